# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Our environments in the form of TRL's `environment_factory`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...actions import ActionParser
from ..make import make_env
from .suites import joined


def as_trl_environment(env: str | Callable[..., Any], **env_kwargs: Any) -> type:
    """
    A class for `environment_factory` of [`~trl.GRPOTrainer`]: one tool, `act(action)`, and the episode's return as its
    reward.

    A dataset's column `seed` says which episode to play (rows without it play any), a column `options` what else
    `reset` is given: give the rows of a group one seed. TRL's own trainer has one reward an episode, no penalty for
    invalid actions, and goes on calling after the end, which is answered with a text.

    Args:
        env (`str` or `Callable`):
            Environment id, class or factory.
        **env_kwargs:
            Passed to the environment's constructor.

    Example:

    ```python
    >>> from trl import GRPOTrainer
    >>> from trl_agents.envs.adapters import as_trl_environment

    >>> GRPOTrainer(model, environment_factory=as_trl_environment("trl_agents/TicTacToe-v0"), train_dataset=dataset)
    ```
    """
    exact = ActionParser(r"(?s)(?P<action>.*\S.*)", template="{action}")

    # TRL makes a tool of every public method, so all else is private.
    class TextEnvironment:
        def __init__(self):
            self._env = make_env(env, **env_kwargs)
            self._return, self._over, self._legal = 0.0, True, None

        def reset(self, seed: int | None = None, options: dict | None = None, **row: Any) -> str:
            observation, info = self._env.reset(seed=seed, options=options)
            self._return, self._over = 0.0, False
            instructions = info.get("instructions", self._env.instructions)
            how = "Play an action by calling the tool `act` with it, in place of writing ACTION=X."
            return "\n" + joined(instructions, how, self._with_legal_actions(observation, info))

        def act(self, action: str) -> str:
            """
            Plays an action in the environment.

            Args:
                action: The action, spelled as in the list of legal actions where there is one.

            Returns:
                What the environment answers.
            """
            if self._over:
                return "The episode is over: there is nothing more to play."
            parsed = exact.parse(str(action), self._legal)
            if parsed.action is None:
                return f"That is no legal action. Legal actions: {', '.join(self._legal or [])}."
            observation, reward, terminated, truncated, info = self._env.step(parsed.action)
            self._return += reward
            self._over = bool(terminated or truncated)
            if self._over:
                return joined(observation, "The episode is over.")
            return self._with_legal_actions(observation, info)

        def get_reward(self) -> float:
            return self._return

        def _with_legal_actions(self, observation: str, info: dict[str, Any]) -> str:
            self._legal = info.get("legal_actions")
            listed = f"Legal actions: {', '.join(self._legal)}" if self._legal else ""
            return joined(observation, "" if listed.replace(" ", "") in observation.replace(" ", "") else listed)

        def __del__(self):
            if hasattr(self, "_env"):
                self._env.close()

    return TextEnvironment
