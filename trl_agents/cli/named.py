# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a command line names: environments and their arguments, folders, close matches of what is not there."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import gymnasium

from ..envs.make import make_env
from ..envs.names import close_to
from ..exploration import make_exploration


DEFAULT_ENV = "trl_agents/Bandit-v0"


def add_env(parser) -> None:
    """Add `--env`, for commands that play in the environment a model was trained in if none is named."""
    parser.add_argument(
        "--env", metavar="ENV", help=f"id or MODULE:CLASS (default: that of the models, else {DEFAULT_ENV})"
    )


def add_env_kwargs(parser) -> None:
    """Add what all commands that make an environment have: `--env_kwargs`, and the limits of an episode in it."""
    parser.add_argument(
        "--env_kwargs",
        type=as_object,
        metavar="JSON",
        help='all arguments of the environment, such as \'{"n_arms": 10, "horizon": 20}\' (default: those of the '
        "models that were trained in it)",
    )
    parser.add_argument(
        "--max_turns",
        type=positive,
        metavar="N",
        help="of an episode, for environments without an end of their own (default: that of the models trained in it)",
    )


def as_mechanism(text: str) -> str:
    """The name of an exploration mechanism."""
    import argparse

    try:
        make_exploration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def as_object(text: str) -> dict[str, Any]:
    """A JSON object from the command line, for argparse's `type`."""
    import argparse

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}): write '{{\"n_arms\": 10}}'") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object: write '{{\"n_arms\": 10}}'")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse's `type`."""
    import argparse

    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse's `type`: a seed."""
    import argparse

    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def as_temperature(text: str) -> float:
    """A number of at least 0, for argparse's `type`."""
    import argparse

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return value


def as_share(text: str) -> float:
    """A number from 0 to 1, for argparse's `type`."""
    import argparse

    if not 0 <= (value := as_temperature(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def as_seconds(text: str) -> float:
    """A number above 0, for argparse's `type`."""
    import argparse

    if not (value := as_temperature(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def make_named_env(env_id: str, env_kwargs: dict[str, Any]) -> Any:
    """
    The environment that a user named.

    Raises:
        `ValueError`: that names what is close to it, if there is no such environment, or its arguments, if they do
            not fit, or what is amiss, if it is none for text.
    """
    if ":" not in env_id:  # else a module is named, or a suite
        try:
            gymnasium.spec(env_id)
        except gymnasium.error.Error:
            ours = sorted(id_ for id_ in gymnasium.registry if id_.startswith("trl_agents/"))
            raise ValueError(
                f"There is no environment {env_id!r}.{close_to(env_id, ours, gymnasium.registry)} Those of trl_agents "
                f"are {', '.join(ours)}; for your own, say MODULE:CLASS, or MODULE:ID of one that MODULE registers."
            ) from None
    env = make_env(env_id, **env_kwargs)
    if not hasattr(env, "instructions"):
        env.close()
        raise ValueError(
            f"{env_id} is no text environment: it has no `instructions`. `check_env` tells what one needs."
        )
    return env


def check_named_env(env_id: str, env_kwargs: dict[str, Any], timeout: float | None) -> None:
    """Raises as [`make_named_env`], and for an environment that cannot be made within `timeout` seconds."""
    from ..rollout.probe import Probe

    factory = functools.partial(make_named_env, env_id, env_kwargs)
    with contextlib.closing(Probe(factory, timeout, resets=False)) as probe:
        probe.begin(0)


def writable_folder(path: str) -> Path:
    """Make the folder and try it, before anything is computed that is to be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"The folder {path} cannot be written ({error.strerror}): choose another.") from None
    return folder


def writable_file(path: str) -> Path:
    """The same for a file, whose folder is made."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it.")
    writable_folder(str(file.parent))
    return file
