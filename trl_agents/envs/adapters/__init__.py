# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Other people's environments as ours, and ours as TRL's. [`~envs.make_env`] makes them from ids such as
`"gymnasium:FrozenLake-v1"`; a suite is imported when one of its environments is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


# What stands before the first colon of an id, and what is made of the rest.
PREFIXES = {
    "gymnasium": "GymnasiumEnvironment",
    "textarena": "TextArenaGame",
    "gem": "GemEnvironment",
    "reasoning_gym": "ReasoningGymQuestion",
    "openenv": "OpenEnvEnvironment",
    "tools": "ToolEnvironment",
}

_MODULES = {
    "GymnasiumEnvironment": "gymnasium_suite",
    "TextArenaGame": "textarena_suite",
    "GemEnvironment": "gem_suite",
    "ReasoningGymQuestion": "question",
    "OpenEnvEnvironment": "openenv",
    "ToolEnvironment": "tools",
    "as_trl_environment": "trl",
}

__all__ = ["PREFIXES", "adapt", *_MODULES]


def adapt(prefix: str, name: str, **env_kwargs: Any) -> Any:
    """The environment `name` of the suite `prefix`, as ours."""
    return __getattr__(PREFIXES[prefix])(name, **env_kwargs)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
