# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What TRL hands a reward function, as plain lists: texts, columns, and the name a variant is logged under."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """
    Returns the text of each completion: a string as it is, of a conversation the last message (the one that answers,
    after tool calls). Parts that are no text, and messages without content, read as nothing.
    """
    if isinstance(completions, (str, bytes, dict)) or not hasattr(completions, "__iter__"):
        raise ValueError(
            f"`completions` is a list with one completion a row, got {type(completions).__name__}: wrap it in a list."
        )
    return [_text(completion) for completion in completions]


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if completion is None:
        return ""
    if isinstance(completion, dict):
        completion = [completion]
    if not isinstance(completion, (list, tuple)):
        raise ValueError(
            f"A completion is a string or a list of messages, got {type(completion).__name__}: decode token ids first."
        )
    message = completion[-1] if completion else {}
    content = message.get("content") if isinstance(message, dict) else message
    if isinstance(content, (list, tuple)):  # parts: {"type": "text", "text": ...}, images, plain strings
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def answer_column(reward: str, completions: Sequence[Any], answer: Any) -> list[Any]:
    """Returns the `answer` column, one gold answer for each completion, or tells how to get one."""
    if answer is None:
        raise ValueError(
            f"`{reward}` needs the correct answers, but the dataset has no column `answer`: rename the one it has, as "
            "in `dataset.rename_column('solution', 'answer')`."
        )
    if isinstance(answer, (str, bytes)) or not hasattr(answer, "__len__"):
        raise ValueError(f"`answer` is a list with one answer a completion, got {answer!r}: pass [{answer!r}].")
    if len(answer) != len(completions):
        raise ValueError(
            f"`{reward}` got {len(completions)} completions and {len(answer)} answers: pass one answer a completion "
            "(repeat it for each generation of a prompt)."
        )
    return list(answer)


def variant_name(name: str, **settings: Any) -> str:
    """
    Returns `name` and what was changed, such as `numeric_reward_partial_0`: TRL logs by it, and would mix two variants
    of one name. Letters, digits, `_`, `.` and `-` only, which every tracker takes.
    """
    for key, value in settings.items():
        if value is True:
            name += f"_{key}"
        elif isinstance(value, (int, float)):
            name += f"_{key}_{value:g}"
        else:
            value = value if isinstance(value, str) else "_".join(map(str, value))
            name += f"_{key}_" + re.sub(r"[^A-Za-z0-9]+", "_", value).strip("_").lower()[:32]
    return name.replace("+", "").rstrip("_")
