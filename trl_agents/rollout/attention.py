# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Attention for reading a few tokens behind a long past, without copying the past.

Where heads share their keys (grouped-query attention), transformers repeats the keys and values of the whole past for
each head whenever it reads more than one token a row under a mask. Here the queries of the heads that share stand one
after the other instead, as transformers itself has them for a single token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward


GROUPED = "trl_agents_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa` computes, in its form: `(b, heads, n, head_dim)` -> `(b, n, heads, head_dim)`."""
    (batch, heads, n, _), groups = query.shape, query.shape[1] // key.shape[1]
    if groups == 1 or n == 1 or attention_mask is None or attention_mask.shape[1] > 1 or position_bias is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    query = query.reshape(batch, key.shape[1], groups * n, -1)
    mask = attention_mask.repeat(1, 1, groups, 1)  # (b, 1, groups * n, columns)
    # The stand-in for the module knows of no groups, so nothing is repeated
    output, _ = sdpa_attention_forward(SimpleNamespace(is_causal=False), query, key, value, mask, **kwargs)
    return output.transpose(1, 2).reshape(batch, heads, n, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)


def best_attention(model: PreTrainedModel) -> str:
    """The attention to read with: grouped where the model would use `sdpa` and lets attention be exchanged."""
    own = model.config.get_text_config()._attn_implementation
    return GROUPED if own == "sdpa" and getattr(model, "_supports_attention_backend", False) else own


@contextmanager
def attending(config: PreTrainedConfig, attention: str) -> Iterator[None]:
    """Let the model of `config` attend by `attention` for a while."""
    own, config._attn_implementation = config._attn_implementation, attention
    try:
        yield
    finally:
        config._attn_implementation = own
