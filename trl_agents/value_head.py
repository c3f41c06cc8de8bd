# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A value head on a policy's trunk, or on one of its own: attach, read, save, load."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import cached_file


VALUE_HEAD_NAME = "value_head"  # of the submodule
VALUE_HEAD_FILE = "value_head.safetensors"  # beside the weights; the policy's own files stay what any loader expects


class ValueHead(nn.Linear):
    """
    V(s) as a linear function of the last hidden state, in float32 (https://huggingface.co/papers/1909.08593):

        V_t = w . h_t + b

    It becomes the submodule `value_head` of the causal language model, so that data-parallel wrappers, optimizers and
    checkpoints see it, and hears the trunk's hidden states in the policy's own forward pass: see [`listen`].

    Args:
        hidden_size (`int`):
            Width of the trunk.
        detach (`bool`, *optional*, defaults to `False`):
            Whether the trunk is kept from learning what the head learns.
    """

    def __init__(self, hidden_size: int, detach: bool = False, **kwargs: Any):
        super().__init__(hidden_size, 1, dtype=torch.float32, **kwargs)
        self.detach = detach
        self._heard: list[torch.Tensor] | None = None
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, S, H)` of any dtype -> values `(B, S)` in float32."""
        if self.detach:
            hidden_states = hidden_states.detach()
        with torch.autocast(hidden_states.device.type, enabled=False):
            # DeepSpeed and FSDP2 keep the weights that compute in half precision, whatever they were made in
            return super().forward(hidden_states.to(self.weight.dtype)).squeeze(-1).float()

    def attach(self, model: PreTrainedModel) -> ValueHead:
        """Become a submodule of `model`, a causal language model without its adapter wrapper."""
        setattr(model, VALUE_HEAD_NAME, self.to(model.device))
        model.base_model.register_forward_hook(self._hear, with_kwargs=True)
        model.register_forward_hook(self._show)
        return self

    def _hear(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._heard is not None:
            self._heard.append(self(output.last_hidden_state))

    def _show(self, model: nn.Module, args: tuple, output: Any) -> None:
        # DistributedDataParallel takes for unused what it does not find behind the outputs, and then fails. It takes
        # outputs apart and builds them anew, so the values have to travel in a field that they have.
        if self._heard and torch.is_grad_enabled() and is_dataclass(output):
            empty = [field.name for field in fields(output) if getattr(output, field.name) is None]
            if empty:
                output[empty[-1]] = self._heard[-1]

    @contextmanager
    def listen(self) -> Iterator[list[torch.Tensor]]:
        """While open, every forward pass of the model adds its values `(B, S)` to the list."""
        self._heard, kept = [], self._heard
        try:
            yield self._heard
        finally:
            self._heard = kept

    def load(self, folder: str, **download_kwargs: Any) -> bool:
        """
        Load the head saved in `folder`, a path or a repository of the Hub. Returns False if there is none.
        """
        try:
            file = cached_file(
                folder,
                VALUE_HEAD_FILE,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **download_kwargs,
            )
        except OSError:  # a model in memory may come from a folder that is gone, whose name is no repository's
            return False
        if file is None:
            return False
        self._copy(load_file(file), file)
        return True

    def load_reward_model(self, name: str, **kwargs: Any) -> None:
        """Start from the head of a reward model, a sequence classifier with one label of the same width."""
        reward_model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **kwargs)
        names = ("score", "out_proj")  # of decoders, and of encoders
        linear = {name: module for name, module in reward_model.named_modules() if isinstance(module, nn.Linear)}
        heads = [module for name, module in linear.items() if name.endswith(names) and module.out_features == 1]
        head = heads[-1] if heads else None
        if head is None:
            raise ValueError(
                f"{name!r} has no linear head `score` with one output: give a reward model as TRL's RewardTrainer "
                "saves it."
            )
        with gathered(reward_model):
            weights = {"weight": head.weight.detach().float().clone()}
            weights["bias"] = torch.zeros(1) if head.bias is None else head.bias.detach().float().clone()
        self._take(reward_model)
        self._copy({**self.state_dict(), **weights}, name)

    def _take(self, reward_model: PreTrainedModel) -> None:
        """What besides its head is taken from a reward model: nothing, this head reads the policy's trunk."""

    def _copy(self, weights: dict[str, torch.Tensor], source: str) -> None:
        own_trunk, saved_trunk = len(self.state_dict()) > 2, len(weights) > 2
        if own_trunk != saved_trunk:
            was, is_ = (
                ("a trunk of its own", "the policy's") if saved_trunk else ("the policy's", "a trunk of its own")
            )
            raise ValueError(
                f"The value head in {source} reads {was}, and separate_critic={own_trunk} makes one that reads {is_}: "
                f"set separate_critic={saved_trunk}, or start it from elsewhere (`value_head_init`, or no file there)."
            )
        if weights["weight"].shape[1] != self.in_features:
            raise ValueError(
                f"The value head in {source} reads {weights['weight'].shape[1]} features, but this model has "
                f"{self.in_features}: it belongs to another model."
            )
        self.load_state_dict({name: tensor.to(self.weight.device) for name, tensor in weights.items()})


class SeparateCritic(ValueHead):
    """
    V(s) as a linear function of the last hidden state of a trunk of its own, which starts as a copy of the policy's or
    of a reward model's: a second one to hold and to train, and the policy's learns nothing but to act. ReFT's
    ablation (https://huggingface.co/papers/2401.08967); RLHF's critic that starts from the reward model.

    Args:
        trunk ([`~transformers.PreTrainedModel`]):
            Model without a head, whose weights are copied.
    """

    def __init__(self, trunk: PreTrainedModel):
        super().__init__(hidden_size_of(trunk))
        self.trunk = _copy_of(trunk)

    def _hear(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._heard is not None:
            # What the policy's trunk was given, but for its cache
            cached = ("cache", "past_key_values", "use_cache")
            inputs = {name: value for name, value in kwargs.items() if name not in cached}
            self._heard.append(self(self.trunk(*args, **inputs, use_cache=False).last_hidden_state))

    def _take(self, reward_model: PreTrainedModel) -> None:
        first = next(self.trunk.parameters())
        self.trunk = _copy_of(reward_model.base_model).to(first.device)
        cast_parameters(self.trunk, first.dtype)


def _copy_of(trunk: PreTrainedModel) -> PreTrainedModel:
    """Made anew and not copied whole: under ZeRO-3 the original's parameters are in pieces on all processes."""
    with gathered(trunk):
        first = next(trunk.parameters())
        made = type(trunk)(copy.deepcopy(trunk.config)).to(first.device)
        cast_parameters(made, first.dtype)
        made.load_state_dict(trunk.state_dict())
        for buffer, other in zip(made.buffers(), trunk.buffers(), strict=True):
            buffer.data = other.detach().clone()  # also what no state dict holds
    for module, other in zip(made.modules(), trunk.modules(), strict=True):
        if isinstance(module, nn.Dropout):
            module.p = other.p
    return made


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """To another type without its buffers: rotary frequencies stay in float32, as models load them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While open, parameters that ZeRO-3 has in pieces are whole on every process."""
    pieces = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not pieces:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces):
        yield


def hidden_size_of(model: PreTrainedModel) -> int:
    """Width of the hidden states that a model's head reads."""
    config = model.config.get_text_config()
    return getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT projects before its head


@contextmanager
def without_value_head(model: PreTrainedModel) -> Iterator[None]:
    """While open, `model` has no value head, for whatever walks over its parameters and must not meet one."""
    head = model._modules.pop(VALUE_HEAD_NAME, None)
    try:
        yield
    finally:
        if head is not None:
            setattr(model, VALUE_HEAD_NAME, head)


def split_value_head(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's weights -> those of the policy, and those of the head by the names the head's file has."""
    infix = f"{VALUE_HEAD_NAME}."
    head = {name.rpartition(infix)[2]: tensor for name, tensor in state_dict.items() if infix in name}
    return {name: tensor for name, tensor in state_dict.items() if infix not in name}, head


def save_value_head(weights: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Write the head's `weight` and `bias`, in float32, into `folder`, and its own trunk as it is."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {
        name: (tensor if name.startswith("trunk.") else tensor.float()).detach().cpu().contiguous()
        for name, tensor in weights.items()
    }
    save_file(weights, str(Path(folder) / VALUE_HEAD_FILE), metadata={"format": "pt"})


def warn_of_missing_head(folder: str) -> None:
    """Say that a checkpoint was made without a critic."""
    warnings.warn(
        f"{folder} has no {VALUE_HEAD_FILE}: the policy is loaded, and its values start anew from the head's "
        "initialisation. Consider `critic_warmup_steps`.",
        stacklevel=3,
    )
