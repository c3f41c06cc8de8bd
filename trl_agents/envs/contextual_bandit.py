# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The contextual bandit in words, after [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078): a person a
step, movies for arms. It is BanditBench's MovieLens task, which the paper plays.

What differs from the two:

- Without a data set the people and their ratings are made up ([`make_population`]); `data_dir` takes MovieLens' own.
- The texts say the same in other words. A person's place is a US state, from the zip code; BanditBench has a table of
  counties.
- The preference vector is scaled to the size of 1. As the paper writes it, its entries are near 0.03, of which two
  decimals leave a digit or none; `scale=False` has that form.
- What `info["features"]` tells a scripted player are the numbers as the text shows them, not the exact ones.
"""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from ..contexts import format_reward
from .bandit import _require_choice, _require_integer
from .movielens import load_population
from .population import Population, make_population
from .spaces import Labels


# The order of the people is drawn once for all: it says who is among the first, those to train on.
_ORDER_SEED = 0


class ContextualBandit(gymnasium.Env[str, str]):
    r"""
    Recommend movies: at each step another person comes, described in words and by a vector of their taste.

    The ratings \\( D \\) of all people (rows) and the most rated movies (columns), 0 where there is none, are
    decomposed. The reward is the reconstruction's entry for person \\( i \\) and movie \\( a \\), the vector is the
    person's row of \\( U_k \\):

    $$ D = U S V^\top, \qquad r(i, a) = (U_k S_k V_k^\top)_{ia} $$

    so the reward is a linear function of the vector, without noise, and the movies are the same in every episode: both
    what an episode shows and what earlier ones have taught help. Who comes at which step is drawn when the episode
    starts, so all players of one seed meet the same people whatever they choose.

    The first line of a step's observation is that step, completed; the rest is the next step, still open:

    ```text
    Step=0 This person is ... Their taste: [1.29, -0.36, 0.77, 0.56, -0.48] Action=contact_(1997) Reward=4
    Step=1 This person is ... Their taste: [0.62, 1.05, 0.74, -1.71, 0.21]
    ```

    `info` holds `legal_actions`, `state` (the person who is open, in words) and `features` (the vector, as the text
    rounds it), but for the last two after the last step; after a step `transition` (the completed line), and what a
    player must not see: `expected_reward`, `regret` (the person's best reward minus the chosen one's) and `optimal`.

    Regret of scripted players after 50 steps with all the made-up people, mean over 500 episodes (within 1.5 at 95%):
    `trl-agents eval random linucb --env trl_agents/ContextualBandit-v0 --num_episodes 500 --env_kwargs '{"n_arms": 5,
    "users": "all"}'`, and with `"scale": false`.

    | player                                       | 5 movies | 10 movies | 20 movies |
    |----------------------------------------------|----------|-----------|-----------|
    | random                                       | 111.6    | 139.1     | 149.1     |
    | [`~agents.LinUCBAgent`]                      | 42.1     | 77.2      | 102.7     |
    | the same on the paper's form (`scale=False`) | 73.8     | 104.5     | 119.6     |

    Args:
        n_arms (`int`, *optional*, defaults to `5`):
            Number of movies, at least 2: those with most ratings. Made-up people know up to 30.
        horizon (`int`, *optional*, defaults to `50`):
            Steps of an episode.
        data_dir (`str`, *optional*):
            Folder with the files of MovieLens-100k or -1M as unpacked. Without it, the people are made up.
        rank (`int`, *optional*):
            \\( k \\), the length of the vector, at most `n_arms`, and by default as much: then the reward is the
            person's rating itself, 1 to 5 stars, or 0 if there is none.
        users (`str`, *optional*, defaults to `"train"`):
            Who may come: the first `n_train_users` people (`"train"`), the others (`"eval"`), or `"all"`. The vectors
            are made of everybody's ratings.
        n_train_users (`int`, *optional*, defaults to `100`):
            Number of people to train on. BanditBench takes 100 of MovieLens-100k and 200 of MovieLens-1M.
        scale (`bool`, *optional*, defaults to `True`):
            Whether the vector is multiplied with the square root of the number of people.
        digits (`int`, *optional*, defaults to `2`):
            Decimals of the vector, 0 to 8.
        reasoning (`bool`, *optional*, defaults to `True`):
            Whether the instructions ask for a short reasoning before the answer, or for the answer alone.

    Example:

    ```python
    >>> import gymnasium
    >>> import trl_agents

    >>> env = gymnasium.make("trl_agents/ContextualBandit-v0", n_arms=3)
    >>> observation, info = env.reset(seed=0)
    >>> info["legal_actions"]
    ['star_wars_(1977)', 'contact_(1997)', 'fargo_(1996)']
    >>> len(info["features"])
    3
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
        data_dir: str | Path | None = None,
        rank: int | None = None,
        users: str = "train",
        n_train_users: int = 100,
        scale: bool = True,
        digits: int = 2,
        reasoning: bool = True,
    ):
        _require_integer("n_arms", n_arms, at_least=2)
        _require_integer("horizon", horizon, at_least=1)
        _require_integer("n_train_users", n_train_users, at_least=1)
        _require_integer("digits", digits, at_least=0)
        _require_choice("users", users, ("train", "eval", "all"))
        _require_choice("scale", scale, (True, False))
        _require_choice("reasoning", reasoning, (True, False))
        if digits > 8:
            raise ValueError(f"digits={digits}: the vector is not known more exactly than to 8. Use 0 to 8.")
        if rank is not None:
            _require_integer("rank", rank, at_least=1)
            if rank > n_arms:
                raise ValueError(f"rank={rank}, but {n_arms} movies have {n_arms} dimensions. Use at most {n_arms}.")
        self.n_arms = int(n_arms)
        self.horizon = int(horizon)
        self.data_dir = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
        self.rank = self.n_arms if rank is None else int(rank)
        self.users = users
        self.n_train_users = int(n_train_users)
        self.scale = scale
        self.digits = int(digits)
        self.reasoning = reasoning

        population, order, vectors, self._rewards = _decompose(self.data_dir, self.n_arms, self.rank)
        n_people = len(population.people)
        if users != "all" and n_train_users >= n_people:
            raise ValueError(
                f"n_train_users={n_train_users} of {n_people} people leaves none to evaluate on. Use at most "
                f"{n_people - 1}, or users='all'."
            )
        if scale:
            vectors = vectors * n_people**0.5
        self._people = population.people
        self._vectors = np.round(vectors, self.digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        self._pool = {"train": order[:n_train_users], "eval": order[n_train_users:], "all": order}[users]

        self.labels = population.movies
        self.instructions = self._instructions()
        self.action_space = Labels(self.labels)
        self.observation_space = Text(4096, charset=string.printable)

        self._arms = {label: arm for arm, label in enumerate(self.labels)}
        self._step: int | None = None  # None: not reset yet

    @property
    def best_arm(self) -> str:
        """The movie that is best for everybody who may come, taken together: what to play without looking at them."""
        return self.labels[int(self._rewards[self._pool].mean(0).argmax())]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """
        Starts an episode.

        Args:
            seed (`int`, *optional*):
                Fixes who comes at which step. Without it, each reset gives another episode.
            options (`dict`, *optional*):
                Unused; part of Gymnasium's signature.

        Returns:
            `tuple[str, dict]`:
                The open step and `info`.
        """
        super().reset(seed=seed)
        self._visitors = self._pool[self.np_random.integers(len(self._pool), size=self.horizon)]
        self._turn_to(0)
        return f"Step=0 {self._state}", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """
        Recommends one movie.

        Args:
            action (`str`):
                One of `info["legal_actions"]`, spelled the same.

        Returns:
            `tuple[str, float, bool, bool, dict]`:
                The completed step and the next one, the reward, whether the horizon is reached, `False`, and `info`.
        """
        if self._step is None:
            raise ResetNeeded("step() was called before reset(). Call reset() first.")
        if self._step >= self.horizon:
            raise ResetNeeded(f"The episode ended after {self.horizon} steps. Call reset() to start another.")
        if not isinstance(action, str) or action not in self._arms:
            raise ValueError(f"Unknown action {action!r}. The legal actions are: {', '.join(self.labels)}.")

        rewards = self._rewards[self._visitors[self._step]]
        arm = self._arms[action]
        reward = float(rewards[arm])
        regret = float(rewards.max()) - reward
        transition = f"Step={self._step} {self._state} Action={action} Reward={format_reward(reward)}"
        self._turn_to(self._step + 1)
        # The horizon is part of the task, as in Bandit: nothing follows it
        terminated = self._step == self.horizon
        observation = transition if terminated else f"{transition}\nStep={self._step} {self._state}"
        info = self._info(transition=transition, arm=arm, expected_reward=reward, regret=regret, optimal=regret == 0)
        return observation, reward, terminated, False, info

    def _turn_to(self, step: int) -> None:
        """The person of `step` comes; nobody after the last one."""
        self._step = step
        if step < self.horizon:
            visitor = self._visitors[step]
            self._features = tuple(self._vectors[visitor].tolist())
            vector = ", ".join(f"{value:.{self.digits}f}" for value in self._features)
            self._state = f"This person is {self._people[visitor]}. Their taste: [{vector}]"

    def _info(self, **of_step: Any) -> dict[str, Any]:
        info = {"legal_actions": list(self.labels), **of_step}
        if self._step < self.horizon:
            info["state"], info["features"] = self._state, self._features
        return info

    def _instructions(self) -> str:
        steps = f"{self.horizon} time step{'' if self.horizon == 1 else 's'}"
        estimate = "" if self.rank == self.n_arms else "an estimate of "
        task = (
            f"You face a contextual bandit problem: you recommend movies. You have {steps}. At each one another "
            "person comes, described in words and by numbers that tell their taste in movies, and you MUST recommend "
            f"exactly one of these {self.n_arms} movies: {', '.join(self.labels)}. Your reward is {estimate}this "
            "person's rating of the movie, from 1 to 5 stars, or 0 if they have not rated it. How ratings depend on "
            "the numbers is fixed, but unknown to you. Your goal is to maximize the sum of your rewards over the "
            f"{steps}. To do so, explore enough to find out which movies people of which taste like, and recommend "
            "what is best for each person by what you know."
        )
        answer = "ACTION=X, where X is one of the movies listed above"
        if not self.reasoning:
            return f"{task}\n\nReply with nothing but your choice, in the form {answer}."
        return (
            f"{task}\n\nThink step by step, then give your final choice in the form {answer}.\n"
            "IMPORTANT: Keep your thinking SHORT, and always finish with ACTION=X."
        )


@lru_cache(maxsize=16)
def _decompose(data_dir: str | None, n_arms: int, rank: int) -> tuple[Population, np.ndarray, np.ndarray, np.ndarray]:
    """The population, its people in order, `U_k` (n_people, k) and the rewards (n_people, n_arms)."""
    population = make_population(n_arms) if data_dir is None else load_population(data_dir, n_arms)
    ratings = population.ratings
    if len(ratings) < n_arms:
        raise ValueError(
            f"n_arms={n_arms}, but there are {len(ratings)} people, whose ratings span no more dimensions. Use more "
            f"people, or at most {len(ratings)} movies."
        )
    left, values, right = np.linalg.svd(ratings, full_matrices=False)
    # A decomposition leaves the signs open: the largest entry of each row of `right` shall be positive, on any machine
    signs = np.sign(right[np.arange(n_arms), np.abs(right).argmax(1)])
    left, right = left * signs, right * signs[:, None]
    # Rounded, so that equal ratings are equal: the best of two equally good movies would be a matter of the 15th digit
    rewards = np.round((left[:, :rank] * values[:rank]) @ right[:rank], 6) + 0.0
    order = np.random.default_rng(_ORDER_SEED).permutation(len(ratings))
    for array in (order, left, rewards):
        array.setflags(write=False)
    return population, order, left[:, :rank], rewards
