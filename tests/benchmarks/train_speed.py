# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How long does an optimisation step take: ours, and plain supervised fine-tuning on the same tokens.

    OMP_NUM_THREADS=1 python tests/benchmarks/train_speed.py --output_dir train_speed

- `sft`: TRL's `SFTTrainer`; what the model sampled is labelled, what it read is not.
- `grpo`: `AgentGRPOTrainer`.
- `ppo`: `AgentPPOTrainer`, whose reference and old values are forward passes of their own, made before the update.

A policy that writes words of filler and an action plays the same episodes of the bandit in each context: `chat`, a
row an episode, and `window`, a row a turn, whose prompt is rendered anew. All systems get these rows in batches of as
many, train the same tokens of them, and start from the same weights. A step is what the trainer does from update to
update, but for playing: rows, padding, rewards, advantages and tables (`building`), passes without gradients
(`scoring`), and forward and backward passes, clipping and Adam (`updating`, of `sft` with its collating).

Seconds are the process's own on a CPU, medians over repeats; the systems take turns, and a ratio is the median of each
turn's. Peak memory is that of a step in one batch, beside weights and Adam's moments (`step_cost.py`).

Where ours was slower: TRL pads all batches of a rollout to its longest row, SFT each to its own. Since forward passes
leave out columns of padding, a step of `grpo` on `chat` rows of 1 to 6 turns takes 1.02 times as long as `sft`'s, not
1.34 times (medians of three, both in one run). What is left of `ppo` are its two passes without gradients.
Looked at and left: `rows_of`, `steps_of` and the rest of `batch.py` take less than half a second for 64 episodes of 50
turns (445,000 tokens); with a `response_template`, which few tokenizers have, TRL parses every completion by it (7.4
of 8.2 s of `building` for 3200 rows).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import trl
from rollout_systems import Case
from scripted_bandit import SHAPES
from step_cost import peak_bytes_of
from tqdm.auto import tqdm
from train_systems import GENERATIONS, PHASES, SYSTEMS, Work, Workbench


LABELS = {"sft": "SFT", "grpo": "GRPO", "ppo": "PPO"}
COLOURS = {"sft": "tab:gray", "grpo": "tab:blue", "ppo": "tab:green"}


def name_of(case: Case) -> str:
    return f"{case.context}, {'1 to ' * case.varied}{case.turns} turns"


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(systems: dict[str, Any], works: list[Work], repeats: int) -> dict[Case, dict[str, list[dict[str, float]]]]:
    """Every system's seconds by phase on all work, `repeats` times, one after the other within each repeat."""
    names = list(systems)
    measured = {work.case: {name: [] for name in names} for work in works}
    with tqdm(total=len(names) * (1 + repeats * len(works)), unit="step") as bar:
        for name in names:  # the first step makes Adam's moments
            bar.set_description(f"warm-up, {LABELS[name]}")
            systems[name].step(works[0])
            bar.update()
        for repeat in range(repeats):
            for work in works:
                for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                    bar.set_description(f"{name_of(work.case)}, {LABELS[name]}")
                    measured[work.case][name].append(systems[name].step(work))
                    bar.update()
    return measured


def measure_memory(systems: dict[str, Any], works: list[Work], device: str) -> list[dict[str, Any]]:
    """The peak of one step on each work, in bytes by system."""
    lines = []
    for work in tqdm(works, desc="Memory", unit="batch"):
        peaks = {name: peak_bytes_of(functools.partial(system.step, work), device) for name, system in systems.items()}
        line = {"case": name_of(work.case), "episodes": work.case.episodes, "rows": len(work.rows)}
        lines.append({**line, "bytes": peaks})
    return lines


def summarize(works: list[Work], measured: dict[Case, dict[str, list[dict[str, float]]]]) -> list[dict[str, Any]]:
    """A dict a case: its tokens, and of each system seconds, tokens per second, and ratios to `sft`."""
    lines = []
    for work in works:
        runs, rows = measured[work.case], work.rows
        seconds = {name: [sum(run.values()) for run in each] for name, each in runs.items()}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        sampled = sum(sum(row.mask) for row in rows)
        read = sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)

        def over_sft(values: list[float], seconds: dict[str, list[float]] = seconds) -> float:
            return statistics.median(value / sft for value, sft in zip(values, seconds["sft"], strict=True))

        lines.append(
            {
                **asdict(work.case),
                "case": name_of(work.case),
                "batches": work.n_batches,
                "rows": len(rows),
                "sampled": sampled,
                "tokens": read,
                "seconds": medians,
                "all_seconds": seconds,
                "phases": {
                    name: {phase: statistics.median(run[phase] for run in each) for phase in PHASES}
                    for name, each in runs.items()
                },
                "tokens_per_second": {name: read / value for name, value in medians.items()},
                "sampled_per_second": {name: sampled / value for name, value in medians.items()},
                "step_over_sft": {name: over_sft(values) for name, values in seconds.items()},
                "update_over_sft": {name: over_sft([run["updating"] for run in each]) for name, each in runs.items()},
            }
        )
    return lines


# -- showing ----------------------------------------------------------------------------------------------------------


def print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print()
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))


def print_tables(lines: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        for name in line["seconds"]:
            phases = line["phases"][name]
            rows.append(
                [
                    line["case"],
                    LABELS[name],
                    *(str(line[count]) for count in ("rows", "tokens", "sampled")),
                    *(f"{phases[phase]:.3f}" for phase in PHASES),
                    f"{line['tokens_per_second'][name]:.0f}",
                    f"{line['sampled_per_second'][name]:.0f}",
                    f"{line['update_over_sft'][name]:.2f}",
                    f"{line['step_over_sft'][name]:.2f}",
                ]
            )
    head = ["episodes", "", "rows", "tokens", "sampled", *(f"{phase} s" for phase in PHASES)]
    print_table([*head, "tokens/s", "sampled/s", "update/SFT", "step/SFT"], rows)
    rows = [
        [line["case"], str(line["episodes"]), str(line["rows"])]
        + [f"{line['bytes'][name] / 2**20:.0f}" for name in LABELS]
        for line in memory
    ]
    print_table(["peak MiB of one batch", "episodes", "rows", *LABELS.values()], rows)


def plot(lines: list[dict[str, Any]], memory: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = list(LABELS)
    hatches = {"building": "....", "scoring": "////", "updating": ""}
    for number, line in enumerate(lines):
        for index, name in enumerate(names):
            bottom, place = 0.0, number + 0.27 * (index - 1)
            for phase in reversed(PHASES):
                height = line["phases"][name][phase]
                left.bar(
                    place, height, 0.24, bottom, color=COLOURS[name], hatch=hatches[phase], edgecolor="white", lw=0.5
                )
                bottom += height
            text = f"{line['sampled_per_second'][name]:.0f}"
            left.annotate(text, (place, bottom), ha="center", va="bottom", fontsize=7)
    left.set_xticks(range(len(lines)), [line["case"].replace(", ", "\n") for line in lines])
    left.set_ylabel("seconds per step")
    left.set_title("above: sampled tokens per second", fontsize=9)
    left.margins(y=0.12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=LABELS[name]) for name in names]
    handles += [
        plt.Rectangle((0, 0), 1, 1, fill=False, hatch=hatches[phase], edgecolor="gray", label=phase)
        for phase in PHASES
    ]
    left.legend(handles=handles, fontsize=8, ncols=2, loc="upper left")
    for index, name in enumerate(names):
        peaks = [line["bytes"][name] / 2**20 for line in memory]
        places = [number + 0.27 * (index - 1) for number in range(len(memory))]
        right.bar(places, peaks, 0.24, color=COLOURS[name])
        for place, peak in zip(places, peaks, strict=True):
            right.annotate(f"{peak:.0f}", (place, peak), ha="center", va="bottom", fontsize=6)
    right.set_xticks(range(len(memory)), [f"{line['case'].split(',')[0]}\n{line['rows']} rows" for line in memory])
    right.set_ylabel("peak MiB of a step in one batch")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].strip(), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--contexts", nargs="+", default=["chat", "window"], choices=["chat", "window"], help="rows")
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=["fixed", "varied"],
        choices=["fixed", "varied"],
        help="--turns, or 1 to as many",
    )
    parser.add_argument("--turns", type=int, default=6, help="of an episode")
    parser.add_argument("--window", type=int, default=3, help="transitions a prompt keeps with context window")
    parser.add_argument("--tokens", type=int, default=20, help="of a reply, on average")
    parser.add_argument("--episodes", type=int, default=8, help="of a step")
    parser.add_argument("--batches", type=int, default=4, help="of a step: the gradient accumulation")
    parser.add_argument("--memory_episodes", type=int, nargs="+", default=[2, 4, 8], help="of a batch, for the peak")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of Qwen3, in place of the following three")
    parser.add_argument("--hidden_size", type=int, default=128, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the model")
    parser.add_argument("--beta", type=float, help="KL coefficient; by default each trainer's own: 0, PPO's 0.05")
    parser.add_argument(
        "--as_on_gpu", action="store_true", help="logits where there is a label alone, as TRL computes them on GPUs"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of all systems")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, of all systems")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each; the median counts")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train")
    parser.add_argument("--output_dir", default="train_speed", help="for train_speed.json and train_speed.png")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command and return what it writes, with the work that was done."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if min(args.turns, args.episodes, args.batches, args.repeats) < 1:
        parser.error("--turns, --episodes, --batches and --repeats are at least 1")
    for size in (args.episodes / args.batches, *args.memory_episodes):
        if size < 1 or size % GENERATIONS:
            parser.error(f"--memory_episodes and --episodes divided by --batches are multiples of {GENERATIONS}")
    cases = [
        Case(args.turns, args.episodes, args.tokens, context, varied=length == "varied")
        for context, length in itertools.product(args.contexts, args.lengths)
    ]
    batches = [
        Case(args.turns, size, args.tokens, context)
        for context, size in itertools.product(args.contexts, sorted(args.memory_episodes))
    ]
    everywhere = mock.patch("trl.trainer.utils._use_triton", lambda device: True) if args.as_on_gpu else nullcontext()
    with tempfile.TemporaryDirectory() as folder, everywhere:
        bench = Workbench(args, folder)
        systems = {name: make(bench) for name, make in SYSTEMS.items()}
        works = [bench.work(case, args.batches) for case in cases]
        measured = measure(systems, works, args.repeats)
        memory = measure_memory(systems, [bench.work(case, 1) for case in batches], args.device)
    lines = summarize(works, measured)
    result = {
        "command": " ".join(["python tests/benchmarks/train_speed.py", *(arguments or sys.argv[1:])]),
        "settings": {
            **vars(args),
            "parameters": bench.n_parameters,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        },
        "lines": lines,
        "memory": memory,
    }
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "train_speed.json").write_text(json.dumps(result, indent=2) + "\n")
    millions = bench.n_parameters / 1e6
    title = f"{args.episodes} episodes in {args.batches} batches, {millions:.1f}M parameters, {args.device}"
    plot(lines, memory, title, output_dir / "train_speed.png")
    print_tables(lines, memory)
    return {**result, "works": works}


if __name__ == "__main__":
    main()
