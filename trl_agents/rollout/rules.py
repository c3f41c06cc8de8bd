# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is played, and by which rules."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any


INVALID_ACTION_CHOICES = ("random", "retry", "end")


@dataclass(frozen=True, slots=True)
class Episode:
    """
    An episode to be played.

    Args:
        seed (`int`):
            What the environment is reset with.
        luck (`tuple[int, ...]`, *optional*):
            Seeds the model's own luck (sampling, and the actions played in place of invalid ones): episodes that
            share `seed` differ by it.
        options (`dict`, *optional*):
            Passed on to the environment's `reset`.
    """

    seed: int
    luck: tuple[int, ...] = ()
    options: dict[str, Any] | None = None

    def __post_init__(self):
        try:
            object.__setattr__(self, "seed", operator.index(self.seed))  # a tensor, in a dataset's other formats
        except TypeError:
            raise ValueError(
                f"seed={self.seed!r} is no whole number: give each episode one, in a dataset each row of its column "
                "'seed'."
            ) from None


@dataclass(frozen=True, slots=True)
class Rules:
    """
    What holds for every episode.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Token budget of one reply.
        max_length (`int`, *optional*):
            Most tokens a prompt and its reply may have together; an episode that outgrows it is truncated.
        max_turns (`int`, *optional*):
            Most turns of an episode. Without it, one that goes on for 10,000 is an error.
        invalid_action (`str`, *optional*, defaults to `"random"`):
            What a reply without a legal action leads to: `"random"` plays a random legal action (and ends the episode
            where the environment lists none), `"retry"` asks again, `"end"` ends the episode.
        invalid_action_penalty (`float`, *optional*, defaults to `-5.0`):
            Added to the reward of the turn.
        max_retries (`int`, *optional*, defaults to `2`):
            How often one step is asked again before `"retry"` ends the episode.
        action_stop (`bool`, *optional*, defaults to `False`):
            Whether a reply is over as soon as it states a legal action (see [`ActionParser.is_complete`]) in its last
            64 tokens. The first such statement is then the one that counts, and no token that ends a reply is sampled
            or learnt.
    """

    max_new_tokens: int = 256
    max_length: int | None = None
    max_turns: int | None = None
    invalid_action: str = "random"
    invalid_action_penalty: float = -5.0
    max_retries: int = 2
    action_stop: bool = False

    def __post_init__(self):
        if self.invalid_action not in INVALID_ACTION_CHOICES:
            raise ValueError(
                f"invalid_action={self.invalid_action!r} is unknown: choose one of "
                f"{', '.join(INVALID_ACTION_CHOICES)}."
            )
        if self.max_retries < 0:
            raise ValueError(f"max_retries={self.max_retries!r}: give 0 or more.")
        for name in ("max_new_tokens", "max_length", "max_turns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} leaves no room to act: give a positive number.")
