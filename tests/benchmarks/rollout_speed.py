# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How long do episodes take: TRL's own environment loop, ours, and the floor.

    python tests/benchmarks/rollout_speed.py --output_dir rollout_speed
    python tests/benchmarks/rollout_speed.py --contexts chat window --lengths fixed varied --delays 0 10 100
    python tests/benchmarks/rollout_speed.py --turns 50 --tokens 40 --lengths varied ragged --systems lockstep ours
    python tests/benchmarks/rollout_speed.py --shape 0.6B --device cuda --dtype bfloat16

- `trl`: `GRPOTrainer(environment_factory=...)`, whose loop calls the environment's method as a tool and sends the
  whole history to `generate` at each turn. It knows growing conversations of one length only.
- `ours`: `Player` with `SlotBackend`, which keeps the key-value cache from turn to turn and refills a place as soon
  as its episode is over.
- `lockstep`: the same code, but all wait for the slowest, at each turn and at the end of a batch.
- `stop`: ours with `action_stop=True`, where replies go on `--after` their action.
- `floor`: one plain `generate` of as many tokens from the same first prompt, without any environment. Its rows end
  shorter, as nobody answers them.
- `limit`: what cannot be beaten: the time to read, once per sampled token, the weights (shared by the rows side by
  side) and the keys and values of what the token follows, at the bandwidth of a large copy on this device.

All run in one process on the same model with random weights, and write the same replies: what a random model
would say is overwritten, token by token, with a call of the tool. Logits are computed and sampled from as ever, and
the overwriting is the same code everywhere. So `trl` and `ours` make the same rows, token for token
(`tests/test_rollout_speed.py` compares them), and a difference in seconds is a difference of the loops. Times are
medians over repeats; the systems take turns, so that a busy machine is busy for all of them.

The last reply of an episode calls the environment in vain in `trl`: its loop ends with a reply, ours with a step.

Where the time of `ours` goes (50 turns, one thread): 98% into the model's own passes (`Clock.model` of `Clock.wall`),
two thirds of which are matrix products and attention. Tried and left:
- `torch.inference_mode` in place of `no_grad`: 0.94 of the computing time at 5 turns, 0.99 at 20 (medians of 4). What
  a model makes at its first pass (longrope's frequencies) would then be lost to training.
- two `matmul` in place of `sdpa` where 8 rows read a token each: 0.85 to 1.12 of its time, by the shape.
- `CALL_BYTES` from 1e5 to 3e6: 0.99 to 1.2 of the time where lengths vary, least from 1e5 to 3e5. Keys stored
  transposed, and keys times queries in place of queries times keys: no faster at 32 numbers a head.
- huge pages for the cache: 0.93 of the time for ours and for lockstep, with an environment variable of torch's alone.
There was no GPU to fill the table of `--device cuda` with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from rollout_systems import LABELS, SYSTEMS, Case, Measured, System, Workbench
from scripted_bandit import SHAPES
from tqdm.auto import tqdm


COLOURS = {"trl": "tab:orange", "lockstep": "tab:green", "ours": "tab:blue", "stop": "tab:purple", "floor": "tab:gray"}
VARIED_ROUNDS = 8  # episodes for each place, where their lengths vary: with one nothing would be refilled


# -- measuring --------------------------------------------------------------------------------------------------------


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = float("inf")
    for _ in range(5):
        synchronize()
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best


def limit_seconds(bench: Workbench, case: Case, run: Measured, bytes_per_second: float) -> float:
    """The least time in which `run` could have read what its sampled tokens depend on."""
    config = bench.model.config
    size = bench.model.dtype.itemsize
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    passes = run.sampled / case.episodes
    weights = sum(parameter.numel() for parameter in bench.model.parameters()) * size
    return (passes * weights + run.attended * per_token) / bytes_per_second


def measure(bench: Workbench, systems: dict[str, System], cases: list[Case], repeats: int):
    """Run every system on every case `repeats` times, one after the other within each repeat."""
    names = list(systems)
    measured: dict[Case, dict[str, list[Measured]]] = {case: {} for case in cases}
    warm_up = Case(2, bench.episodes, cases[0].tokens)
    for name in tqdm(names, desc="Warm-up", leave=False):
        if systems[name].can_play(warm_up):
            systems[name].run(warm_up)
    runs = [(repeat, case) for repeat in range(repeats) for case in cases]
    with tqdm(total=sum(systems[name].can_play(case) for _, case in runs for name in names), unit="run") as bar:
        for repeat, case in runs:
            first = repeat % len(names)
            for name in filter(lambda name: systems[name].can_play(case), names[first:] + names[:first]):
                bar.set_description(f"{case.turns} turns, {name}")
                measured[case].setdefault(name, []).append(systems[name].run(case))
                bar.update()
    return measured


def summarize(bench: Workbench, measured: dict[Case, dict[str, list[Measured]]]) -> list[dict[str, Any]]:
    """A dict a line of the table: medians, their ratios, and seconds per step of an episode."""
    medians = {
        case: {name: statistics.median(run.seconds for run in runs) for name, runs in by_system.items()}
        for case, by_system in measured.items()
    }
    bytes_per_second = bandwidth(bench.device)
    lines = []
    for case, by_system in measured.items():
        seconds, steps = medians[case], sum(case.lengths) / case.episodes
        line = {
            **asdict(case),
            "seconds": seconds,
            "all_seconds": {name: [run.seconds for run in runs] for name, runs in by_system.items()},
            "seconds_per_step": {name: value / steps for name, value in seconds.items()},
            "sampled": {name: runs[-1].sampled for name, runs in by_system.items()},
            "passes": {name: runs[-1].passes for name, runs in by_system.items() if runs[-1].passes},
        }
        if "ours" in seconds:
            line["ratios"] = {f"{name}/ours": seconds[name] / seconds["ours"] for name in seconds if name != "ours"}
            if "floor" in seconds:
                line["ratios"]["ours/floor"] = 1 / line["ratios"].pop("floor/ours")
            line["limit"] = limit_seconds(bench, case, by_system["ours"][-1], bytes_per_second)
            line["ratios"]["ours/limit"] = seconds["ours"] / line["limit"]
        if case.delay and (prompt := medians.get(replace(case, delay=0.0))):
            line["seconds_of_delay"] = {name: value - prompt[name] for name, value in seconds.items()}
        lines.append(line)
    return lines


def growth(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds per step of the longest episodes over those of the shortest: 1 if length costs nothing."""
    plain = [line for line in lines if like(line) == like(lines[0])]
    first, last = min(plain, key=lambda line: line["turns"]), max(plain, key=lambda line: line["turns"])
    return {name: last["seconds_per_step"][name] / value for name, value in first["seconds_per_step"].items()}


def like(line: dict[str, Any]) -> tuple[str, str, float]:
    """Lines that share it differ in the number of turns only."""
    return line["context"], length_kind(line), line["delay"]


def length_kind(line: dict[str, Any]) -> str:
    """One of the choices of `--lengths`."""
    return "ragged" if line["ragged"] else "varied" if line["varied"] else "fixed"


# -- showing ----------------------------------------------------------------------------------------------------------


def print_table(lines: list[dict[str, Any]], grown: dict[str, float]) -> None:
    names = [name for name in LABELS if any(name in line["seconds"] for line in lines)]
    ratios = list(dict.fromkeys(name for line in lines for name in line.get("ratios", ())))
    head = ["context", "lengths", "turns", "delay", *(f"{name} s" for name in names), *ratios]
    rows = [
        [
            line["context"],
            length_kind(line),
            f"1-{line['turns']}" if line["varied"] else str(line["turns"]),
            f"{1000 * line['delay']:.0f} ms",
            *(f"{line['seconds'][name]:.2f}" if name in line["seconds"] else "-" for name in names),
            *(f"{line['ratios'][name]:.2f}" if name in line.get("ratios", ()) else "-" for name in ratios),
        ]
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print()
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    turns = sorted(line["turns"] for line in lines)
    values = ", ".join(f"{name} {value:.2f}" for name, value in grown.items())
    print(f"\nseconds per step at {turns[-1]} turns over those at {turns[0]} ({lines[0]['context']}): {values}")
    for line in lines:
        if "seconds_of_delay" in line:
            seconds = ", ".join(f"{name} {value:.2f} s" for name, value in line["seconds_of_delay"].items())
            what = f"{line['context']}, {'1-' if line['varied'] else ''}{line['turns']} turns"
            print(f"{what}: {1000 * line['delay']:.0f} ms a step cost {seconds}")


def plot(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """A column of panels for each environment delay, a row for each context and kind of length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    kinds = list(dict.fromkeys(like(line)[:2] for line in lines))
    delays = sorted({line["delay"] for line in lines})
    figure, axes = plt.subplots(
        len(kinds),
        len(delays),
        figsize=(max(4 * len(delays), 6), 3.2 * len(kinds) + 0.8),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    handles = {}
    for (row, (context, kind)), (column, delay) in itertools.product(enumerate(kinds), enumerate(delays)):
        axis = axes[row][column]
        chosen = [line for line in lines if like(line) == (context, kind, delay)]
        for name, label in LABELS.items():
            points = [(line["turns"], line["seconds_per_step"][name]) for line in chosen if name in line["seconds"]]
            if points:
                style = {"linestyle": "--" if name == "floor" else "-", "marker": "o", "color": COLOURS[name]}
                (handles[label],) = axis.plot(*zip(*points, strict=True), **style)
        length = {"fixed": "n turns", "varied": "1 to n turns", "ragged": "1 to n turns, ragged replies"}[kind]
        axis.set_title(f"{context}, {length}, {1000 * delay:.0f} ms", fontsize=10)
        turns = sorted({line["turns"] for line in lines})
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(turns, [str(value) for value in turns])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        if row == len(kinds) - 1:
            axis.set_xlabel("turns of an episode, at most" if kind != "fixed" else "turns of an episode")
        if column == 0:
            axis.set_ylabel("seconds per step")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# -- the command ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].strip(), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 25, 50], help="lengths of episodes to time")
    parser.add_argument("--contexts", nargs="+", choices=["chat", "window"], default=["chat"], help="what is read")
    parser.add_argument(
        "--lengths",
        nargs="+",
        choices=["fixed", "varied", "ragged"],
        default=["fixed"],
        help="varied: of 1 to so many turns; ragged: with replies from the shortest to as much above --tokens as well",
    )
    parser.add_argument("--delays", type=float, nargs="+", default=[0], help="milliseconds a step of the environment")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="what to time")
    parser.add_argument("--episodes", type=int, default=8, help="episodes side by side")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of each reply")
    parser.add_argument("--after", type=int, default=0, help="how many of them come after the action: times `stop`")
    parser.add_argument("--shape", choices=list(SHAPES), help="of Qwen3, instead of the next two")
    parser.add_argument("--hidden_size", type=int, default=320, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--output_dir", default="rollout_speed", help="for rollout_speed.json and rollout_speed.png")
    return parser


def make_cases(args: argparse.Namespace) -> list[Case]:
    kinds = itertools.product(args.contexts, args.lengths, args.delays, sorted(set(args.turns)))
    return [
        Case(
            turns=turns,
            episodes=args.episodes,
            tokens=args.tokens,
            context=context,
            varied=length != "fixed",
            ragged=length == "ragged",
            rounds=1 if length == "fixed" else VARIED_ROUNDS,
            delay=delay / 1000,
        )
        for context, length, delay, turns in kinds
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command and return what it writes, with the rows of the last run of each system."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if min(*args.turns, args.episodes, args.repeats) < 1 or min(args.delays) < 0:
        parser.error("--turns, --episodes and --repeats are at least 1, --delays at least 0")
    shape = args.shape or (args.hidden_size, args.layers)
    bench = Workbench(args.output_dir, args.episodes, args.tokens, shape, args.device, args.dtype, args.after)
    systems = {name: SYSTEMS[name](bench) for name in args.systems}
    measured = measure(bench, systems, make_cases(args), args.repeats)
    lines = summarize(bench, measured)
    result = {
        "command": " ".join(["python tests/benchmarks/rollout_speed.py", *(arguments or sys.argv[1:])]),
        "settings": {
            **vars(args),
            "parameters": bench.model.num_parameters(),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        },
        "lines": lines,
        "growth": growth(lines),
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollout_speed.json").write_text(json.dumps(result, indent=2) + "\n")
    millions = bench.model.num_parameters() / 1e6
    title = f"{args.episodes} episodes, {args.tokens} tokens a turn, {millions:.1f}M parameters, {args.device}"
    plot(lines, title, folder / "rollout_speed.png")
    print_table(lines, result["growth"])
    return {**result, "measured": measured}


if __name__ == "__main__":
    main()
