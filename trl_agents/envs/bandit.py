# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The multi-armed bandit in words, after [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078).

What differs from the paper:

- The task text says the same in other words. The paper elides its `[More Instructions]`; a sentence on exploration and
  exploitation stands in its place, as in BanditBench.
- Labels come in one fixed order. Each arm's mean is drawn per seed, so no label is better than another.
- The text says the means are uniform on (0, 1), which its own regret figures contradict: they fit BanditBench's
  N(0, sigma). Both are here, `means="uniform"` and `means="normal"`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from .spaces import Labels


# The first 20 are BanditBench's, in its order. No name is part of another.
COLOURS = (
    *("blue", "green", "red", "yellow", "orange", "purple", "pink", "brown", "black", "white"),
    *("gray", "cyan", "magenta", "maroon", "olive", "lime", "teal", "navy", "indigo", "violet"),
    *("gold", "silver", "crimson", "turquoise", "coral", "beige", "lavender", "salmon", "khaki", "amber"),
)
NOISE = {"low": 0.1, "medium": 1.0, "high": 3.0}
NOUNS = {"button": ("button", "press"), "number": ("arm", "pull")}


class Bandit(gymnasium.Env[str, str]):
    r"""
    A multi-armed bandit that is described, played and answered in text.

    The rewards of every arm at every step are drawn when the episode starts, so all players of one seed meet the same
    luck whatever they choose. A shorter horizon sees the start of a longer one's luck.

    Args:
        n_arms (`int`, *optional*, defaults to `5`):
            Number of arms, at least 2. The button scenario has a colour for each of up to 30.
        horizon (`int`, *optional*, defaults to `50`):
            Steps of an episode.
        distribution (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"` pays a draw from \\( N(\mu_a, \sigma) \\), `"bernoulli"` pays 1 with probability \\( \mu_a \\)
            and 0 otherwise.
        noise (`str` or `float`, *optional*, defaults to `"medium"`):
            \\( \sigma \\): `"low"` (0.1), `"medium"` (1), `"high"` (3), or a positive number. Bernoulli rewards ignore
            it.
        means (`str` or `Sequence[float]`, *optional*, defaults to `"uniform"`):
            Where an episode's \\( \mu_a \\) come from: `"uniform"` is U(0, 1), `"normal"` is \\( N(0, \sigma) \\)
            (Gaussian rewards only), and a sequence is used as given, one value an arm in the order of the labels.
        scenario (`str`, *optional*, defaults to `"button"`):
            `"button"` names the arms by colours, `"number"` by 0, 1, 2, ...
        reasoning (`bool`, *optional*, defaults to `True`):
            Whether the instructions ask for a short reasoning before the answer, or for the answer alone.

    Example:

    ```python
    >>> import gymnasium
    >>> import trl_agents

    >>> env = gymnasium.make("trl_agents/Bandit-v0", n_arms=3, distribution="bernoulli")
    >>> observation, info = env.reset(seed=0)
    >>> info["legal_actions"]
    ['blue', 'green', 'red']
    >>> observation, reward, terminated, truncated, info = env.step("green")
    >>> observation
    'Step=0 Action=green Reward=0'
    ```
    """

    metadata = {"render_modes": []}

    history_header = "So far you have tried/seen:"
    question = "What do you predict next?"

    def __init__(
        self,
        *,
        n_arms: int = 5,
        horizon: int = 50,
        distribution: str = "gaussian",
        noise: str | float = "medium",
        means: str | Sequence[float] = "uniform",
        scenario: str = "button",
        reasoning: bool = True,
    ):
        _require_integer("n_arms", n_arms, at_least=2)
        _require_integer("horizon", horizon, at_least=1)
        _require_choice("distribution", distribution, ("gaussian", "bernoulli"))
        _require_choice("scenario", scenario, tuple(NOUNS))
        _require_choice("reasoning", reasoning, (True, False))
        if scenario == "button" and n_arms > len(COLOURS):
            raise ValueError(
                f"n_arms={n_arms}, but scenario='button' has {len(COLOURS)} colours. Use at most {len(COLOURS)} arms, "
                "or scenario='number'."
            )

        self.n_arms = int(n_arms)
        self.horizon = int(horizon)
        self.distribution = distribution
        self.sigma = _sigma(noise) if distribution == "gaussian" else None
        self.means = means if isinstance(means, str) else _numbers("means", means)
        self.scenario = scenario
        self.reasoning = reasoning
        self._check_means()

        self.labels = COLOURS[:n_arms] if scenario == "button" else tuple(str(arm) for arm in range(n_arms))
        self.instructions = self._instructions()
        self.action_space = Labels(self.labels)
        self.observation_space = Text(512, min_length=0, charset=string.printable)

        self._arms = {label: arm for arm, label in enumerate(self.labels)}
        self._step: int | None = None  # None: not reset yet

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """
        Starts an episode.

        Args:
            seed (`int`, *optional*):
                Fixes the instance and its luck. Without it, each reset gives another instance.
            options (`dict`, *optional*):
                Unused; part of Gymnasium's signature.

        Returns:
            `tuple[str, dict]`:
                The empty text, as nothing has been seen yet, and `info` with `legal_actions` and `state`.
        """
        super().reset(seed=seed)
        means = self._draw_means()
        self._means = means.tolist()
        self._best_mean = max(self._means)
        # One draw for each arm at each step, played or not: were only the played arm's reward drawn, two players of
        # one seed would meet different luck as soon as their choices differ.
        shape = (self.horizon, self.n_arms)
        if self.distribution == "bernoulli":
            rewards = (self.np_random.random(shape) < means).astype(float)
        else:
            rewards = means + self.sigma * self.np_random.standard_normal(shape)
        self._rewards = rewards.tolist()
        self._step = 0
        return "", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """
        Plays one arm.

        Args:
            action (`str`):
                One of `info["legal_actions"]`, spelled the same.

        Returns:
            `tuple[str, float, bool, bool, dict]`:
                The line of the history that this step adds (also in `info` as `transition`), the reward as drawn (the
                line shows it rounded), whether the horizon is reached, `False`, and `info`. What a player must not see
                is in `info` only: `expected_reward`, `regret` (the best mean minus the chosen arm's) and `optimal`.
        """
        if self._step is None:
            raise ResetNeeded("step() was called before reset(). Call reset() first.")
        if self._step >= self.horizon:
            raise ResetNeeded(f"The episode ended after {self.horizon} steps. Call reset() to start another.")
        if not isinstance(action, str) or action not in self._arms:
            raise ValueError(f"Unknown action {action!r}. The legal actions are: {', '.join(self.labels)}.")

        arm = self._arms[action]
        reward = self._rewards[self._step][arm]
        observation = f"Step={self._step} Action={action} Reward={self._show(reward)}"
        self._step += 1
        # The instructions state the number of steps, so the horizon is part of the task: nothing follows it, and the
        # value there is 0. Truncation would bootstrap a value from beyond the end.
        terminated = self._step == self.horizon
        mean = self._means[arm]
        regret = self._best_mean - mean
        info = self._info(transition=observation, arm=arm, expected_reward=mean, regret=regret, optimal=regret == 0)
        return observation, reward, terminated, False, info

    def _check_means(self) -> None:
        if isinstance(self.means, str):
            _require_choice("means", self.means, ("uniform", "normal"), or_else="a sequence of numbers")
            if self.means == "normal" and self.distribution == "bernoulli":
                raise ValueError(
                    "means='normal' with distribution='bernoulli' would draw probabilities outside [0, 1]. Use "
                    "means='uniform', or give the probabilities."
                )
            return
        if len(self.means) != self.n_arms:
            raise ValueError(
                f"means has {len(self.means)} values, but n_arms={self.n_arms}. Pass one mean for each arm, or "
                f"n_arms={len(self.means)}."
            )
        if self.distribution == "bernoulli" and not all(0 <= mean <= 1 for mean in self.means):
            raise ValueError(
                f"means={self.means} with distribution='bernoulli': these are probabilities and must lie in [0, 1]. "
                "Change them, or use distribution='gaussian'."
            )

    def _draw_means(self) -> np.ndarray:
        if self.means == "uniform":
            return self.np_random.random(self.n_arms)
        if self.means == "normal":
            return self.sigma * self.np_random.standard_normal(self.n_arms)
        return np.array(self.means)

    def _instructions(self) -> str:
        noun, verb = NOUNS[self.scenario]
        steps = f"{self.horizon} time step{'' if self.horizon == 1 else 's'}"
        task = (
            f"You face a bandit problem with {self.n_arms} {noun}s, labelled {', '.join(self.labels)}. Each {noun} "
            f"pays a reward drawn from its own {self.distribution.capitalize()} distribution. Its mean is fixed but "
            f"unknown to you, and the means may differ between {noun}s. You have {steps}, and at each one you MUST "
            f"{verb} exactly one {noun} and get its reward. Your goal is to maximize the sum of your rewards over the "
            f"{steps}. To do so, explore enough to find out which {noun}s pay well, and exploit the best one you know."
        )
        answer = f"ACTION=X, where X is one of the {noun}s listed above"
        if not self.reasoning:
            return f"{task}\n\nReply with nothing but your choice, in the form {answer}."
        return (
            f"{task}\n\nThink step by step, then give your final choice in the form {answer}.\n"
            "IMPORTANT: Keep your thinking SHORT, and always finish with ACTION=X."
        )

    def _info(self, **of_step: Any) -> dict[str, Any]:
        return {"legal_actions": list(self.labels), "state": "", **of_step}

    def _show(self, reward: float) -> str:
        if self.distribution == "bernoulli":
            return str(int(reward))
        return f"{round(reward, 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0: no "-0.00" in the text


def _sigma(noise: str | float) -> float:
    if isinstance(noise, str) and noise in NOISE:
        return NOISE[noise]
    is_number = isinstance(noise, (int, float, np.number)) and not isinstance(noise, bool)
    if not is_number or not 0 < noise < math.inf:
        names = ", ".join(repr(name) for name in NOISE)
        raise ValueError(f"noise={noise!r} is not a standard deviation. Use {names} or a positive number.")
    return float(noise)


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}={values!r} is not a sequence of finite numbers. Give one number for each arm.")
    return numbers


def _require_integer(name: str, value: Any, at_least: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r}. Use an integer of at least {at_least}.")


def _require_choice(name: str, value: Any, choices: tuple[Any, ...], or_else: str = "") -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is unknown. Use one of {listed}{or_else and f', or {or_else}'}.")
