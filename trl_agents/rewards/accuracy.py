# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""R1's accuracy reward: is the stated answer the correct one? By math_verify, or by numbers and strings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .answers import find_answer, find_number, numbers_equal, spoken_text
from .completions import answer_column, completion_texts, variant_name
from .numeric import gold_number
from .symbolic import MAX_ANSWER, compare_symbolically, has_math_verify


VERIFIERS = ("auto", "math_verify", "number")

_EXTRA = "pip install trl-agents[math]"
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_TOLERANCE = 1e-6  # math_verify compares six decimals
_EDGES = " \t\n.,;:!?*_`\"'“”‘’()[]{}<>$\\"


def accuracy_reward(
    completions: list[str] | list[list[dict[str, Any]]],
    answer: list[str | float] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function of R1 (https://huggingface.co/papers/2501.12948): 1 if the stated answer is the correct one, else
    0. The answer is what [`find_answer`] finds (the last `<answer>`, `\boxed{}`, "The answer is"), else the whole text
    without its reasoning.

    TRL's `accuracy_reward` for a column `answer`, and for answers in tags or plain words, which need no LaTeX here.
    It compares with math_verify if that is installed. If not, it warns once and compares as `verify="number"` does,
    see [`get_accuracy_reward`]: choose one there if runs on several machines must agree.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            What the model wrote.
        answer (`list[str]` or `list[float]`):
            The dataset's column of correct answers.
        log_extra (`callable`, *optional*):
            Provided by the trainer: shows the answers that were read in the table of completions.
        **kwargs:
            The dataset's other columns, which this function does not use.

    Returns:
        `list[float | None]`: one reward a completion; `None`, which TRL skips, where `answer` cannot be read.

    Example:
    ```python
    >>> from trl_agents.rewards import accuracy_reward

    >>> accuracy_reward(["<answer>0.5</answer>", r"\boxed{\frac{1}{2}}", "I do not know."], answer=["1/2"] * 3)
    [1.0, 1.0, 0.0]
    ```
    """
    return _AccuracyReward()(completions, answer, log_extra, **kwargs)


def get_accuracy_reward(verify: str = "auto") -> Callable:
    """
    Returns [`accuracy_reward`] with a comparison of your choice.

    Args:
        verify (`str`, *optional*, defaults to `"auto"`):
            How answers are compared.

            - `"math_verify"`: symbolically, as in TRL's `accuracy_reward`, with its timeouts (10 s to parse, 5 s to
              compare). They need a main thread: what other threads ask is answered by a process of its own (Linux and
              macOS; elsewhere without a timeout). A correct answer that math_verify cannot parse gets `None`: words,
              and formulas outside `$...$`. Stated answers of over 500 characters or 16 nested brackets are wrong
              unread.
            - `"number"`: if the correct answer is a number, by [`numbers_equal`] to 1e-6; else as strings, without
              case, punctuation at the ends, and runs of whitespace. Needs nothing installed.
            - `"auto"`: the first where math_verify is installed, else the second, with a warning.
    """
    if verify not in VERIFIERS:
        raise ValueError(f"`verify` is one of {list(VERIFIERS)}, got {verify!r}.")
    if verify == "math_verify" and not has_math_verify():
        raise ValueError(f"`verify='math_verify'` needs math_verify: `{_EXTRA}`, or pass `verify='number'`.")
    return _AccuracyReward(verify)


@dataclass(frozen=True)
class _AccuracyReward:
    verify: str = "auto"

    @property
    def __name__(self) -> str:
        return variant_name("accuracy_reward", **({} if self.verify == "auto" else {"verify": self.verify}))

    def __call__(self, completions, answer=None, log_extra=None, **kwargs) -> list[float | None]:
        texts = completion_texts(completions)
        golds = answer_column(self.__name__, texts, answer)
        symbolic = self.verify == "math_verify" or (self.verify == "auto" and _math_verify_or_warning())
        compare = compare_symbolically if symbolic else _compare_plainly
        rewards = [compare(text, gold) for text, gold in zip(texts, golds, strict=True)]
        if log_extra is not None:
            log_extra(f"{self.__name__}_read", [_answer_of(text)[:MAX_ANSWER] or "[none]" for text in texts])
        return rewards


@lru_cache(maxsize=1)  # once a process
def _math_verify_or_warning() -> bool:
    found = has_math_verify()
    if not found:
        warnings.warn(
            "math_verify is not installed, so `accuracy_reward` compares numbers and strings: 'x+1' and '1+x' differ. "
            f"`{_EXTRA}` to compare symbolically, or pass `get_accuracy_reward(verify='number')` to say that you "
            "mean it.",
            stacklevel=4,
        )
    return found


def _answer_of(text: str) -> str:
    stated = find_answer(text)
    return spoken_text(text).strip() if stated is None else stated


# -- numbers and strings ----------------------------------------------------------------------------------------------


def _compare_plainly(text: str, gold: Any) -> float | None:
    number = gold_number(gold)
    if number is not None:
        found = find_number(text)
        return float(found is not None and numbers_equal(found, number, _TOLERANCE))
    expected = _normalised(_answer_of(gold)) if isinstance(gold, str) else ""
    return float(_normalised(_answer_of(text)) == expected) if expected else None


def _normalised(answer: str) -> str:
    return " ".join(_LATEX_TEXT.sub(r"\1", answer).strip(_EDGES).casefold().split())
