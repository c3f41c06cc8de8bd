# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments side by side: one thread an episode, timeouts, and faults that stay in their own slot."""

from __future__ import annotations

import atexit
import functools
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ..envs.check import innermost
from .faults import Fault, RemoteFault, checked_reset, checked_step, describe
from .processes import CLOSE_SECONDS, EnvProcess, NoGuard, check_picklable, refuse_in_process_of_env


# How long one is waited for that was given up; closing all the others may take `CLOSE_SECONDS` together.
GIVEN_UP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EnvReply:
    """What an environment answered to a `reset` or a `step`, or the fault that took the answer's place."""

    slot: int
    observation: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] | None = None
    seconds: float = 0.0
    fault: Fault | None = None
    error: str | None = None


class SharedEnv(ValueError):
    """Episodes side by side would play in one environment, and be paid for each other's actions."""

    def __init__(self):
        super().__init__(
            "The factory gave one environment to several episodes that are played side by side: let it make a new one "
            "at each call, as a class does."
        )


@dataclass(frozen=True, slots=True)
class _Question:
    """What an environment was asked, when, and until when (on the clock `time.monotonic`) it may think about it."""

    name: str
    ask: Callable[[Any], Any]
    check: Callable[[Any], tuple]
    asked: float
    seconds: float

    @property
    def deadline(self) -> float:
        return self.asked + self.seconds


class EnvPool:
    """
    A fixed number of environments of one kind, each in a thread of its own, reused from episode to episode.

    Slow environments overlap with each other and with decoding. An exception, a malformed answer or a timeout becomes
    an [`EnvReply`] with a `fault`; the slot gets a fresh environment and its neighbours notice nothing.

    A thread cannot be ended from outside: an environment that hangs keeps its own until it comes back or the process
    ends, which it does not keep from ending. With `processes` it is killed.

    Args:
        factory (`Callable[[], Any]`):
            Makes an environment.
        n_slots (`int`):
            Number of environments.
        timeout (`float`, *optional*):
            Seconds a `step` may take. None waits for ever.
        reset_timeout (`float`, *optional*):
            Seconds a `reset` may take (making the environment included, when it is the slot's first). Defaults to
            `timeout`.
        processes (`bool`, *optional*, defaults to `False`):
            Whether each environment gets a process of its own besides. The factory must be picklable then.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        n_slots: int,
        timeout: float | None = None,
        reset_timeout: float | None = None,
        processes: bool = False,
    ):
        if n_slots < 1:
            raise ValueError(f"n_slots={n_slots!r} leaves no place to play in: give at least 1.")
        for name, value in (("timeout", timeout), ("reset_timeout", reset_timeout)):
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value!r}: give a positive number of seconds, or None to wait for ever.")
        if processes:
            refuse_in_process_of_env()
            check_picklable(factory)
        self.factory = functools.partial(EnvProcess, factory) if processes else factory
        self.timeout = math.inf if timeout is None else timeout
        self.reset_timeout = self.timeout if reset_timeout is None else reset_timeout
        self.answers: SimpleQueue = SimpleQueue()
        self.workers: list[_Worker | None] = [None] * n_slots
        self.waiting: dict[int, _Question] = {}  # slot -> what it was asked
        self.leaving: list[_Worker] = []  # without a slot, and perhaps not gone yet
        # Should nobody call `close`, what the environments have opened is closed all the same
        weakref.finalize(self, _shut_down, self.workers, self.leaving).atexit = False
        _pools.add(self)

    def reset(self, slot: int, seed: int, options: dict[str, Any] | None = None) -> None:
        """Start an episode in `slot`."""
        self._ask(slot, "reset", lambda env: env.reset(seed=seed, options=options), checked_reset, self.reset_timeout)

    def step(self, slot: int, action: str) -> None:
        """Play `action` in `slot`."""
        self._ask(slot, "step", lambda env: env.step(action), checked_step, self.timeout)

    def renew(self, slot: int) -> None:
        """Let the next episode in `slot` begin with a fresh environment."""
        self._dismiss(slot)

    def collect(self, patience: float, block: bool) -> list[EnvReply]:
        """
        The answers that have come. Waits for each until `patience` seconds after its question was asked, so that a
        slow environment is waited for once and not at every call; with `block`, until at least one has come.
        """
        replies: list[EnvReply] = []
        while self.waiting:
            now = time.monotonic()
            latest = max(question.asked for question in self.waiting.values())
            wait = math.inf if block and not replies else latest + patience - now
            until_late = min(question.deadline for question in self.waiting.values()) - now
            try:
                answer = self.answers.get(timeout=max(min(wait, until_late, 3600.0), 0.0))
            except Empty:
                late = self._time_out()
                replies += late
                if wait <= 0 and not late:
                    break
                continue
            worker, slot, value, fault, error, seconds = answer
            if self.workers[slot] is not worker:  # answer of a worker that was given up: it must not shift later ones
                continue
            del self.waiting[slot]
            if fault is not None:
                self._dismiss(slot)
                if isinstance(error, (NoGuard, SharedEnv)):
                    raise error  # so would all others
                replies.append(EnvReply(slot, seconds=seconds, fault=fault, error=error))
            else:
                replies.append(EnvReply(slot, *value, seconds=seconds))
        return sorted(replies, key=lambda reply: reply.slot)  # the order of arrival is not reproducible

    def give_up(self) -> None:
        """Discard the environments that have not answered: nobody will collect what they say."""
        for slot in list(self.waiting):
            self._dismiss(slot, give_up=True)
        self.waiting.clear()

    def close(self) -> None:
        """Close all environments. A thread that does not come back is left to die with the process."""
        self.give_up()
        _shut_down(self.workers, self.leaving)

    def _ask(self, slot: int, name: str, ask: Callable, check: Callable, seconds: float) -> None:
        if self.workers[slot] is None:
            self.workers[slot] = _Worker(self.factory, slot, self.answers, self.workers)
        self.waiting[slot] = _Question(name, ask, check, time.monotonic(), seconds)
        self.workers[slot].questions.put(self.waiting[slot])

    def _time_out(self) -> list[EnvReply]:
        now = time.monotonic()
        late = {slot: question for slot, question in self.waiting.items() if question.deadline <= now}
        replies = []
        for slot, question in late.items():
            del self.waiting[slot]
            self._dismiss(slot, give_up=True)
            error = f"no answer to `{question.name}` within {question.seconds:g} s"
            replies.append(EnvReply(slot, seconds=question.seconds, fault=Fault.TIMEOUT, error=error))
        return replies

    def _dismiss(self, slot: int, give_up: bool = False) -> None:
        worker, self.workers[slot] = self.workers[slot], None
        self.leaving[:] = [gone for gone in self.leaving if gone.thread.is_alive()]
        if worker is not None:
            worker.dismiss(give_up)
            self.leaving.append(worker)


_pools: weakref.WeakSet[EnvPool] = weakref.WeakSet()


@atexit.register  # after multiprocessing's own, which knows nothing of what environments have started: so before it
def _close_pools() -> None:
    for pool in list(_pools):
        pool.close()


def _shut_down(workers: list[_Worker | None], leaving: list[_Worker]) -> None:
    """Dismiss all `workers`, and wait for them and for those who are leaving."""
    for slot, worker in enumerate(workers):
        if worker is not None:
            worker.dismiss()
            leaving.append(worker)
            workers[slot] = None
    started = time.monotonic()
    for worker in sorted(leaving, key=lambda worker: worker.given_up):
        limit = GIVEN_UP_SECONDS if worker.given_up else CLOSE_SECONDS
        worker.thread.join(max(started + limit - time.monotonic(), 0.0))
    for worker in leaving:
        if worker.thread.is_alive():
            worker.kill()  # its `close` hangs
    leaving.clear()


class _Worker:
    """A daemon thread that owns one environment: a hung one must not keep the process alive."""

    def __init__(
        self, factory: Callable[[], Any], slot: int, answers: SimpleQueue, neighbours: Sequence[_Worker | None]
    ):
        self.neighbours = neighbours
        self.questions: SimpleQueue = SimpleQueue()
        self.given_up = self.killed = False
        self.env: Any = None
        self.thread = threading.Thread(
            target=self._run, args=(factory, slot, answers), name=f"trl-agents-env-{slot}", daemon=True
        )
        self.thread.start()

    def dismiss(self, give_up: bool = False) -> None:
        """Close the environment when it has answered. `give_up`: nobody wants to know what."""
        self.given_up = self.given_up or give_up
        self.questions.put(None)
        if give_up:
            self.kill()

    def kill(self) -> None:
        """End the environment now, if it can be: in a process, not in a thread."""
        self.killed = True
        if isinstance(self.env, EnvProcess):
            self.env.kill()

    def _shares_env(self) -> bool:
        others = [worker for worker in self.neighbours if worker is not None and worker is not self]
        own = innermost(self.env)
        return any(worker.env is not None and innermost(worker.env) is own for worker in others)

    def _run(self, factory: Callable[[], Any], slot: int, answers: SimpleQueue) -> None:
        while (question := self.questions.get()) is not None:
            started = time.monotonic()
            value = error = None
            try:
                fault = Fault.MAKE  # what it is if the next line raises
                if self.env is None:
                    self.env = factory()
                    if self.killed:  # before there was anything to kill
                        self.kill()
                    if self._shares_env():
                        raise SharedEnv
                fault = Fault.CRASH
                answer = question.ask(self.env)
                fault = Fault.MALFORMED
                value = question.check(answer)
                fault = None
            except BaseException as exception:  # also what would end the thread silently, and leave us waiting
                fault = exception.fault if isinstance(exception, RemoteFault) else fault
                error = exception if isinstance(exception, (NoGuard, SharedEnv)) else describe(exception)
            answers.put((self, slot, value, fault, error, time.monotonic() - started))
        try:
            if self.env is not None:
                self.env.close()
        except BaseException:  # the episode is over: nothing depends on a clean end
            pass
