# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Bytes on one GPU, part by part, at the two moments that need most: the update and the rollout.

What lies there all along is counted by states.py, what forward and backward passes need besides is found by
[`dry_run`].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .cluster import GIB, Cluster, Sharding
from .dry_run import Passes, dry_run
from .plan import Plan
from .shape import ModelShape
from .states import States, count_states


LIVE = 1_000_000_000  # numbers that stage 3 of ZeRO gathers at once: DeepSpeed's default, which accelerate leaves
# TRL's output head goes through the vocabulary in tiles of so many tokens x entries
TILE_TOKENS, TILE_WIDTH = 4096, 32768


def kv_cache_bytes(shape: ModelShape, n_slots: int, length: int, number_bytes: int, grown_by: int = 1) -> int:
    """Keys and values of `n_slots` episodes of `length` tokens; the cache grows in steps of `grown_by`."""
    capacity = -(-length // grown_by) * grown_by
    return shape.n_layers * n_slots * capacity * sum(shape.kv_widths) * number_bytes


def head_bytes(shape: ModelShape, tokens: int, number_bytes: int, weight_bytes: int, trained: bool) -> float:
    """TRL's output head at its peak on a GPU: a tile of logits, and gradients in float32 before they are rounded."""
    tile = min(tokens, TILE_TOKENS) * TILE_WIDTH * number_bytes
    hidden = tokens * shape.hidden_size * 4
    table = shape.vocab_size * shape.hidden_size * (4 + (weight_bytes if weight_bytes < 4 else 0))
    return tile + hidden + (table if trained else 0)


def count_passes(shape: ModelShape, plan: Plan, cluster: Cluster, **changes: bool) -> Passes:
    """What the passes of an update need, by a [`dry_run`] of this plan."""
    adapter = plan.adapter
    types = {2: torch.bfloat16, 4: torch.float32}
    dtype = torch.bfloat16 if cluster.sharding.stage and plan.bf16 else types[plan.weight_bytes]
    lora_dtype = torch.bfloat16
    if adapter and adapter.bits == 16 and not cluster.sharding.deepspeed:
        lora_dtype = torch.float32
    return dry_run(
        shape,
        plan.rows,
        plan.row_length,
        **{
            "dtype": dtype,
            "autocast": plan.bf16 and not cluster.sharding.stage,
            "checkpointing": plan.checkpointing,
            "attention": plan.attention,
            "lora_rank": adapter.rank if adapter else 0,
            "lora_targets": adapter.targets if adapter else None,
            "lora_dtype": lora_dtype,
            "head": cluster.device == "cpu",
            **changes,
        },
    )


@dataclass(frozen=True)
class Memory:
    """
    Bytes on a GPU.

    Args:
        states ([`States`]):
            What lies there.
        update, rollout (`Mapping[str, float]`):
            Part -> bytes, at the peak of each; an empty rollout where there is none.
        available (`float`):
            What there is for them.
    """

    states: States
    update: Mapping[str, float]
    rollout: Mapping[str, float]
    available: float

    @property
    def peak(self) -> float:
        return max(sum(self.update.values()), sum(self.rollout.values()))

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def estimate_memory(shape: ModelShape, plan: Plan, cluster: Cluster) -> Memory:
    """Bytes by part on each GPU of `cluster`."""
    sharding, n_gpus = cluster.sharding, cluster.n_gpus
    states = count_states(shape, plan, sharding, n_gpus)
    computes = 2 if plan.bf16 else plan.weight_bytes
    resting = {
        "weights": states.weights,
        "master weights": states.master,
        "optimizer states": states.optimizer,
        "reference model": states.reference,
        "reward model": states.reward_model,
    }
    vllm = plan.vllm_share * cluster.gpu.memory_gib * GIB
    gathered = _gathered(shape, plan, sharding)
    update = {
        **resting,
        "gradients": states.gradients,
        "buckets": states.buckets,
        "gathered weights": min(gathered, LIVE * 2.0),
        "vLLM": vllm,
    }
    if plan.adapter and plan.adapter.bits < 16:
        update["a layer unpacked"] = 2.0 * max(linear.n_weights for linear in shape.linears)
    passes = count_passes(shape, plan, cluster)
    kept = passes.saved * (2 if plan.separate_critic else 1)
    own = 2 if cluster.sharding.deepspeed and plan.bf16 else plan.weight_bytes
    full = plan.adapter is None
    head = 0.0
    if cluster.device != "cpu":
        head = head_bytes(shape, plan.rows * plan.row_length, computes, own, full)
    copies = 0.0
    if not sharding.stage and plan.bf16 and plan.weight_bytes == 4 and full and plan.checkpointing:
        # Autocast keeps them for a forward pass; without checkpointing they are kept as activations are
        copies = kept + 2.0 * shape.n_linear
    # These follow each other, and one of them is the peak. The last two find the activations gone
    moments = {
        "copies in bfloat16": copies,
        "output head": kept + head,
        "backward pass of a layer": kept + passes.peak - passes.saved,
        "gradient of the embeddings": shape.vocab_size * shape.hidden_size * float(own) if full else 0.0,
        "update of the weights": 4.0 * states.n_trained / n_gpus if sharding.deepspeed else 0.0,
    }
    name = max(moments, key=lambda moment: moments[moment])
    if moments[name] > kept and name not in ("gradient of the embeddings", "update of the weights"):
        update |= {"activations kept": kept, name: moments[name] - kept}
    else:
        update[name] = moments[name]

    rollout: dict[str, float] = {}
    if plan.side_by_side:
        rollout = {**resting, "gathered weights": gathered, "vLLM": vllm}
        if not plan.vllm_share:
            # Autocast leaves the keys, which are turned by positions in float32, in float32, and the values not
            held = 3 if plan.bf16 and plan.weight_bytes == 4 and not sharding.stage else computes
            kv = kv_cache_bytes(shape, plan.side_by_side, plan.longest, held, plan.grown_by)
            first = plan.episode.reads[0] if plan.episode else 1
            read = dry_run(shape, plan.side_by_side, first, dtype=torch.bfloat16, gradients=False)
            sampled = plan.side_by_side * shape.vocab_size * (computes + 4 + 4 + 8 + 1.0)
            rollout |= {"KV cache": kv, "reading prompts": read.peak * computes / 2, "sampling": sampled}
    available = (cluster.gpu.memory_gib - cluster.reserved_gib) * GIB
    return Memory(states, _without_nothing(update), _without_nothing(rollout), available)


def _gathered(shape: ModelShape, plan: Plan, sharding: Sharding) -> float:
    """Whole weights in pieces put together: for a rollout all of them, in passes as many as DeepSpeed lets live."""
    if sharding.stage < 3:
        return 2.0 * shape.n_parameters if sharding.offload_parameters else 0.0
    if plan.adapter and plan.adapter.bits < 16:
        return 0.0
    return (2.0 if plan.bf16 else plan.weight_bytes) * shape.n_parameters


def _without_nothing(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in parts.items() if value > 0}
