# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""reasoning-gym's questions as episodes of one step."""

from __future__ import annotations

import string
from typing import Any

from .evaluated import UNREADABLE, evaluates, harmless
from .luck import episode_luck, own_luck
from .suites import how_to_answer, import_suite, unknown_id


_HOW = how_to_answer("your final answer, in the form that the question asks for, on one line")

_BEFORE = string.whitespace + "\"'`*~([{<"
_AFTER = string.whitespace + "\"'`*~)]}>" + ".,;:!?"


class ReasoningGymQuestion:
    """
    Questions of a reasoning-gym dataset: `"reasoning_gym:countdown"`. An episode is one question and one answer, a
    seed is one question. The reward is reasoning-gym's own score of the answer, from 0 to 1, partial scores included.

    Any text may be answered, so nothing can be played in place of a missing answer: a reply without one ends the
    episode (or `invalid_action="retry"`). Answers of several lines need a parser of their own, such as
    `ActionParser(r"(?s)<answer>(.*?)</answer>")`, and a `how_to_answer` that asks for it.

    Some datasets' graders evaluate answers as Python. They are given only what is no program and computes nothing
    that is huge ([`~evaluated.harmless`]); any other answer is unreadable.

    Args:
        dataset (`str`):
            Its name in reasoning-gym.
        partial_scores (`bool`, *optional*, defaults to `True`):
            Whether an answer that is partly right gets reasoning-gym's partial score, or 0. (Many datasets give a
            little to any answer.)
        how_to_answer (`str`, *optional*):
            The instructions, which the question follows.
        **config:
            Settings of the dataset, such as its difficulty.
    """

    def __init__(self, dataset: str, *, partial_scores: bool = True, how_to_answer: str | None = None, **config: Any):
        self._suite = import_suite("reasoning_gym")
        known = import_suite("reasoning_gym.factory").DATASETS
        if dataset not in known:
            raise unknown_id("reasoning-gym", dataset, known)
        self.name, self.config, self.partial_scores = dataset, config, partial_scores
        self.instructions = _HOW if how_to_answer is None else how_to_answer
        self._entry: dict[str, Any] | None = None
        self.dataset = self._make(0)  # a setting that the dataset does not take fails here
        self._evaluates = evaluates(self.dataset.score_answer)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        luck = episode_luck(seed)
        with own_luck(luck):  # some datasets draw from the global generators as well
            self.dataset = self._make(luck)
            self._entry = self.dataset[0]
        return self._entry["question"], {"answer": self._entry["answer"]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._entry is None:
            raise ValueError("No question is open. Call reset() before step(): an episode has one step.")
        entry, self._entry = self._entry, None
        score = max(self._score(answer, entry) for answer in _spellings(action, entry["answer"]))
        reward = score if self.partial_scores else float(score >= 1.0)
        return f"Score: {reward:.3g}", reward, True, False, {"answer": entry["answer"], "score": score}

    def close(self) -> None:
        self._entry = None

    def _make(self, seed: int) -> Any:
        try:
            return self._suite.create_dataset(self.name, **{"size": 1, **self.config, "seed": seed})
        except AssertionError as error:
            raise ValueError(f"reasoning-gym does not take {self.config!r} for {self.name!r}: {error}") from error

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        if self._evaluates and answer != entry["answer"] and not harmless(answer):
            answer = UNREADABLE
        try:
            return float(self.dataset.score_answer(answer, entry))
        except Exception:  # some graders raise on answers that they cannot read: those are wrong
            return 0.0


def _spellings(action: str, expected: Any) -> list[str]:
    """
    The answer, and with the brackets, quotes and stops around it that [`ActionParser`] takes off, where one is
    expected. Nothing else is forgiven: a sign, say, is part of an answer.
    """
    if not isinstance(expected, str) or not (bare := _bare(expected)):
        return [action]
    before, _, after = expected.partition(bare)
    return [action, f"{before}{_bare(action)}{after}"]


def _bare(answer: str) -> str:
    return answer.lstrip(_BEFORE).rstrip(_AFTER)
