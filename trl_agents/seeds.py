# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Which episodes are for what: seeds that never meet, as the same seed is the same episode.

Training counts from 0 (`num_train_seeds`). What is learnt from beforehand, what checkpoints are chosen by and what is
reported begin far behind.
"""

from __future__ import annotations


TRANSCRIPTS, EXPERTS, VALIDATION, HELD_OUT = 500_000_000, 600_000_000, 750_000_000, 1_000_000_000
LAST = 2**31  # the largest that every environment takes


def transcript_seeds(n: int, seed: int = 0) -> range:
    """Seeds for `n` episodes that warm a model up; others for another `seed`."""
    return _block(TRANSCRIPTS, EXPERTS, n, seed)


def expert_seeds(n: int, seed: int = 0) -> range:
    """Seeds for `n` of an expert's episodes, none of which training or evaluation meets; others for another `seed`."""
    return _block(EXPERTS, VALIDATION, n, seed)


def validation_seeds(n: int) -> range:
    """Seeds for `n` episodes during training, apart from [`held_out_seeds`]: checkpoints may be chosen by them."""
    return _block(VALIDATION, HELD_OUT, n)


def held_out_seeds(n: int) -> range:
    """Seeds for `n` episodes that results are reported of."""
    return _block(HELD_OUT, LAST, n)


def _block(start: int, end: int, n: int, number: int = 0) -> range:
    """The block `number` of `n` seeds before `end`. Blocks behind the last begin anew: they must not reach others."""
    if n > end - start:
        raise ValueError(f"{n} episodes are more than there are seeds for: {end - start} at most.")
    first = start + number % max((end - start) // max(n, 1), 1) * n
    return range(first, first + n)
