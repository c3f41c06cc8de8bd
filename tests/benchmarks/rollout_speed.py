# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How long do episodes take: TRL's own environment loop, ours, and the floor.

    OMP_NUM_THREADS=1 python tests/benchmarks/rollout_speed.py --output_dir rollout_speed

- `trl`: `GRPOTrainer(environment_factory=...)`, whose loop calls the environment's method as a tool and sends the whole
  history to `generate` at each turn.
- `ours`: `Player` with `ChatContext` and `SlotBackend`, which keeps the key-value cache from turn to turn.
- `floor`: one plain `generate` of as many tokens from the same first prompt, without any environment. Its rows end
  shorter, as nobody answers them.

All three run in one process on the same model with random weights. What a random model would say is replaced, token by
token, by one scripted reply that calls the tool: logits are computed and sampled from as ever, only their values are
overwritten, by the same code in all three. So `trl` and `ours` make the same rows, token for token (`test_rollout_speed`
compares them), and differences in seconds are differences of the loops. Times are medians over repeats, and the systems
take turns, so that a busy machine is busy for all of them.

In `trl` the last reply of an episode calls the environment in vain (its loop ends with a reply, ours with a step).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, ChatContext, opening_message
from trl_agents.envs import make_env
from trl_agents.rollout.generation import Sampling, SlotBackend
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool


# -- what all three read and write ------------------------------------------------------------------------------------

# ChatML with tools: what TRL's loop asks of a template. What a tool says is a message of the user, so that `trl` and
# `ours` read the same.
CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\n# Tools' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
{{- '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}

CALL = '<tool_call>{"name": "press", "arguments": {"button": "red"}}</tool_call>'
FILLER = " so"
PARSER = ActionParser(patterns=[r'"button": "(\w+)"'])


def press(button: str) -> str:
    """
    Press a button.

    Args:
        button: The colour of the button.
    """


def make_bandit(turns: int) -> Any:
    return make_env("trl_agents/Bandit-v0", n_arms=5, horizon=turns, distribution="bernoulli")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of this game, and numbers by their digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bandit = make_bandit(2)
    bandit.reset(seed=0)
    texts = [opening_message(Briefing.of(bandit), ""), bandit.step("red")[0], json.dumps(get_json_schema(press))]
    tokenizer.train_from_iterator([*texts, CALL, FILLER, *["system", "user", "assistant"] * 9], trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in ("<tool_call>", "</tool_call>")])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    made.response_template = RESPONSE_TEMPLATE
    return made


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights: 5 million with the default shape."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden_size // 32, 2),
        num_key_value_heads=max(hidden_size // 128, 1),
        head_dim=32,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


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


class Script:
    """The reply that is always given: some filler words, the call, the end-of-turn token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: int, device: str):
        call, filler = tokenizer.encode(CALL), tokenizer.encode(FILLER)
        ids = filler * (tokens - len(call) - 1) + call + [tokenizer.eos_token_id]
        if len(ids) != tokens:
            raise ValueError(f"--tokens {tokens} is too short a reply: the call alone takes {len(call) + 1} tokens.")
        self.ids = torch.tensor(ids, device=device)

    def overwrite(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`logits` (b, V), of which only the scripted tokens at `positions` (b,) of the reply are left."""
        tokens = self.ids[positions % len(self.ids)]
        return torch.full_like(logits, -math.inf).scatter_(1, tokens[:, None], 0.0)


# -- the systems ------------------------------------------------------------------------------------------------------


class ScriptedLogits(LogitsProcessor):
    """The script inside `generate`."""

    def __init__(self, script: Script, prompt_length: int):
        self.script, self.prompt_length = script, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        positions = torch.full((len(scores),), input_ids.shape[1] - self.prompt_length, device=scores.device)
        return self.script.overwrite(scores, positions)


@contextmanager
def scripted_generate(model: Qwen3ForCausalLM, script: Script) -> Iterator[None]:
    """Let `model.generate`, whoever calls it, say what the script says."""
    plain = model.generate

    def generate(**kwargs: Any) -> torch.Tensor:
        processor = ScriptedLogits(script, kwargs["input_ids"].shape[1])
        return plain(**kwargs, logits_processor=LogitsProcessorList([processor]))

    model.generate = generate
    try:
        yield
    finally:
        del model.generate


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
            output_dir=str(bench.output_dir / "trl"),
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
            player = Player(
                pool, backend, self.context, PARSER, briefing, Rules(max_new_tokens=case.tokens)
            )
            trajectories, self.clock = player.play([Episode(seed) for seed in range(case.episodes)])
            seconds = time.perf_counter() - started
        finally:
            pool.close()
        turns = [[turn for turn in trajectory.turns] for trajectory in trajectories]
        rows = [[id_ for turn in row for id_ in (*turn.input_ids, *turn.action_ids)] for row in turns]
        return Measured(seconds, sum(len(turn.action_ids) for row in turns for turn in row), rows)


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

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    turns = [line["turns"] for line in lines]
    for name, label in LABELS.items():
        style = {"color": COLOURS[name], "label": label, "marker": "o", "linestyle": "--" if name == "floor" else "-"}
        left.plot(turns, [line["seconds"][name] for line in lines], **style)
        right.plot(turns, [1000 * line["seconds_per_step"][name] for line in lines], **style)
        for line in lines:
            left.plot(
                [line["turns"]] * len(line["all_seconds"][name]),
                line["all_seconds"][name],
                ".",
                ms=3,
                color=COLOURS[name],
            )
    left.set(xscale="log", yscale="log", xlabel="turns per episode", ylabel="seconds per rollout")
    right.set(xscale="log", ylim=(0, None), xlabel="turns per episode", ylabel="milliseconds per environment step")
    for axis in (left, right):
        axis.set_xticks(turns, [str(value) for value in turns])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
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
    parser.add_argument("--hidden_size", type=int, default=256, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output_dir", default="rollout_speed", help="for rollout_speed.json and rollout_speed.png")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command and return what it writes, with the rows of the last run of each system."""
    args = make_parser().parse_args(arguments)
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
    title = f"{args.episodes} episodes, {args.tokens} tokens a turn, {bench.model.num_parameters() / 1e6:.1f}M parameters, {args.device}"
    plot(lines, title, bench.output_dir / "rollout_speed.png")
    print_table(lines, result["growth"])
    return {**result, "measured": measured}


if __name__ == "__main__":
    main()
