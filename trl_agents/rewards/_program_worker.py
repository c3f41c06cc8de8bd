# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The process in which models' programs run. `sandbox.py` starts this file as a script, `python -I -S`, with no
environment; it imports the standard library only, and nothing of this package.

It warms up once, then answers each line on its stdin (a JSON request) with a line on its stdout (a JSON reply). Every
program runs in a fork of its own: what it changes dies with it. Before its first statement the fork is left with one
file descriptor, the pipe that carries its answer, and behind the limits of [`Walls`].
"""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import math
import os
import select
import signal
import sys
import time
import types


# Linux, <linux/prctl.h>, <linux/seccomp.h>, <linux/audit.h>
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_KILL_PROCESS, SECCOMP_ALLOW, SECCOMP_EPERM = 0x80000000, 0x7FFF0000, 0x00050000 | 1

# Machine -> its number, and the system calls that computing needs: memory, clocks, signals' own bookkeeping, locks,
# randomness, `write` (there is one descriptor to write to) and the exit. All others answer EPERM.
SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,
        # write close fstat mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn sched_yield mremap
        # madvise nanosleep getpid exit gettimeofday sigaltstack time futex restart_syscall clock_gettime clock_getres
        # clock_nanosleep exit_group getrandom membarrier rseq
        (1, 3, 5, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28)
        + (35, 39, 60, 96, 131, 201, 202, 219, 228, 229, 230, 231, 318, 324, 334),
    ),
    "aarch64": (
        0xC00000B7,
        # the same, but `time`, which does not exist there
        (64, 57, 80, 222, 226, 215, 214, 134, 135, 139, 124, 216, 233)
        + (101, 172, 93, 169, 132, 98, 128, 113, 114, 115, 94, 278, 283, 293),
    ),
}


# What `datetime` imports while a program runs, for `strftime`, `today` and `timetuple`. The first wall lets no program
# import it.
IMPORTED_LATE = {"time": ["strftime", "struct_time", "time"]}


class Walls:
    """
    What the fork gives up before it runs a program. `seccomp` says whether this system filters system calls.

    Args:
        memory_mb (`int`):
            Memory a program may take beyond what the warm process holds.
    """

    def __init__(self, memory_mb: int):
        import resource

        self.resource, self.memory, self.parent = resource, memory_mb * 2**20, os.getpid()
        self.libc = self.filter = None
        if sys.platform == "linux":
            self._prepare_filter()
        self.seccomp = self.filter is not None and _outcome(lambda _: self._filter(), 5.0)[0] == b"r"

    def raise_(self, seconds: float) -> None:
        """Nothing here may fail silently where it is known to work: an exception ends the fork unrun."""
        limit, resource = self._limit, self.resource
        if self.libc is not None:
            self.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.parent:  # it died before we asked to go with it
                os._exit(0)
        cpu = math.ceil(seconds) + 1  # for when nobody is left to kill us; the caller's clock comes first
        limit(resource.RLIMIT_CPU, cpu)
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_FSIZE, 0)
        limit(resource.RLIMIT_NOFILE, 1)  # descriptor 0 is taken: nothing can be opened, no socket, no pipe
        if hasattr(resource, "RLIMIT_NPROC"):
            limit(resource.RLIMIT_NPROC, 0)  # root is not held by it; the filter below holds root
        if sys.platform == "linux":
            with_code = self.statm_pages * resource.getpagesize()
            limit(resource.RLIMIT_AS, with_code + self.memory)
        else:
            try:  # macOS takes the number or not, and does not hold programs to it
                limit(resource.RLIMIT_DATA, self.memory)
            except (OSError, ValueError):
                pass
        if self.seccomp:
            self._filter()

    def measure(self) -> None:
        """Notes how large the warm process is; the fork cannot read it any more."""
        if sys.platform == "linux":
            with open("/proc/self/statm") as file:
                self.statm_pages = int(file.read().split()[0])

    def _limit(self, which: int, value: int) -> None:
        hard = self.resource.getrlimit(which)[1]
        value = value if hard == self.resource.RLIM_INFINITY else min(value, hard)
        self.resource.setrlimit(which, (value, value))

    def _prepare_filter(self) -> None:
        """A classic BPF program: [code, jump if true, jump if false, value] each, over `struct seccomp_data`."""
        try:
            import ctypes

            self.libc = ctypes.CDLL(None, use_errno=True)
            machine, calls = SYSTEM_CALLS[os.uname().machine]
        except (ImportError, OSError, KeyError):
            return

        class Instruction(ctypes.Structure):
            _fields_ = [
                ("code", ctypes.c_ushort),
                ("jt", ctypes.c_ubyte),
                ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint),
            ]

        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]

        load, equal, return_ = 0x20, 0x15, 0x06
        lines = [(load, 0, 0, 4), (equal, 1, 0, machine), (return_, 0, 0, SECCOMP_KILL_PROCESS), (load, 0, 0, 0)]
        lines += [(equal, len(calls) - i, 0, call) for i, call in enumerate(calls)]
        lines += [(return_, 0, 0, SECCOMP_EPERM), (return_, 0, 0, SECCOMP_ALLOW)]
        self._instructions = (Instruction * len(lines))(*lines)  # Program points at it: it must live as long
        self.filter = Program(len(lines), self._instructions)
        self.filter_pointer = ctypes.byref(self.filter)

    def _filter(self) -> None:
        if self.libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError("no_new_privs")
        if self.libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, self.filter_pointer, 0, 0):
            raise OSError("seccomp")


def _outcome(job, seconds: float, limit: int = 65536) -> tuple[bytes, bool]:
    """
    Runs `job(descriptor)` in a fork and waits for what it writes: (what came, was it late). The fork is killed in any
    case, with whatever group it made: an answer is all that we want of it.
    """
    reader, writer = os.pipe()
    deadline = time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.dup2(writer, 0)
            os.closerange(1, max(reader, writer) + 1)
            job(0)
            os.write(0, b"r")
        finally:
            os._exit(0)
    os.close(writer)
    answer, late = b"", False
    try:
        while len(answer) < limit:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([reader], [], [], left)[0]:
                late = True
                break
            if not (chunk := os.read(reader, limit)):
                break
            answer += chunk
    finally:
        os.close(reader)
        for kill in (os.killpg, os.kill):  # the group first: the leader's death would leave its children
            try:
                kill(child, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        os.waitpid(child, 0)
    return answer, late


def loaded_modules(exports: dict[str, list[str] | None]) -> dict[str, types.ModuleType]:
    """Copies of the modules with their public names only: the real ones lead on to `sys` and `os`."""
    views = {}
    for name, names in exports.items():
        module = importlib.import_module(name)
        if names is None:
            names = getattr(module, "__all__", None) or dir(module)
            names = [
                n for n in names if not n.startswith("_") and not isinstance(getattr(module, n), types.ModuleType)
            ]
        views[name] = types.ModuleType(name)
        views[name].__dict__.update({n: getattr(module, n) for n in names}, __all__=list(names))
    return views


def warm_up(modules: dict[str, types.ModuleType]) -> None:
    """What the modules import late, since a fork can open no file."""
    for late in ("_strptime", "calendar", "heapq", "bisect"):
        importlib.import_module(late)
    importlib.import_module("datetime").datetime.strptime("1 January 2024", "%d %B %Y")
    if "sympy" in modules:
        sympy = importlib.import_module("sympy")
        x, y = sympy.symbols("x y")
        sympy.solve([x + y - 3, x - y - 1], [x, y]), sympy.solve(x**2 - 3 * x + 2, x), sympy.solve(x > 2, x)
        sympy.simplify((x**2 - 1) / (x - 1)), sympy.integrate(sympy.sin(x) * x, x), sympy.diff(sympy.exp(x), x)
        sympy.nsolve(sympy.cos(x) - x, 1), sympy.Matrix([[1, 2], [3, 4]]).inv(), sympy.sympify("2*x + 1").evalf()
        sympy.factorint(360), sympy.solveset(sympy.Eq(2 * x, 4), x), sympy.limit(1 / x, x, sympy.oo)
        sympy.summation(x, (x, 1, 5)), str(sympy.Rational(1, 3)), sympy.binomial(5, 2), sympy.lcm(4, 6)


def answer_of(value, max_output: int) -> bytes:
    """A tag and a text: `n` number, `t` text, `e` reason."""
    if value is None:
        return b"eno result"
    if isinstance(value, str):
        return b"t" + value.encode("utf-8", "replace") if len(value) <= max_output else b"etoo long"
    if isinstance(value, (bool, complex)) or not hasattr(type(value), "__float__"):
        return b"enot a number"
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError):  # 10**400, a signalling NaN, a symbol
        return b"enot a number"
    return b"n" + repr(number).encode() if math.isfinite(number) else b"enot a number"


def run_program(source: str, entry: str, modules: dict[str, types.ModuleType], names: list[str], size: int) -> bytes:
    """Runs a program where it stands, and calls its function: only ever in a fork."""

    def import_(name, globals=None, locals=None, fromlist=(), level=0):
        if level or name not in modules:
            raise ImportError(name)
        return modules[name]

    allowed = {name: getattr(builtins, name) for name in names}
    allowed.update(__import__=import_, print=lambda *args, **kwargs: None, __build_class__=builtins.__build_class__)
    scope = {"__builtins__": allowed, "__name__": "program"}
    scope.update({name: modules[name] for name in ("math", "sympy") if name in modules})  # as ReFT has them
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), scope)
        function = scope.get(entry)
        return answer_of(function(), size) if callable(function) else b"eno result"
    except MemoryError:
        return b"ememory"
    except SyntaxError:
        return b"esyntax"
    except BaseException as exception:
        return b"eerror: " + type(exception).__name__[:40].encode("utf-8", "replace")


def reply_to(answer: bytes, late: bool) -> dict:
    """What goes back to the host. The fork may have been hostile, so its words are checked."""
    tag, text = answer[:1], answer[1:].decode("utf-8", "replace")
    if tag == b"n":
        try:
            return {"value": float(text)} if math.isfinite(float(text)) else {"reason": "not a number"}
        except ValueError:
            return {"reason": "crash"}
    if tag == b"t":
        return {"value": text}
    if tag == b"e":
        return {"reason": text[:60]}
    return {"reason": "timeout" if late else "crash"}


def main() -> None:
    config = json.loads(sys.argv[1])
    requests, replies = sys.stdin.buffer, os.dup(1)

    def say(message: dict) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(replies, line) :]

    try:
        sys.path += config["path"]
        modules = loaded_modules(config["modules"])
        warm_up(modules)
        modules |= loaded_modules(IMPORTED_LATE)
        walls = Walls(config["memory_mb"])
        walls.measure()
        gc.freeze()  # a collection in a fork would copy every page that it looks at
    except Exception as exception:
        say({"error": f"{type(exception).__name__}: {exception}"})
        return
    size = config["max_output"]
    say({"seccomp": walls.seccomp})
    while line := requests.readline():
        request = json.loads(line)

        def job(descriptor: int, request: dict = request) -> None:
            try:
                walls.raise_(request["timeout"])
                answer = run_program(request["source"], request["entry"], modules, config["builtins"], size)
            except MemoryError:
                answer = b"ememory"
            os.write(descriptor, answer)
            os._exit(0)

        started = time.monotonic()
        answer, late = _outcome(job, request["timeout"], limit=4 * size + 1000)
        if len(answer) > 4 * size + 100:
            answer = b"etoo long"
        say({**reply_to(answer, late), "seconds": time.monotonic() - started})


if __name__ == "__main__":
    main()
