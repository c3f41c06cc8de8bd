# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One way of reading answers, for rewards, accuracy and votes alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .answers import find_number, numbers_equal
from .choice import find_choice, get_choice_reward, gold_choice
from .numeric import get_numeric_reward, gold_number


STYLES = ("words", "program")


@dataclass(frozen=True)
class Grading:
    """
    How the answers to a dataset's questions are read and judged.

    Args:
        style (`str`, *optional*, defaults to `"words"`):
            `"words"`: the completion states its answer. `"program"`: it is a program, whose result is the answer (run
            as [`ProgramRunner`] does).
        choice (`bool`, *optional*, defaults to `False`):
            Whether answers are letters of a multiple choice instead of numbers.
        partial (`float`, *optional*, defaults to `0.1`):
            Reward of a wrong number (ReFT). Letters get none: every text with a letter would be paid.
    """

    style: str = "words"
    choice: bool = False
    partial: float = 0.1

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"style={self.style!r} is unknown: choose one of {', '.join(STYLES)}.")
        _ = self.reward  # refuses a `partial` it cannot use, now and not after hours

    @classmethod
    def of(cls, answers: Mapping[str, Sequence[str]], **settings: Any) -> Grading:
        """
        How to grade a dataset: by letters if all its answers are letters, else by numbers. Tells of answers that
        cannot be read, as `check_answers` does.

        Args:
            answers (`Mapping[str, Sequence[str]]`):
                The correct answers of each split; those of the first one decide.
            **settings:
                The other arguments.
        """
        first = next(iter(answers.values()))
        grading = cls(choice=all(len(answer) == 1 and answer.isalpha() for answer in first), **settings)
        for split, own in answers.items():
            grading.check_answers(own, split)
        return grading

    @property
    def reward(self) -> Callable:
        """The reward function, in TRL's form."""
        if self.style == "program":
            from .programs import get_program_reward

            return get_program_reward(partial=0.0 if self.choice else self.partial, multiple_choice=self.choice)
        return get_choice_reward() if self.choice else get_numeric_reward(partial=self.partial)

    def check_answers(self, answers: Sequence[str], split: str = "train") -> None:
        """
        Tells of correct answers that cannot be read, to which no answer is ever right: a warning, or a `ValueError` if
        there are no others.

        Args:
            answers (`Sequence[str]`):
                The dataset's correct answers.
            split (`str`, *optional*, defaults to `"train"`):
                Where they are from, for the message.
        """
        unread = [answer for answer in answers if (gold_choice if self.choice else gold_number)(answer) is None]
        if not unread:
            return
        told = f"{split}: {len(unread)} of {len(answers)} correct answers are no "
        told += "letter" if self.choice else "number"
        told = f"{told}, {unread[0]!r} among them: leave such rows out."
        if len(unread) == len(answers):
            raise ValueError(told)
        warnings.warn(told, stacklevel=2)

    def read(self, completions: Sequence[str], prompts: Sequence[str]) -> list[float | str | None]:
        """
        The answer that each completion gives; None for none.

        Args:
            completions (`Sequence[str]`):
                What the model wrote.
            prompts (`Sequence[str]`):
                What it was asked, one for each: programs begin there.
        """
        if self.style == "words":
            if not self.choice:
                return [find_number(text) for text in completions]
            return [None if letter is None else letter.lower() for letter in map(find_choice, completions)]
        from .programs import program_of, shared_runner

        programs = [program_of(text, prompt) for text, prompt in zip(completions, prompts, strict=True)]
        values = [result.value for result in shared_runner().run(programs)]
        if self.choice:
            return [None if value is None else str(value).strip().strip("'\"").lower() for value in values]
        return [gold_number(value) for value in values]

    def is_correct(self, read: float | str | None, answer: str) -> bool:
        """Whether what was read is the dataset's `answer`."""
        if read is None:
            return False
        if self.choice:
            letter = gold_choice(answer)
            return letter is not None and read == letter.lower()
        gold = gold_number(answer)
        return gold is not None and numbers_equal(read, gold)
