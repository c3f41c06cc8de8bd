# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The glossary: the frozen values that flow through the package. Standard library only.

environment -> text -> tokens -> `Turn` -> `Trajectory` -> returns -> advantages -> batch -> TRL's loss
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


ENDLESS = 10_000  # turns after which an episode that nothing limits is taken for one without an end


class InvalidReason(StrEnum):
    """Why a reply held no action. The values name the metrics `agents/invalid_<reason>`."""

    NO_MATCH = "no_match"  # no pattern matched anything in the text
    ILLEGAL = "illegal"  # a pattern matched, but what it captured is not a legal action
    CUT_OFF = "cut_off"  # nothing usable, and the reply ran into its token budget


class StopReason(StrEnum):
    """Why an episode ended. The values name the metrics `agents/stop_<reason>`."""

    TERMINATED = "terminated"  # the environment reached a terminal state: nothing follows, its value is 0
    TRUNCATED = "truncated"  # the environment's time limit: something would follow, bootstrap
    MAX_TURNS = "max_turns"  # our own limit on turns
    CONTEXT_FULL = "context_full"  # the next turn would not fit the model's positions or the completion budget
    INVALID_ACTION = "invalid_action"  # `invalid_action="end"` ended it, or the retries ran out
    ENV_ERROR = "env_error"  # the environment raised: the episode weighs nothing
    ENV_TIMEOUT = "env_timeout"  # the environment hung: the episode weighs nothing

    @property
    def is_fault(self) -> bool:
        """Whether the environment failed, so that nothing can be learnt from the episode."""
        return self in (StopReason.ENV_ERROR, StopReason.ENV_TIMEOUT)

    @property
    def is_terminal(self) -> bool:
        """Whether the value of what follows is 0. Anything else that is not a fault is a truncation."""
        return self in (StopReason.TERMINATED, StopReason.INVALID_ACTION)


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What [`ActionParser`] took out of a text: `action` as the environment spells it, or None and a `reason`."""

    action: str | None
    reason: InvalidReason | None = None
    matched: str | None = None  # the captured text before it was compared with the legal actions

    @property
    def is_valid(self) -> bool:
        return self.action is not None


@dataclass(frozen=True, slots=True)
class Turn:
    """
    One turn: what the model read, what it sampled, what the environment made of it.

    `input_ids` are the tokens read since the last sampled token if `appends`, else the whole prompt, rendered anew.
    `action_ids` are exactly the sampled tokens, the end-of-turn token included when it was sampled.
    """

    observation: str
    input_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    text: str
    parsed: ParsedAction
    executed: str | None  # what the environment was given; None: it was not stepped
    reward: float = 0.0  # the environment's own, raw
    penalty: float = 0.0  # shaping for an invalid action, at most 0
    bonus: float = 0.0  # shaping for exploring, in training; see `exploration.py`
    appends: bool = True
    logprobs: tuple[float, ...] | None = None  # of `action_ids` under the sampler, when the backend reports them
    cut_off: bool = False  # the reply ran into its token budget
    forced: bool = False  # an exploration mechanism wrote the reply, not the model
    drafts: tuple[str, ...] = ()  # other replies of the model to the same question, which were not played
    info: Mapping[str, Any] = field(default_factory=dict)  # the environment's, never shown to the model


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode. `seed` is what the environment was reset with: episodes that share it form a group."""

    seed: int
    turns: tuple[Turn, ...]
    stop: StopReason
    instructions: str = ""
    final_observation: str = ""
    final_ids: tuple[int, ...] = ()  # tokens it would have gone on with, where it was truncated and they fit
    reset_info: Mapping[str, Any] = field(default_factory=dict)
    env_seconds: float = 0.0  # time the environment worked for this episode
    error: str | None = None  # the environment's exception, when `stop.is_fault`

    @property
    def return_(self) -> float:
        """Undiscounted sum of the environment's own rewards, without penalties."""
        return sum(turn.reward for turn in self.turns)

    @property
    def steps(self) -> int:
        """Number of environment steps (turns that asked again are not steps)."""
        return sum(turn.executed is not None for turn in self.turns)

    def __str__(self) -> str:
        """The episode as text: what was observed, what was answered, what was played in place of an invalid answer."""
        lines = []
        for turn in self.turns:
            lines += [turn.observation] if turn.observation else []
            lines += [f"  (draft) {draft}" for draft in turn.drafts]
            lines.append(f"> {turn.text}")
            lines += ["  (forced)"] if turn.forced else []
            if not turn.parsed.is_valid:
                played = f"; {turn.executed} was played" if turn.executed is not None else ""
                lines.append(f"  (invalid, {turn.parsed.reason.value}{played})")
        return "\n".join([*lines, self.final_observation, f"[{self.stop.value}, return {self.return_:g}]"])
