# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments side by side: one thread an episode, timeouts, and faults that stay in their own slot."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ..types import StopReason


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
            Seconds a `reset` or a `step` may take. None waits for ever.
    """

    def __init__(self, factory: Callable[[], Any], n_slots: int, timeout: float | None = None):
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

    def collect(self, wait: float | None) -> list[EnvReply]:
        """
        The answers that have come. Waits up to `wait` seconds for all outstanding ones; None waits until at least one
        has come, and then no longer.
        """
        replies: list[EnvReply] = []
        deadline = None if wait is None else time.monotonic() + wait
        while self.waiting:
            patience = self._patience(deadline, bool(replies))
            try:
                worker, slot, value, error, seconds = (
                    self.answers.get_nowait() if patience <= 0 else self.answers.get(timeout=patience)
                )
            except Empty:
                replies += self._time_out()
                if (deadline is None and replies) or (deadline is not None and time.monotonic() >= deadline):
                    break
                continue
            if self.workers[slot] is not worker:  # answer of a worker that was given up: it must not shift later ones
                continue
            del self.waiting[slot]
            if error is not None:
                self._discard(slot)
                replies.append(EnvReply(slot, seconds=seconds, fault=StopReason.ENV_ERROR, error=error))
            else:
                replies.append(EnvReply(slot, *value, seconds=seconds))
        return sorted(replies, key=lambda reply: reply.slot)  # the order of arrival is not reproducible

    def close(self) -> None:
        """Close all environments. A worker that does not come back is left to die with the process."""
        for slot in range(len(self.workers)):
            self._discard(slot)
        self.waiting.clear()

    def _ask(self, slot: int, question: Callable[[Any], tuple]) -> None:
        if self.workers[slot] is None:
            self.workers[slot] = _Worker(self.factory, slot, self.answers)
        self.waiting[slot] = time.monotonic()
        self.workers[slot].questions.put(question)

    def _patience(self, deadline: float | None, has_some: bool) -> float:
        now = time.monotonic()
        patience = (0.0 if has_some else math.inf) if deadline is None else deadline - now
        if self.timeout is not None:
            patience = min(patience, min(self.waiting.values()) + self.timeout - now)
        return min(patience, 3600.0)

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
            except Exception as exception:
                error = f"{type(exception).__name__}: {exception}"
            answers.put((self, slot, value, error, time.monotonic() - started))
        try:
            if env is not None:
                env.close()
        except Exception:  # the episode is over: nothing depends on a clean end
            pass


def _checked_reset(answer: Any) -> tuple:
    observation, info = answer
    _check_types(observation, info)
    return observation, 0.0, False, False, dict(info)


def _checked_step(answer: Any) -> tuple:
    observation, reward, terminated, truncated, info = answer
    _check_types(observation, info)
    reward = float(reward)
    if not math.isfinite(reward):
        raise ValueError(f"the environment returned the reward {reward}")
    return observation, reward, bool(terminated), bool(truncated), dict(info)


def _check_types(observation: Any, info: Any) -> None:
    if not isinstance(observation, str):
        raise TypeError(f"the environment returned an observation of type {type(observation).__name__}, not str")
    if not isinstance(info, dict):
        raise TypeError(f"the environment returned an info of type {type(info).__name__}, not dict")
