# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Multiple choice: which letter a text answers, and the reward for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .answers import WRAPPERS, check_trigger, find_answer, spoken_text
from .completions import answer_column, completion_texts, variant_name


_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}
_GAP = r"[^\S\n]{0,4}"
# A letter ends at punctuation or at the end of its line. Before a word it is a word itself: "a dog", "I think".
_ENDS = rf"""(?={_GAP}(?:\Z|\n|[)\]}}>:,;*"”`$|]|[.'’!?_-](?!\w)|\\[)\]}}]|</)|[^\S\n]{{1,4}}\()"""
_LETTER = rf"{WRAPPERS}(?:(?:the\s)?(?:(?i:option|choice|answer))[\s:]++)?+{WRAPPERS}([A-Za-z]){_ENDS}"
_STATED = re.compile(_LETTER)
_AND_ANOTHER = re.compile(
    rf"""[)\]}}>.*"'`]{{0,4}}{_GAP}(?:[,;/&|]{_GAP}(?:(?:or|and)[^\S\n]{{1,4}})?|(?:or|and)[^\S\n]{{1,4}}){_LETTER}"""
)
_REST = re.compile(r"""(?:[\s).,:\]}>*_"'`”’$]|\\[)\]}])*+""")


def find_choice(text: str, trigger: str | Sequence[str] | None = None) -> str | None:
    r"""
    Returns the letter that `text` answers, as a capital, or `None`.

    After a trigger (see [`find_answer`]) the letter must come first; without one it must be the whole text.

    | Answer | Choice |
    |---|---|
    | `c`, `C`, `c )`, `(c)`, `c.`, `**C**`, `\text{C}`, `Ｃ` | C |
    | `option c`, `choice (C)` | C |
    | `C) 120 km`, `C: 120`, `C, because ...`, `C. As for A, ...` | C |
    | `Because`, `cat`, `C3` | None: no letter by itself |
    | `a dog`, `I think so`, `C because ...` | None: before a word, a letter may be a word |
    | `C or D`, `C, D`, `(C) and (D)`, `A B C D` | None: different letters |
    | `C, C` | C |
    | two triggers | the last one's |
    | no trigger, `I take C` | None |

    Args:
        text (`str`):
            What the model wrote. Any string will do.
        trigger (`str` or `list[str]`, *optional*):
            What announces the answer, see [`find_answer`].
    """
    stated = find_answer(text, trigger)
    if stated is not None:
        return _read(stated)
    reply = spoken_text(text).strip().translate(_FULL_WIDTH)
    found = _STATED.match(reply)
    return found[1].upper() if found and _REST.fullmatch(reply, found.end()) else None


def _read(stated: str) -> str | None:
    stated = stated.translate(_FULL_WIDTH)
    if not (found := _STATED.match(stated)):
        return None
    letter = found[1].upper()
    while found := _AND_ANOTHER.match(stated, found.end()):
        if found[1].upper() != letter:
            return None
    return letter


def gold_choice(gold: Any) -> str | None:
    """Returns the letter of a correct answer, as a capital, or `None` if it is none."""
    return _read(gold) if isinstance(gold, str) else None


def choice_reward(
    completions: list[str] | list[list[dict[str, Any]]],
    answer: list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """
    Reward function for multiple choice: 1 if the completion answers the correct letter, else 0.

    There is nothing between: ReFT's code pays 0.1 for any text here, gibberish too, since its reading never fails. A
    policy that always answers one letter scores that letter's share of the answers; compare with it.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            What the model wrote: see [`find_choice`] for what is read.
        answer (`list[str]`):
            The dataset's column of correct letters, in either case, alone or with the option (`"c"`, `"(C)"`,
            `"c ) 120"`).
        log_extra (`callable`, *optional*):
            Provided by the trainer: shows the letters that were read in the table of completions.
        **kwargs:
            The dataset's other columns, which this function does not use.

    Returns:
        `list[float | None]`: one reward a completion; `None`, which TRL skips, where `answer` holds no letter.

    Example:
    ```python
    >>> from trl_agents.rewards import choice_reward

    >>> choice_reward(["The answer is (c)", "The answer is: b", "Because"], answer=["c", "c", "c"])
    [1.0, 0.0, 0.0]
    ```
    """
    return _ChoiceReward()(completions, answer, log_extra, **kwargs)


def get_choice_reward(trigger: str | Sequence[str] | None = None) -> Callable:
    """
    Returns a variant of [`choice_reward`].

    Args:
        trigger (`str` or `list[str]`, *optional*):
            What announces the answer, see [`find_answer`].
    """
    return _ChoiceReward(check_trigger(trigger))


@dataclass(frozen=True)
class _ChoiceReward:
    trigger: str | tuple[str, ...] | None = None

    @property
    def __name__(self) -> str:
        return variant_name("choice_reward", **({} if self.trigger is None else {"trigger": self.trigger}))

    def __call__(self, completions, answer=None, log_extra=None, **kwargs) -> list[float | None]:
        texts = completion_texts(completions)
        golds = [gold_choice(gold) for gold in answer_column(self.__name__, texts, answer)]
        letters = [find_choice(text, self.trigger) for text in texts]
        if log_extra is not None:
            log_extra(f"{self.__name__}_read", [letter or "[none]" for letter in letters])
        return [None if gold is None else float(letter == gold) for letter, gold in zip(letters, golds, strict=True)]
