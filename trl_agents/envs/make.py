# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""From what a user names an environment by to an environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium

from .adapters import PREFIXES, adapt
from .names import unknown_argument


class ShowThrough(gymnasium.Wrapper):
    """Lets `instructions` and the like be read through Gymnasium's wrappers, which otherwise hide them."""

    def __getattr__(self, name: str) -> Any:
        # Guards against endless recursion while unpickling or copying, before `env` is set.
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return self.env.get_wrapper_attr(name)


def make_env(env: str | Callable[..., Any], **env_kwargs: Any) -> Any:
    """
    Makes one environment.

    Args:
        env (`str` or `Callable`):
            An id that is registered with Gymnasium, such as `"trl_agents/Bandit-v0"`; an environment of another suite,
            such as `"gymnasium:FrozenLake-v1"`, `"textarena:Nim-v0"`, `"gem:game:GuessTheNumber-v0-easy"`,
            `"reasoning_gym:countdown"`, `"openenv:http://localhost:8000"` or `"tools:package.module:Class"` (see
            [`~envs.adapters`]); or a class or factory.
        **env_kwargs:
            Passed to the environment's constructor.

    Returns:
        An environment on which `instructions` and its other attributes can be read, wrapped or not.

    Example:

    ```python
    >>> from trl_agents.envs import make_env

    >>> make_env("trl_agents/Bandit-v0", n_arms=10).horizon
    50
    ```
    """
    if not isinstance(env, str) and not callable(env):
        raise ValueError(
            f"env={env!r} is neither an id nor a class or factory. Pass one of these: an environment is made for each "
            "of the episodes that are played side by side, so an instance does not do."
        )
    prefix, _, name = env.partition(":") if isinstance(env, str) else ("", "", "")
    try:
        if prefix in PREFIXES:
            return adapt(prefix, name, **env_kwargs)
        made = show_through(gymnasium.make(env, **env_kwargs) if isinstance(env, str) else env(**env_kwargs))
    except (gymnasium.error.Error, ImportError) as error:
        if not isinstance(env, str):
            raise
        ours = ", ".join(sorted(id_ for id_ in gymnasium.registry if id_.startswith("trl_agents/")))
        raise ValueError(
            f"No environment could be made from the id {env!r}: {error} The ids of trl_agents are: {ours}; those of "
            f"other suites begin with {', '.join(f'{prefix}:' for prefix in PREFIXES)}. Register others with "
            "gymnasium.register, or pass a class or a factory."
        ) from error
    except TypeError as error:
        unknown = "unexpected keyword argument" in str(error)
        if not unknown:
            raise
        told = "" if prefix in PREFIXES else unknown_argument(env, env_kwargs)
        raise ValueError(
            f"The environment {env!r} does not take env_kwargs={env_kwargs!r}: {told or error}"
        ) from error
    space = getattr(made, "observation_space", None)
    if isinstance(env, str) and not hasattr(made, "instructions") and not isinstance(space, gymnasium.spaces.Text):
        made.close()
        raise ValueError(
            f"{env} is no text environment: it has no `instructions`, and its observations are {space}. Say "
            f"'gymnasium:{env}', which puts it into words."
        )
    return made


def show_through(env: Any) -> Any:
    """Returns `env`, with the attributes of what it wraps made readable if it is a Gymnasium wrapper."""
    return ShowThrough(env) if isinstance(env, gymnasium.Wrapper) else env
