# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A model's shape: how many parameters where, read off the model itself, which is made without any memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .published import PUBLISHED, SAME, TINY


TINY_NAME = "tiny"


@dataclass(frozen=True)
class Linear:
    """A linear layer of the trunk: what adapters and quantisation reach."""

    name: str
    n_in: int
    n_out: int

    @property
    def n_weights(self) -> int:
        return self.n_in * self.n_out


@dataclass(frozen=True)
class ModelShape:
    """
    Args:
        name (`str`):
            As the user named it.
        source (`str`):
            Where the shape is from.
        config ([`~transformers.PreTrainedConfig`]):
            Of the text model; what [`dry_run`] makes its models from.
        n_parameters (`int`):
            Of the whole model, weights that are shared counted once.
        n_trunk (`int`):
            Of these, without the output head where it is no other's weight: what a separate critic copies.
        linears (`tuple[Linear, ...]`):
            All linear layers but the output head.
        vocab_size, hidden_size, n_layers, n_heads, head_dim (`int`):
            As in the configuration.
        kv_widths (`tuple[int, int]`):
            Numbers that a layer keeps of a token: of its key, of its value.
    """

    name: str
    source: str
    config: PreTrainedConfig
    n_parameters: int
    n_trunk: int
    linears: tuple[Linear, ...]
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    head_dim: int
    kv_widths: tuple[int, int]

    @property
    def n_linear(self) -> int:
        """Weights in the trunk's linear layers."""
        return sum(linear.n_weights for linear in self.linears)

    @property
    def n_matmul(self) -> int:
        """Weights that a token is multiplied with: those of the linear layers and of the output head."""
        return self.n_linear + self.vocab_size * self.hidden_size

    @property
    def positions(self) -> int | None:
        """Most tokens of a row."""
        return getattr(self.config, "max_position_embeddings", None)


def read_shape(name: str | Path | None, changes: Mapping[str, Any] | None = None) -> ModelShape:
    """
    The shape of a model, of which nothing but its configuration is read.

    Args:
        name (`str` or `Path`, *optional*):
            A folder, a `config.json`, a name on the Hub, or `"tiny"` (also if None): the model that recipes make on
            the spot. A name on the Hub is looked up in the local cache, then in [`published.PUBLISHED`], then on the
            Hub.
        changes (`Mapping[str, Any]`, *optional*):
            Entries of the configuration in place of the model's own.

    Raises:
        `ValueError`: if there is no such model, or none that generates text.
    """
    config, source = _find_config(str(name) if name else TINY_NAME)
    unknown = [key for key in changes or {} if not hasattr(config.get_text_config(), key)]
    if unknown:
        raise ValueError(f"The configuration of {name} ({config.model_type}) has no {', '.join(unknown)}.")
    config = copy.deepcopy(config.get_text_config())
    try:
        for key, value in (changes or {}).items():
            setattr(config, key, value)
    except StrictDataclassError as error:
        raise ValueError(
            f"The configuration of {name} ({config.model_type}) refuses {key}={value!r}: {error}"
        ) from error
    if config.num_hidden_layers < 1:
        raise ValueError(f"{name} with num_hidden_layers={config.num_hidden_layers}: give at least 1.")
    if hasattr(config, "layer_types") and "num_hidden_layers" in (changes or {}):
        config.layer_types = resize_layers(config, config.num_hidden_layers)
    return measure_shape(config, str(name) if name else TINY_NAME, source)


def measure_shape(config: PreTrainedConfig, name: str, source: str = "configuration") -> ModelShape:
    """The shape of the model that `config` describes, made on the meta device."""
    try:
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{name} ({config.model_type}) cannot be made as a causal language model: {error}") from error
    experts = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 3)
    if experts > 0.1 * sum(parameter.numel() for parameter in model.parameters()):
        raise ValueError(
            f"{name} ({config.model_type}) is a mixture of experts, of which a token meets a few: its times and its "
            "quantised memory are not known here. Give a dense model of the size you are interested in."
        )
    model.tie_weights()
    head = model.get_output_embeddings()
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    shared = head.weight is model.get_input_embeddings().weight
    linears = tuple(
        Linear(path, *_sizes(module))
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    return ModelShape(
        name=name,
        source=source,
        config=config,
        n_parameters=sum(parameters.values()),
        n_trunk=sum(parameters.values()) - (0 if shared else sum(p.numel() for p in head.parameters())),
        linears=linears,
        vocab_size=head.weight.shape[0],
        hidden_size=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        head_dim=head_dim,
        kv_widths=(width, width),
    )


def resize_layers(config: PreTrainedConfig, n_layers: int) -> list[str]:
    """`layer_types` of a model with another number of layers: the pattern goes on as it began."""
    types = list(config.layer_types)
    return (types * -(-n_layers // len(types)))[:n_layers]


def _sizes(module: torch.nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def _find_config(name: str) -> tuple[PreTrainedConfig, str]:
    if name == TINY_NAME:
        return _from_values(TINY), "made on the spot by the recipes"
    path = Path(name).expanduser()
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return _from_values(values), str(path)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name} is no config.json of a model that transformers knows: {error}") from error
    if path.is_dir():
        try:
            return AutoConfig.from_pretrained(path), str(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"The folder {name} holds no model: {' '.join(str(error).split())}") from error
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True), "the Hub, cached"
    except (OSError, ValueError):
        pass
    published = PUBLISHED.get(SAME.get(name, name))
    if published:
        return _from_values(published), "published configuration"
    try:
        return AutoConfig.from_pretrained(name), "the Hub"
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no folder {name!r}, and the Hub gave no such model ({' '.join(str(error).split())[:200]}). "
            f"Known without a network: {TINY_NAME}, {', '.join(sorted({*PUBLISHED, *SAME}))}; or give a config.json."
        ) from None


def _from_values(values: Mapping[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)
