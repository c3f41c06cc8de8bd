# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`trl-agents diagnose`: the failure modes of a model that acts, measured into one folder with a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from .model_arguments import NOT_OF_A_DIAGNOSIS, add_model_arguments, settle
from .named import add_env, add_env_kwargs, check_named_env, not_negative, positive, writable_folder
from .players import load_model, name_player, shows_progress, warn_of_invalid


PARTS = ("greediness", "frequency_bias", "knowing_doing")  # as in `diagnostics`, which would import torch
HELP = "measure greediness, frequency bias and the knowing-doing gap"
DESCRIPTION = (
    "Measure how a model fails where it should explore: greediness, frequency bias, and the gap between knowing and\n"
    "doing. Everything goes into one folder: diagnostics.json, plots, episodes.jsonl and .html, and report.html.\n"
    "What is measured is saved at once; the same command goes on where it was interrupted."
)
EXAMPLES = """\
examples:
  trl-agents diagnose outputs/grpo_bandit_tiny/warmup --output_dir outputs/diagnosis/before
  trl-agents diagnose outputs/grpo_bandit_tiny --output_dir outputs/diagnosis/after --compare outputs/diagnosis/before
  trl-agents diagnose ucb --env_kwargs '{"n_arms": 10}' --output_dir outputs/diagnosis/ucb
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("player", metavar="MODEL", help="folder of a model, a Hub id, or a scripted player")
    add_env(parser)
    add_env_kwargs(parser)
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of this diagnosis")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of other diagnoses, which the report shows beside this one (first the one from before)",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--num_instances", type=positive, default=64, metavar="N", help="episodes (default: 64)")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--max_new_tokens_ucb",
        type=positive,
        default=2048,
        metavar="N",
        help="where values are written (default: 2048)",
    )
    add_model_arguments(parser, context="window", temperature=0.0, diagnosis=True)


def run(args: argparse.Namespace) -> int:
    player = name_player(args.player)
    settings = settle(args, [player])
    check_named_env(settings.env_id, settings.env_kwargs, args.env_timeout)
    folder = writable_folder(args.output_dir)

    from ..diagnostics.report import read_diagnosis, write_report

    for other in args.compare:  # before hours of measuring
        if not (Path(other) / "diagnostics.json").exists():
            raise ValueError(f"--compare {other}: there is no {Path(other) / 'diagnostics.json'}; diagnose it first.")
        read_diagnosis(other)

    from ..diagnostics import diagnose
    from ..viewer import write_page
    from .view import read_folder

    source = player.source if player.is_scripted else load_model(player.source, args.device, args.dtype)
    how = settings.of.get(player.label, args.untold).arguments()
    how = {name: value for name, value in how.items() if name == "temperature" or name not in NOT_OF_A_DIAGNOSIS}
    result = diagnose(
        source,
        settings.env_id,
        folder,
        name=player.label,
        **({"parts": args.parts} if args.parts else {}),
        **{**how, "env_kwargs": settings.env_kwargs, "max_turns": settings.max_turns},
        env_timeout=args.env_timeout,
        n_instances=args.num_instances,
        seed=args.seed,
        max_new_tokens_ucb=args.max_new_tokens_ucb,
        n_slots=args.n_slots,
        progress=shows_progress(args),
    )
    if not player.is_scripted:
        rates = result["invalid_rate"]  # of frequency bias, it is no share of replies
        shares = {f"in {part}": rates[part]["mean"] for part in ("greediness", "knowing_doing") if part in rates}
        warn_of_invalid(shares, "--max_new_tokens (in knowing_doing --max_new_tokens_ucb)")
    if any(folder.rglob("*.jsonl")):
        write_page(folder / "episodes.html", read_folder(folder), title=f"Diagnosis of {player.label}")
    report = write_report([*args.compare, folder], folder / "report.html")
    print(f"Report: {report}")
    return 0
