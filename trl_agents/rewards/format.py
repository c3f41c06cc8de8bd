# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rewards for the form of a reply: reasoning and answer in their tags, or an answer after its trigger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .completions import completion_texts, variant_name


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
REFT_TRIGGER = "Therefore, the answer is:"


def think_answer_format_reward(completions: list[str] | list[list[dict[str, Any]]], **kwargs) -> list[float]:
    r"""
    Reward function for the form of R1-Zero (https://huggingface.co/papers/2501.12948): 1 if the whole text is
    `<think>...</think>` and then `<answer>...</answer>`, else 0.

    Each tag stands there exactly once, neither pair is empty, and only whitespace is before, between and after them.
    Against open-r1's regular expression: newlines around the tags are not required, text on a new line after
    `</answer>` fails (its `$` took the end of any line for the end of the text), and so do repeated tags and empty
    pairs, which are the cheap ways to earn a reward for form.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            What the model wrote.
        **kwargs:
            The dataset's columns, which this function does not use.

    Example:
    ```python
    >>> from trl_agents.rewards import think_answer_format_reward

    >>> text = "<think>\n2 + 2 = 4\n</think>\n<answer>\n4\n</answer>"
    >>> think_answer_format_reward([text, text + "\nIndeed."])
    [1.0, 0.0]
    ```
    """
    return _ThinkAnswerFormatReward()(completions, **kwargs)


def get_think_answer_format_reward(prefilled: bool = False) -> Callable:
    """
    Returns a variant of [`think_answer_format_reward`].

    Args:
        prefilled (`bool`, *optional*, defaults to `False`):
            Whether the prompt already ends in `<think>`, as with the chat templates of some distilled models: the
            completion then must not open it again. The completion alone cannot tell.
    """
    return _ThinkAnswerFormatReward(prefilled)


@dataclass(frozen=True)
class _ThinkAnswerFormatReward:
    prefilled: bool = False

    @property
    def __name__(self) -> str:
        return variant_name("think_answer_format_reward", **({"prefilled": True} if self.prefilled else {}))

    def __call__(self, completions, **kwargs) -> list[float]:
        opening = TAGS[0] if self.prefilled else ""
        return [float(_is_think_answer(opening + text)) for text in completion_texts(completions)]


def _is_think_answer(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    parts, rest = [], text
    for tag in TAGS:
        part, found, rest = rest.partition(tag)
        if not found:  # out of order
            return False
        parts.append(part.strip())
    before, thought, between, answer = parts
    return bool(thought and answer) and not (before or between or rest.strip())


def tag_count_reward(completions: list[str] | list[list[dict[str, Any]]], **kwargs) -> list[float]:
    """
    Reward function with a quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that stands in the text
    exactly once. A slope towards [`think_answer_format_reward`], which sees order and content.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            What the model wrote.
        **kwargs:
            The dataset's columns, which this function does not use.
    """
    return _TagCountReward()(completions, **kwargs)


def get_tag_count_reward(prefilled: bool = False) -> Callable:
    """
    Returns a variant of [`tag_count_reward`].

    Args:
        prefilled (`bool`, *optional*, defaults to `False`):
            Whether the prompt already ends in `<think>`: its quarter is then for not opening it again.
    """
    return _TagCountReward(prefilled)


@dataclass(frozen=True)
class _TagCountReward:
    prefilled: bool = False

    @property
    def __name__(self) -> str:
        return variant_name("tag_count_reward", **({"prefilled": True} if self.prefilled else {}))

    def __call__(self, completions, **kwargs) -> list[float]:
        opening = TAGS[0] if self.prefilled else ""
        texts = [opening + text for text in completion_texts(completions)]
        return [sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS) for text in texts]


def trigger_format_reward(completions: list[str] | list[list[dict[str, Any]]], **kwargs) -> list[float]:
    """
    Reward function for the form of ReFT (https://huggingface.co/papers/2401.08967): 1 if "Therefore, the answer is:"
    stands in the text exactly once, in that spelling, and its last line is what follows, else 0. An answer holds at
    least one letter or digit.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            What the model wrote.
        **kwargs:
            The dataset's columns, which this function does not use.
    """
    return _TriggerFormatReward()(completions, **kwargs)


def get_trigger_format_reward(trigger: str = REFT_TRIGGER) -> Callable:
    """
    Returns a variant of [`trigger_format_reward`].

    Args:
        trigger (`str`, *optional*, defaults to `"Therefore, the answer is:"`):
            What announces the answer.
    """
    if not isinstance(trigger, str) or not trigger.strip():
        raise ValueError(f"`trigger` is a text that announces the answer, got {trigger!r}: pass {REFT_TRIGGER!r}.")
    return _TriggerFormatReward(trigger.strip())


@dataclass(frozen=True)
class _TriggerFormatReward:
    trigger: str = REFT_TRIGGER

    @property
    def __name__(self) -> str:
        changed = {} if self.trigger == REFT_TRIGGER else {"trigger": self.trigger}
        return variant_name("trigger_format_reward", **changed)

    def __call__(self, completions, **kwargs) -> list[float]:
        return [float(self._fits(text)) for text in completion_texts(completions)]

    def _fits(self, text: str) -> bool:
        if text.count(self.trigger) != 1:
            return False
        answer = text.partition(self.trigger)[2].strip()
        return "\n" not in answer and any(char.isalnum() for char in answer)
