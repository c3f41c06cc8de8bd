# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""An estimate as a whole: what fits, what would, where the time goes; as text, as a table of sizes, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .cluster import GIB, Cluster, Sharding
from .memory import Memory, estimate_memory
from .plan import METHODS, Plan
from .shape import ModelShape
from .timing import Times, estimate_times


TIGHT = 0.1  # less headroom than this share: fragments of memory may take it
# What mends what most of the time is spent on
MENDS = {
    "rollout: reading prompts": 'context: chat keeps what was read in the cache; a shorter "window" reads less',
    "rollout: writing, bound by memory bandwidth": "more episodes side by side share the reading of the weights",
    "rollout: writing, bound by matrix products": "more GPUs; fewer or shorter replies",
    "rollout: writing, bound by starting operations": "more episodes side by side, or use_vllm: true, which records "
    "a graph",
    "rollout: environment": "more episodes side by side, so that some write while others wait",
    "rollout: gathering weights": "zero2, if its memory suffices",
    "scoring: matrix products": "beta: 0 needs no reference; rows are scored once a rollout, so more updates on it",
    "update: matrix products": "more GPUs; no gradient_checkpointing where memory allows",
    "update: everything between them": "fewer tokens an update; fused kernels (use_liger_kernel, kernels of the Hub)",
    "update: communication": "more gradient_accumulation_steps; zero2 in place of zero3; fewer nodes",
    "update: optimizer": "more rows an update",
}


@dataclass(frozen=True)
class Estimate:
    """
    Args:
        shape ([`ModelShape`]), plan ([`Plan`]), cluster ([`Cluster`]):
            What was estimated.
        memory ([`Memory`]), times ([`Times`]):
            What came out.
    """

    shape: ModelShape
    plan: Plan
    cluster: Cluster
    memory: Memory
    times: Times

    @property
    def headroom(self) -> float:
        """Bytes of a GPU that stay free; negative: it does not fit."""
        return self.memory.available - self.memory.peak

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file: bytes and seconds."""
        adapter = self.plan.adapter
        return {
            "model": {"name": self.shape.name, "source": self.shape.source, "parameters": self.shape.n_parameters},
            "cluster": asdict(self.cluster),
            "recipe": self.plan.recipe,
            "trainer": self.plan.trainer,
            "adapter": None if adapter is None else asdict(adapter),
            "batch": {
                "rows": self.plan.rows,
                "row_length": self.plan.row_length,
                "passes": self.plan.accumulation,
                "episodes": self.plan.episodes,
                "side_by_side": self.plan.side_by_side,
                "turns": self.plan.episode.n_turns if self.plan.episode else 0,
            },
            "trained_parameters": self.memory.states.n_trained,
            "memory": {
                "update": dict(self.memory.update),
                "rollout": dict(self.memory.rollout),
                "on_host": self.memory.states.on_host,
                "peak": self.memory.peak,
                "available": self.memory.available,
                "fits": self.memory.fits,
            },
            "seconds": {
                "rollout": dict(self.times.rollout),
                "update": dict(self.times.update),
                "updates": self.times.updates,
                "cycle": self.times.cycle,
                "bottleneck": self.times.bottleneck,
            },
        }


def estimate(shape: ModelShape, plan: Plan, cluster: Cluster) -> Estimate:
    """What `plan` takes with a model of this shape on `cluster`."""
    return Estimate(shape, plan, cluster, estimate_memory(shape, plan, cluster), estimate_times(shape, plan, cluster))


def suggest(found: Estimate) -> str | None:
    """The smallest change with which it fits, of those that are known; None if none of them does."""
    plan, cluster, n = found.plan, found.cluster, found.cluster.n_gpus
    tries: list[tuple[str, Plan, Cluster]] = []
    if not plan.checkpointing:
        tries.append(("gradient_checkpointing: true", replace(plan, checkpointing=True), cluster))
    checkpointed = replace(plan, checkpointing=True)
    if plan.rows > 1:
        fewer = replace(checkpointed, rows=-(-plan.rows // 4), side_by_side=-(-plan.side_by_side // 4))
        tries.append(("a quarter of per_device_train_batch_size and rollout_batch_size", fewer, cluster))
    if n > 1 and cluster.sharding.stage < 3:
        for name in ("zero2", "zero3"):
            spread = replace(cluster, sharding=replace(cluster.sharding, kind=name))
            if spread.sharding.stage > cluster.sharding.stage:
                tries.append((f"accelerate_configs/{name}.yaml", checkpointed, spread))
    if plan.adapter is None:
        tries.append(("LoRA (use_peft: true, lora_target_modules: all-linear)", checkpointed.by("lora"), cluster))
    if plan.adapter is None or plan.adapter.bits > 4:
        tries.append(("QLoRA, as in the _qlora.yaml of the recipes", checkpointed.by("qlora"), cluster))
    for told, other, machine in tries:
        if estimate_memory(found.shape, other, machine).fits:
            return told
    return None


def describe(found: Estimate) -> str:
    """The estimate as text for a terminal."""
    plan, memory, times, cluster = found.plan, found.memory, found.times, found.cluster
    method = "all weights" if plan.adapter is None else f"LoRA of rank {plan.adapter.rank}"
    if plan.adapter and plan.adapter.bits < 16:
        method += f" on {plan.adapter.bits}-bit weights"
    nodes = f" on {cluster.n_nodes} nodes" if cluster.n_nodes > 1 else ""
    lines = [
        f"{plan.recipe} ({plan.trainer.upper()}) with {found.shape.name}: {found.shape.n_parameters / 1e9:.2f}B "
        f"parameters ({found.shape.source}), training {method}, {memory.states.n_trained / 1e6:,.1f}M",
        f"{cluster.n_gpus} x {cluster.gpu.name} ({cluster.gpu.memory_gib:g} GiB){nodes}, "
        f"{'one process' if cluster.sharding.kind == 'none' else cluster.sharding.kind}",
        f"an update: {plan.accumulation} x {plan.rows} rows of up to {plan.row_length} tokens on each GPU",
    ]
    if plan.episode:
        lines.append(
            f"a rollout: {plan.episodes} episodes on each GPU, {plan.side_by_side} side by side, "
            f"{plan.episode.n_turns} turns, replies of {plan.episode.reply} tokens"
        )
    lines += ["", "memory per GPU (GiB)            update   rollout"]
    for part in dict.fromkeys((*memory.update, *memory.rollout)):
        cells = (_gib(parts.get(part)) for parts in (memory.update, memory.rollout))
        lines.append(f"  {part:28}" + "".join(f"{cell:>10}" for cell in cells))
    totals = (_gib(sum(parts.values())) if parts else "" for parts in (memory.update, memory.rollout))
    lines.append(f"  {'peak':28}" + "".join(f"{total:>10}" for total in totals))
    lines += ["", _verdict(found), "", "seconds"]
    lines += [f"  {name:48}{seconds:10.2f}" for name, seconds in times.rollout.items()]
    if times.rollout:
        lines.append(f"  {'a rollout':48}{sum(times.rollout.values()):10.2f}")
    lines += [f"  {name:48}{seconds:10.2f}" for name, seconds in times.update.items()]
    lines.append(f"  {'an update':48}{sum(times.update.values()):10.2f}")
    if times.rollout:
        lines.append(f"  {f'a rollout and its updates ({times.updates})':48}{times.cycle:10.2f}")
    lines += ["", f"bottleneck: {times.bottleneck}"]
    if times.bottleneck in MENDS:
        lines.append(f"  what helps: {MENDS[times.bottleneck]}")
    lines.append(
        f"Assumed: {cluster.efficiency:.0%} of the peak of matrix products, {cluster.bandwidth_efficiency:.0%} of all "
        f"bandwidths, {cluster.op_seconds * 1e6:g} us to start an operation, {cluster.reserved_gib:g} GiB taken by "
        "libraries (--cluster FILE says otherwise)."
    )
    return "\n".join(lines)


def _verdict(found: Estimate) -> str:
    memory, free = found.memory, found.headroom
    host = f" {_gib(memory.states.on_host)} GiB a process in the host's memory." if memory.states.on_host else ""
    if free >= TIGHT * memory.available:
        return f"fits: {_gib(memory.available)} GiB there, {_gib(free)} GiB to spare.{host}"
    if free >= 0:
        return f"fits tightly: {_gib(memory.available)} GiB there, {_gib(free)} GiB to spare.{host}"
    where = "update" if sum(memory.update.values()) == memory.peak else "rollout"
    tried = suggest(found)
    advice = f"Try {tried}." if tried else "Take more or larger GPUs, a smaller model, or shorter rows."
    needs = f"the {where} needs {_gib(memory.peak)} GiB, {_gib(-free)} GiB more than there are"
    return f"does not fit: {needs}.{host} {advice}"


def tabulate(
    shapes: Sequence[ModelShape], plan: Plan, cluster: Cluster, kinds: Iterable[str] = ("none", "zero2", "zero3")
) -> str:
    """
    A Markdown table of GiB per GPU: sizes x methods, on one GPU and spread over those of `cluster`.

    Args:
        shapes (`Sequence[ModelShape]`):
            Models.
        plan ([`Plan`]):
            What is trained, of which the method is changed.
        cluster ([`Cluster`]):
            Whose GPUs; what does not fit them is in brackets.
        kinds (`Iterable[str]`, *optional*, defaults to `("none", "zero2", "zero3")`):
            Of [`Sharding`].
    """
    kinds = list(kinds)
    titles = ["1 GPU" if kind == "none" else f"{cluster.n_gpus} GPUs, {kind}" for kind in kinds]
    lines = [f"| model | trained | {' | '.join(titles)} |", "|---|---|" + "---|" * len(kinds)]
    for shape in shapes:
        for method in METHODS:
            cells = []
            for kind in kinds:
                spread = replace(cluster, sharding=Sharding(kind))
                if kind == "none":
                    spread = replace(spread, n_gpus=1, n_nodes=1)
                memory = estimate_memory(shape, plan.by(method), spread)
                cell = f"{memory.peak / GIB:.0f}"
                cells.append(cell if memory.fits else f"({cell})")
            name = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[method]
            lines.append(f"| {shape.name} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gib(n_bytes: float | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / GIB:.2f}" if n_bytes < 10 * GIB else f"{n_bytes / GIB:.1f}"
