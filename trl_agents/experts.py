# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Experts to learn from: scripted players that say why. [`expert_data.expert_dataset`] writes their episodes down.

[LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078) (section 4.3) clones a UCB player in two forms. In
behaviour cloning the reply is the action alone, in thought cloning the values it was chosen by come first:

    Think step by step, by the counts and means of all actions:
    Count for action blue = 2, Mean = (-1.91 + 0.45) / 2 = -0.73, UCB = -0.73 + sqrt(1 / 2) = -0.02
    Count for action green = 0, Mean = NaN, UCB = NaN
    Not all actions have been selected yet, so the next one is selected: green.
    ACTION=green

An expert decides by what it writes. Rewards are those that the history shows, means are rounded before a bonus is
added, and the best of the rounded values is played, the first of equals. So a reader of the history can arrive at
every number and at the action, which an expert with more digits than its text would not allow now and then.

What differs from the paper: the sentences are our own, and it clones no players of other tasks than the bandit.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from .agents import AGENTS, Agent, LinUCBAgent, MinimaxAgent, UCBAgent, make_agent
from .contexts import format_reward
from .envs.tictactoe import minimax_values


class Expert(Agent):
    """A scripted player that can say why it plays an action."""

    looks_back = True  # whether its thoughts depend on all steps so far, not on the open one alone

    @abstractmethod
    def explain(self, observation: str, info: Mapping[str, Any], action: str) -> str:
        """The thought that leads to `action`, between `act` and `update`. Draws nothing at random."""


class UCBExpert(Expert, UCBAgent):
    """
    The UCB player with its counts, means and upper confidence bounds, a line each action.

    Args:
        bonus (`str`, *optional*, defaults to `"sqrt_n"`):
            As for [`UCBAgent`]. The default is the paper's expert's.
        most_listed (`int`, *optional*):
            List at most so many rewards of an action, the latest; earlier ones are added up, as in
            `(12 earlier: 7.31 + 0.45 + 0.78) / 14`. Defaults to all, as in the paper, whose texts grow by a number a
            step.
    """

    FORMULAS = {
        "ucb1": "sqrt(2 * ln({t}) / {n})",
        "sqrt_n": "sqrt(1 / {n})",
        "half_ln": "sqrt(0.5 * ln({t}) / {n})",
    }

    def __init__(self, bonus: str = "sqrt_n", most_listed: int | None = None):
        super().__init__(bonus)
        if most_listed is not None and most_listed < 1:
            raise ValueError(f"most_listed={most_listed!r}: give 1 or more, or None to list all rewards.")
        self.most_listed = most_listed

    def reset(self, *, legal_actions: list[str], seed: int) -> None:
        super().reset(legal_actions=legal_actions, seed=seed)
        self.rewards: dict[str, list[str]] = {action: [] for action in legal_actions}  # as the history shows them

    def update(self, action: str, reward: float, info: Mapping[str, Any]) -> None:
        shown = shown_reward(reward, info)
        self.rewards.setdefault(action, []).append(shown)
        super().update(action, float(shown), info)

    def mean(self, action: str) -> float:
        """The mean as it is written."""
        return round(self.totals[action] / self.pulls[action], 2)

    def score(self, action: str) -> float:
        pulls = self.pulls.get(action, 0)
        return round(self.mean(action) + self.BONUSES[self.bonus](self.steps, pulls), 2) if pulls else math.inf

    def explain(self, observation: str, info: Mapping[str, Any], action: str) -> str:
        legal = self.legal(info)
        lines = ["Think step by step, by the counts and means of all actions:", *map(self._line, legal)]
        scores = [self.score(other) for other in legal]
        if math.inf in scores:
            end = f"Not all actions have been selected yet, so the next one is selected: {action}."
        else:
            end = _choice("UCB value", scores, action)
        return "\n".join([*lines, end])

    def _line(self, action: str) -> str:
        n = self.pulls.get(action, 0)
        if not n:
            return f"Count for action {action} = 0, Mean = NaN, UCB = NaN"
        mean, bonus = _number(self.mean(action)), self.FORMULAS[self.bonus].format(t=self.steps, n=n)
        return (
            f"Count for action {action} = {n}, Mean = ({self._sum(action)}) / {n} = {mean}, "
            f"UCB = {mean} + {bonus} = {_number(self.score(action))}"
        )

    def _sum(self, action: str) -> str:
        listed = self.rewards[action]
        if self.most_listed is None or len(listed) <= self.most_listed:
            return " + ".join(listed)
        earlier, listed = listed[: -self.most_listed], listed[-self.most_listed :]
        total = format_reward(round(math.fsum(map(float, earlier)), 2))
        return " + ".join([f"{len(earlier)} earlier: {total}", *listed])


class LinUCBExpert(Expert, LinUCBAgent):
    """
    The LinUCB player with its estimate, bonus and score of each action for the features of the open step.

    Args:
        alpha (`float`, *optional*, defaults to `0.5`):
            As for [`LinUCBAgent`].
    """

    def __init__(self, alpha: float = 0.5):
        super().__init__(alpha)

    def reset(self, *, legal_actions: list[str], seed: int) -> None:
        super().reset(legal_actions=legal_actions, seed=seed)
        self.pulls = dict.fromkeys(legal_actions, 0)

    def update(self, action: str, reward: float, info: Mapping[str, Any]) -> None:
        self.pulls[action] = self.pulls.get(action, 0) + 1
        super().update(action, float(shown_reward(reward, info)), info)

    def parts(self, action: str) -> tuple[float, float]:
        """Estimate and bonus as they are written."""
        inverse, total = self._belief(action)
        spread = inverse @ self.features
        bonus = self.alpha * math.sqrt(max(self.features @ spread, 0.0))
        return round(float(total @ spread), 2), round(bonus, 2)

    def score(self, action: str) -> float:
        return round(sum(self.parts(action)), 2)

    def explain(self, observation: str, info: Mapping[str, Any], action: str) -> str:
        legal = self.legal(info)
        lines = ["Think step by step, by the estimates and bonuses of all actions for these features:"]
        for other in legal:
            estimate, bonus = map(_number, self.parts(other))
            lines.append(
                f"Count for action {other} = {self.pulls.get(other, 0)}, Estimate = {estimate}, Bonus = {bonus}, "
                f"Score = {estimate} + {bonus} = {_number(self.score(other))}"
            )
        return "\n".join([*lines, _choice("score", list(map(self.score, legal)), action)])


class MinimaxExpert(Expert, MinimaxAgent):
    """
    The optimal player of tic-tac-toe, with what each move leads to when both sides play perfectly, and after how many
    moves of both sides, this one included.

    Args:
        fastest (`bool`, *optional*, defaults to `True`):
            As for [`MinimaxAgent`]. `False` plays any of the moves that keep the value of the game, so that the same
            position gets different replies.
    """

    looks_back = False

    def __init__(self, fastest: bool = True):
        super().__init__(fastest)

    def explain(self, observation: str, info: Mapping[str, Any], action: str) -> str:
        values = minimax_values(info["board"], self.legal(info))
        ends = {move: self._end(value, len(values)) for move, value in values.items()}
        best = ends[action] if self.fastest else ends[action].split()[0]
        moves = ", ".join(f"{move} {end}" for move, end in ends.items())
        return (
            f"State {info['state']}. What each move leads to with perfect play, counting the moves of both sides: "
            f"{moves}. The best is a {best}, so {action} is selected."
        )

    @staticmethod
    def _end(value: int, empty: int) -> str:
        moves = 10 - abs(value) if value else empty  # a draw fills the board
        return f"{'win' if value > 0 else 'loss' if value else 'draw'} in {moves}"


EXPERTS = {"ucb": UCBExpert, "linucb": LinUCBExpert, "minimax": MinimaxExpert}


def make_expert(name: str, env: Any = None, **kwargs: Any) -> Agent:
    """
    Makes a player to learn from by its name.

    Args:
        name (`str`):
            `"ucb"`, `"linucb"` or `"minimax"`, which have thoughts, or another of [`make_agent`], whose behaviour can
            be cloned.
        env (*optional*):
            What will be played, as for [`make_agent`].
        **kwargs:
            Arguments of the expert.
    """
    if name in EXPERTS:
        return EXPERTS[name](**kwargs)
    if name not in AGENTS:
        raise ValueError(f"Expert {name!r} is unknown. Use one of {', '.join(map(repr, {**EXPERTS, **AGENTS}))}.")
    return AGENTS[name](**kwargs) if kwargs else make_agent(name, env)


def shown_reward(reward: float, info: Mapping[str, Any]) -> str:
    """The reward of a step as the history writes it: by the environment's own line, else as contexts do."""
    found = re.findall(r"Reward=(-?\d+(?:\.\d+)?)", info.get("transition", ""))
    return found[-1] if found else format_reward(reward)


def _choice(name: str, scores: list[float], action: str) -> str:
    first = ", the first of equals" if scores.count(max(scores)) > 1 else ""
    return f"The highest {name} is {_number(max(scores))}, so its action is selected{first}: {action}."


def _number(value: float) -> str:
    return f"{value + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0: no "-0.00" in the text
