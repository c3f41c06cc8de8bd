# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`trl-agents eval`: players and models on the same held-out episodes."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..page import describe_env, write_text
from ..viewer import episode_record, write_page, write_records
from .model_arguments import OWN, add_model_arguments, settle
from .named import add_env, add_env_kwargs, check_named_env, not_negative, positive, writable_folder
from .players import console, name_players, play_named, shows_progress, warn_of_invalid
from .unfinished import Unfinished


if TYPE_CHECKING:
    from ..tables import Interval


HELP = "compare players and models on the same held-out episodes"
DESCRIPTION = (
    "Let players and models play the same held-out episodes (seeds apart from those of training), and compare them:\n"
    "a table of means with 95% intervals, a plot, metrics.json, and the episodes to read (episodes.jsonl, .html).\n"
    "Interrupted, the same command goes on with the players that had not finished."
)
EXAMPLES = """\
examples:
  trl-agents eval random ucb thompson bold=thompson:prior=gaussian,prior_std=3
  trl-agents eval random ucb before=outputs/grpo_bandit_tiny/warmup after=outputs/grpo_bandit_tiny
  trl-agents eval random minimax Qwen/Qwen3-0.6B --env trl_agents/TicTacToe-v0 --env_kwargs '{"opponent": "optimal"}'
"""


# `metrics.json` has what came of them
_UNTOLD = ("run", "debug", "quiet", "untold", "not_taken", "env_timeout", "max_turns", *OWN)
_FREE = ("players", "models", "output_dir", "n_slots", "device")  # may differ when an interrupted evaluation goes on
_PICTURES = ("regret.png", "measures.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "players",
        nargs="+",
        metavar="PLAYER",
        help="a scripted player, the folder of a model, or a Hub id; LABEL=PLAYER names it in the table, and "
        "thompson:prior=gaussian,sigma=2 gives a scripted one arguments",
    )
    add_env(parser)
    add_env_kwargs(parser)
    parser.add_argument(
        "--num_episodes", type=positive, default=64, metavar="N", help="held-out episodes (default: 64)"
    )
    parser.add_argument("--output_dir", default="outputs/eval", metavar="DIR", help="default: outputs/eval")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the models' sampling (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    players = name_players(args.players)
    how = settle(args, players)
    check_named_env(how.env_id, how.env_kwargs, args.env_timeout)
    folder = writable_folder(args.output_dir)
    settings = {**{name: value for name, value in vars(args).items() if name not in _UNTOLD}, **how.as_dict()}
    common = {name: value for name, value in settings.items() if name not in _FREE}
    earlier = _earlier(folder)
    if earlier and any(earlier.get(name) != settings.get(name) for name in ("players", "max_turns", *common)):
        what = describe_env(earlier["env"], earlier.get("env_kwargs"))
        warnings.warn(
            f"{folder} holds an earlier evaluation, of {', '.join(earlier['players'])} in {what}, which this one "
            "replaces: keep it by another --output_dir.",
            stacklevel=2,
        )
    unfinished = Unfinished(folder, {**common, "env_timeout": args.env_timeout}, settings["models"])

    from ..evaluation import held_out_seeds
    from ..tables import plain_table, summarize

    seeds = held_out_seeds(args.num_episodes)
    played = {}
    for player in players:
        done = unfinished.done(player)
        if done is None:
            done = play_named(player, how, args, seeds, progress=shows_progress(args))
            unfinished.keep(player, done)
        else:
            warnings.warn(f"{player.label} had finished when this was interrupted: going on from there.", stacklevel=2)
        played[player.label] = done
    table = summarize(played)
    if not table:
        unfinished.delete()  # the environment may be mended, and nobody goes on from this
        first = next(one.error for episodes in played.values() for one in episodes)
        raise ValueError(f"The environment failed in every episode; the first time: {first}")
    for name, episodes in played.items():
        if faults := sum(one.stop.is_fault for one in episodes):
            warnings.warn(
                f"The environment failed in {faults} of {name}'s episodes, which are left out.", stacklevel=2
            )
    invalid = table.get("invalid_rate", {})
    shares = {f"of {name}'s": invalid[name].mean for name in how.of if name in invalid}
    warn_of_invalid(shares, "--max_new_tokens")
    title = describe_env(how.env_id, how.env_kwargs)
    records = [
        episode_record(trajectory, player=name, env_id=how.env_id, env_kwargs=how.env_kwargs)
        for name, episodes in played.items()
        for trajectory in episodes
    ]
    write_records(folder / "episodes.jsonl", records)
    write_page(folder / "episodes.html", records, title=f"{title}: {', '.join(played)}")
    write_text(folder / "metrics.json", json.dumps({**plain_table(table), "settings": settings}, indent=2) + "\n")
    picture = _plot(played, table, folder, title)
    for name in _PICTURES:
        if earlier and name != picture:  # it would be taken for one of this evaluation
            (folder / name).unlink(missing_ok=True)
    unfinished.delete()
    _show(table, f"{title}, {len(seeds)} held-out episodes, mean [95% interval]")
    written = ", ".join(("metrics.json", picture, "episodes.jsonl", "episodes.html"))
    console().print(f"Written to {folder}{os.sep}: {written}", markup=False)
    return 0


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The settings of the evaluation that is in the folder; None if what is there is something else, or nothing."""
    try:
        settings = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["settings"]
        known = all(isinstance(one, str) for one in (settings["env"], *settings["players"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return settings if known else None


def _plot(played: Mapping[str, Any], table: Mapping[str, Mapping[str, Interval]], folder, title: str) -> str:
    from ..plots import plot_measures, plot_regret

    if "regret" in table:
        plot_regret(played, folder / "regret.png", title)
        return "regret.png"
    plot_measures(table, folder / "measures.png", title)
    return "measures.png"


def _show(table: Mapping[str, Mapping[str, Interval]], title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title))
    shown.add_column("player")
    for measure in table:
        shown.add_column(measure, justify="right")
    for name in dict.fromkeys(name for row in table.values() for name in row):
        shown.add_row(
            Text(name), *(str(row[name]).replace("[", r"\[") if name in row else "" for row in table.values())
        )
    console().print(shown)
