# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Players as a command line names them: scripted ones by name, models by folder or Hub id."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..agents import AGENTS, is_scripted, make_agent, play_episode
from ..envs.make import make_env
from ..envs.names import check_model_source
from ..types import Trajectory
from .named import close_to


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .model_arguments import Settings


MANY_INVALID = 0.2  # of the replies
MISTYPED = 0.8  # how much a folder is like a name, from 0 to 1, for the name not to be looked for on the Hub


@dataclass(frozen=True)
class NamedPlayer:
    """`label` is what tables call the player; `source` what [`make_agent`] takes, a folder, or a Hub id."""

    label: str
    source: str

    @property
    def is_scripted(self) -> bool:
        return is_scripted(self.source)


def name_player(text: str) -> NamedPlayer:
    """
    The player that a user named, as `SOURCE` or `LABEL=SOURCE`.

    Raises:
        `ValueError`: if it can be told without a network that there is no such player.
    """
    label, source = _label_and_source(text)
    player = NamedPlayer(label or text.rstrip("/\\") or text, source)
    if player.is_scripted:
        make_agent(source)  # says what is amiss with its settings
    else:
        _check_model(source)
    return player


def _label_and_source(text: str) -> tuple[str, str]:
    if os.path.exists(text):
        return "", text
    head, colon, settings = text.partition(":")
    label, _, kind = head.rpartition("=")
    if colon and (kind in AGENTS or (close_to(kind, AGENTS) and "/" not in settings)):  # settings have an = too
        return label, f"{kind}:{settings}"
    label, _, source = text.rpartition("=")
    return (label, source) if label else ("", text)


def name_players(texts: Sequence[str]) -> list[NamedPlayer]:
    """Several players, by different labels."""
    players = [name_player(text) for text in texts]
    labels = [player.label for player in players]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"Two players are called {label!r}: name them apart, as in `before=MODEL after=MODEL`.")
    return players


def _check_model(source: str) -> None:
    scripted = f"The scripted players are {', '.join(AGENTS)}."
    try:
        check_model_source(os.path.expanduser(source))
    except ValueError as error:
        hint = "" if "Did you mean" in str(error) else close_to(source.partition(":")[0], AGENTS)
        raise ValueError(f"{error}{hint} {scripted}") from None
    folder = Path(source).expanduser()
    if folder.exists():
        return
    if "/" not in source and (hint := close_to(source, AGENTS)):
        raise ValueError(f"There is no player {source!r}.{hint} {scripted} Models are folders or Hub ids.")
    if (hint := _close_folders(folder)) and not _is_cached(source):  # the Hub is asked for a minute
        raise ValueError(
            f"There is no folder {source}.{hint} (If it is a Hub id, fetch it first: `hf download {source}`.)"
        )


def _close_folders(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    return close_to(folder.name, [str(one) for one in folder.parent.iterdir() if one.is_dir()], cutoff=MISTYPED)


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(hub_id, name), str) for name in ("config.json", "adapter_config.json")
    )


def load_model(source: str, device: str | None = None, dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """
    A model, with its adapters if it has any, and its tokenizer.

    Raises:
        `ValueError`: if there is none of that name, in a line.
    """
    import torch
    from transformers.utils import logging

    from ..diagnostics.players import load_model

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype}: there is no such type of weights. Use bfloat16, float16 or float32.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}).") from error
    logging.disable_progress_bar()
    return load_model(os.path.expanduser(source), device, dtype)


@contextlib.contextmanager
def _explained(player: NamedPlayer, env_id: str) -> Iterator[None]:
    """Says it in words if the environment does not tell what the player has to know."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"The player {player.source!r} cannot play {env_id}, which does not tell info[{error}]. Choose another of "
            f"{', '.join(name for name in AGENTS if name != player.source.partition(':')[0])}."
        ) from error


def play_named(
    player: NamedPlayer, settings: Settings, args: argparse.Namespace, seeds: Sequence[int], progress: bool
) -> list[Trajectory]:
    """An episode of `player` from each seed."""
    env_id, env_kwargs = settings.env_id, settings.env_kwargs
    game = {"env_kwargs": env_kwargs, "max_turns": settings.max_turns}
    if player.is_scripted and len(seeds) == 1:  # without torch, whose import takes longer than the episode
        env = make_env(env_id, **env_kwargs)
        with _explained(player, env_id):
            return [play_episode(env, make_agent(player.source, env), seed=seeds[0], max_turns=settings.max_turns)]

    from ..evaluation import play_agents, play_model

    if player.is_scripted:
        with _explained(player, env_id):
            played = play_agents(env_id, [player.source], seeds, **game, progress=progress)
        return played[player.source]
    model, tokenizer = load_model(player.source, args.device, args.dtype)
    how = {**settings.of[player.label].arguments(), **game, "env_timeout": args.env_timeout, "n_slots": args.n_slots}
    return play_model(model, tokenizer, env_id, seeds, **how, seed=args.seed, progress=progress)


def warn_of_invalid(shares: Mapping[str, float], flags: str) -> None:
    """A line where so many replies held no action that the figures say little of the model."""
    many = [f"{share:.1%} {of}" for of, share in shares.items() if share > MANY_INVALID]
    if many:
        warnings.warn(
            f"Replies without a legal action: {', '.join(many)}. Random actions in their place say little of the "
            f"model. Does it play as it was trained to? Check --context, {flags}, --env_kwargs and --action_pattern.",
            stacklevel=2,
        )


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether to show progress bars: not into a file or pipe, where each step of one would be a line."""
    return sys.stderr.isatty() and not getattr(args, "quiet", False)


@functools.cache
def console():
    """The terminal; where there is none, lines wide enough for a table."""
    from rich.console import Console

    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=160)
