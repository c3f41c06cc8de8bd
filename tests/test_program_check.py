# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The first wall around programs as answers: what may run at all."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import warnings

import pytest
from program_texts import FINE, solution

from trl_agents.rewards import program_check
from trl_agents.rewards.program_check import MAX_SOURCE
from trl_agents.rewards.programs import FAILURES, check_program, program_of


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs run in forks")

FORBIDDEN = {
    "import os": "import os",
    "import math, os": "import os",
    "import os.path as math": "import os.path",
    "from os import *": "import os",
    "from . import x": "import None",
    "from math import __loader__": "__loader__",
    "from statistics import sys": "import sys",
    "from collections import namedtuple": "import namedtuple",
    "import statistics\nstatistics.sys": ".sys",
    "__import__('os')": "__import__",
    "x = __builtins__": "__builtins__",
    "__name__ = 'x'": "__name__",
    "def __f(): pass": "__f",
    "lambda __x: 1": "__x",
    "f(__x=1)": "__x",
    "import math as __x": "__x",
    "open('x')": "open",
    "eval('1')": "eval",
    "exec('1')": "exec",
    "compile('1', '', 'exec')": "compile",
    "getattr(1, 'real')": "getattr",
    "setattr": "setattr",
    "globals()": "globals",
    "type(1)": "type",
    "object()": "object",
    "input()": "input",
    "exit()": "exit",
    "quit()": "quit",
    "breakpoint()": "breakpoint",
    "BaseException": "BaseException",
    "raise SystemExit": "SystemExit",
    "f(eval=eval)": "eval",
    "().__class__": ".__class__",
    "x._y": "._y",
    "().__ｃlass__": ".__class__",  # a full-width c, which Python reads as ASCII
    "f'{().__class__}'": ".__class__",
    "'{0.__class__}'.format(1)": ".format",
    "'{x}'.format_map({})": ".format_map",
    "int.mro()": ".mro",
    "x.gi_frame": ".gi_frame",
    "x.unheard_of": ".unheard_of",
    "f'{1:{2}}'": "format spec",
    "f'{1:>9999999999}'": "format spec",
    "math.sqrt = 1": ".sqrt =",
    "for math.pi in [3]: pass": ".pi =",
    "class A: pass": "classdef",
    "with x: pass": "with",
    "match x:\n    case int(real=y): pass": "match",
    "del print": "delete",
    "def f():\n    global x": "global",
    "async def f(): pass": "asyncfunctiondef",
    "try:\n    pass\nexcept* ValueError:\n    pass": "trystar",
}


@pytest.mark.parametrize("source", FORBIDDEN)
def test_check_forbids(source):
    assert check_program(source) == f"forbidden: {FORBIDDEN[source]}"


@pytest.mark.parametrize(
    "source",
    [
        "x: int = 1\nx += 2\nassert x == 3, 'no'",
        "from math import *\nimport math as m, fractions\nm.pi, math.sqrt",
        "type = 'adult'\nid = 3\ntype, id",
        "@functools.lru_cache(None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
        "def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n    yield from [g()]",
        "f'{x:.2f} {x!r} {x:>10,} {day:%Y-%m-%d}'",
        "a, *_ = sorted({1: 2}.items(), key=lambda pair: -pair[1])[::-1]",
        "while (n := n + 1) < 5:\n    if n: continue\n    break\nelse:\n    pass",
        "'a,b'.split(',')[0].upper().strip().replace('A', 'b')",
    ],
)
def test_check_allows(source):
    assert check_program(source) is None


@pytest.mark.parametrize(
    ("source", "reasons"),
    [
        ("x" * (MAX_SOURCE + 1), {"too long"}),
        ("def solution(", {"syntax"}),
        ("x = 1\0", {"syntax"}),
        ("x = '\ud800'", {"syntax"}),
        ("1" * 5000, {"syntax"}),  # more digits than `int` reads
        ("(" * 5000 + ")" * 5000, {"syntax", "too deep"}),
        ("(" * 150 + ")" * 150, {None, "too deep"}),  # brackets alone make no tree
        ("[" * 150 + "]" * 150, {"too deep"}),
        ("-" * 9000 + "1", {"too deep"}),
        ("not " * 2000 + "1", {"too deep"}),
        ("1+" * 4000 + "1", {"too deep"}),
        ("x" + "[0]" * 3000, {"too deep"}),
        ("x" + ".real" * 1900, {"too deep"}),
        ("f" + "()" * 4000, {"too deep"}),
        ("2**" * 3000 + "1", {"too deep"}),
        ("lambda:" * 1000 + "1", {"too deep"}),
        ("1 if 1 else " * 800 + "1", {"too deep"}),
        ("if 1: pass\n" + "elif 1: pass\n" * 700, {"too deep"}),
        ("".join(" " * i + "if 1:\n" for i in range(99)) + " " * 99 + "pass", {"too deep"}),
        ("f'{" * 500, {"syntax", "too deep"}),
    ],
)
def test_check_survives(source, reasons):
    assert check_program(source) in reasons


def test_check_is_quiet():
    """What Python warns of in a model's text is nobody's business, and no syntax error where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_program('def solution():\n    return "\\d" if 1 is 1 else 2') is None


def test_check_in_threads_leaves_the_warnings_as_they_are():
    """Each thread puts back the filters that it found: of two at once, the later one those of the earlier."""
    source, interval = solution("x = 1\n" * 300), sys.getswitchinterval()
    threads = [threading.Thread(target=lambda: [check_program(source) for _ in range(20)]) for _ in range(4)]
    with warnings.catch_warnings():
        before = list(warnings.filters)
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert warnings.filters == before


def test_check_in_a_fork_while_a_thread_checks():
    with program_check._FILTERS:
        child = os.fork()
        if child == 0:
            os._exit(0 if check_program(FINE) is None else 1)
        deadline = time.monotonic() + 20
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_check_never_raises():
    rng = random.Random(0)
    pieces = 'def solution():\n |return|(|)|[|]|{|}|\'|"""|\\|\n|\n    |\t|__class__|.|:|=|f\'{|\0|é|𝐱|\ud800|1e9|```'
    pieces = [*pieces.split("|"), "|"]
    for _ in range(1500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 30)))
        reason = check_program(text)
        assert reason is None or reason.partition(":")[0] in FAILURES
        program_of(text, rng.choice([None, "def solution():\n", text]))
