# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Programs as answers: what they return, and that none of them does harm. (What may run: test_program_check.py.)

The hostile programs run behind all walls; `TestSecondWall` takes the first wall away, and the last test the filter of
system calls too. Timeouts are short, and every program is one that would do little if all walls were down.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from fault_checks import wait_until
from program_texts import ENDLESS, FINE, solution

from trl_agents.rewards import ProgramRunner, get_program_reward
from trl_agents.rewards.programs import ProgramResult, check_program
from trl_agents.rewards.sandbox import GRACE_SECONDS, WORKER


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs run in forks")

TIMEOUT = 0.6
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def secret():
    os.environ["TRL_AGENTS_SECRET"] = "canary"  # before the workers start
    yield "canary"
    del os.environ["TRL_AGENTS_SECRET"]


@pytest.fixture(scope="module")
def runner(secret):
    with ProgramRunner(n_workers=1, timeout=TIMEOUT, memory_mb=128) as runner:
        yield runner


@pytest.fixture(scope="module")
def patient():
    """For programs that must come to their end, on however busy a machine."""
    with ProgramRunner(n_workers=2, timeout=20.0) as runner:
        yield runner


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    path.write_text("alive")
    yield path
    assert path.read_text() == "alive"
    assert sorted(tmp_path.iterdir()) == [path]


def assert_unharmed(runner: ProgramRunner) -> None:
    """The worker has no children left and no memory of what ran, and the next program is right."""
    short, runner.timeout = runner.timeout, 20.0  # a busy computer is no harm
    assert runner.run([FINE]) == [ProgramResult(42.0, None, pytest.approx(0, abs=20))]
    runner.timeout = short
    for worker in runner._workers if sys.platform == "linux" else []:
        pid = worker.process.pid
        assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
        assert int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < 200 * 2**20


# -- right programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("money = 23\nbagels = 5\ncost = 3\nresult = money - bagels * cost\nreturn result", 8.0),
        ("return math.sqrt(16) + math.pi * 0", 4.0),  # ReFT's programs do not import math
        ("import math\nreturn math.ceil(7 / 2)", 4.0),
        ("from math import *\nreturn floor(2.5)", None),  # only allowed at the top of a file
        ("from fractions import Fraction\nreturn Fraction(1, 3) + Fraction(1, 6)", 0.5),
        ("from decimal import Decimal, getcontext\ngetcontext().prec = 30\nreturn Decimal('0.1') * 3", 0.3),
        ("import statistics as st\nreturn st.mean([1, 2, 6])", 3.0),
        ("from itertools import combinations\nreturn len(list(combinations(range(5), 2)))", 10.0),
        ("from datetime import datetime\nd = datetime.strptime('2024-03-01', '%Y-%m-%d')\nreturn d.day", 1.0),
        (
            "from datetime import date as day\nd = day(2024, 3, 1)\nreturn f'{d:%d %B}, ' + d.strftime('%a')",
            "01 March, Fri",
        ),
        ("from datetime import date\nd = date.today()\nreturn 0 if d.timetuple() is None else d.year // 2000", 1.0),
        ("from collections import Counter\nreturn Counter('abca').most_common(1)[0][1]", 2.0),
        ("total = 0\nfor i, x in enumerate([1, 2, 3]):\n    total += i * x\nreturn total", 8.0),
        ("n = 0\nwhile n * n < 50:\n    n += 1\nreturn n", 8.0),
        ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nreturn f(10)", 3628800.0),
        ("try:\n    x = 1 / 0\nexcept ZeroDivisionError as error:\n    x = 5\nreturn x", 5.0),
        ("return sum(x ** 2 for x in range(4) if x % 2)", 10.0),
        ("sum = 3 + 4\ninput = 2\nreturn sum * input", 14.0),  # a builtin's name as a variable
        ("print('thinking', 3)\nreturn round(2.567, 2)", 2.57),
        ("price = 3.14159\nreturn f'{price:.2f}'", "3.14"),
        ("options = {'a': 1, 'b': 2}\nreturn [k for k, v in options.items() if v == 2][0]", "b"),
        ("return 10 ** 300", 1e300),
        ("return '€' * 1000", "€" * 1000),
    ],
)
def test_right_programs(patient, body, expected):
    (result,) = patient.run([solution(body)])
    assert result.value == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert result.reason == ("syntax" if expected is None else None)
    assert 0 < result.seconds < 20


def test_order_entry_and_top_level(patient):
    programs = [f"from math import *\nk = {i}\ndef answer():\n    return floor(k + 0.5) * 2" for i in range(40)]
    assert [result.value for result in patient.run(programs, entry="answer")] == [2.0 * i for i in range(40)]
    assert patient.run([]) == []
    with pytest.raises(ValueError, match="no name of a function"):
        patient.run([FINE], entry="a b")


def test_results_that_are_none(patient):
    bodies = {
        "pass": "no result",
        "return None": "no result",
        "return float('nan')": "not a number",
        "return float('-inf')": "not a number",
        "return 1e308 * 10": "not a number",
        "return 10 ** 400": "not a number",
        "return True": "not a number",
        "return 1j": "not a number",
        "return [1]": "not a number",
        "x = [1]\nx.append(x)\nreturn x": "not a number",
        "return (i for i in range(3))": "not a number",
        "return math.sqrt": "not a number",
        "return solution": "not a number",
        "return 'x' * 1001": "too long",
        "return 'x' * 10 ** 7": "too long",
        "return 1 / 0": "error: ZeroDivisionError",
        "return unknown": "error: NameError",
        "raise ValueError('x')": "error: ValueError",
    }
    results = patient.run([solution(body) for body in bodies])
    assert dict(zip(bodies, [result.reason for result in results], strict=True)) == bodies
    assert all(result.value is None for result in results)
    sources = ["", "x = 5", "solution = 5", "def other():\n    return 1", "def solution(x):\n    return 1"]
    reasons = [result.reason for result in patient.run(sources)]
    assert reasons == ["no result"] * 4 + ["error: TypeError"]


def test_sympy_is_there_when_asked_for():
    pytest.importorskip("sympy")
    assert check_program("import sympy") == "forbidden: import sympy"
    with ProgramRunner(1, timeout=30.0, modules=("math", "sympy")) as runner:
        if not runner.seccomp:
            pytest.skip("sympy needs seccomp")
        programs = ["x = sympy.symbols('x')\nreturn sympy.solve(sympy.Eq(2 * x + 4, 10), x)[0]"]
        programs += ["from sympy import Rational\nreturn Rational(1, 4)", "return sympy.symbols('x')"]
        # sympy evaluates text as Python: past the first wall, and into the second
        programs += ['return sympy.sympify(\'__import__("os").unlink("/nothing")\')']
        results = runner.run([solution(program) for program in programs])
    assert [result.value for result in results] == [3.0, 0.25, None, None]
    assert [result.reason for result in results[2:]] == ["not a number", "error: PermissionError"]


# -- hostile programs -------------------------------------------------------------------------------------------------

HOSTILE = {
    "endless": ("while True:\n    pass", "timeout"),
    "endless_generator": ("import itertools\nreturn sum(itertools.count())", "timeout"),
    "catch_all_in_a_loop": ("while True:\n    try:\n        while True: pass\n    except: pass", "timeout"),
    "catch_base_exception": ("try:\n    return 1\nexcept BaseException:\n    pass", "forbidden: BaseException"),
    "allocate": ("x = []\nwhile True:\n    x.append('a' * 10 ** 6 + str(len(x)))", "memory timeout"),
    "allocate_and_catch": (
        "x = ['a' * 1000]\nwhile True:\n    try:\n        x = x + x\n    except MemoryError:\n        pass",
        "forbidden: MemoryError",
    ),
    "power_tower": ("return 9 ** 9 ** 9", "timeout memory"),
    "long_text": ("return len('a' * 10 ** 12)", "memory"),
    "long_list": ("return len([0] * 10 ** 12)", "memory"),
    "long_range": ("return len(list(range(10 ** 12)))", "memory timeout"),
    "doubling": ("x = 'a'\nfor _ in range(60):\n    x += x\nreturn len(x)", "memory"),
    "comprehension_bomb": (
        "return len([(a, b, c) for a in range(9999) for b in range(9999) for c in 'abc'])",
        "memory timeout",
    ),
    "percent_width": ("return '%999999999999d' % 1", "error: memory"),
    "factorial": ("return math.factorial(10 ** 8)", "timeout memory"),
    "decimal_precision": (
        "from decimal import Decimal, getcontext\ngetcontext().prec = 10 ** 9\nreturn Decimal(1) / 3",
        "memory timeout",
    ),
    "long_integer_as_text": ("return str(10 ** 100000)", "error: ValueError"),
    "long_literal": ("return " + "9" * 5000, "syntax"),
    "recursion": ("return solution()", "error: RecursionError"),
    "lambda_recursion": ("f = lambda n: f(n + 1)\nreturn f(0)", "error: RecursionError"),
    "recursive_repr": ("x = []\nfor _ in range(10 ** 5):\n    x = [x]\nreturn str(x)", "error: RecursionError"),
    "deep_generators": (  # past Python's own count of recursion: the stack is what ends them
        "x = iter([1])\nfor _ in range(10 ** 5):\n    x = (y for y in x)\nreturn next(x)",
        "crash error: timeout",
    ),
    "deep_hash": ("x = ()\nfor _ in range(10 ** 6):\n    x = (x,)\nreturn len({x: 1})", "crash timeout memory"),
    "endless_at_the_end": ("try:\n    return 1\nfinally:\n    while True:\n        pass", "timeout"),
    "endless_when_thrown_away": (
        "def g():\n    try:\n        yield 1\n    finally:\n        while True:\n            pass\n"
        "x = g()\nnext(x)\nreturn 1",
        "timeout",
    ),
    "folded_constant": ("return len(('a' * 4096) * 4096 * 4096)", "memory"),
    "wide_star": ("return '%*d' % (4 * 10 ** 9, 1)", "memory error:"),
    "styled_letters": ("return 𝐞𝐯𝐚𝐥('1')", "forbidden: eval"),
    "late_name": ("def f(open=1):\n    pass\nreturn open('/etc/passwd')", "error: NameError"),
    "fork_bomb": ("import os\nwhile True:\n    os.fork()", "forbidden: import os"),
    "system": ("import os\nos.system('echo > CANARY')", "forbidden: import os"),
    "subprocess": ("import subprocess\nsubprocess.run(['rm', 'CANARY'])", "forbidden: import subprocess"),
    "read_passwd": ("return len(open('/etc/passwd').read())", "forbidden: .read"),
    "write": ("print('x', file=open('CANARY', 'w'))", "forbidden: open"),
    "environment": ("from os import environ\nreturn environ['TRL_AGENTS_SECRET']", "forbidden: import os"),
    "socket": ("import socket\nsocket.socket()", "forbidden: import socket"),
    "os_exit": ("import os\nos._exit(0)", "forbidden: import os"),
    "dunder_import": ("x = __import__('os')\nreturn 1", "forbidden: __import__"),
    "importlib": ("import importlib\nreturn importlib.import_module('os').getpid()", "forbidden: import importlib"),
    "import_star": ("from os import *\nreturn getpid()", "forbidden: import os"),
    "subclasses": ("return len(().__class__.__bases__[0].__subclasses__())", "forbidden: .__"),
    "format_walk": ("return '{0.__class__}'.format(1)", "forbidden: .format"),
    "format_map_walk": ("f = '{x.__init__.__globals__}'.format_map\nreturn f({'x': 1})", "forbidden: .format_map"),
    "fstring_walk": ("return f'{(lambda: 0).__globals__}'", "forbidden: .__globals__"),
    "fstring_width": ("return len(f'{1:>{10 ** 10}}')", "forbidden: format spec"),
    "frame_walk": ("g = (g.gi_frame for _ in [1])\nreturn g", "forbidden: .gi_frame"),
    "traceback_walk": (
        "try:\n    1 / 0\nexcept Exception as e:\n    return e.__traceback__",
        "forbidden: .__traceback__",
    ),
    "alarm": ("import signal\nsignal.alarm(1)", "forbidden: import signal"),
    "ignore_sigterm": (
        "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass",
        "forbidden: import signal",
    ),
    "exit": ("exit()", "forbidden: exit"),
    "system_exit": ("raise SystemExit", "forbidden: SystemExit"),
    "keyboard_interrupt": ("raise KeyboardInterrupt", "forbidden: KeyboardInterrupt"),
    "threads": ("import threading\nthreading.Thread(target=print).start()", "forbidden: import threading"),
    "sleep": ("import time\ntime.sleep(100)", "forbidden: import time"),
    "monkeypatch": ("math.sqrt = lambda x: 0\nreturn None", "forbidden: .sqrt ="),
    "hostile_name": ("__name__ = '__main__'\nreturn __name__", "forbidden: __name__"),
    "hostile_repr": ("class A:\n    def __repr__(self): return '1'\nreturn A()", "forbidden: classdef"),
    "nesting": ("return " + "-" * 5000 + "1", "too deep"),
    "null_byte": ("return 1\0", "syntax"),
    "too_long": ("x = 1\n" * 3000, "too long"),
    "output_flood": ("while True:\n    print('flood' * 1000)", "timeout"),
    "text_flood": ("return 'flood' * 10 ** 6", "too long"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(runner, canary, name):
    body, reasons = HOSTILE[name]
    source = solution(body.replace("CANARY", str(canary)))
    (result,) = runner.run([source])
    allowed = [reasons] if ":" in reasons or reasons.startswith("too") else reasons.split()
    if reasons in ("error: memory", "memory error:", "crash error: timeout"):
        allowed = reasons.split()
    assert any(result.reason.startswith(one) for one in allowed), result
    assert result.value is None and result.seconds < TIMEOUT + 5
    assert_unharmed(runner)


def test_hostile_programs_earn_nothing(canary):
    sources = [solution(body.replace("CANARY", str(canary))) for body, _ in HOSTILE.values()]
    with ProgramRunner(n_workers=4, timeout=0.3, memory_mb=64) as runner:
        rewards = get_program_reward(runner=runner)(sources, answer=["42"] * len(sources))
        assert rewards == [0.0] * len(sources)
        assert_unharmed(runner)


# -- the second wall: the first one is not there ----------------------------------------------------------------------

# How a program that got past the check would reach `os`.
ESCAPE = """
found = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == "_wrap_close"]
os = found[0].__init__.__globals__
sys, real = os["sys"], os["__builtins__"]
"""


def escaped(runner: ProgramRunner, body: str) -> ProgramResult:
    return runner._execute([ESCAPE + solution(body)], "solution")[0]


class TestSecondWall:
    @pytest.fixture(autouse=True)
    def only_where_system_calls_are_filtered(self, runner):
        if not runner.seccomp:
            pytest.skip("no seccomp here")

    def test_escape_does_escape(self, runner):
        result = escaped(runner, "return os['getpid']()")  # else the tests below would prove nothing
        assert result.reason is None and result.value != os.getpid()

    @pytest.mark.parametrize(
        "call",
        [
            "real['open']('/etc/passwd')",
            "real['open']('CANARY', 'w')",
            "os['open']('CANARY', 1)",
            "os['unlink']('CANARY')",
            "os['rename']('CANARY', 'CANARY2')",
            "os['mkdir']('CANARY2')",
            "os['chmod']('CANARY', 0)",
            "os['listdir']('/')",
            "os['stat']('/')",
            "os['readlink']('/proc/self/cwd')",
            "os['chdir']('/tmp')",
            "os['fork']()",
            "os['execv']('/bin/true', ['true'])",
            "os['kill'](os['getppid'](), 0)",
            "os['kill'](os['getpid'](), 15)",
            "os['setsid']()",
            "os['pipe']()",
            "os['dup'](0)",
            "os['nice'](-1)",
            "sys.modules['signal'].setitimer(0, 1)",
        ],
    )
    def test_system_calls(self, runner, canary, call):
        result = escaped(runner, f"return {call.replace('CANARY', str(canary))}")
        assert result == ProgramResult(None, "error: PermissionError", result.seconds) or "itimer" in call
        assert result.value is None and result.reason.startswith("error: ")
        assert_unharmed(runner)

    def test_os_system(self, runner, canary):
        result = escaped(runner, f"return os['system']('echo dead > {canary}')")
        assert result.value != 0.0
        assert_unharmed(runner)

    def test_native_calls(self, runner):
        # socket(AF_INET, SOCK_STREAM), clone, and getppid, by number: ctypes goes past Python's own checks
        numbers = {"x86_64": [41, 56, 110], "aarch64": [198, 220, 173]}[os.uname().machine]
        for number in numbers:
            body = f"return sys.modules['ctypes'].CDLL(None).syscall({number}, 2, 1, 0)"
            assert escaped(runner, body).value == -1.0
        assert_unharmed(runner)

    def test_threads(self, runner):
        result = escaped(runner, "return real['__import__']('_thread').start_new_thread(print, ())")
        assert result.reason == "error: RuntimeError"

    def test_limits_cannot_be_raised(self, runner):
        body = "r = sys.modules['resource']\nreturn r.setrlimit(r.RLIMIT_NOFILE, (100, 100))"
        assert escaped(runner, body).reason.startswith("error: ")

    def test_environment_is_empty(self, runner, secret):
        result = escaped(runner, "return str(dict(os['environ']))")
        assert isinstance(result.value, str) and secret not in result.value and "PATH=" not in result.value

    def test_importer_and_builtins_are_reduced(self, runner):
        for body, reason in [
            ("import os", "error: ImportError"),
            ("import time\nreturn time.sleep(9)", "error: AttributeError"),
            ("return open('x')", "error: NameError"),
            ("return getattr(1, 'real')", "error: NameError"),
            ("import statistics\nreturn statistics.sys", "error: AttributeError"),
        ]:
            assert runner._execute([solution(body)], "solution")[0].reason == reason

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("def solution():\n    raise os['sys'].exit()", "error: SystemExit"),
            ("def solution():\n    raise real['KeyboardInterrupt']", "error: KeyboardInterrupt"),
            ("def solution():\n    os['_exit'](0)", "crash"),
            ("def solution():\n    os['close'](0)\n    while True: pass", "crash"),
            ("def solution():\n    os['write'](0, b'garbage')\n    os['_exit'](0)", "crash"),
            ("def solution():\n    os['write'](0, b'nnan')\n    os['_exit'](0)", "not a number"),
            ("def solution():\n    os['write'](0, b'n' + b'[' * 900)\n    os['_exit'](0)", "crash"),
            ("def solution():\n    while True: os['write'](0, b'tflood' * 999)", "too long"),
            ("def solution():\n    sys.modules['ctypes'].string_at(0)", "crash"),
            (
                "class A:\n    def __float__(self): return 1 / 0\ndef solution(): return A()",
                "error: ZeroDivisionError",
            ),
            ("class A(str):\n    def encode(self, *a): return 5\ndef solution(): return A('x')", "error: TypeError"),
            ("class A:\n    def __float__(self):\n        while 1: pass\ndef solution(): return A()", "timeout"),
            ("class A(real['BaseException']): pass\nA.__name__ = 'x' * 999\ndef solution(): raise A", "error: xxx"),
            ("def solution():\n    sys.setrecursionlimit(10**9)\n    return solution()", "crash memory error timeout"),
            (
                "def solution():\n    signal = sys.modules['signal']\n    signal.signal(15, signal.SIG_IGN)\n"
                "    signal.signal(24, signal.SIG_IGN)\n    while True: pass",
                "timeout",
            ),
        ],
    )
    def test_answers_of_a_hostile_process(self, runner, source, reason):
        (result,) = runner._execute([ESCAPE + source], "solution")
        allowed = reason.split() if reason.startswith("crash ") else [reason]
        assert result.value is None and any(result.reason.startswith(one) for one in allowed), result
        assert len(result.reason) <= 60
        assert_unharmed(runner)

    def test_nothing_leaks_into_the_next_program(self, runner):
        body = "math.sqrt = lambda x: 0\nreal['abs'] = real['len'] = None\nsys.modules['math'].floor = None\nreturn 1"
        assert escaped(runner, body).value == 1.0
        assert runner.run([solution("return math.sqrt(9) + abs(-1) + math.floor(2.5)")])[0].value == 6.0


@pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits")
def test_descriptors_are_closed_without_seccomp(canary):
    """What is left where system calls cannot be filtered."""
    script = f"""
    import os, socket, sys
    sys.path.insert(0, {str(WORKER.parent)!r})
    import _program_worker as worker
    walls = worker.Walls(256)
    walls.measure()
    walls.seccomp = False
    def attempt(descriptor):
        walls.raise_(1.0)
        failed = 0
        for open_one in (socket.socket, os.pipe, lambda: open({str(canary)!r}, "w"), lambda: os.open("/", 0)):
            try:
                open_one()
            except OSError:
                failed += 1
        os.write(descriptor, str(failed).encode())
        os._exit(0)
    print(worker._outcome(attempt, 20.0))
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "(b'4', False)", done.stderr


# -- the pool ---------------------------------------------------------------------------------------------------------


def test_endless_programs_share_the_workers():
    with ProgramRunner(n_workers=4, timeout=0.5) as runner:
        runner.run([FINE] * 4)  # warm
        started = time.monotonic()
        results = runner.run([ENDLESS] * 12 + [FINE])
        assert time.monotonic() - started < 6  # one after the other: 6, and each time a new process
    assert [result.reason for result in results] == ["timeout"] * 12 + [None]
    assert all(0.5 <= result.seconds < 0.5 + GRACE_SECONDS for result in results[:12])


def test_close_ends_the_processes(runner):
    with ProgramRunner(n_workers=2, timeout=5.0) as own:
        own.run([FINE] * 4)
        processes = [worker.process for worker in own._workers]
        assert len(processes) == 2 and all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)
    own.close()
    assert own.run([FINE])[0].value == 42.0  # opens again
    (process,) = [worker.process for worker in own._workers]
    del own
    assert process.poll() is not None


def test_dead_workers_are_replaced():
    with ProgramRunner(n_workers=1, timeout=5.0) as runner:
        for _ in range(2):
            assert runner.run([FINE])[0].value == 42.0
            runner._workers[0].process.kill()
            runner._workers[0].process.wait()
        assert [result.value for result in runner.run([FINE] * 3)] == [42.0] * 3

        def kill_soon():
            assert wait_until(lambda: runner._workers[0].program == ENDLESS)
            time.sleep(0.1)  # until it has arrived: what was never received is asked again
            runner._workers[0].process.kill()

        thread = threading.Thread(target=kill_soon)
        thread.start()
        results = runner.run([ENDLESS, FINE])  # dies with a program under way
        thread.join()
        assert [result.reason for result in results] == ["crash", None]


def test_a_worker_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("trl_agents.rewards.sandbox.GRACE_SECONDS", 0.5)
    with ProgramRunner(n_workers=1, timeout=0.3) as runner:
        assert runner.run([FINE])[0].value == 42.0
        os.kill(runner._workers[0].process.pid, 19)  # SIGSTOP
        assert [result.reason for result in runner.run([FINE, ENDLESS])] == ["timeout", "timeout"]


def test_a_worker_that_does_not_start(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr("trl_agents.rewards.sandbox.WORKER", broken)
    with ProgramRunner(n_workers=1) as runner, pytest.raises(RuntimeError, match="does not start"):
        runner.run([FINE])


def test_interrupted_runs_do_not_shift_answers(monkeypatch):
    with ProgramRunner(n_workers=1, timeout=5.0) as runner:
        runner.run([FINE])

        def interrupt(workers):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("trl_agents.rewards.sandbox._ready", interrupt)
            runner.run([solution("return 1")])
        assert runner.run([FINE])[0].value == 42.0


def test_copies_and_pickles(patient):
    reward = get_program_reward(partial=0.0, runner=patient)
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin.__name__ == reward.__name__ == "program_reward_partial_0"
        assert twin.runner is not patient and twin.runner.timeout == patient.timeout
        assert twin([FINE], ["42"]) == [1.0]
        twin.runner.close()
    assert reward([FINE], ["42"]) == [1.0]


def test_threads_take_turns(patient):
    values = {}

    def work(n):
        values[n] = [result.value for result in patient.run([solution(f"return {n} + {i}") for i in range(5)])]

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {100 * n: [100.0 * n + i for i in range(5)] for n in range(4)}


def test_forks_and_the_interpreter_s_end():
    """A forked process has a pool of its own, though a thread held the parent's; nothing outlives the interpreter."""
    script = f"""
    import os, threading, time
    from trl_agents.rewards import ProgramRunner
    runner = ProgramRunner(n_workers=1, timeout=2.0)
    assert runner.run([{FINE!r}])[0].value == 42.0
    thread = threading.Thread(target=runner.run, args=([{ENDLESS!r}],))
    thread.start()
    time.sleep(0.3)
    child = os.fork()
    if child == 0:
        ok = runner.run([{FINE!r}])[0].value == 42.0
        runner.close()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert runner.run([{FINE!r}])[0].value == 42.0
    print(runner._workers[0].process.pid)
    """
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_workers": 0},
        {"timeout": 0},
        {"timeout": math.inf},
        {"memory_mb": 0},
        {"max_output": 10**6},
        {"modules": ("os",)},
        {"modules": "math"},
    ],
)
def test_runner_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ProgramRunner(**settings)
