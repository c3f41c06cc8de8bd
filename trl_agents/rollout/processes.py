# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""An environment in a process of its own: one that hangs can be killed, one that crashes takes nobody along."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from .faults import Fault, RemoteFault, describe


# How long an environment may take to close, and then its process to end.
CLOSE_SECONDS, END_SECONDS = 10.0, 5.0

NAME, UNGUARDED = "trl-agents-env", 83  # of the processes, and the exit code of those that begin the run again


class NoGuard(ValueError):
    """The run is begun again by every process that it starts."""

    def __init__(self):
        super().__init__(
            "A process for an environment imports your script, and so would begin the run again: put `if __name__ == "
            '"__main__":` above what starts the run, or leave out env_processes=True.'
        )


def refuse_in_process_of_env() -> None:
    """Ends the process if it is an environment's: what begins a run there stands in a script without a guard."""
    if multiprocessing.current_process().name == NAME:
        os._exit(UNGUARDED)  # at once, and without a traceback: the one who started it tells what is wrong


class EnvProcess:
    """
    An environment behind a pipe, with the environment's own methods. It is used by one thread at a time, except for
    `kill`.

    The process leads a group of its own, so that what the environment has started is killed along with it, and does
    not outlive the one it was made by.

    Args:
        factory (`Callable[[], Any]`):
            Makes the environment. It is pickled.
    """

    def __init__(self, factory: Callable[[], Any]):
        context = multiprocessing.get_context("spawn")  # a fork of many threads, some of them torch's, may deadlock
        self.has_answered = False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, factory), name=NAME, daemon=True)
        self.process.start()
        theirs.close()

    def reset(self, **kwargs: Any) -> Any:
        return self._ask("reset", (), kwargs)

    def step(self, action: str) -> Any:
        return self._ask("step", (action,), {})

    def close(self) -> None:
        try:
            self._ask("close", (), {}, patience=CLOSE_SECONDS)
        finally:
            self.pipe.close()
            self._end()

    def kill(self) -> None:
        """End the process and all it has started, whatever they are doing. What waits for an answer fails."""
        if self.process.is_alive():
            _kill_group(self.process.pid)
            with suppress(OSError):  # another thread has just seen it end
                self.process.kill()  # it becomes the leader of its group only once it has begun

    def _ask(self, *question: Any, patience: float | None = None) -> Any:
        try:
            self.pipe.send(question)
            if patience is not None and not self.pipe.poll(patience):
                self.kill()
            fault, answer = self.pipe.recv()
        except (EOFError, OSError):
            self._end()
            if self.process.exitcode == UNGUARDED:
                raise NoGuard from None
            hint = "" if self.has_answered else " before it could answer: is the run below `if __name__ == ...`?"
            error = f"the environment's process ended with exit code {self.process.exitcode}{hint}"
            raise RemoteFault(Fault.CRASH, error) from None
        self.has_answered = True
        if fault is not None:
            raise RemoteFault(fault, answer)
        return answer

    def _end(self) -> None:
        """Wait for the process, then take down what it has left behind."""
        self.process.join(END_SECONDS)
        self.kill()
        self.process.join(END_SECONDS)  # or its remains stay in the table of processes
        _kill_group(self.process.pid)


def _kill_group(leader: int) -> None:
    if hasattr(os, "killpg"):
        with suppress(OSError):  # there is no such group, or none yet
            os.killpg(leader, signal.SIGKILL)


def check_picklable(factory: Callable[[], Any]) -> None:
    """Raises `ValueError` if no other process can be told how to make the environment."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is None and hasattr(main, "__file__") and not _has_file():
        raise ValueError(
            f"An environment in a process of its own imports the script, and {main.__file__!r} is no file. Save the "
            "script as one, or let environments run in threads."
        )
    try:
        _Pickler(io.BytesIO()).dump(factory)
    except Exception as error:
        raise ValueError(
            f"An environment in a process of its own must be made from what can be pickled, but: {error}. Define its "
            "class or factory at the top of a module, a file to import it from, or let environments run in threads."
        ) from error


class _Pickler(pickle.Pickler):
    """Refuses what would be pickled, and not found by the process that unpickles it: it imports `__main__` anew."""

    def reducer_override(self, value: Any) -> Any:
        if getattr(value, "__module__", None) == "__main__" and hasattr(value, "__qualname__") and not _has_file():
            raise ValueError(
                f"`{value.__qualname__}` was written in a notebook, on standard input or in a package's `__main__`, "
                "which other processes cannot import"
            )
        return NotImplemented


def _has_file() -> bool:
    """Whether processes that are started find the `__main__` of this one, as `multiprocessing` looks for it."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:  # begun with `python -m`
        return main.__spec__.name.rpartition(".")[2] != "__main__"
    return os.path.isfile(getattr(main, "__file__", None) or "")


def _serve(pipe: Connection, factory: Callable[[], Any]) -> None:
    """The process: answers one question after the other until there is nobody to ask."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # also: Ctrl-C is for those who started the run
    # It may hang in a step when those who would end it are gone
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
    env = None
    with suppress(EOFError, OSError):
        while True:
            method, args, kwargs = pipe.recv()
            fault = Fault.MAKE
            try:
                if env is None and method != "close":
                    env = factory()
                fault = Fault.CRASH
                answer = (None, getattr(env, method)(*args, **kwargs) if env is not None else None)
                fault = Fault.MALFORMED
                message = pickle.dumps(answer)
            except BaseException as exception:
                message = pickle.dumps((fault, describe(exception)))
            pipe.send_bytes(message)
    _end_self()  # the pipe is closed


def _end_with(parent: int) -> None:
    wait([parent])
    _end_self()


def _end_self() -> None:
    _kill_group(os.getpid())  # not only this process: also what the environment has started
    os._exit(1)
