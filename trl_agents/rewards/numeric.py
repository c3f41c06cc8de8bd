# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""ReFT's reward: 1 for the right number, a little for any number, 0 for none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from numbers import Real
from typing import Any

from .answers import check_trigger, find_number, numbers_equal
from .completions import answer_column, completion_texts, variant_name


def numeric_reward(
    completions: list[str] | list[list[dict[str, Any]]],
    answer: list[str | float] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """
    Reward function of ReFT (https://huggingface.co/papers/2401.08967): 1 if the completion states the correct number,
    0.1 if it states another one, 0 if it states none.

    The 0.1 is paid for any wrong number, near or far. It is on top of the share of correct answers in TRL's
    `rewards/numeric_reward/mean`; for that share alone, add `get_numeric_reward(partial=0)` with weight 0.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            What the model wrote: see [`find_number`] for what is read.
        answer (`list[str]` or `list[float]`):
            The dataset's column of correct answers, read as completions are (`"1,234"`, also GSM8K's `"... #### 72"`).
        log_extra (`callable`, *optional*):
            Provided by the trainer: shows the numbers that were read in the table of completions.
        **kwargs:
            The dataset's other columns, which this function does not use.

    Returns:
        `list[float | None]`: one reward a completion; `None`, which TRL skips, where `answer` holds no number.

    Example:
    ```python
    >>> from trl_agents.rewards import numeric_reward

    >>> numeric_reward(["Therefore, the answer is: 10", "The answer is 11.", "I do not know."], answer=["10"] * 3)
    [1.0, 0.1, 0.0]
    ```
    """
    return _NumericReward()(completions, answer, log_extra, **kwargs)


def get_numeric_reward(
    partial: float = 0.1,
    tolerance: float = 1e-2,
    trigger: str | Sequence[str] | None = None,
    require_trigger: bool = False,
    last_number: bool = False,
) -> Callable:
    """
    Returns a variant of [`numeric_reward`]. Its name, by which TRL logs it, holds what differs from the default, as in
    `numeric_reward_partial_0`.

    Args:
        partial (`float`, *optional*, defaults to `0.1`):
            Reward of a wrong number, from 0 (off) to less than 1.
        tolerance (`float`, *optional*, defaults to `1e-2`):
            How far apart equal numbers may be, see [`numbers_equal`].
        trigger (`str` or `list[str]`, *optional*):
            What announces the answer, see [`find_answer`].
        require_trigger (`bool`, *optional*, defaults to `False`):
            Whether a text without a trigger answers nothing, even if it is just a number.
        last_number (`bool`, *optional*, defaults to `False`):
            Whether the last number of a text without a trigger is its answer.
    """
    if not 0 <= partial < 1:
        raise ValueError(
            f"`partial` must lie between 0 and less than 1, the reward of a correct answer, got {partial}: pass for "
            "example 0.1, or 0 to reward correct answers only."
        )
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` must be finite and not negative, got {tolerance}: pass for example 1e-2.")
    if require_trigger and last_number:
        raise ValueError(
            "`require_trigger=True` reads nothing in a text without a trigger, `last_number=True` its last number: "
            "choose one."
        )
    return _NumericReward(float(partial), float(tolerance), check_trigger(trigger), require_trigger, last_number)


@dataclass(frozen=True)
class _NumericReward:
    # A class, as TRL's own: a closure could not be pickled
    partial: float = 0.1
    tolerance: float = 1e-2
    trigger: str | tuple[str, ...] | None = None
    require_trigger: bool = False
    last_number: bool = False

    @property
    def __name__(self) -> str:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {field.name: settings[field.name] for field in fields(self) if settings[field.name] != field.default}
        return variant_name("numeric_reward", **changed)

    def __call__(self, completions, answer=None, log_extra=None, **kwargs) -> list[float | None]:
        texts = completion_texts(completions)
        golds = [gold_number(gold) for gold in answer_column(self.__name__, texts, answer)]
        options = {"require_trigger": self.require_trigger, "last_number": self.last_number}
        numbers = [find_number(text, self.trigger, **options) for text in texts]
        if log_extra is not None:
            # Two rewards that wrote one column would double its length
            log_extra(f"{self.__name__}_read", ["[none]" if number is None else str(number) for number in numbers])
        return [self._score(number, gold) for number, gold in zip(numbers, golds, strict=True)]

    def _score(self, number: float | None, gold: float | None) -> float | None:
        if gold is None:
            return None
        if number is None:
            return 0.0
        return 1.0 if numbers_equal(number, gold, self.tolerance) else self.partial


def gold_number(gold: Any) -> float | None:
    """Returns a correct answer as a number, or `None` if it is none."""
    if isinstance(gold, str):
        return find_number(gold)
    if isinstance(gold, bool) or not isinstance(gold, (Real, Decimal)):
        return None
    try:
        number = float(gold)
    except (OverflowError, ValueError):  # ValueError: a signalling NaN
        return None
    return number if math.isfinite(number) else None
