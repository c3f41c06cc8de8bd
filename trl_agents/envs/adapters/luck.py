# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Chance for environments that draw it from the global generators of Python and NumPy."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


# How long one environment waits while the same other one draws, in seconds. One that hangs while it draws takes its
# neighbours' next answers with it, but it must not keep them for ever.
PATIENCE = 60.0

_drawing = threading.RLock()
_begun = 0.0  # when the one that draws began to


@contextmanager
def own_luck(*key: int) -> Iterator[None]:
    """
    Within it, the global generators are seeded with `key`; afterwards they go on as if nothing had been drawn.

    One thread at a time: environments play side by side, and there is only one pair of global generators. Keep out of
    it what takes long and draws nothing, such as an opponent's move. (A thread that draws from the global generators
    without it, at the same time, still disturbs both sides.)

    Args:
        *key (`int`):
            Says which luck: an episode's own number, and how many calls it has seen.
    """
    global _begun
    waiting = time.monotonic()
    while not _drawing.acquire(timeout=max(max(_begun, waiting) + PATIENCE - time.monotonic(), 0.0)):
        if time.monotonic() - max(_begun, waiting) >= PATIENCE:  # else it is another's turn by now: many draw slowly
            raise TimeoutError(
                f"For {PATIENCE:.0f} s another environment has been drawing from the global random generators. It may "
                "hang: set `env_timeout`."
            )
    _begun = time.monotonic()
    try:
        before = random.getstate(), np.random.get_state()
        random.seed(repr(key))
        np.random.seed(random.getrandbits(32))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
    finally:
        _drawing.release()


def episode_luck(seed: int | None) -> int:
    """The number that fixes an episode's chance: from its seed, or a new one each time."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
