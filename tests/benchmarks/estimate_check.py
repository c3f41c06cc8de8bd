# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How far `trl-agents estimate` can be trusted: what it says beside what happens, on this computer.

    OMP_NUM_THREADS=1 python tests/benchmarks/estimate_check.py

Real rollouts and updates of `AgentGRPOTrainer` with random weights, in one process on a CPU, as
recipes/configs/grpo_bandit_tiny.yaml says but for the lengths; all weights, and LoRA. The computer is described to the
estimate by what is measured here first: matrix products, copies in memory, what it takes to start an operation.

- Weights, gradients, optimizer states and key-value cache are counted tensor by tensor.
- The passes' memory is the most bytes that storages made in forward and backward pass hold at once (`LiveBytes`), with
  the gradients there before.
- Times are the process's own on the CPU, as others may be running, of the second rollout and update. What a rollout
  reads and writes is told to the estimate as it happened, so that the comparison is of the cost of tokens, not of
  their number.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig
from recipe_runs import RECIPES, parse, recipe

from trl_agents import AgentGRPOTrainer
from trl_agents.estimate.cluster import GPU, Cluster
from trl_agents.estimate.dry_run import LiveBytes
from trl_agents.estimate.episodes import Episode
from trl_agents.estimate.memory import count_passes, kv_cache_bytes
from trl_agents.estimate.plan import read_plan
from trl_agents.estimate.shape import measure_shape
from trl_agents.estimate.states import count_states
from trl_agents.estimate.timing import estimate_times
from trl_agents.tiny import tiny_model, tiny_tokenizer


CONFIG = RECIPES / "configs" / "grpo_bandit_tiny.yaml"
SETTINGS = {"per_device_train_batch_size": 4, "steps_per_generation": 1, "num_generations": 2, "max_steps": 2}
SETTINGS |= {"max_completion_length": 16, "beta": 0.0, "rollout_batch_size": 4}
MODELS = {"0.4M": (128, 2, 800), "4.7M": (256, 4, 8000), "19M": (512, 4, 16000)}  # width, layers, vocabulary


class MeasuredTrainer(AgentGRPOTrainer):
    """Notes what rollouts and updates take."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollout_seconds: list[float] = []
        self.update_seconds: list[float] = []
        self.rows: list[tuple[int, int]] = []
        self.played: list[Any] = []
        self.peak = self.kv_bytes = 0
        self.gradient_bytes = 0
        self.live: LiveBytes | None = None

    def roll_out(self, inputs):
        start = time.process_time()
        rows = super().roll_out(inputs)
        self.rollout_seconds.append(time.process_time() - start)
        self.played.append(self.trajectories)
        layers = self.backend.decoder.cache.layers
        self.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return rows

    def _make_backend(self, *args):
        self.backend = super()._make_backend(*args)
        return self.backend

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows, length = inputs["prompt_ids"].shape
        self.rows.append((rows, length + inputs["completion_ids"].shape[1]))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not self.peak:  # the first update is counted, which takes time; the second is timed
            self.live = LiveBytes()
            self.live.__enter__()
        self.started = time.process_time()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.live is not None:
            self.live.__exit__(None, None, None)
            self.peak, self.live = self.live.peak, None
        self.gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        self.update_seconds.append(time.process_time() - self.started)
        return loss


def measure_cluster() -> Cluster:
    """This computer, as the estimate is told of it."""
    left, right = torch.randn(1024, 512), torch.randn(512, 1024)
    products = 2 * 1024 * 512 * 1024 / best_of(lambda: left @ right)
    source, target = torch.randn(2**26), torch.empty(2**26)
    copied = 2 * source.nbytes / best_of(lambda: target.copy_(source), 5)
    # A model that computes next to nothing
    nothing = tiny_model(tiny_tokenizer(["red"], vocab_size=300), hidden_size=32, num_hidden_layers=2).eval()
    token = torch.zeros((1, 1), dtype=torch.long)
    with torch.no_grad():
        with LiveBytes() as live:
            nothing(input_ids=token, use_cache=False)
        started = best_of(lambda: nothing(input_ids=token, use_cache=False)) / live.n_ops
    gpu = GPU("this computer", 16, copied / 1e9, products / 1e12, products / 1e12, 1)
    return Cluster(gpu, efficiency=1.0, bandwidth_efficiency=1.0, op_seconds=started, reserved_gib=0.0, device="cpu")


def best_of(run, n: int = 30) -> float:
    seconds = []
    for _ in range(n):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def compare(name: str, sizes: tuple[int, int, int], lora: bool, cluster: Cluster, folder: str) -> dict[str, Any]:
    """What is estimated and what is measured, by quantity."""
    width, layers, vocabulary = sizes
    tokenizer = tiny_tokenizer(["ACTION=red", "Step=1 Action=blue Reward=1"], vocab_size=300)
    model = tiny_model(tokenizer, width, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    shape = measure_shape(model.config, name)
    changes = SETTINGS | ({"use_peft": True, "lora_target_modules": "all-linear"} if lora else {})
    plan = read_plan(CONFIG, cluster, changes)

    module = recipe("grpo_bandit")
    typed = [f"--{key}" if part == 0 else str(value) for key, value in SETTINGS.items() for part in (0, 1)]
    _, args, _ = parse(module, CONFIG, *typed, "--use_cpu", "true", "--output_dir", folder, "--save_strategy", "no")
    args.disable_tqdm, args.env_kwargs = True, {"n_arms": 5, "horizon": 8, "distribution": "bernoulli"}
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = MeasuredTrainer(
        model, env="trl_agents/Bandit-v0", args=args, processing_class=tokenizer, peft_config=adapter
    )
    trainer.train()

    parameters = {id(p): p for p in trainer.model.parameters()}.values()
    moments = [
        value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    rows, length = trainer.rows[-1]
    # As it happened
    turns = max(trainer.played[-1], key=lambda one: len(one.turns)).turns
    replies, reads = [len(turn.action_ids) for turn in turns], [len(turn.input_ids) for turn in turns]
    contexts = [sum(reads[: number + 1]) + sum(replies[:number]) for number in range(len(turns))]
    episode = Episode(round(sum(replies) / len(replies)), tuple(reads), tuple(contexts), (length,))
    plan = replace(plan, rows=rows, row_length=length, mean_row_length=length, episode=episode, longest=length)
    states = count_states(shape, plan, cluster.sharding)
    first = replace(plan, rows=trainer.rows[0][0], row_length=trainer.rows[0][1])
    times = estimate_times(shape, plan, cluster)
    update = sum(value for part, value in times.update.items() if part != "update: optimizer")
    rollout = sum(value for part, value in times.rollout.items() if part.startswith("rollout"))
    return {
        "weights": (states.weights, sum(p.nbytes for p in parameters)),
        "gradients": (states.gradients, trainer.gradient_bytes),
        "optimizer states": (states.optimizer, sum(value.nbytes for value in moments if value.dim() > 0)),
        "KV cache": (
            kv_cache_bytes(shape, plan.side_by_side, length, 4, plan.grown_by),
            trainer.kv_bytes,
        ),
        "passes, peak": (count_passes(shape, first, cluster).peak, trainer.peak),
        "rollout, seconds": (rollout, trainer.rollout_seconds[-1]),
        "update, seconds": (update, trainer.update_seconds[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cluster = measure_cluster()
    print(
        f"this computer, one thread: {cluster.gpu.fp32_tflops * 1e3:.0f} GFLOP/s, {cluster.gpu.memory_gbps:.1f} GB/s, "
        f"{cluster.op_seconds * 1e6:.1f} us an operation\n"
    )
    print("| model | trained | quantity | estimated | measured | ratio |\n|---|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for name in options.models:
        for method in ("all weights", "LoRA"):
            with tempfile.TemporaryDirectory() as folder:
                table = compare(name, MODELS[name], method == "LoRA", cluster, folder)
            found[f"{name}, {method}"] = dict(table)
            for quantity, (estimated, measured) in table.items():
                unit, scale = ("s", 1.0) if "seconds" in quantity else ("MB", 1e6)
                cells = f"{estimated / scale:.3f} {unit} | {measured / scale:.3f} {unit} | {estimated / measured:.2f}"
                print(f"| {name} | {method} | {quantity} | {cells} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
