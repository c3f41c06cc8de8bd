# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""From what a user names an environment by to an environment."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import gymnasium
from gymnasium.envs.registration import find_highest_version, load_env_creator

from .adapters import PREFIXES, adapt
from .imported import import_named, import_object, is_path
from .names import unknown_argument


SUITES = f"Ids of other suites begin with {', '.join(f'{prefix}:' for prefix in PREFIXES)}."


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
            [`~envs.adapters`]); or a class or factory, itself or by name, `"package.module:Class"`.
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
    factory = None if isinstance(env, str) else env
    try:
        if prefix in PREFIXES:
            return adapt(prefix, name, **env_kwargs)
        factory = factory or find_factory(env)
        made = show_through(_make_registered(env, env_kwargs) if factory is None else factory(**env_kwargs))
    except (gymnasium.error.Error, ImportError) as error:
        if not isinstance(env, str):
            raise
        ours = ", ".join(sorted(id_ for id_ in gymnasium.registry if id_.startswith("trl_agents/")))
        raise ValueError(
            f"No environment could be made from the id {env!r}: {error} The ids of trl_agents are: {ours}. {SUITES} "
            "Register others with gymnasium.register, or pass a class or a factory, by name 'package.module:Class'."
        ) from error
    except TypeError as error:
        unknown = "unexpected keyword argument" in str(error) or (env_kwargs and "takes no arguments" in str(error))
        if not unknown:
            raise
        told = "" if prefix in PREFIXES else unknown_argument(factory or env, env_kwargs)
        raise ValueError(
            f"The environment {env!r} does not take env_kwargs={env_kwargs!r}: {told or error}"
        ) from error
    space = getattr(made, "observation_space", None)
    words = space is None or isinstance(space, gymnasium.spaces.Text)
    if factory is None and not words and not hasattr(made, "instructions"):
        made.close()
        raise ValueError(
            f"{env} is no text environment: it has no `instructions`, and its observations are {space}. Say "
            f"'gymnasium:{env}', which puts it into words."
        )
    return made


def find_factory(env: str) -> Callable[..., Any] | None:
    """
    The class or factory that `"package.module:Class"` names; None, if `env` is an id. Gymnasium has ids of that form,
    `"module:Id-v0"`, whose module registers them: it is imported here.
    """
    module, colon, name = env.partition(":")
    if not colon or module in PREFIXES:
        return None
    if module.endswith(".py") or "/" in module:
        file = PurePath(module)
        where = "" if file.parent == PurePath(".") else f", from its folder, {file.parent}"
        raise ValueError(f"{env!r} names a file: write {file.name.removesuffix('.py')}:{name}{where}.")
    if ":" in name:
        raise ValueError(f"env={env!r} is no id, and not `package.module:Class`: {SUITES}")
    try:
        found = import_named(module)
    except ValueError as error:
        raise ValueError(f"{env!r} names no environment: {error} Or did you mean a suite? {SUITES}") from error
    if name in gymnasium.registry or not is_path(name):
        return None
    if find_highest_version(None, name) is not None and not hasattr(found, name):
        return None  # Gymnasium finds the latest version itself
    return import_object(env)


def _make_registered(env: str, env_kwargs: dict[str, Any]) -> Any:
    """An environment by its id. Gymnasium makes its own kind alone; other classes are made here, unwrapped."""
    spec = gymnasium.registry.get(env.rpartition(":")[2])
    creator = spec.entry_point if spec else None
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    if not inspect.isclass(creator) or issubclass(creator, gymnasium.Env):
        try:
            # Gymnasium's checker asks for spaces, of which text has no need; ours is `check_env`
            return gymnasium.make(env, **{"disable_env_checker": True, **env_kwargs})
        except TypeError as error:
            if "must inherit from the gymnasium.Env" not in str(error):
                raise
            raise ValueError(
                f"{env!r} was registered with what makes no gymnasium.Env: inherit from it, or pass the factory "
                "itself, by name 'package.module:factory'."
            ) from error
    if spec.max_episode_steps is not None or spec.additional_wrappers:
        raise ValueError(
            f"{env!r} was registered with max_episode_steps or wrappers, which only a gymnasium.Env can have: let "
            f"{creator.__name__} inherit from it, or end the episodes itself."
        )
    return creator(**{**copy.deepcopy(spec.kwargs), **env_kwargs})


def show_through(env: Any) -> Any:
    """Returns `env`, with the attributes of what it wraps made readable if it is a Gymnasium wrapper."""
    return ShowThrough(env) if isinstance(env, gymnasium.Wrapper) else env
