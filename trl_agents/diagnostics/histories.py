# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a player is asked about: histories that a random player made, and the last step repeated again and again."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contexts import Briefing, transition_line


class NotMeasurable(Exception):
    """A part of the diagnosis means nothing for this environment or player; the text says why."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One step that lies behind: what was played, and what the environment answered."""

    action: str
    reward: float
    observation: str
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class History:
    """The start of an episode: the environment's texts, what `reset` said, and the steps so far."""

    seed: int
    briefing: Briefing
    observation: str
    info: Mapping[str, Any]
    transitions: tuple[Transition, ...]

    @property
    def legal_actions(self) -> list[str]:
        return list(self.info["legal_actions"])

    def repeated(self, times: int) -> History:
        """The same, the last step `times` more: its line again with its reward, only the step numbers go on."""
        last = self.transitions[-1]
        again = tuple(
            Transition(last.action, last.reward, _later(last.observation, number), _later_info(last.info, number))
            for number in range(1, times + 1)
        )
        return History(self.seed, self.briefing, self.observation, self.info, self.transitions + again)


def random_histories(
    factory: Callable[[], Any],
    seeds: Sequence[int],
    *,
    n_targets: int = 5,
    lengths: tuple[int, int] = (2, 10),
    seed: int = 0,
) -> list[History]:
    """
    Histories of a uniformly random player, each ending in a given target action; one for each of `seeds`.

    The last action is set and not drawn, which gives what drawing until it is the target would give.

    Args:
        factory (`Callable`):
            Makes the environment.
        seeds (`Sequence[int]`):
            What it is reset with, a history each. They take turns with the targets.
        n_targets (`int`, *optional*, defaults to `5`):
            Number of target actions, drawn without replacement; all of them, if there are fewer.
        lengths (`tuple[int, int]`, *optional*, defaults to `(2, 10)`):
            Fewest and most steps.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the player.

    Raises:
        `NotMeasurable`: in an environment whose actions are unknown or change, or whose episodes end at once.
    """
    env = factory()
    try:
        briefing, rng = Briefing.of(env), np.random.default_rng(seed)
        targets: list[str] = []
        histories = []
        for number, start in enumerate(seeds):
            observation, info = env.reset(seed=start)
            legal = legal_actions_of(info)
            if not targets:
                targets = [legal[place] for place in rng.permutation(len(legal))[:n_targets]]
            target = targets[number % len(targets)]
            length = int(rng.integers(lengths[0], lengths[1] + 1))
            actions = [legal[place] for place in rng.integers(len(legal), size=length - 1)]
            transitions = _play(env, start, actions, target, legal)
            if "instructions" in info:
                own = Briefing(info["instructions"], briefing.history_header, briefing.question)
            else:
                own = briefing
            histories.append(History(start, own, observation, info, transitions))
    finally:
        env.close()
    return histories


def legal_actions_of(info: Mapping[str, Any]) -> list[str]:
    """What may be played, of an environment's `info`."""
    legal = info.get("legal_actions")
    if not legal:
        raise NotMeasurable(
            "the environment does not tell info['legal_actions'], which this is measured over: let it list them"
        )
    return list(legal)


def check_actions_stay(factory: Callable[[], Any], seed: int, steps: int = 3) -> list[str]:
    """The legal actions, if they are told and stay the same for a few steps; else raises `NotMeasurable`."""
    env = factory()
    try:
        legal = legal_actions_of(env.reset(seed=seed)[1])
        _play(env, seed, legal[: steps - 1] or legal, legal[-1], legal)
    finally:
        env.close()
    return legal


def _play(env: Any, seed: int, actions: list[str], last: str, legal: list[str]) -> tuple[Transition, ...]:
    """Plays `actions` and then `last`, sooner where the episode is shorter."""
    transitions: list[Transition] = []
    remaining = [*actions, last]
    while remaining:
        action = remaining.pop(0)
        observation, reward, terminated, truncated, info = env.step(action)
        transitions.append(Transition(action, float(reward), observation, info))
        if info.get("legal_actions", legal) != legal:
            raise NotMeasurable(
                "the legal actions change from step to step: this is measured where the same ones can be chosen "
                "again and again, as in a bandit"
            )
        if (terminated or truncated) and remaining:
            if len(transitions) < 2:
                raise NotMeasurable("the episodes end after one step, and this needs a history to look back on")
            env.reset(seed=seed)
            return _play(env, seed, actions[: len(transitions) - 1], last, legal)
    return tuple(transitions)


def shown_reward(step: int, observation: str, transition: Transition) -> float:
    """The reward as the line of history shows it, rounded as it may be: nobody can know more from reading."""
    line = transition_line(step, observation, transition.action, transition.reward, transition.info)
    told = re.findall(r"Reward=\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)", line)
    value = float(told[-1]) if told else transition.reward
    return value if math.isfinite(value) else transition.reward


def _later(text: str, by: int) -> str:
    return re.sub(r"(?m)^Step=(\d{1,9})", lambda found: f"Step={int(found[1]) + by}", text)


def _later_info(info: Mapping[str, Any], by: int) -> dict[str, Any]:
    return {**info, **({"transition": _later(info["transition"], by)} if "transition" in info else {})}
