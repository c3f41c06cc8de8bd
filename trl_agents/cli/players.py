# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Players as a command line names them: scripted ones by name, models by folder or Hub id."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..actions import ActionParser
from ..agents import AGENTS, make_agent, play_episode
from ..envs.make import make_env
from ..types import Trajectory
from .named import as_mechanism, as_object, as_temperature, close_to, not_negative, positive


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedPlayer:
    """`label` is what tables call the player; `source` a scripted player's name, a folder, or a Hub id."""

    label: str
    source: str

    @property
    def is_scripted(self) -> bool:
        return self.source in AGENTS


def name_player(text: str) -> NamedPlayer:
    """
    The player that a user named, as `SOURCE` or `LABEL=SOURCE`.

    Raises:
        `ValueError`: if it can be told without a network that there is no such player.
    """
    label, _, source = text.rpartition("=")
    if not label or os.path.exists(text):
        label, source = "", text
    player = NamedPlayer(label or text.rstrip("/\\") or text, source)
    if not player.is_scripted:
        _check_model(source)
    return player


def name_players(texts: Sequence[str]) -> list[NamedPlayer]:
    """Several players, by different labels."""
    players = [name_player(text) for text in texts]
    labels = [player.label for player in players]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"Two players are called {label!r}: name them apart, as in `before=MODEL after=MODEL`.")
    return players


def _check_model(source: str) -> None:
    folder = Path(source).expanduser()
    scripted = f"The scripted players are {', '.join(AGENTS)}."
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            checkpoints = sorted(folder.glob("**/checkpoint-*"), key=lambda path: path.stat().st_mtime)
            hint = f" Did you mean {checkpoints[-1]}?" if checkpoints else ""
            raise ValueError(
                f"The folder {source} holds no model (neither config.json nor adapter_config.json).{hint}"
            )
    elif folder.exists():
        raise ValueError(f"{source} is a file: give the folder of a model, a Hub id, or a player. {scripted}")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        siblings = [str(path) for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ValueError(f"There is no folder {source}, and it is no Hub id.{close_to(source, siblings)} {scripted}")
    elif "/" not in source and (hint := close_to(source, AGENTS)):
        raise ValueError(f"There is no player {source!r}.{hint} {scripted} Models are folders or Hub ids.")


def load_model(source: str, device: str | None = None, dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """
    A model, with its adapters if it has any, and its tokenizer.

    Raises:
        `ValueError`: if there is none of that name, in a line.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    source = os.path.expanduser(source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype}: there is no such type of weights. Use bfloat16, float16 or float32.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}).") from error
    logging.disable_progress_bar()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.to(device), tokenizer
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
        where = "The folder" if Path(source).is_dir() else "No folder here, and the Hub gave no model:"
        raise ValueError(
            f"No model could be loaded from {source!r}. {where} ({type(error).__name__}: {reason})"
        ) from error


def add_model_arguments(
    parser: argparse.ArgumentParser, context: str = "chat", temperature: float = 1.0, whole_replies: bool = False
) -> None:
    """
    How models read and write, with these defaults; scripted players have no use for it. `whole_replies`: without the
    option to end a reply with its action.
    """
    group = parser.add_argument_group("how models read and write (as they were trained)")
    group.add_argument(
        "--context",
        choices=("chat", "window"),
        default=context,
        help=f"conversation that grows, or the last steps anew (default: {context})",
    )
    group.add_argument(
        "--window", type=not_negative, metavar="C", help="steps kept with --context window (default: all)"
    )
    group.add_argument("--max_new_tokens", type=positive, default=256, metavar="N", help="of a reply (default: 256)")
    if not whole_replies:
        group.add_argument("--action_stop", action="store_true", help="a reply is over when it has stated an action")
    group.add_argument(
        "--temperature",
        type=as_temperature,
        default=temperature,
        metavar="X",
        help=f"0 is greedy (default: {temperature:g})",
    )
    group.add_argument(
        "--action_pattern", metavar="REGEX", help="finds the action, in its one group (default: ACTION=X)"
    )
    group.add_argument(
        "--chat_template_kwargs", type=as_object, metavar="JSON", help="such as '{\"enable_thinking\": false}'"
    )
    group.add_argument(
        "--exploration",
        nargs="+",
        type=as_mechanism,
        default=[],
        metavar="MECHANISM",
        help="what makes them explore, such as try_all epsilon_greedy=0.1",
    )
    group.add_argument("--n_slots", type=positive, default=32, metavar="N", help="episodes side by side (default: 32)")
    group.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--dtype", default="auto", help="of the weights, such as bfloat16 (default: as they were saved)"
    )


def check_model_arguments(args: argparse.Namespace, players: Sequence[NamedPlayer]) -> None:
    """Raises where an argument of [`add_model_arguments`] would change nothing, which nobody would notice."""
    if args.window is not None and args.context != "window":
        raise ValueError(f"--window {args.window} keeps steps of --context window: add that, or leave --window out.")
    if args.exploration and all(player.is_scripted for player in players):
        raise ValueError(
            f"--exploration {' '.join(args.exploration)} is for models, and "
            f"{' and '.join(player.label for player in players)} writes no replies: name a model, or leave it out."
        )


@contextlib.contextmanager
def _explained(player: NamedPlayer, env_id: str) -> Iterator[None]:
    """Says it in words if the environment does not tell what the player has to know."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"The player {player.source!r} cannot play {env_id}, which does not tell info[{error}]. Choose another of "
            f"{', '.join(name for name in AGENTS if name != player.source)}."
        ) from error


def play_named(
    player: NamedPlayer, args: argparse.Namespace, env_id: str, seeds: Sequence[int], progress: bool
) -> list[Trajectory]:
    """An episode of `player` from each seed, with the settings of [`add_model_arguments`]."""
    parser = ActionParser(args.action_pattern)
    if player.is_scripted and len(seeds) == 1:  # without torch, whose import takes longer than the episode
        env = make_env(env_id, **args.env_kwargs)
        with _explained(player, env_id):
            return [play_episode(env, make_agent(player.source, env), seed=seeds[0])]

    from ..evaluation import play_agents, play_model

    if player.is_scripted:
        with _explained(player, env_id):
            played = play_agents(env_id, [player.source], seeds, env_kwargs=args.env_kwargs, progress=progress)
        return played[player.source]
    model, tokenizer = load_model(player.source, args.device, args.dtype)
    return play_model(
        model,
        tokenizer,
        env_id,
        seeds,
        env_kwargs=args.env_kwargs,
        parser=parser,
        context=args.context,
        window=args.window,
        chat_template_kwargs=args.chat_template_kwargs,
        exploration=args.exploration,
        max_new_tokens=args.max_new_tokens,
        action_stop=args.action_stop,
        temperature=args.temperature,
        n_slots=args.n_slots,
        seed=args.seed,
        progress=progress,
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
