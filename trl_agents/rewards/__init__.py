# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rewards in TRL's form, `reward(completions, <dataset columns>, **kwargs)`, for any of its trainers. Text only."""

from typing import TYPE_CHECKING


# Loaded when first used, as at the package's top.
_EXPORTS = {
    "Grading": "grading",
    "ProgramRunner": "programs",
    "accuracy_reward": "accuracy",
    "choice_reward": "choice",
    "find_answer": "answers",
    "find_choice": "choice",
    "find_number": "answers",
    "get_accuracy_reward": "accuracy",
    "get_choice_reward": "choice",
    "get_numeric_reward": "numeric",
    "get_program_reward": "programs",
    "get_tag_count_reward": "format",
    "get_think_answer_format_reward": "format",
    "get_trigger_format_reward": "format",
    "numbers_equal": "answers",
    "numeric_reward": "numeric",
    "program_reward": "programs",
    "tag_count_reward": "format",
    "think_answer_format_reward": "format",
    "trigger_format_reward": "format",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from .accuracy import accuracy_reward as accuracy_reward
    from .accuracy import get_accuracy_reward as get_accuracy_reward
    from .answers import find_answer as find_answer
    from .answers import find_number as find_number
    from .answers import numbers_equal as numbers_equal
    from .choice import choice_reward as choice_reward
    from .choice import find_choice as find_choice
    from .choice import get_choice_reward as get_choice_reward
    from .format import get_tag_count_reward as get_tag_count_reward
    from .format import get_think_answer_format_reward as get_think_answer_format_reward
    from .format import get_trigger_format_reward as get_trigger_format_reward
    from .format import tag_count_reward as tag_count_reward
    from .format import think_answer_format_reward as think_answer_format_reward
    from .format import trigger_format_reward as trigger_format_reward
    from .grading import Grading as Grading
    from .numeric import get_numeric_reward as get_numeric_reward
    from .numeric import numeric_reward as numeric_reward
    from .programs import ProgramRunner as ProgramRunner
    from .programs import get_program_reward as get_program_reward
    from .programs import program_reward as program_reward


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
