# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What an optimisation step of PPO costs beside one of GRPO: forward, backward, optimizer, on the same batch.

    OMP_NUM_THREADS=1 python tests/benchmarks/ppo_step_cost.py

`AgentGRPOTrainer` and `AgentPPOTrainer` (without a KL in the loss, as PPO has it in the rewards) have a model each
with the same weights, and compute their loss on the same rows; the batch of PPO has values and returns besides. They
take turns in one process, so that a busy machine is busy for both, and begin by turns.

- Time is the process's own time on the CPU (on a GPU the clock's, after waiting for the device), the median over
  repeats; the ratio is the median of each pair's ratio.
- Memory is the step's peak of activations, gradients and intermediate results (`step_cost.py` says how it is counted).
  Parameters and Adam's moments are there before and not counted, which makes the ratio the stricter one: both have
  them alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from step_cost import peak_bytes_of, seconds_of, update

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer
from trl_agents.tiny import tiny_model, tiny_tokenizer


TARGETS = {"time": 1.2, "memory": 1.1}


def make_trainers(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    trainers = {}
    for name, config_class, trainer_class in (
        ("grpo", AgentGRPOConfig, AgentGRPOTrainer),
        ("ppo", AgentPPOConfig, AgentPPOTrainer),
    ):
        tokenizer = tiny_tokenizer(["ACTION=red", "ACTION=blue"], vocab_size=300)
        model = tiny_model(tokenizer, options.hidden_size, options.layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(options.vocab_size, mean_resizing=False)
        args = config_class(
            output_dir=str(Path(folder) / name),
            per_device_train_batch_size=options.rows,
            num_generations=2 if name == "grpo" else 1,
            env_kwargs={"n_arms": 2, "horizon": 2},
            beta=0.0,
            max_steps=1,
            bf16=options.bf16,
            gradient_checkpointing=False,
            use_cpu=options.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({"value_head_init": "normal"} if name == "ppo" else {}),
        )
        trainer = trainer_class(model, env="trl_agents/Bandit-v0", args=args, processing_class=tokenizer)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainers[name] = trainer
    return trainers


def make_batch(options: argparse.Namespace, trainer: Any) -> dict[str, torch.Tensor]:
    """Rows of random tokens, a fifth of them the environment's, as long as each other."""
    generator = torch.Generator().manual_seed(0)
    shape, prompt = (options.rows, options.tokens), (options.rows, 32)
    ids = torch.randint(3, options.vocab_size, shape, generator=generator)  # (B, T)
    sampled = torch.ones(shape, dtype=torch.long)
    sampled[:, ::5] = 0
    batch = {
        "prompt_ids": torch.randint(3, options.vocab_size, prompt, generator=generator),
        "prompt_mask": torch.ones(prompt, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": torch.ones(shape, dtype=torch.long),
        "tool_mask": sampled,
        "advantages": torch.randn(shape, generator=generator) * sampled,
        "num_items_in_batch": sampled.sum(),
    }
    batch = {name: value.to(options.device) for name, value in batch.items()}
    batch["old_per_token_logps"] = trainer.score_batch(batch)
    return batch


def with_values(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a batch of PPO has besides: a value and a return every twenty tokens."""
    mask = torch.zeros_like(batch["advantages"])
    mask[:, 1::20] = 1.0
    return {
        **batch,
        "old_values": torch.zeros_like(mask),
        "returns": torch.ones_like(mask) * mask,
        "value_mask": mask,
        "num_value_steps": mask.sum(),
    }


def step(trainer: Any, batch: dict[str, torch.Tensor]) -> None:
    loss = trainer.compute_loss(trainer.model, dict(batch))
    trainer.accelerator.backward(loss)
    update(trainer)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(options, folder)
        rows = make_batch(options, trainers["grpo"])
        batches = {"grpo": rows, "ppo": with_values(rows)}
        names = list(trainers)
        steps = {name: functools.partial(step, trainers[name], batches[name]) for name in names}
        for name in names:  # the first step makes Adam's moments
            steps[name]()
        memory = {name: peak_bytes_of(steps[name], options.device) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(options.repeats):
            for name in names if repeat % 2 else reversed(names):
                seconds[name].append(seconds_of(steps[name], options.device))
        n_parameters = sum(parameter.numel() for parameter in trainers["grpo"].model.parameters())
    pairs = [ppo / grpo for ppo, grpo in zip(seconds["ppo"], seconds["grpo"], strict=True)]
    return {
        "parameters": n_parameters,
        "rows": options.rows,
        "tokens": options.tokens,
        "device": options.device,
        "seconds": seconds,
        "bytes": memory,
        "ratio": {"time": statistics.median(pairs), "memory": memory["ppo"] / memory["grpo"]},
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['parameters'] / 1e6:.1f}M parameters, {result['rows']} rows of 32 + {result['tokens']} tokens, "
        f"{result['device']}, {platform.processor() or platform.machine()}, torch {torch.__version__}",
        "",
        "| one step | GRPO | PPO | PPO / GRPO | target |",
        "| --- | --- | --- | --- | --- |",
    ]
    seconds = {name: statistics.median(values) for name, values in result["seconds"].items()}
    peak = {name: value / 2**20 for name, value in result["bytes"].items()}
    for thing, values, unit in (("time", seconds, "s"), ("memory", peak, "MiB")):
        lines.append(
            f"| {thing} | {values['grpo']:.3f} {unit} | {values['ppo']:.3f} {unit} "
            f"| {result['ratio'][thing]:.3f} | {TARGETS[thing]} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", help="where to write the figures as JSON")
    options = parser.parse_args(arguments)
    result = measure(options)
    print(table(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
