# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Scripted players: baselines to compare a model with, experts to learn from, oracles for tests.

They choose from the legal actions by the rewards they got, and LinUCB by `info["features"]`, which the text tells too.
What `info` tells beyond that (`regret`, `expected_reward`) is for the evaluation, and no player reads it.
"""

from __future__ import annotations

import inspect
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from .envs.names import close_to
from .envs.tictactoe import optimal_actions
from .types import ENDLESS, ParsedAction, StopReason, Trajectory, Turn


class Agent(ABC):
    """A player. The order of calls is `reset`, then `act` and `update` for each step."""

    def reset(self, *, legal_actions: list[str], seed: int) -> None:
        """
        Forgets the last episode.

        Args:
            legal_actions (`list[str]`):
                What may be played at the first step, in the environment's order.
            seed (`int`):
                Fixes what the player chooses at random. It may be the environment's seed.
        """
        self.legal_actions = list(legal_actions)
        # Not NumPy's generator: seeded alike, the environment's and the player's would draw the same numbers, and the
        # player's chance would foretell the environment's.
        self.rng = random.Random(seed)

    @abstractmethod
    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        """Returns one of the legal actions."""

    def update(self, action: str, reward: float, info: Mapping[str, Any]) -> None:  # noqa: B027
        """Learns from a step. The base class learns nothing."""

    def legal(self, info: Mapping[str, Any]) -> list[str]:
        """The actions that are legal now; those of the first step if `info` tells none."""
        return info.get("legal_actions", self.legal_actions)

    def __repr__(self) -> str:
        """Class and settings, the same in every run: stages are stamped with it."""
        names = [name for name in inspect.signature(type(self)).parameters if name in vars(self)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class RandomAgent(Agent):
    """
    Plays each legal action with the same probability.

    Args:
        repeat (`float`, *optional*, defaults to `0.0`):
            Probability of playing the last action again instead, if it is legal. As that does not depend on rewards
            either, regret stays the random player's; coverage grows more slowly.
    """

    def __init__(self, repeat: float = 0.0):
        if not 0.0 <= repeat <= 1.0:
            raise ValueError(f"repeat={repeat} is a probability: give a number between 0 and 1.")
        self.repeat = repeat

    def reset(self, *, legal_actions: list[str], seed: int) -> None:
        super().reset(legal_actions=legal_actions, seed=seed)
        self.last: str | None = None

    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        legal = self.legal(info)
        if not (self.repeat and self.last in legal and self.rng.random() < self.repeat):
            self.last = self.rng.choice(legal)
        return self.last


class BanditAgent(Agent):
    """Keeps `pulls` and `totals` (summed rewards) of each action, and plays the one with the highest `score`."""

    def reset(self, *, legal_actions: list[str], seed: int) -> None:
        super().reset(legal_actions=legal_actions, seed=seed)
        self.pulls = dict.fromkeys(legal_actions, 0)
        self.totals = dict.fromkeys(legal_actions, 0.0)
        self.steps = 0

    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        return max(self.legal(info), key=self.score)  # the first of equals, so untried actions go in order

    def update(self, action: str, reward: float, info: Mapping[str, Any]) -> None:
        self.pulls[action] = self.pulls.get(action, 0) + 1
        self.totals[action] = self.totals.get(action, 0.0) + reward
        self.steps += 1

    @abstractmethod
    def score(self, action: str) -> float:
        """How much the action is worth playing now."""


class GreedyAgent(BanditAgent):
    r"""
    Plays each action once in order, then the one with the highest mean reward; the first of equals.

    $$ \text{score}(a) = \hat{\mu}_a, \qquad \infty \text{ if untried} $$

    Args:
        untried (`float`, *optional*, defaults to `math.inf`):
            Score of an untried action. With 0 it is greedy as "LLMs are Greedy Agents" finds language models to be:
            where rewards are not negative, it never leaves what once brought something. Equals are then drawn from.
        epsilon (`float`, *optional*, defaults to `0.0`):
            Probability of playing any legal action instead.
    """

    def __init__(self, untried: float = math.inf, epsilon: float = 0.0):
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"epsilon={epsilon} is a probability: give a number between 0 and 1.")
        self.untried, self.epsilon = untried, epsilon

    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        if self.epsilon and self.rng.random() < self.epsilon:
            return self.rng.choice(self.legal(info))
        if self.untried == math.inf:
            return super().act(observation, info)
        best = max(map(self.score, self.legal(info)))
        return self.rng.choice([action for action in self.legal(info) if self.score(action) == best])

    def score(self, action: str) -> float:
        pulls = self.pulls.get(action, 0)
        return self.totals[action] / pulls if pulls else self.untried


class UCBAgent(GreedyAgent):
    r"""
    Plays each action once in order, then the one with the highest upper confidence bound; the first of equals.

    $$ \text{score}(a) = \hat{\mu}_a + b(t, n_a) $$

    for \\( n_a \\) plays of the action in \\( t \\) steps, from [Finite-time Analysis of the Multiarmed Bandit
    Problem](https://doi.org/10.1023/A:1013689704352). The bonuses are meant for rewards on the scale of 1; they do not
    adapt to the noise.

    Args:
        bonus (`str`, *optional*, defaults to `"ucb1"`):
            \\( b(t, n) \\): `"ucb1"` is \\( \sqrt{2 \ln t / n} \\), the usual one; `"sqrt_n"` is
            \\( \sqrt{1 / n} \\), of the expert that "LLMs are Greedy Agents" clones; `"half_ln"` is
            \\( \sqrt{0.5 \ln t / n} \\), BanditBench's.
    """

    BONUSES = {
        "ucb1": lambda t, n: math.sqrt(2 * math.log(t) / n),
        "sqrt_n": lambda t, n: math.sqrt(1 / n),
        "half_ln": lambda t, n: math.sqrt(0.5 * math.log(t) / n),
    }

    def __init__(self, bonus: str = "ucb1"):
        if bonus not in self.BONUSES:
            raise ValueError(f"bonus={bonus!r} is unknown. Use one of {', '.join(map(repr, self.BONUSES))}.")
        super().__init__()
        self.bonus = bonus

    def score(self, action: str) -> float:
        mean = super().score(action)
        return mean if mean == math.inf else mean + self.BONUSES[self.bonus](self.steps, self.pulls[action])


class ThompsonAgent(BanditAgent):
    r"""
    Draws a mean for each action from what it believes about it, and plays the highest draw.

    With \\( n \\) rewards of sum \\( s \\) from an action, it believes

    $$ \mu \sim \text{Beta}(1 + s, 1 + n - s) \qquad \text{or} \qquad \mu \sim N\!\left(
    \frac{m / \tau^2 + s / \sigma^2}{1 / \tau^2 + n / \sigma^2}, \frac{1}{1 / \tau^2 + n / \sigma^2} \right) $$

    for the priors Beta(1, 1) and \\( N(m, \tau^2) \\).

    Args:
        prior (`str`, *optional*, defaults to `"beta"`):
            `"beta"` for rewards in [0, 1], exact if they are 0 or 1. `"gaussian"` for any reward, exact if it is
            Gaussian with standard deviation `sigma`.
        sigma (`float`, *optional*, defaults to `1.0`):
            \\( \sigma \\), the standard deviation of a reward around its mean. Unused by the Beta prior, like the
            next two.
        prior_mean (`float`, *optional*, defaults to `0.0`):
            \\( m \\), the mean that an action is believed to have before it is played.
        prior_std (`float`, *optional*, defaults to `1.0`):
            \\( \tau \\), how far from `prior_mean` an action's mean is believed to lie. The defaults are what
            `Bandit(means="normal", noise="medium")` draws from.
    """

    def __init__(self, prior: str = "beta", *, sigma: float = 1.0, prior_mean: float = 0.0, prior_std: float = 1.0):
        if prior not in ("beta", "gaussian"):
            raise ValueError(f"prior={prior!r} is unknown. Use one of 'beta', 'gaussian'.")
        for name, value in (("sigma", sigma), ("prior_std", prior_std)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} is a standard deviation. Use a positive number.")
        self.prior = prior
        self.sigma = sigma
        self.prior_mean = prior_mean
        self.prior_std = prior_std

    def update(self, action: str, reward: float, info: Mapping[str, Any]) -> None:
        if self.prior == "beta" and not 0 <= reward <= 1:
            raise ValueError(
                f"reward={reward!r}: Thompson sampling with prior='beta' needs rewards in [0, 1]. Use "
                "prior='gaussian', thompson:prior=gaussian where players are named."
            )
        super().update(action, reward, info)

    def score(self, action: str) -> float:
        pulls, total = self.pulls.get(action, 0), self.totals.get(action, 0.0)
        if self.prior == "beta":
            return self.rng.betavariate(1 + total, 1 + pulls - total)
        precision = self.prior_std**-2 + pulls * self.sigma**-2
        mean = (self.prior_mean * self.prior_std**-2 + total * self.sigma**-2) / precision
        return self.rng.gauss(mean, precision**-0.5)


class LinUCBAgent(Agent):
    r"""
    Plays the action whose reward may be highest, where it is a linear function of a vector \\( x \\) that the
    environment tells before each step as `info["features"]`; the first of equals.

    $$ \text{score}(a) = \theta_a^\top x + \alpha \sqrt{x^\top A_a^{-1} x}, \qquad A_a = I + \sum x x^\top, \qquad
    \theta_a = A_a^{-1} \sum r x $$

    over the steps at which the action was played: the algorithm with disjoint linear models of [A Contextual-Bandit
    Approach to Personalized News Article Recommendation](https://huggingface.co/papers/1003.0146), with the bonus of
    [Contextual Bandits with Linear Payoff Functions](https://proceedings.mlr.press/v15/chu11a.html).

    Args:
        alpha (`float`, *optional*, defaults to `0.5`):
            \\( \alpha \\), what not knowing is worth. 0 is greedy.
    """

    def __init__(self, alpha: float = 0.5):
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha={alpha!r} is the weight of the bonus. Use a number of at least 0.")
        self.alpha = alpha

    def reset(self, *, legal_actions: list[str], seed: int) -> None:
        super().reset(legal_actions=legal_actions, seed=seed)
        self.inverses: dict[str, np.ndarray] = {}  # A^-1, (d, d), of each action that was played
        self.totals: dict[str, np.ndarray] = {}  # sum of r x, (d,)

    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        if "features" not in info:
            raise ValueError(
                "LinUCB chooses by `info['features']`, which this environment does not tell. Use 'ucb', or a "
                "contextual bandit."
            )
        self.features = np.asarray(info["features"], dtype=float)  # (d,): `info` moves on before the reward is known
        return max(self.legal(info), key=self.score)

    def update(self, action: str, reward: float, info: Mapping[str, Any]) -> None:
        inverse, total = self._belief(action)
        spread = inverse @ self.features
        # Sherman and Morrison's formula: the inverse of A + x x^T
        self.inverses[action] = inverse - np.outer(spread, spread) / (1 + self.features @ spread)
        self.totals[action] = total + reward * self.features

    def score(self, action: str) -> float:
        """The most that the action may reasonably bring for the present features."""
        inverse, total = self._belief(action)
        spread = inverse @ self.features
        return float(total @ spread + self.alpha * math.sqrt(max(self.features @ spread, 0.0)))

    def _belief(self, action: str) -> tuple[np.ndarray, np.ndarray]:
        if action in self.inverses:
            return self.inverses[action], self.totals[action]
        return np.eye(len(self.features)), np.zeros(len(self.features))


class MinimaxAgent(Agent):
    """
    Plays tic-tac-toe perfectly: one of the moves that keep the value of the game, each with the same probability.

    Args:
        fastest (`bool`, *optional*, defaults to `False`):
            Whether to play the first of the moves that win soonest or lose latest, as LMAct's expert does.
    """

    def __init__(self, fastest: bool = False):
        self.fastest = fastest

    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        best = optimal_actions(info["board"], self.legal(info), fastest=self.fastest)
        return best[0] if self.fastest else self.rng.choice(best)


AGENTS = {
    "random": RandomAgent,
    "greedy": GreedyAgent,
    "ucb": UCBAgent,
    "thompson": ThompsonAgent,
    "linucb": LinUCBAgent,
    "minimax": MinimaxAgent,
}


def is_scripted(name: str) -> bool:
    """Whether `name` is a scripted player's, with settings or without."""
    return name.partition(":")[0] in AGENTS


def make_agent(name: str, env: Any = None) -> Agent:
    """
    Makes a scripted player by its name.

    Args:
        name (`str`):
            `"random"`, `"greedy"`, `"ucb"`, `"thompson"` (bandits), `"linucb"` (contextual bandits) or `"minimax"`
            (tic-tac-toe). Arguments may follow: `"thompson:prior=gaussian,sigma=0.5"`.
        env ([`~envs.Bandit`], *optional*):
            What will be played. Thompson sampling takes its prior from how the bandit draws its means and rewards,
            never from the means of an instance. Without it, Thompson sampling is for rewards in [0, 1].

    Returns:
        [`Agent`]: The player.
    """
    kind, colon, told = name.partition(":")
    if kind not in AGENTS:
        hint = close_to(kind, AGENTS)
        raise ValueError(f"Player {name!r} is unknown.{hint} Use one of {', '.join(map(repr, AGENTS))}.")
    env, fitting = getattr(env, "unwrapped", env), {}
    if kind == "thompson" and getattr(env, "distribution", None) == "gaussian":
        fitting = {"prior": "gaussian", "sigma": env.sigma}
        if env.means == "uniform":  # the moments of U(0, 1)
            fitting |= {"prior_mean": 0.5, "prior_std": 12**-0.5}
        elif env.means == "normal":
            fitting |= {"prior_std": env.sigma}
    return AGENTS[kind](**{**fitting, **(_settings(kind, told) if colon else {})})


def _settings(kind: str, told: str) -> dict[str, Any]:
    """The arguments behind a player's name, `prior=gaussian,sigma=0.5`; their defaults say of what type they are."""
    usual = {name: one.default for name, one in inspect.signature(AGENTS[kind]).parameters.items()}
    example = next((f"{kind}:{name}={value}" for name, value in usual.items()), kind)
    settings: dict[str, Any] = {}
    for part in told.split(","):
        name, equals, value = part.partition("=")
        if name not in usual:
            known = f"Its settings: {', '.join(usual)}; write {example}." if usual else "It has none."
            raise ValueError(f"Player {kind!r} has no setting {name!r}.{close_to(name, usual)} {known}")
        if not equals:
            raise ValueError(f"Player {f'{kind}:{told}'!r} gives {name} no value: write {kind}:{name}={usual[name]}.")
        type_ = type(usual[name])
        try:
            settings[name] = {"true": True, "false": False}[value.lower()] if type_ is bool else type_(value)
        except (ValueError, KeyError):
            raise ValueError(f"{name}={value!r} of {kind!r} is no {type_.__name__}: write {example}.") from None
    return settings


def play_episode(env: Any, agent: Agent, *, seed: int, max_turns: int | None = None) -> Trajectory:
    """
    Plays one episode with a scripted player.

    Args:
        env:
            An environment that tells `info["legal_actions"]`.
        agent ([`Agent`]):
            The player.
        seed (`int`):
            Seeds the environment and the player.
        max_turns (`int`, *optional*):
            Ends an episode that is still going on after that many turns.

    Returns:
        [`Trajectory`]: The episode, its turns without tokens.

    Raises:
        `ValueError`: without `max_turns`, if the episode is still going on after 10,000 turns.
    """
    observation, reset_info = env.reset(seed=seed)
    if "legal_actions" not in reset_info:
        raise ValueError(f"{type(env).__name__} does not tell `info['legal_actions']`, and scripted players need it.")
    agent.reset(legal_actions=reset_info["legal_actions"], seed=seed)

    info = reset_info
    turns: list[Turn] = []
    stop = None
    while stop is None:
        action = agent.act(observation, info)
        next_observation, reward, terminated, truncated, info = env.step(action)
        agent.update(action, reward, info)
        turns.append(
            Turn(
                observation=observation,
                input_ids=(),
                action_ids=(),
                text=action,
                parsed=ParsedAction(action),
                executed=action,
                reward=float(reward),
                info=info,
            )
        )
        observation = next_observation
        if terminated:
            stop = StopReason.TERMINATED
        elif truncated:
            stop = StopReason.TRUNCATED
        elif len(turns) == max_turns:
            stop = StopReason.MAX_TURNS
        elif max_turns is None and len(turns) == ENDLESS:
            raise ValueError(
                f"The episode of seed {seed} is still going on after {ENDLESS:,} turns, and its environment may never "
                "end it: limit it with max_turns."
            )

    return Trajectory(
        seed=seed,
        turns=tuple(turns),
        stop=stop,
        instructions=getattr(getattr(env, "unwrapped", env), "instructions", ""),
        final_observation=observation,
        reset_info=reset_info,
    )
