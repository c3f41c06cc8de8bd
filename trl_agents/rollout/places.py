# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Episodes in their places: which wait, which are played, what became of the others, and which are begun again."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..exploration import Past
from ..types import ParsedAction, StopReason, Trajectory, Turn
from .faults import Fault
from .generation import Reply
from .progress import Bar, Clock
from .rules import Episode
from .workers import EnvPool


# Each episode is begun at most twice, and at most two others from the same seed take its place.
STARTS, REPLACEMENTS = 2, 2

# Any number but 0
OWN = 1_000_003


@dataclass(frozen=True, slots=True)
class End:
    """Why an episode is over."""

    stop: StopReason | Fault
    error: str | None = None


@dataclass(slots=True)
class Live:
    """An episode in its slot. `tell` is given each of its replies, as they were read."""

    slot: int
    index: int
    episode: Episode
    rng: np.random.Generator  # samples replies, and what is played in place of invalid ones
    chance: random.Random  # the exploration mechanisms' own luck
    tell: Callable[[ParsedAction], None]
    start: int = 0  # how many have failed before it in this episode's place
    reader: Any = None
    observation: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    reset_info: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    pending: dict[str, Any] | None = None  # the turn whose action the environment is playing
    retries: int = 0
    env_seconds: float = 0.0
    names: dict[str, str] | None = None  # what the actions are called at this turn
    drafts: list[Reply] = field(default_factory=list)  # replies so far to the question that is open

    @property
    def past(self) -> Past:
        played = [turn for turn in self.turns if turn.executed is not None]
        legal = self.info.get("legal_actions") or ()
        return Past(tuple(legal), tuple(t.executed for t in played), tuple(t.reward for t in played))


class Places:
    """Which episode is where: those that wait for a place, those that are played, and what became of the others."""

    def __init__(
        self,
        pool: EnvPool,
        episodes: Sequence[Episode],
        make_trajectory: Callable[[Live, StopReason, str | None], Trajectory],
        clock: Clock,
        bar: Bar,
    ):
        self.pool, self.make_trajectory, self.clock, self.bar = pool, make_trajectory, clock, bar
        self.waiting = deque(enumerate(episodes))
        self.free = list(range(len(pool.workers)))[::-1]
        self.live: dict[int, Live] = {}
        self.finished: list[Trajectory | None] = [None] * len(episodes)

    def fill(self) -> bool:
        """Begin what finds a place. Whether anything is played."""
        while self.waiting and self.free:
            self._begin(self.free.pop(), *self.waiting.popleft())
        return bool(self.live)

    def _begin(self, slot: int, index: int, episode: Episode, start: int = 0) -> None:
        luck = [episode.seed % 2**32, *episode.luck]
        luck += [start // STARTS] if start >= STARTS else []
        chance = random.Random(str([int(part) for part in luck]))
        # NumPy pads seeds with zeros: luck of zeros, however many, would be the environment's own, and guess its draws
        rng = np.random.default_rng(luck if any(luck[1:]) else [luck[0], OWN])
        self.live[slot] = Live(slot, index, episode, rng, chance, self.bar.turn, start)
        self.pool.reset(slot, episode.seed, copy.deepcopy(episode.options))  # it may be begun again

    def end(self, live: Live, end: End | None) -> None:
        """Free the place of an episode that is over, unless another from its seed is to be played in it."""
        if end is None:
            return
        del self.live[live.slot]
        stop = end.stop
        if isinstance(stop, Fault):
            faults = self.clock.faults
            faults.add(stop, f"seed {live.episode.seed}, turn {len(live.turns)}: {end.error}")
            faults.retried += live.start == 0
            faults.replaced += live.start == STARTS - 1
            if live.start + 1 < STARTS * (1 + REPLACEMENTS):
                self.pool.renew(live.slot)
                return self._begin(live.slot, live.index, live.episode, live.start + 1)
            stop = stop.stop
        self.free.append(live.slot)
        self.finished[live.index] = self.make_trajectory(live, stop, end.error)
        self.bar.episode()
