# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Runs models' Python programs and survives them.

Three walls, each built as if the ones before it had a hole:

1. `check_program` ([`program_check`]): an allow-list over the syntax tree, on every platform. Nothing runs.
2. A reduced Python (`_program_worker.py`), on every platform: builtins without `open`, `eval`, `getattr`...; modules
   as copies of their public names; `print` that prints nothing; a fork per program, so that nothing leaks to the next.
3. The process: started with no environment, no file of ours, in its own session. What ends before a program begins:

| | Linux, x86-64 and ARM64 | other Linux | macOS |
|---|---|---|---|
| wall-clock time (SIGKILL), CPU time, writing files, core dumps | yes | yes | yes |
| open files, sockets, pipes: one descriptor allowed, and taken | yes | yes | yes |
| memory (`RLIMIT_AS`) | yes | yes | no: macOS holds nobody to it |
| new processes and threads | yes | unless root | unless root |
| any system call that computing does not need (seccomp) | yes | no | no |

Without seccomp (also where a container forbids it) the third wall leaves calls that need no descriptor, such as
`unlink` or `kill`: there the first two walls stand alone. [`ProgramRunner.seccomp`] tells. Windows has no `fork`:
[`ProgramRunner`] says so with an error. (Tested on Linux, x86-64; the rest is written and has not been run.)
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from .program_check import BUILTINS, DEFAULT_MODULES, MODULES, check_program


WORKER = Path(__file__).with_name("_program_worker.py")
START_SECONDS = 60.0  # sympy on a busy machine
GRACE_SECONDS = 5.0  # a worker keeps its programs' time itself; this much later it is not believed any more
START_ATTEMPTS = 3
# What the dynamic linker needs to start Python at all where it was built so. No other variable is passed on.
LINKER_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
MAX_OUTPUT = 1000


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """
    What a program returned, or why nothing came of it.

    Args:
        value (`float` or `str`, *optional*):
            The finite number or the text that the program's function returned; None where it failed.
        reason (`str`, *optional*):
            None where there is a value, else one of:

            - `"too long"`: more than 10,000 characters of program, or more than `max_output` of result
            - `"too deep"`: nested beyond 100 levels
            - `"syntax"`: not Python
            - `"forbidden: <what>"`: see [`check_program`]
            - `"timeout"`, `"memory"`: it hit the limit
            - `"error: <type>"`: it raised
            - `"no result"`: it defines no such function, or that returned None
            - `"not a number"`: it returned neither a finite number nor a text (a bool, a list, nan, 10**400...)
            - `"crash"`: its process died without an answer
        seconds (`float`, *optional*, defaults to `0.0`):
            How long it ran.
    """

    value: float | str | None = None
    reason: str | None = None
    seconds: float = 0.0


class ProgramRunner:
    """
    A warm pool of processes that run programs. Made when first used, restarted when one dies, closed with the
    interpreter; a pickled, copied or forked runner starts a pool of its own. Calls from several threads take turns.

    Args:
        n_workers (`int`, *optional*):
            Programs that run at a time. By default the processors that this process may use, 8 at most.
        timeout (`float`, *optional*, defaults to `2.0`):
            Seconds of wall-clock time a program may take. `n` endless loops take about `n * timeout / n_workers`.
        memory_mb (`int`, *optional*, defaults to `256`):
            Memory a program may take, beyond what Python and the modules take.
        modules (`Sequence[str]`, *optional*, defaults to all but sympy):
            What a program may import, out of math, fractions, decimal, statistics, itertools, functools, collections,
            datetime, sympy. As in ReFT, math and sympy need no `import`. sympy evaluates strings as Python, which the
            first two walls do not see: it is refused where there is no seccomp. A program can load no file, so
            what sympy imports late fails, unless the warm-up used it (solving, calculus, matrices, number theory).
        max_output (`int`, *optional*, defaults to `1000`):
            Characters that a returned text may have. What a program prints goes nowhere.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        timeout: float = 2.0,
        memory_mb: int = 256,
        modules: Sequence[str] = DEFAULT_MODULES,
        max_output: int = MAX_OUTPUT,
    ):
        if n_workers is None:
            processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
            n_workers = min(8, len(processors))
        if n_workers < 1:
            raise ValueError(f"n_workers={n_workers!r} leaves nobody to run a program: give at least 1.")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout={timeout!r}: give a positive number of seconds.")
        if memory_mb < 1:
            raise ValueError(f"memory_mb={memory_mb!r}: give at least 1.")
        if not 1 <= max_output <= MAX_OUTPUT:  # a longer answer would not pass through a pipe in one piece
            raise ValueError(f"max_output={max_output!r}: give 1 to {MAX_OUTPUT} characters.")
        if isinstance(modules, str) or not set(modules) <= set(MODULES):
            raise ValueError(f"modules={modules!r}: give a list out of {sorted(MODULES)}.")
        self.n_workers, self.timeout, self.memory_mb = n_workers, float(timeout), memory_mb
        self.modules, self.max_output = tuple(modules), max_output
        self._reset()

    def run(self, programs: Sequence[str], entry: str = "solution") -> list[ProgramResult]:
        """
        Runs each program and calls its function `entry` without arguments. No program raises here.

        Args:
            programs (`Sequence[str]`):
                Python programs.
            entry (`str`, *optional*, defaults to `"solution"`):
                Name of the function.

        Returns:
            `list[ProgramResult]`: in the order of the programs.
        """
        if not entry.isidentifier():
            raise ValueError(f"entry={entry!r} is no name of a function.")
        reasons = [check_program(program, self.modules) for program in programs]
        ran = iter(self._execute([p for p, reason in zip(programs, reasons, strict=True) if reason is None], entry))
        return [next(ran) if reason is None else ProgramResult(reason=reason) for reason in reasons]

    @property
    def seccomp(self) -> bool:
        """Whether this system filters the programs' system calls. Starts a worker to see."""
        if self._filtered is None:
            self._execute([""], "solution")
        return bool(self._filtered)

    def close(self) -> None:
        """Ends the processes. A later `run` starts new ones."""
        with self._lock:
            while self._workers:
                self._workers.pop().kill()

    def _execute(self, programs: Sequence[str], entry: str) -> list[ProgramResult]:
        """What `run` does after the first wall. Only tests of the other walls call it directly."""
        if not programs:
            return []
        with self._lock:
            for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
                self._drop(worker)
            while len(self._workers) < min(self.n_workers, len(programs)):
                self._workers.append(_Worker(self))
            results: list[ProgramResult] = [ProgramResult(reason="crash")] * len(programs)
            busy: dict[_Worker, int] = {}
            try:
                self._converse(results, deque(enumerate(programs)), entry, busy)
            finally:
                for worker in busy:  # we were interrupted: its answer must not be taken for the next program's
                    self._drop(worker)
            return results

    def _converse(self, results: list, todo: deque, entry: str, busy: dict[_Worker, int]) -> None:
        """Hands `todo` to idle workers and files their answers in `results`, until nobody is busy."""
        failed_starts = 0
        while todo or busy:
            for worker in [worker for worker in self._workers if worker not in busy]:
                if todo:
                    busy[worker], program = todo.popleft()
                    worker.ask(program, entry, self.timeout)
            for worker in _ready(busy):
                message = worker.hear()
                if message is None and time.monotonic() < worker.deadline and not worker.dead:
                    continue  # not a whole line yet
                if message is not None and "seccomp" in message:  # its first words; the answer is still to come
                    failed_starts = 0
                    worker.greet(message["seccomp"])
                    self._filtered = worker.seccomp
                    if "sympy" in self.modules and not worker.seccomp:
                        raise RuntimeError("This system has no seccomp, so programs with sympy are not safe: drop it.")
                    continue
                index = busy.pop(worker)
                if message is not None and "error" not in message:
                    results[index] = _result(message)
                    continue
                self._drop(worker)
                if worker.seccomp is None or not worker.asked_well:  # it was dead before: not the program's fault
                    failed_starts += 1
                    if failed_starts >= START_ATTEMPTS:
                        why = message["error"] if message else f"exit code {worker.process.returncode}"
                        raise RuntimeError(f"{sys.executable} -I -S {WORKER} does not start: {why}.")
                    todo.appendleft((index, worker.program))
                else:
                    reason = "crash" if worker.dead else "timeout"
                    results[index] = ProgramResult(reason=reason, seconds=time.monotonic() - worker.asked)
                if todo and len(self._workers) < self.n_workers:
                    self._workers.append(_Worker(self))

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        if worker in self._workers:
            self._workers.remove(worker)

    def _reset(self) -> None:
        self._workers: list[_Worker] = []  # always this list: the finalizer holds it
        self._lock = threading.Lock()
        self._filtered: bool | None = None
        self._finalizer = weakref.finalize(self, _end, self._workers)
        _RUNNERS.add(self)

    def _forget(self) -> None:
        """In a forked process: the workers are the parent's, and its lock may be held by a thread that is not here."""
        workers = self._workers
        self._finalizer.detach()
        self._reset()
        for worker in workers:
            worker.channel.close()
            worker.process.returncode = 0  # not ours to wait for

    def __enter__(self) -> ProgramRunner:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()


class _Worker:
    """One warm process, seen from here. `seccomp` is None until it has come up."""

    def __init__(self, runner: ProgramRunner):
        if sys.platform == "win32":
            raise RuntimeError("Programs run in forks, which Windows does not have: use Linux, WSL or macOS.")
        exports = {name: MODULES[name] for name in runner.modules}
        found = map(importlib.util.find_spec, ("sympy", "mpmath")) if "sympy" in exports else ()
        config = {
            "modules": exports,
            "path": sorted({str(Path(spec.origin).parents[1]) for spec in found if spec}),
            "builtins": sorted(BUILTINS),
            "memory_mb": runner.memory_mb,
            "max_output": runner.max_output,
        }
        self.channel, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(WORKER), json.dumps(config)],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in LINKER_VARIABLES if name in os.environ},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()
        self.channel.settimeout(GRACE_SECONDS)
        self.seccomp: bool | None = None
        self.dead, self.asked_well = False, True
        self.heard = b""
        self.timeout = 0.0
        self.asked = time.monotonic()
        self.deadline = self.asked + START_SECONDS

    def ask(self, program: str, entry: str, timeout: float) -> None:
        request = json.dumps({"source": program, "entry": entry, "timeout": timeout})  # ASCII, in one line
        self.program, self.timeout, self.asked = program, timeout, time.monotonic()
        self.deadline = self.asked + timeout + GRACE_SECONDS + (START_SECONDS if self.seccomp is None else 0.0)
        try:
            self.channel.sendall(request.encode() + b"\n")
        except OSError:
            self.dead, self.asked_well = True, False

    def greet(self, seccomp: bool) -> None:
        self.seccomp = seccomp
        self.deadline = time.monotonic() + self.timeout + GRACE_SECONDS

    def hear(self) -> dict | None:
        """The next message, if it is whole. The worker writes short lines and is trusted to; programs cannot."""
        if b"\n" not in self.heard and not self.dead and _readable(self):
            try:
                chunk = self.channel.recv(65536)
            except OSError:
                chunk = b""
            self.dead = not chunk
            self.heard += chunk
        line, newline, rest = self.heard.partition(b"\n")
        if not newline:
            return None
        self.heard = rest
        return json.loads(line)

    def kill(self) -> None:
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        self.channel.close()
        self.process.wait()


def _ready(workers: Collection[_Worker]) -> list[_Worker]:
    """Waits until one of `workers` has something to say, died, or is late."""
    now = [worker for worker in workers if worker.dead or b"\n" in worker.heard]
    if now:
        return now
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.channel, selectors.EVENT_READ, worker)
        wait = min(worker.deadline for worker in workers) - time.monotonic()
        now = [key.data for key, _ in selector.select(max(wait, 0.0))]
    return now or [worker for worker in workers if time.monotonic() >= worker.deadline]


def _readable(worker: _Worker) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(worker.channel, selectors.EVENT_READ)
        return bool(selector.select(0))


def _result(message: dict) -> ProgramResult:
    return ProgramResult(message.get("value"), message.get("reason"), message["seconds"])


_RUNNERS: weakref.WeakSet[ProgramRunner] = weakref.WeakSet()


def _end(workers: list[_Worker]) -> None:
    """When a runner is gone or the interpreter ends."""
    while workers:
        workers.pop().kill()


def _forget_all() -> None:
    for runner in list(_RUNNERS):
        runner._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
