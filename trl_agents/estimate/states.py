# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What lies on a GPU between two passes: weights, gradients, optimizer states, other models. Arithmetic on the number of
parameters (ZeRO: https://huggingface.co/papers/1910.02054; QLoRA: https://huggingface.co/papers/2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from .cluster import Sharding
from .plan import Adapter, Plan
from .shape import Linear, ModelShape


# States that an optimizer keeps of a parameter: 32-bit ones in their parameters' type, 8-bit ones in a byte each
STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "ademamix": 3}
FACTORED = "adafactor"
BUCKET = 500_000_000  # numbers in a bucket of gradients: DeepSpeed's default, which accelerate leaves
BLOCK, SCALES_BLOCK, CODE_4BIT, CODE_8BIT = 64, 256, 16, 256  # of bitsandbytes
SMALL_8BIT = 4096  # its 8-bit optimizers keep smaller tensors in 32 bits


@dataclass(frozen=True)
class States:
    """
    What lies on a GPU between two passes, in bytes.

    Args:
        weights (`float`):
            That compute: frozen ones, and trained ones in the type of the passes.
        master (`float`):
            Copies of trained weights in float32, where DeepSpeed trains.
        gradients, optimizer (`float`):
            Of the trained weights.
        reference, reward_model (`float`):
            Models that are only read.
        buckets (`float`):
            Gradients on their way between GPUs.
        on_host (`float`):
            What DeepSpeed keeps in the host's memory instead, of this GPU's share.
        n_trained (`int`):
            Parameters that learn, on all GPUs together.
    """

    weights: float
    master: float
    gradients: float
    optimizer: float
    reference: float
    reward_model: float
    buckets: float
    on_host: float
    n_trained: int

    @property
    def resting(self) -> float:
        """What is there all along, also in a rollout."""
        return self.weights + self.master + self.optimizer + self.reference + self.reward_model


def count_states(shape: ModelShape, plan: Plan, sharding: Sharding, n_gpus: int = 1) -> States:
    """Bytes of weights, gradients and optimizer states on each of `n_gpus`."""
    stage, shards = sharding.stage, n_gpus if sharding.stage else 1
    adapted = adapted_layers(shape, plan.adapter)
    n_adapter = sum(plan.adapter.rank * (linear.n_in + linear.n_out) for linear in adapted) if plan.adapter else 0
    critic = (shape.n_trunk if plan.separate_critic else 0) + (shape.hidden_size + 1 if plan.trainer == "ppo" else 0)
    n_trained = (n_adapter if plan.adapter else shape.n_parameters) + critic
    passes_bytes = 2 if sharding.deepspeed and plan.bf16 else plan.weight_bytes
    # PEFT keeps adapters in float32, TRL those of quantised models in bfloat16
    own_bytes = plan.weight_bytes
    if plan.adapter:
        own_bytes = 2 if plan.adapter.bits < 16 else 4
    if sharding.kind == "fsdp" and plan.bf16:
        passes_bytes = own_bytes = 4  # accelerate raises what it shards, and gathers in bfloat16
    if sharding.deepspeed and plan.bf16:
        own_bytes = 2

    frozen = frozen_bytes(shape, plan.adapter, passes_bytes) if plan.adapter else 0.0
    quantised = plan.adapter is not None and plan.adapter.bits < 16
    weights = frozen / (shards if stage == 3 and not quantised else 1)
    weights += n_trained * own_bytes / (shards if stage == 3 else 1)
    gradients = n_trained * own_bytes / (shards if stage >= 2 else 1)
    master = n_trained * 4 / shards if sharding.deepspeed and own_bytes < 4 else 0.0
    state_bytes = 4 if sharding.deepspeed else own_bytes
    optimizer = _optimizer_bytes(shape, plan, n_trained, state_bytes, flat=sharding.deepspeed) / shards
    reads = 2 if plan.bf16 and sharding.stage else plan.weight_bytes
    reference = shape.n_parameters * reads / (shards if stage == 3 else 1) if plan.reference else 0.0
    buckets = 0.0
    if sharding.deepspeed and stage >= 1:
        buckets = BUCKET * own_bytes
    elif sharding.kind == "ddp":
        buckets = n_trained * own_bytes
    on_host = 0.0
    if sharding.offload_optimizer:
        on_host, master, optimizer = master + optimizer, 0.0, 0.0
        if stage >= 2:  # gradients follow as soon as they are reduced
            on_host, gradients = on_host + gradients, 0.0
    if sharding.offload_parameters:
        on_host, weights = on_host + weights, 0.0
    return States(
        weights=weights,
        master=master,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        reward_model=shape.n_trunk * plan.weight_bytes if plan.reward_model else 0.0,
        buckets=buckets,
        on_host=on_host,
        n_trained=n_trained,
    )


def adapted_layers(shape: ModelShape, adapter: Adapter | None) -> list[Linear]:
    """The linear layers that get an adapter."""
    if adapter is None:
        return []
    if adapter.targets == "all-linear":
        return list(shape.linears)
    targets = adapter.targets
    if targets is None:
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(shape.config.model_type)
    if not targets or isinstance(targets, str):
        raise ValueError(
            f"lora_target_modules={adapter.targets!r} names no layers of {shape.config.model_type}: say `all-linear`, "
            "or their names."
        )
    ends = tuple(f".{target}" for target in targets)  # whole names, as PEFT matches them
    found = [linear for linear in shape.linears if f".{linear.name}".endswith(ends)]
    if not found:
        raise ValueError(f"lora_target_modules={list(targets)} are no layers of {shape.name}.")
    return found


def frozen_bytes(shape: ModelShape, adapter: Adapter, weight_bytes: int) -> float:
    """Bytes of a base model under adapters: quantised are its linear layers, but not the output head."""
    rest = (shape.n_parameters - shape.n_linear) * weight_bytes
    if adapter.bits == 16:
        return rest + shape.n_linear * weight_bytes
    if adapter.bits == 8:
        return rest + sum(linear.n_weights + 4 * linear.n_out for linear in shape.linears)
    return rest + sum(quantised_bytes(linear.n_weights, adapter.double_quantization) for linear in shape.linears)


def quantised_bytes(n_weights: int, double_quantization: bool) -> int:
    """A 4-bit layer of bitsandbytes: packed weights, a scale a block of 64, and the table of the 16 values."""
    n_blocks = -(-n_weights // BLOCK)
    packed = -(-n_weights // 2) + 4 * CODE_4BIT
    if not double_quantization:
        return packed + 4 * n_blocks
    # Scales in 8 bits, with scales of their own and a table, and their mean
    return packed + n_blocks + 4 * -(-n_blocks // SCALES_BLOCK) + 4 * CODE_8BIT + 4


def trained_tensors(shape: ModelShape, plan: Plan) -> list[tuple[int, int]]:
    """Rows and columns of the matrices that learn; the rest, norms and biases, are few numbers."""
    if plan.adapter:
        rank = plan.adapter.rank
        layers = adapted_layers(shape, plan.adapter)
        return [size for layer in layers for size in ((rank, layer.n_in), (layer.n_out, rank))]
    linears = [(layer.n_out, layer.n_in) for layer in shape.linears]
    return linears + (linears if plan.separate_critic else [])


def _optimizer_bytes(shape: ModelShape, plan: Plan, n_trained: int, number_bytes: int, flat: bool) -> float:
    name = plan.optimizer.lower().removeprefix("paged_")
    sizes = trained_tensors(shape, plan)
    n_rest = max(n_trained - sum(a * b for a, b in sizes), 0)  # with the embeddings, where they learn
    if name == FACTORED:
        if flat:  # DeepSpeed's shards have no rows and columns to factor into
            return 4.0 * n_trained
        n_tables = 0 if plan.adapter else round((n_rest // shape.hidden_size) / shape.vocab_size)
        sizes += [(shape.vocab_size, shape.hidden_size)] * n_tables
        n_rest = n_trained - sum(a * b for a, b in sizes)
        return 4.0 * (sum(a + b for a, b in sizes) + n_rest)
    kind = next((kind for kind in sorted(STATES, key=len, reverse=True) if name.startswith(kind)), None)
    if kind is None or "4bit" in name:
        raise ValueError(f"What optim={plan.optimizer!r} keeps is not known: {', '.join((*STATES, FACTORED))} are.")
    if "8bit" in name:
        # Scales of 4 bytes a block of 256; transformers leaves embeddings in 32 bits
        counts = [a * b for a, b in sizes]
        in_8_bits = sum(count for count in counts if count >= SMALL_8BIT)
        return STATES[kind] * (in_8_bits * (1 + 4 / 256) + 4.0 * (n_trained - in_8_bits))
    return float(STATES[kind] * number_bytes * n_trained)
