# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What forward and backward passes need besides the weights, found by running them without any memory: PyTorch's fake
tensors have shapes and types and no data, so the model's own code says what it keeps, whatever the architecture.

Layers are alike, so that two small models tell what the whole one needs.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .._trl import add_fused_lm_head
from .shape import ModelShape, resize_layers


# Numbers of layers of the two models: even, as layers of two kinds may take turns
FEW, MORE = 2, 4


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of storages made while it is open and not yet freed; `peak` is the most at once, `n_ops` the
    number of operations, `moved` the bytes that those read and write that are no matrix products. Works with fake
    tensors too.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.n_ops = self.moved = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [tensor for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        output = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # fake tensors are asked for their device
            return output
        self.n_ops += 1
        made = [tensor for tensor in tree_leaves(output) if torch.is_tensor(tensor)]
        for tensor in made:
            self._count(tensor.untyped_storage(), known)
        if not func.is_view and func._overloadpacket not in flop_registry:
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        return output

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self.seen:  # a view, or written in place
            return
        size = storage.nbytes()

        def free():
            self.live -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.finalize(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Passes:
    """
    Args:
        saved (`float`):
            Bytes that the trunk's forward pass keeps for the backward pass.
        peak (`float`):
            Most bytes at once in forward and backward pass: of the trunk without its embeddings, or of the whole model
            where the output head was run along.
        n_ops (`float`):
            Operations of the forward pass.
        moved (`float`):
            Bytes that forward and backward pass read and write, but for those of matrix products.
    """

    saved: float
    peak: float
    n_ops: float
    moved: float


def dry_run(
    shape: ModelShape,
    rows: int,
    length: int,
    *,
    dtype: torch.dtype,
    autocast: bool = False,
    checkpointing: bool = False,
    attention: str = "sdpa",
    lora_rank: int = 0,
    lora_targets: str | tuple[str, ...] | None = "all-linear",
    lora_dtype: torch.dtype = torch.float32,
    head: bool = False,
    gradients: bool = True,
) -> Passes:
    """
    Run forward and backward passes of a model without its memory.

    Args:
        shape ([`ModelShape`]):
            The model.
        rows, length (`int`):
            Of the batch.
        dtype (`torch.dtype`):
            Of the weights.
        autocast (`bool`, *optional*, defaults to `False`):
            Whether matrix products are in bfloat16 where the weights are not.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Gradient checkpointing.
        attention (`str`, *optional*, defaults to `"sdpa"`):
            transformers' name of the attention; one that is not installed is taken to need what `"sdpa"` needs.
        lora_rank, lora_targets, lora_dtype (*optional*):
            Adapters to train in place of all weights; 0 for none.
        head (`bool`, *optional*, defaults to `False`):
            Whether to run TRL's chunked output head along as it is run without a GPU.
        gradients (`bool`, *optional*, defaults to `True`):
            Whether there is a backward pass.

    Returns:
        [`Passes`]
    """
    run = functools.partial(
        _run, config=_Key(shape.config), rows=rows, length=length, dtype=dtype, autocast=autocast, head=head,
        checkpointing=checkpointing, attention="eager" if attention == "eager" else "sdpa", lora_rank=lora_rank,
        lora_targets=lora_targets, lora_dtype=lora_dtype, gradients=gradients,
    )  # fmt: skip
    if shape.n_layers <= MORE:
        return run(n_layers=shape.n_layers)
    few, more = run(n_layers=FEW), run(n_layers=MORE)

    def extend(name: str) -> float:
        first, second = getattr(few, name), getattr(more, name)
        return first + (shape.n_layers - FEW) * (second - first) / (MORE - FEW)

    saved = extend("saved")
    return Passes(saved, saved + more.peak - more.saved, extend("n_ops"), extend("moved"))


class _Key:
    """A configuration that a cache can tell from others."""

    def __init__(self, config: PreTrainedConfig):
        self.config, self.text = config, config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@functools.lru_cache(maxsize=256)
def _run(
    *,
    config: _Key,
    n_layers: int,
    rows: int,
    length: int,
    dtype: torch.dtype,
    autocast: bool,
    checkpointing: bool,
    attention: str,
    lora_rank: int,
    lora_targets: str | tuple[str, ...] | None,
    lora_dtype: torch.dtype,
    head: bool,
    gradients: bool,
) -> Passes:
    small = copy.deepcopy(config.config)
    small.num_hidden_layers = n_layers
    if getattr(small, "layer_types", None):
        small.layer_types = resize_layers(small, n_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _default_dtype(dtype), torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(small, attn_implementation=attention)
            except ValueError:  # the architecture has no other
                model = AutoModelForCausalLM.from_config(small, attn_implementation="eager")
            model.tie_weights()
            if head:
                add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            trained = _with_adapters(model, lora_rank, lora_targets, lora_dtype) if lora_rank else model
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _materialize(trained)
        trained.train(gradients)
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
            if lora_rank:
                trained.enable_input_require_grads()
        for parameter in trained.parameters():
            parameter.requires_grad_(parameter.requires_grad and gradients)
            if parameter.requires_grad:  # gradients are counted elsewhere
                parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros((rows, length), dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not head:  # the embeddings' gradient, large and at the very end, is counted apart
            width = model.get_input_embeddings().weight.shape[1]
            inputs = {"attention_mask": inputs["attention_mask"]}
            inputs["inputs_embeds"] = torch.zeros((rows, length, width), dtype=dtype, requires_grad=gradients)
        precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with LiveBytes() as live, torch.set_grad_enabled(gradients):
            with precision:
                if head:
                    result = trained(**inputs, labels=torch.zeros_like(ids), fused_lm_head=True).log_probs
                else:
                    trunk = (trained.get_base_model() if lora_rank else trained).base_model
                    result = trunk(**inputs, use_cache=False).last_hidden_state
            saved, n_ops = live.live, live.n_ops
            if gradients:
                result.sum().backward()
        return Passes(saved, live.peak, n_ops, live.moved)


def _with_adapters(model: Any, rank: int, targets: str | tuple[str, ...] | None, dtype: torch.dtype) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = list(targets) if isinstance(targets, tuple) else targets
    trained = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return trained


def _materialize(model: torch.nn.Module) -> None:
    """From the meta device to fake tensors of a CPU; weights that are shared stay shared."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device="cpu")
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
