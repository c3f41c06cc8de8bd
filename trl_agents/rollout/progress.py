# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a rollout says of itself: where its time went, what failed, how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from ..types import ParsedAction
from .faults import FaultCounts


@dataclass(slots=True)
class Clock:
    """Where the time of a rollout went, in seconds, and its faults. Environments overlap: `env` may exceed `wall`."""

    wall: float = 0.0
    model: float = 0.0
    env: float = 0.0
    env_wait: float = 0.0  # nothing to decode: waiting for environments
    faults: FaultCounts = field(default_factory=FaultCounts)


class Bar:
    """Progress for people: episodes done, steps played, share of valid actions."""

    def __init__(self, total: int, enabled: bool, description: str):
        # Without `miniters` the bar would show turns only when an episode ends
        self.bar = tqdm(total=total, desc=description, unit="ep", leave=False, disable=not enabled, miniters=0)
        self.turns = self.valid = 0

    def turn(self, parsed: ParsedAction) -> None:
        self.turns += 1
        self.valid += parsed.is_valid
        if not self.bar.disable:
            self.bar.set_postfix(turns=self.turns, valid=f"{self.valid / self.turns:.0%}", refresh=False)
            self.bar.update(0)

    def episode(self) -> None:
        self.bar.update()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()


def open_bar(progress: bool | Callable[[int, str], Bar], total: int, description: str) -> Bar:
    """Progress of `total` episodes: by a bar, by none, or by what `progress(total, description)` returns."""
    return progress(total, description) if callable(progress) else Bar(total, progress, description)
