# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The first wall around a model's program: which Python it may be written in, read off its syntax tree. Nothing runs.

Everything is an allow-list (kinds of syntax, builtins, modules and what they export, attributes), so what a later
Python adds is forbidden until somebody lists it. `sandbox.py` is the second wall and does not trust this one.
"""

from __future__ import annotations

import ast
import builtins
import collections
import datetime
import decimal
import fractions
import functools
import itertools
import math
import os
import re
import statistics
import threading
import warnings
from collections.abc import Collection, Iterator


MAX_SOURCE = 10_000  # characters; ReFT's programs end at 700 tokens
MAX_DEPTH = 100  # of the syntax tree: far below where Python's own recursion gives up


def _public(module) -> tuple[str, ...]:
    """What a module exports; never what it imported itself (`statistics.sys` would be a way out)."""
    return tuple(getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")])


# Module -> the names a program sees of it; None (sympy is not imported here): whatever it exports.
MODULES: dict[str, tuple[str, ...] | None] = {
    "math": _public(math),
    "fractions": _public(fractions),
    "decimal": _public(decimal),
    "statistics": _public(statistics),
    "itertools": _public(itertools),
    "functools": ("cache", "cmp_to_key", "lru_cache", "partial", "reduce"),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),  # not namedtuple: it runs text as code
    "datetime": ("MAXYEAR", "MINYEAR", "UTC", "date", "datetime", "time", "timedelta", "timezone"),
    "sympy": None,
}
DEFAULT_MODULES = tuple(name for name, exports in MODULES.items() if exports is not None)

# No way to attributes by name, to types of types, to files, code or the interpreter; no exception that ends a process.
BUILTINS = frozenset(
    "abs all any bin bool chr complex dict divmod enumerate filter float frozenset hex int isinstance iter len list "
    "map max min next oct ord pow print range repr reversed round set slice sorted str sum tuple zip "
    "ArithmeticError AssertionError AttributeError Exception IndexError KeyError LookupError NameError "
    "NotImplementedError OverflowError RecursionError RuntimeError StopIteration TypeError ValueError "
    "ZeroDivisionError".split()
)
_BARRED = {*dir(builtins), "copyright", "credits", "exit", "help", "license", "quit"} - BUILTINS

_VALUES = (
    *(str, int, float, complex, list, dict, set, frozenset, tuple, range, slice),
    *(fractions.Fraction, decimal.Decimal, decimal.Context, statistics.NormalDist),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    *(collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque),
    *(itertools.chain, functools.lru_cache(lambda: None), ValueError()),
)
# `format` reads attributes that its text names, so no tree shows them.
_UNSEEN = frozenset({"format", "format_map", "mro", "add_note", "with_traceback"})
_ATTRIBUTES = {name for value in _VALUES for name in dir(value) if not name.startswith("_")} | {
    name for exports in MODULES.values() for name in exports or ()
}
_SETTABLE = frozenset({"prec", "rounding"})  # of decimal's context
_FRAMES = re.compile(r"(ag|co|cr|f|func|gi|tb)_")  # frames, code and tracebacks, where attributes are not listed

_NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.keyword, ast.Return, ast.Lambda),
    *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.Expr, ast.Pass, ast.Nonlocal),
    *(ast.For, ast.While, ast.If, ast.Break, ast.Continue, ast.Try, ast.ExceptHandler, ast.Raise, ast.Assert),
    *(ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Call, ast.Starred, ast.Yield, ast.YieldFrom),
    *(ast.Constant, ast.JoinedStr, ast.FormattedValue, ast.Name, ast.Attribute, ast.Subscript, ast.Slice),
    *(ast.List, ast.Tuple, ast.Dict, ast.Set),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
    *(ast.Import, ast.ImportFrom, ast.alias),
    *(ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)
_SPEC = re.compile(r"[^{}\d]{0,20}\d{0,3}[^{}\d]{0,20}\d{0,3}[^{}\d]{0,20}")  # no width that fills the memory


def check_program(source: str, modules: Collection[str] = DEFAULT_MODULES) -> str | None:
    """
    Why a program must not run, read off its syntax tree.

    Allowed are arithmetic, assignments, functions, lambdas and generators, loops, comprehensions, conditions, `try`,
    literals, f-strings with plain format specs, a list of builtins, imports from `modules`, and the public attributes
    of Python's own values and of those modules. Everything else is forbidden: names that begin with two underscores,
    attributes that begin with one, `str.format` (it walks attributes named in a string), setting an attribute (but
    `prec` and `rounding` of decimal's context), `class`, `with`, `match`, `del`, `global`, `async`, and builtins such
    as `open`, `eval`, `getattr` or `type` unless the program gives the name a value of its own.

    Args:
        source (`str`):
            The program.
        modules (`Collection[str]`, *optional*, defaults to all but sympy):
            What the program may import, out of [`MODULES`].

    Returns:
        `str` or `None`: "too long", "too deep", "syntax", "forbidden: <what>", or None where the program may run.
    """
    if len(source) > MAX_SOURCE:
        return "too long"
    try:
        tree = parse_quietly(source)
    except (RecursionError, MemoryError):
        return "too deep"
    except (SyntaxError, ValueError):  # ValueError: null bytes, lone surrogates
        return "syntax"
    nodes: list[ast.AST] = []
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):  # not ast.walk: the depth counts, and recursion is what a hostile tree is after
        nodes += level
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            break
    else:
        return "too deep"
    bound = {name for node in nodes if not isinstance(node, ast.keyword) for name in _bound_names(node)}
    for node in nodes:
        if (fault := _fault(node, bound, modules)) is not None:
            return f"forbidden: {fault[:40]}"
    return None


def parse_quietly(source: str) -> ast.Module:
    """`ast.parse` without Python's warnings of what a model wrote (an unknown escape, `1 is 1`)."""
    # The filters are the process's, and each thread puts back what it found: two at once, and all warnings may be off
    # for good.
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _unlock() -> None:
    """In a forked process: the thread that held the lock is not here."""
    global _FILTERS
    _FILTERS = threading.Lock()


_unlock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def _bound_names(node: ast.AST) -> Iterator[str]:
    """The names that a node gives a value."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name:
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name
    elif isinstance(node, ast.keyword) and node.arg:
        yield node.arg
    elif isinstance(node, ast.Nonlocal):
        yield from node.names


def _fault(node: ast.AST, bound: Collection[str], modules: Collection[str]) -> str | None:
    """What is wrong with one node."""
    if not isinstance(node, _NODES):
        return type(node).__name__.lower()
    for name in _bound_names(node):
        if name.startswith("__"):
            return name
    match node:
        case ast.Name(id=name):
            if name.startswith("__") or (name in _BARRED and name not in bound):
                return name
        case ast.Attribute(attr=name, ctx=context):
            known = name in _ATTRIBUTES or ("sympy" in modules and not _FRAMES.match(name))
            if name.startswith("_") or name in _UNSEEN or not known:
                return f".{name}"
            if not isinstance(context, ast.Load) and name not in _SETTABLE:
                return f".{name} ="
        case ast.Import(names=aliases):
            for alias in aliases:
                if alias.name not in modules:
                    return f"import {alias.name}"
        case ast.ImportFrom(module=module, names=aliases, level=level):
            if level or module not in modules:
                return f"import {module}"
            exports = MODULES[module]
            for alias in aliases:
                if alias.name.startswith("_") or (exports is not None and alias.name not in (*exports, "*")):
                    return f"import {alias.name}"
        case ast.FormattedValue(format_spec=ast.JoinedStr(values=parts)):
            text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
            if not _SPEC.fullmatch(text):
                return "format spec"
    return None
