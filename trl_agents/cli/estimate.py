# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`trl-agents estimate`: what a recipe takes on a machine one does not have."""

from __future__ import annotations

import argparse
import json
from math import inf
from pathlib import Path
from typing import Any

from .named import as_object, positive


HELP = "estimate a recipe's memory and time on GPUs you name"
DESCRIPTION = (
    "Read a recipe's YAML and say what it takes on the GPUs you name: memory on each of them, part by part, for the\n"
    "update and for the rollout; the time of both, and what most of it is spent on. No weights are loaded, and no\n"
    "GPU is needed. How far the figures can be trusted is told in the README of trl-agents."
)
EXAMPLES = """\
examples:
  trl-agents estimate recipes/configs/grpo_bandit_qlora.yaml --model Qwen/Qwen2.5-7B --gpu RTX4090
  trl-agents estimate recipes/configs/grpo_bandit_paper.yaml --model google/gemma-2-2b-it --gpu H100 \\
      --accelerate_config accelerate_configs/zero2.yaml
  trl-agents estimate recipes/configs/reft_paper.yaml --model codellama/CodeLlama-7b-hf --gpus 8 --gpu A100 \\
      --set per_device_train_batch_size=2 gradient_accumulation_steps=2 --json estimate.json
  trl-agents estimate recipes/configs/grpo_bandit_qlora.yaml --gpus 8 --gpu H100 --table Qwen/Qwen3-0.6B Qwen/Qwen3-8B

--cluster FILE.yaml describes another machine:
  gpu: {name: mine, memory_gib: 24, memory_gbps: 900, bf16_tflops: 150, fp32_tflops: 40, link_gbps: 32}
  n_gpus: 4            # n_nodes, network_gbps, efficiency, bandwidth_efficiency, op_seconds, reserved_gib
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="YAML", help="of a recipe: one of recipes/configs/, or your own")
    parser.add_argument(
        "--model", metavar="MODEL", help="a folder, a config.json, a Hub id, or tiny (default: the YAML's, or tiny)"
    )
    parser.add_argument(
        "--model_kwargs",
        type=as_object,
        default={},
        metavar="JSON",
        help="entries of the model's configuration to change, such as '{\"num_hidden_layers\": 12}'",
    )
    parser.add_argument("--gpu", metavar="NAME", help="a GPU of the catalogue (default: H100)")
    parser.add_argument("--gpus", type=positive, metavar="N", help="how many in all (default: the file's, or 1)")
    parser.add_argument(
        "--nodes", type=positive, metavar="N", help="on how many computers (default: the file's, or 1)"
    )
    parser.add_argument("--cluster", metavar="FILE", help="YAML that describes the machine")
    parser.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help="of `accelerate launch` (default: none with one GPU, plain data parallelism with several)",
    )
    parser.add_argument("--recipe", metavar="FILE", help="script of the YAML (default: by the YAML's name)")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), help="train so, whatever the YAML says")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments in place of the YAML's")
    parser.add_argument("--turns", type=positive, metavar="N", help="turns of an episode (default: one is played)")
    parser.add_argument("--prompt_tokens", type=positive, metavar="N", help="tokens of a prompt (questions: 256)")
    parser.add_argument(
        "--reply_tokens", type=positive, metavar="N", help="typical tokens of a reply, for times (default: the budget)"
    )
    parser.add_argument(
        "--env_delay", type=float, default=0.0, metavar="S", help="seconds the environment takes a turn (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, in bytes and seconds")
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="MODEL",
        help="instead: a Markdown table of memory for these models x all weights, LoRA, QLoRA x 1 GPU, zero2, zero3",
    )


def run(args: argparse.Namespace) -> int:
    from ..estimate.plan import read_plan
    from ..estimate.report import describe, estimate, tabulate
    from ..estimate.shape import read_shape

    if not 0 <= args.env_delay < inf:
        raise ValueError(f"--env_delay {args.env_delay}: give a number of seconds of at least 0.")
    cluster = _cluster_of(args)
    changes = _changes_of(args.set)
    settings = {
        "script": args.recipe,
        "reply_tokens": args.reply_tokens,
        "prompt_tokens": args.prompt_tokens,
        "turns": args.turns,
        "env_delay": args.env_delay,
    }
    if args.table:
        shapes = [read_shape(name, args.model_kwargs) for name in args.table]
        positions = min((shape.positions for shape in shapes if shape.positions), default=None)
        plan = read_plan(args.config, cluster, changes, positions=positions, **settings)
        print(tabulate(shapes, plan, cluster))
        return 0
    name = args.model or changes.get("model_name_or_path") or _named_in(args.config)
    shape = read_shape(name, args.model_kwargs)
    plan = read_plan(args.config, cluster, changes, positions=shape.positions, **settings)
    if args.method:
        plan = plan.by(args.method)
    found = estimate(shape, plan, cluster)
    print(describe(found))
    if args.json:
        path = Path(args.json).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
    return 0


def _cluster_of(args: argparse.Namespace) -> Any:
    from ..estimate.cluster import Cluster, Sharding, find_gpu, read_accelerate, read_cluster

    sharding, n_gpus, n_nodes = None, None, None
    if args.accelerate_config:
        sharding, n_gpus, n_nodes = read_accelerate(args.accelerate_config)
    given = {"n_gpus": args.gpus or n_gpus, "n_nodes": args.nodes or n_nodes}
    if args.cluster:
        gpu = find_gpu(args.gpu) if args.gpu else None
        cluster = read_cluster(args.cluster, gpu=gpu, **given)
    else:
        given = {name: value for name, value in given.items() if value is not None}
        cluster = Cluster(find_gpu(args.gpu or "H100"), **given)
    from dataclasses import replace

    plain = Sharding("ddp" if cluster.n_gpus > 1 else "none")
    if sharding is None:
        sharding = plain
    elif sharding.kind in ("ddp", "none"):  # --gpus may have made one of the other
        sharding = replace(sharding, kind=plain.kind)
    return replace(cluster, sharding=sharding)


def _changes_of(pairs: list[str]) -> dict[str, Any]:
    import yaml

    changes = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: write NAME=VALUE, such as per_device_train_batch_size=4.")
        changes[name.removeprefix("--")] = yaml.safe_load(value)
    return changes


def _named_in(config: str) -> str | None:
    from ..estimate.cluster import read_settings

    return read_settings(config).get("model_name_or_path") if Path(config).expanduser().is_file() else None
