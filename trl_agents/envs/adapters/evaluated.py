# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Answers that a grader evaluates as Python, with `eval` or sympy's `parse_expr`, as some of reasoning-gym's do.

What a model wrote is data: it must neither run a program (`__import__("os").system(...)`) nor compute what never ends,
in C and so beyond the reach of any timeout (`9**9**9**9`).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any


UNREADABLE = "?"  # what a grader is given instead

_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
_MOST_CHARACTERS, _MOST_BITS = 2000, 10_000
_HUGE_FLOAT = re.compile(r"[eE][+-]?[\d_]{4}")
# Where there is a "!", `1 != f()` and `f"{f()!r}"` are Python, and `5! != f()` is to sympy: nothing that could run
_BESIDE_FACTORIALS = re.compile(r"""\(|!=|[fF][rR]?["']|[rR][fF]["']""")
_GROWING = {"exp", "sinh", "cosh"}
_FUNCTIONS = {"sqrt", "log", "ln", "Abs", "abs", "Rational", "sign", *_GROWING} | {
    f"{prefix}{name}{suffix}"
    for prefix in ("", "a")
    for name in ("sin", "cos", "tan", "sec", "csc", "cot")
    for suffix in ("", "h")
}


def evaluates(grader: Callable[..., Any]) -> bool:
    """Whether a grader's source evaluates answers; also where it cannot be read."""
    try:
        return _EVALUATES.search(inspect.getsource(grader)) is not None
    except (OSError, TypeError):
        return True


def harmless(answer: str) -> bool:
    """Whether `answer` is no Python, or numbers, symbols, usual functions and lists of them, of moderate size."""
    if len(answer) > _MOST_CHARACTERS or _HUGE_FLOAT.search(answer):
        return False
    if "!" in answer and _BESIDE_FACTORIALS.search(answer):
        return False
    try:
        # To sympy 5! is a call
        node = ast.parse(answer.replace("!", " ").strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return True  # what is no Python is evaluated by nobody
    except (RecursionError, MemoryError):
        return False
    try:
        return "!" not in answer and _is_plain(node)
    except RecursionError:
        return False


def _is_plain(node: ast.expr) -> bool:
    if isinstance(node, (ast.List, ast.Tuple)):
        return all(map(_is_plain, node.elts))
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bool, type(None))):
        return True
    return _bits(node) <= _MOST_BITS


def _bits(node: ast.expr) -> float:
    """A bound for the size of the value, in bits; infinite for what is not allowed."""
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value.bit_length() + 1
        case ast.Constant(value=float() | complex()):
            return 64
        case ast.Name(id=name) if not name.startswith("_"):
            return 1
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return _bits(node.operand)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()):
            return _bits(node.left) + _bits(node.right)
        case ast.BinOp(op=ast.Pow()):
            return _bits(node.left) * _power_of_2(_bits(node.right))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            bits = sum(map(_bits, node.args))
            if name not in _GROWING:
                return max(bits, 64)
            # exp(3*x**2 + 1) stays as it is, but exp(exp(exp(9 + 0*x))) may not
            return _power_of_2(bits) if _holds(node, ast.Call) or not _holds(node, ast.Name) else bits + 64
    return float("inf")


def _holds(call: ast.Call, kind: type[ast.expr]) -> bool:
    return any(isinstance(node, kind) for argument in call.args for node in ast.walk(argument))


def _power_of_2(bits: float) -> float:
    return 2.0**bits if bits < 64 else float("inf")
