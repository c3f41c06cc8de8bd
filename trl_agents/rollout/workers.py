# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments side by side: one thread an episode, timeouts, and faults that stay in their own slot."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ..types import StopReason


# How long closing the environments may take, all together.
CLOSE_SECONDS = 10.0


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
    fault: StopReason | None = None
    error: str | None = None


class EnvPool:
    """
    A fixed number of environments of one kind, each in a thread of its own, reused from episode to episode.

    Slow environments overlap with each other and with decoding. An exception, a malformed answer or a timeout becomes
    an [`EnvReply`] with a `fault`; the slot gets a fresh environment and its neighbours notice nothing.

    Args:
        factory (`Callable[[], Any]`):
            Makes an environment.
        n_slots (`int`):
            Number of environments.
        timeout (`float`, *optional*):
            Seconds a `reset` (making the environment included, when it is the slot's first) or a `step` may take. None
            waits for ever.
    """

    def __init__(self, factory: Callable[[], Any], n_slots: int, timeout: float | None = None):
        if n_slots < 1:
            raise ValueError(f"n_slots={n_slots!r} leaves no place to play in: give at least 1.")
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout={timeout!r}: give a positive number of seconds, or None to wait for ever.")
        self.factory, self.timeout = factory, timeout
        self.answers: SimpleQueue = SimpleQueue()
        self.workers: list[_Worker | None] = [None] * n_slots
        self.waiting: dict[int, float] = {}  # slot -> when it was asked

    def reset(self, slot: int, seed: int, options: dict[str, Any] | None = None) -> None:
        """Start an episode in `slot`."""
        self._ask(slot, lambda env: _checked_reset(env.reset(seed=seed, options=options)))

    def step(self, slot: int, action: str) -> None:
        """Play `action` in `slot`."""
        self._ask(slot, lambda env: _checked_step(env.step(action)))

    def collect(self, patience: float, block: bool) -> list[EnvReply]:
        """
        The answers that have come. Waits for each until `patience` seconds after its question was asked, so that a
        slow environment is waited for once and not at every call; with `block`, until at least one has come.
        """
        replies: list[EnvReply] = []
        while self.waiting:
            now = time.monotonic()
            wait = math.inf if block and not replies else max(self.waiting.values()) + patience - now
            until_late = math.inf if self.timeout is None else min(self.waiting.values()) + self.timeout - now
            try:
                answer = self.answers.get(timeout=max(min(wait, until_late, 3600.0), 0.0))
            except Empty:
                late = self._time_out()
                replies += late
                if wait <= 0 and not late:
                    break
                continue
            worker, slot, value, error, seconds = answer
            if self.workers[slot] is not worker:  # answer of a worker that was given up: it must not shift later ones
                continue
            del self.waiting[slot]
            if error is not None:
                self._discard(slot)
                replies.append(EnvReply(slot, seconds=seconds, fault=StopReason.ENV_ERROR, error=error))
            else:
                replies.append(EnvReply(slot, *value, seconds=seconds))
        return sorted(replies, key=lambda reply: reply.slot)  # the order of arrival is not reproducible

    def give_up(self) -> None:
        """Discard the environments that have not answered: nobody will collect what they say."""
        for slot in list(self.waiting):
            self._discard(slot)
        self.waiting.clear()

    def close(self) -> None:
        """Close all environments. One that does not come back is left to die with the process."""
        self.give_up()
        workers = [worker for worker in self.workers if worker is not None]
        for slot in range(len(self.workers)):
            self._discard(slot)
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in workers:
            worker.thread.join(max(deadline - time.monotonic(), 0.0))

    def _ask(self, slot: int, question: Callable[[Any], tuple]) -> None:
        if self.workers[slot] is None:
            self.workers[slot] = _Worker(self.factory, slot, self.answers)
        self.waiting[slot] = time.monotonic()
        self.workers[slot].questions.put(question)

    def _time_out(self) -> list[EnvReply]:
        if self.timeout is None:
            return []
        now = time.monotonic()
        late = [slot for slot, asked in self.waiting.items() if now - asked >= self.timeout]
        for slot in late:
            del self.waiting[slot]
            self._discard(slot)
        error = f"no answer within {self.timeout} s"
        return [EnvReply(s, seconds=self.timeout, fault=StopReason.ENV_TIMEOUT, error=error) for s in late]

    def _discard(self, slot: int) -> None:
        worker, self.workers[slot] = self.workers[slot], None
        if worker is not None:
            worker.questions.put(None)


class _Worker:
    """A daemon thread that owns one environment: a hung one must not keep the process alive."""

    def __init__(self, factory: Callable[[], Any], slot: int, answers: SimpleQueue):
        self.questions: SimpleQueue = SimpleQueue()
        self.thread = threading.Thread(
            target=self._run, args=(factory, slot, answers), name=f"trl-agents-env-{slot}", daemon=True
        )
        self.thread.start()

    def _run(self, factory: Callable[[], Any], slot: int, answers: SimpleQueue) -> None:
        env = None
        while (question := self.questions.get()) is not None:
            started = time.monotonic()
            value = error = None
            try:
                if env is None:
                    env = factory()
                value = question(env)
            except BaseException as exception:  # also what would end the thread silently, and leave us waiting
                error = "".join(traceback.format_exception_only(exception)).strip()
            answers.put((self, slot, value, error, time.monotonic() - started))
        try:
            if env is not None:
                env.close()
        except BaseException:  # the episode is over: nothing depends on a clean end
            pass


def _checked_reset(answer: Any) -> tuple:
    observation, info = answer
    return _checked_text(observation), 0.0, False, False, _checked_info(info)


def _checked_step(answer: Any) -> tuple:
    observation, reward, terminated, truncated, info = answer
    reward = float(reward)
    if not math.isfinite(reward):
        raise ValueError(f"the environment returned the reward {reward}")
    return _checked_text(observation), reward, bool(terminated), bool(truncated), _checked_info(info)


def _checked_text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise TypeError(f"the environment returned an observation of type {type(observation).__name__}, not str")
    return observation


def _checked_info(info: Any) -> dict[str, Any]:
    """A copy, so that what an environment changes later does not change the past. What we read must be as agreed."""
    if not isinstance(info, dict):
        raise TypeError(f"the environment returned an info of type {type(info).__name__}, not dict")
    info = dict(info)
    if (actions := info.get("legal_actions")) is not None:
        if not isinstance(actions, (list, tuple)) or not all(isinstance(action, str) for action in actions):
            raise TypeError(f"the environment returned legal_actions={actions!r}, not a list of str")
        info["legal_actions"] = list(actions)
    for name in ("instructions", "transition"):
        if not isinstance(info.get(name, ""), str):
            raise TypeError(f"the environment returned {name}={info[name]!r}, not str")
    return info
