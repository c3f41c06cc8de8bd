# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Gymnasium spaces for actions that are words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Text


class Labels(Text):
    """
    Text that is one of a few labels.

    A plain [`~gymnasium.spaces.Text`] samples random letters; `sample` here draws a label, so that Gymnasium's
    `env.step(env.action_space.sample())` plays a legal action.

    Args:
        labels (`Sequence[str]`):
            The members of the space.
        seed (`int` or `numpy.random.Generator`, *optional*):
            Seeds the sampling.
    """

    def __init__(self, labels: Sequence[str], seed: int | np.random.Generator | None = None):
        self.labels = tuple(labels)
        charset = "".join(sorted(set("".join(self.labels))))
        super().__init__(max(map(len, self.labels)), charset=charset, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is not None or probability is not None:
            raise ValueError("Labels samples uniformly; leave `mask` and `probability` out.")
        return self.labels[self.np_random.integers(len(self.labels))]

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and x in self.labels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self.labels == other.labels

    def __repr__(self) -> str:
        return f"Labels({', '.join(self.labels)})"
