# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How long do episodes take: TRL's own environment loop, ours, and the floor.

    OMP_NUM_THREADS=1 python tests/benchmarks/rollout_speed.py --output_dir rollout_speed

- `trl`: `GRPOTrainer(environment_factory=...)`, whose loop calls the environment's method as a tool and sends the
  whole history to `generate` at each turn.
- `ours`: `Player` with `ChatContext` and `SlotBackend`, which keeps the key-value cache from turn to turn.
- `floor`: one plain `generate` of as many tokens from the same first prompt, without any environment. Its rows end
  shorter, as nobody answers them.

All three run in one process on the same model with random weights, and write the same replies: what a random model
would say is overwritten, token by token, with a call of the tool. Logits are computed and sampled from as ever, and
the overwriting is the same code everywhere. So `trl` and `ours` make the same rows, token for token
(`tests/test_rollout_speed.py` compares them), and a difference in seconds is a difference of the loops. Times are
medians over repeats; the systems take turns, so that a busy machine is busy for all of them.

The last reply of an episode calls the environment in vain in `trl`: its loop ends with a reply, ours with a step.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import trl
from scripted_bandit import PARSER, Script, make_bandit, make_model, make_tokenizer, press, scripted_generate
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from trl_agents.contexts import Briefing, ChatContext, opening_message
from trl_agents.rollout.generation import Sampling, SlotBackend
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool


# -- the systems ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    turns: int
    episodes: int
    tokens: int  # of each reply, the one that ends it included


@dataclass
class Measured:
    """One run of one system. `rows` are all token ids of each episode, where the system has them."""

    seconds: float
    sampled: int
    rows: list[list[int]] = field(default_factory=list)


class TRLLoop:
    """TRL's `environment_factory`."""

    class Environment:
        def reset(self, turns: int, seed: int, **kwargs) -> None:
            self.bandit = make_bandit(turns)
            self.bandit.reset(seed=seed)

        def press(self, button: str) -> str:
            return self.bandit.step(button)[0]

        def get_reward(self) -> float:
            return 0.0

    Environment.press.__doc__ = press.__doc__

    class Trainer(GRPOTrainer):
        """Times the rollout alone, and keeps what it made."""

        def _generate(self, prompts):
            started = time.perf_counter()
            output = super()._generate(prompts)
            self.rollout_seconds = time.perf_counter() - started
            self.rollout_output = output
            return output

    def __init__(self, bench: Benchmark):
        self.bench = bench
        args = GRPOConfig(
            output_dir=str(bench.output_dir),
            per_device_train_batch_size=bench.episodes,
            num_generations=bench.episodes,
            max_completion_length=30000,
            max_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=bench.device == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = self.Trainer(
            bench.model, args=args, processing_class=bench.tokenizer, environment_factory=self.Environment
        )

    def run(self, case: Case) -> Measured:
        trainer = self.trainer
        trainer.max_tool_calling_iterations = case.turns - 1
        prompt = [{"role": "user", "content": opening_message(Briefing.of(make_bandit(case.turns)), "")}]
        inputs = [{"prompt": prompt, "turns": case.turns, "seed": seed} for seed in range(case.episodes)]
        with scripted_generate(self.bench.model, self.bench.script):
            trainer._generate_and_score_completions(inputs)
        prompt_ids, completion_ids, tool_mask, *_ = trainer.rollout_output
        rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        return Measured(trainer.rollout_seconds, sum(map(sum, tool_mask)), rows)


class Ours:
    """`Player`, `ChatContext` and `SlotBackend`."""

    class Backend(SlotBackend):
        def __init__(self, *args, script: Script):
            super().__init__(*args)
            self.script = script

        def _sample(self, logits: torch.Tensor, active: list[int]):
            slots = [self.slots[index] for index in active]
            positions = torch.tensor([len(slot.ids) - slot.n_prompt for slot in slots], device=logits.device)
            return super()._sample(self.script.overwrite(logits, positions), active)

    def __init__(self, bench: Benchmark):
        self.bench = bench
        self.context = ChatContext(bench.tokenizer, chat_template_kwargs={"tools": [get_json_schema(press)]})
        self.sampling = Sampling((bench.tokenizer.eos_token_id,))

    def run(self, case: Case) -> Measured:
        pool = EnvPool(functools.partial(make_bandit, case.turns), case.episodes)
        briefing = Briefing.of(make_bandit(case.turns))
        try:
            started = time.perf_counter()
            backend = self.Backend(self.bench.model, case.episodes, self.sampling, script=self.bench.script)
            player = Player(pool, backend, self.context, PARSER, briefing, Rules(max_new_tokens=case.tokens))
            trajectories, self.clock = player.play([Episode(seed) for seed in range(case.episodes)])
            seconds = time.perf_counter() - started
        finally:
            pool.close()
        rows = [[id_ for turn in t.turns for id_ in (*turn.input_ids, *turn.action_ids)] for t in trajectories]
        return Measured(seconds, sum(len(turn.action_ids) for t in trajectories for turn in t.turns), rows)


class Floor:
    """One `generate` of as many tokens, with no end in between."""

    def __init__(self, bench: Benchmark):
        self.bench = bench
        self.context = ChatContext(bench.tokenizer, chat_template_kwargs={"tools": [get_json_schema(press)]})

    @torch.no_grad()
    def run(self, case: Case) -> Measured:
        prompt_ids = self.context.begin(Briefing.of(make_bandit(case.turns)), "", {}).prompt_ids
        prompt = torch.tensor([prompt_ids] * case.episodes, device=self.bench.device)
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=case.turns * case.tokens,
            pad_token_id=self.bench.tokenizer.pad_token_id,
        )
        model = self.bench.model
        own_config, model.generation_config = model.generation_config, config  # `None` of the call is filled from it
        try:
            with scripted_generate(model, self.bench.script):
                started = time.perf_counter()
                output = model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
                ).tolist()
                seconds = time.perf_counter() - started
        finally:
            model.generation_config = own_config
        return Measured(seconds, sum(len(row) - len(prompt_ids) for row in output), output)


SYSTEMS: dict[str, Callable[[Benchmark], Any]] = {"trl": TRLLoop, "ours": Ours, "floor": Floor}
COLOURS = {"trl": "tab:orange", "ours": "tab:blue", "floor": "tab:gray"}
LABELS = {"trl": "TRL's environment loop", "ours": "trl-agents", "floor": "one plain generate"}


# -- measuring --------------------------------------------------------------------------------------------------------


class Benchmark:
    """The model, the tokenizer and the script that all systems share."""

    def __init__(self, args: argparse.Namespace):
        self.output_dir, self.device, self.episodes = Path(args.output_dir), args.device, args.episodes
        self.tokenizer = make_tokenizer()
        self.model = make_model(self.tokenizer, args.hidden_size, args.layers).to(self.device)
        self.script = Script(self.tokenizer, args.tokens, self.device)
        self.systems = {name: make(self) for name, make in SYSTEMS.items()}

    def measure(self, cases: list[Case], repeats: int) -> dict[Case, dict[str, list[Measured]]]:
        """Run every system on every case `repeats` times, one after the other within each repeat."""
        names = list(self.systems)
        measured = {case: {name: [] for name in names} for case in cases}
        for name in tqdm(names, desc="Warm-up", leave=False):
            self.systems[name].run(min(cases, key=lambda case: case.turns))
        with tqdm(total=repeats * len(cases) * len(names), unit="run") as bar:
            for repeat in range(repeats):
                for case in cases:
                    for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                        bar.set_description(f"{case.turns} turns, {name}")
                        measured[case][name].append(self.systems[name].run(case))
                        bar.update()
        return measured


def summarize(measured: dict[Case, dict[str, list[Measured]]]) -> list[dict[str, Any]]:
    """A dict a line of the table: medians, their ratios, and seconds per step of an episode."""
    lines = []
    for case, by_system in measured.items():
        seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in by_system.items()}
        lines.append(
            {
                **asdict(case),
                "seconds": seconds,
                "all_seconds": {name: [run.seconds for run in runs] for name, runs in by_system.items()},
                "seconds_per_step": {name: value / case.turns for name, value in seconds.items()},
                "sampled": {name: runs[-1].sampled for name, runs in by_system.items()},
                "trl_over_ours": seconds["trl"] / seconds["ours"],
                "ours_over_floor": seconds["ours"] / seconds["floor"],
            }
        )
    return lines


def growth(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds per step of the longest episodes over those of the shortest: 1 if length costs nothing."""
    first, last = min(lines, key=lambda line: line["turns"]), max(lines, key=lambda line: line["turns"])
    return {name: last["seconds_per_step"][name] / value for name, value in first["seconds_per_step"].items()}


def print_table(lines: list[dict[str, Any]], grown: dict[str, float]) -> None:
    names = list(LABELS)
    head = [
        "turns",
        *(f"{name} s" for name in names),
        "trl/ours",
        "ours/floor",
        *(f"{name} ms/step" for name in names),
    ]
    rows = [
        [
            str(line["turns"]),
            *(f"{line['seconds'][name]:.2f}" for name in names),
            f"{line['trl_over_ours']:.2f}",
            f"{line['ours_over_floor']:.2f}",
            *(f"{1000 * line['seconds_per_step'][name]:.0f}" for name in names),
        ]
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print()
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    turns = sorted(line["turns"] for line in lines)
    values = ", ".join(f"{name} {value:.2f}" for name, value in grown.items())
    print(f"\nseconds per step at {turns[-1]} turns over those at {turns[0]}: {values}")


def plot(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    turns = [line["turns"] for line in lines]
    for name, label in LABELS.items():
        style = {"color": COLOURS[name], "label": label, "marker": "o", "linestyle": "--" if name == "floor" else "-"}
        left.plot(turns, [line["seconds"][name] for line in lines], **style)
        right.plot(turns, [1000 * line["seconds_per_step"][name] for line in lines], **style)
        for line in lines:
            repeats = line["all_seconds"][name]
            left.plot([line["turns"]] * len(repeats), repeats, ".", markersize=3, color=COLOURS[name])
    left.set(xscale="log", yscale="log", xlabel="turns per episode", ylabel="seconds per rollout")
    right.set(xscale="log", ylim=(0, None), xlabel="turns per episode", ylabel="milliseconds per environment step")
    for axis in (left, right):
        axis.set_xticks(turns, [str(value) for value in turns])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].strip(), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 20, 40], help="lengths of episodes to time")
    parser.add_argument("--episodes", type=int, default=8, help="episodes side by side")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of each reply")
    parser.add_argument("--hidden_size", type=int, default=320, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output_dir", default="rollout_speed", help="for rollout_speed.json and rollout_speed.png")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command and return what it writes, with the rows of the last run of each system."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if min(*args.turns, args.episodes, args.repeats) < 1:
        parser.error("--turns, --episodes and --repeats are at least 1")
    bench = Benchmark(args)
    cases = [Case(turns, args.episodes, args.tokens) for turns in sorted(set(args.turns))]
    measured = bench.measure(cases, args.repeats)
    lines = summarize(measured)
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
    bench.output_dir.mkdir(parents=True, exist_ok=True)
    (bench.output_dir / "rollout_speed.json").write_text(json.dumps(result, indent=2) + "\n")
    millions = bench.model.num_parameters() / 1e6
    title = f"{args.episodes} episodes, {args.tokens} tokens a turn, {millions:.1f}M parameters, {args.device}"
    plot(lines, title, bench.output_dir / "rollout_speed.png")
    print_table(lines, result["growth"])
    return {**result, "measured": measured}


if __name__ == "__main__":
    main()
