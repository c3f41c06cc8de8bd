# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is meant by a name that is not there: environments, their arguments, models."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gymnasium


def close_to(name: str, *known: Iterable[str], cutoff: float = 0.65) -> str:
    """`" Did you mean ...?"`, if something is close to `name`, else nothing. The first `known` with a match counts."""
    wanted = name.lower().rpartition("/")[2]  # also without a namespace or folder
    for names in known:
        short = {one.lower().rpartition("/")[2]: one for one in sorted(names, key=len, reverse=True)}
        if matches := difflib.get_close_matches(wanted, short, n=2, cutoff=cutoff):
            return f" Did you mean {' or '.join(short[match] for match in matches)}?"
    return ""


def check_model_source(source: str) -> None:
    """Raises `ValueError` for what can be told without a network to be neither the folder of a model nor a Hub id."""
    folder = Path(source)
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            checkpoints = sorted(folder.glob("**/checkpoint-*"), key=lambda path: path.stat().st_mtime)
            hint = f" Did you mean {checkpoints[-1]}?" if checkpoints else ""
            raise ValueError(
                f"The folder {source} holds no model (neither config.json nor adapter_config.json).{hint}"
            )
    elif folder.exists():
        raise ValueError(f"{source} is a file: give the folder of a model, or a Hub id.")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        siblings = [str(path) for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ValueError(f"There is no folder {source}, and it is no Hub id.{close_to(source, siblings)}")


def unknown_argument(env: str | Callable[..., Any], env_kwargs: dict[str, Any]) -> str:
    """Which of `env_kwargs` an environment does not take, and which it does; nothing, if that cannot be told."""
    known = _arguments(env)
    also = inspect.signature(gymnasium.make).parameters if isinstance(env, str) else ()  # such as max_episode_steps
    if not known or not (unknown := sorted(set(env_kwargs) - {*known, *also})):
        return ""
    return f"it has no argument {unknown[0]!r}.{close_to(unknown[0], known)} Its arguments: {', '.join(known)}."


def _arguments(env: str | Callable[..., Any]) -> list[str]:
    """The names of an environment's arguments; none, if it takes any or they cannot be told."""
    try:
        made_by = gymnasium.spec(env.rpartition(":")[2]).entry_point if isinstance(env, str) else env
        made_by = gymnasium.envs.registration.load_env_creator(made_by) if isinstance(made_by, str) else made_by
        parameters = inspect.signature(made_by).parameters.values()
    except (gymnasium.error.Error, ImportError, AttributeError, TypeError, ValueError):
        return []
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return [] if takes_any else [parameter.name for parameter in parameters]
