# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Seconds of a rollout and of the updates on it, and what they are spent on.

A prompt is read at the speed of matrix products (2 operations a weight and token), replies are written a token at a
time at the speed of the memory, which all weights and the cache are read from, or at the speed at which operations are
started; an update computes three times a forward pass, four with gradient checkpointing, and what lies between the
products is bound by the memory's bandwidth again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .cluster import Cluster
from .dry_run import dry_run
from .memory import count_passes, kv_cache_bytes
from .plan import Plan
from .shape import ModelShape
from .states import count_states, frozen_bytes


# Bytes that choosing a token from a word's logit reads and writes: float32, its exponential, sums in float64, compared
SAMPLING = 48


@dataclass(frozen=True)
class Times:
    """
    Seconds.

    Args:
        rollout, update (`Mapping[str, float]`):
            Of a whole rollout, with what is scored after it, and of *one* update, by what they are spent on.
        updates (`int`):
            Updates of a rollout.
    """

    rollout: Mapping[str, float]
    update: Mapping[str, float]
    updates: int

    @property
    def cycle(self) -> float:
        """A rollout and its updates."""
        return sum(self.rollout.values()) + self.updates * sum(self.update.values())

    @property
    def bottleneck(self) -> str:
        """What most of the time is spent on."""
        spent = dict(self.rollout)
        for name, seconds in self.update.items():
            spent[name] = spent.get(name, 0.0) + self.updates * seconds
        return max(spent, key=lambda name: spent[name])


def forward_flops(shape: ModelShape, tokens: float, row_length: float, head: bool = True) -> float:
    """Operations of a forward pass: of all weights, and of attention between the tokens of a row."""
    weights = shape.n_matmul if head else shape.n_linear
    return 2.0 * tokens * weights + 4.0 * shape.n_layers * shape.n_heads * shape.head_dim * tokens * row_length


def update_flops(shape: ModelShape, plan: Plan, tokens: float) -> float:
    """Operations of forward and backward passes over so many tokens."""
    forward = forward_flops(shape, tokens, plan.mean_row_length)
    trunk = forward_flops(shape, tokens, plan.mean_row_length, head=False)
    # Adapters need no gradients of the frozen weights; TRL's output head computes its tiles a second time
    flops = forward * (2.0 if plan.adapter else 3.0) + (forward - trunk)
    if plan.checkpointing:
        flops += trunk
    if plan.separate_critic:
        flops += trunk * (4.0 if plan.checkpointing else 3.0)
    return flops


def moved_bytes(shape: ModelShape, plan: Plan, cluster: Cluster) -> float:
    """Bytes that a pass reads and writes outside of matrix products: norms, activations, the softmax over words."""
    moved = count_passes(shape, plan, cluster).moved * plan.mean_row_length / plan.row_length
    if cluster.device != "cpu":
        # TRL's kernels go over the logits so often: written and read forward; again, their gradient, and two products
        over = 7
        moved += over * plan.rows * plan.mean_row_length * shape.vocab_size * (2 if plan.bf16 else plan.weight_bytes)
    return moved


def estimate_times(shape: ModelShape, plan: Plan, cluster: Cluster) -> Times:
    """Seconds of a rollout and of an update on `cluster`."""
    computes = 2 if plan.bf16 else plan.weight_bytes
    flops = cluster.flops(computes)
    tokens = plan.rows * plan.mean_row_length  # of a pass
    n_trained = count_states(shape, plan, cluster.sharding, cluster.n_gpus).n_trained
    update = {"update: matrix products": plan.accumulation * update_flops(shape, plan, tokens) / flops}
    update["update: everything between them"] = (
        plan.accumulation * moved_bytes(shape, plan, cluster) / cluster.bandwidth
    )
    moved = _communicated(shape, plan, cluster, n_trained)
    if moved:
        update["update: communication"] = moved / cluster.link
    # The optimizer reads and writes weights, gradients and moments
    shards = cluster.n_gpus if cluster.sharding.stage else 1
    update["update: optimizer"] = 28.0 * n_trained / shards / cluster.bandwidth

    rollout: dict[str, float] = {}
    if plan.episode is not None:
        rollout |= _rollout_times(shape, plan, cluster, flops)
        all_tokens = plan.episodes * sum(plan.episode.rows)
        scored = (plan.kl + plan.old_logps) * forward_flops(shape, all_tokens, plan.mean_row_length)
        if plan.reward_model:
            scored += forward_flops(shape, all_tokens, plan.mean_row_length, head=False)
        rollout["scoring: matrix products"] = scored / flops
    elif plan.kl:
        update["update: matrix products"] += (
            plan.accumulation * forward_flops(shape, tokens, plan.mean_row_length) / flops
        )
    return Times(_without_nothing(rollout), _without_nothing(update), plan.updates)


def _rollout_times(shape: ModelShape, plan: Plan, cluster: Cluster, flops: float) -> dict[str, float]:
    """Episodes side by side advance as one: each turn its prompt is read, then its reply written token by token."""
    episode = plan.episode
    computes = 2 if plan.bf16 else plan.weight_bytes
    weights = decoded_bytes(shape, plan)
    slots, waves = plan.side_by_side, -(-plan.episodes // plan.side_by_side)
    lora = {"lora_rank": plan.adapter.rank, "lora_targets": plan.adapter.targets} if plan.adapter else {}
    dtype = torch.bfloat16 if computes == 2 else torch.float32
    passes = dry_run(shape, slots, 1, dtype=dtype, gradients=False, **lora)
    # vLLM replays a recorded graph
    started = 0.0 if plan.vllm_share else passes.n_ops * cluster.op_seconds
    sampled = SAMPLING * slots * shape.vocab_size
    spent = dict.fromkeys(("memory bandwidth", "matrix products", "starting operations"), 0.0)
    prefill = 0.0
    for read, context in zip(episode.reads, episode.contexts, strict=True):
        prefill += max(forward_flops(shape, slots * read, context, head=False) / flops, started)
        held = kv_cache_bytes(shape, slots, context + episode.reply // 2, computes)
        step = {
            "memory bandwidth": (weights + held + passes.moved + sampled) / cluster.bandwidth,
            "matrix products": forward_flops(shape, slots, context + episode.reply / 2) / flops,
            "starting operations": started,
        }
        slowest = max(step, key=lambda name: step[name])
        # A GPU computes one operation while the next is started, and reads memory while it computes
        spent[slowest] += episode.reply * (sum(step.values()) if cluster.device == "cpu" else step[slowest])
    times = {
        "rollout: reading prompts": prefill,
        **{f"rollout: writing, bound by {name}": seconds for name, seconds in spent.items()},
        "rollout: environment": episode.n_turns * plan.env_delay,
    }
    times = {name: waves * seconds for name, seconds in times.items()}
    if cluster.sharding.stage == 3 and cluster.n_gpus > 1:
        times["rollout: gathering weights"] = 2.0 * shape.n_parameters / cluster.link
    return times


def decoded_bytes(shape: ModelShape, plan: Plan) -> float:
    """Bytes that a decoding step reads of the weights: 4-bit ones are also unpacked, written and read again."""
    computes = 2 if plan.bf16 else plan.weight_bytes
    if plan.adapter and plan.adapter.bits < 16:
        return frozen_bytes(shape, plan.adapter, computes) + 2 * computes * shape.n_linear
    return float(computes * shape.n_matmul)


def _communicated(shape: ModelShape, plan: Plan, cluster: Cluster, n_trained: int) -> float:
    """Bytes that each GPU sends in an update, in rings over all GPUs."""
    n, kind = cluster.n_gpus, cluster.sharding.kind
    if n == 1 or kind == "none":
        return 0.0
    share = (n - 1) / n
    computes = 2 if plan.bf16 else plan.weight_bytes
    if kind == "ddp":
        return 2 * share * n_trained * plan.weight_bytes
    gradients = share * n_trained * computes
    if kind == "zero1":
        return 2 * gradients + share * n_trained * computes
    if kind == "zero2":  # reduced after each pass, gathered after the update
        return plan.accumulation * gradients + share * n_trained * computes
    quantised = plan.adapter is not None and plan.adapter.bits < 16
    whole = n_trained if quantised else shape.n_parameters
    # Gathered for the forward and for the backward pass; the reference model once
    passes = 2 * whole + (shape.n_parameters if plan.reference else 0)
    return plan.accumulation * (share * passes * computes + gradients)


def _without_nothing(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds > 0}
