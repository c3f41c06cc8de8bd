# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Attention for reading a few tokens behind a long past, without copying the past.

Where heads share their keys (grouped-query attention), transformers repeats the keys and values of the whole past for
each head whenever it reads more than one token a row under a mask. Here the queries of the heads that share stand one
after the other instead, as transformers itself has them for a single token.

Rows that read different numbers of tokens are packed one after the other: all but attention works on tokens, and
attention takes them in [`Segment`]s, each of which looks at its own part of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward


GROUPED, PACKED = "trl_agents_grouped", "trl_agents_packed"

# Another call of the attention kernel takes about as long as reading so many bytes of keys and values
CALL_BYTES = {"cpu": 3e5, "cuda": 1e8}


@dataclass(slots=True)
class Segment:
    """
    Tokens of one packed pass that attend together: `n` of each row of the cache from `first` to before `last`, which
    look at the columns before `columns`, where `mask` of shape `(rows, 1, n, columns)`, or `(1, 1, n, columns)` if it
    is the same for all, allows it (None: everywhere).
    """

    tokens: slice
    first: int
    last: int
    n: int
    columns: int
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # the mask as all layers add it

    def as_bias(self, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of `groups` heads one after the other, `(rows, 1, groups * n, columns)`."""
        if self.mask is not None and self.bias is None:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self.bias = zeros.masked_fill_(~self.mask, -torch.inf).repeat(1, 1, groups if self.n > 1 else 1, 1)
        return self.bias


@dataclass(slots=True)
class Span:
    """Neighbouring rows of the cache that will make a segment."""

    first: int
    last: int
    n: int
    columns: int

    def bytes(self, column_bytes: float) -> float:
        return (self.last - self.first) * self.columns * column_bytes


def spans(
    rows: Sequence[int], lengths: Sequence[int], ends: Sequence[int], column_bytes: float, call_bytes: float
) -> list[Span]:
    """
    Which of the `rows`, each with so many new tokens, the last of them before column `ends`, attend together:
    neighbours that read alike many, unless what the shorter of them would look at in vain costs more than a call. Of
    single tokens also rows apart: those between read something that nobody asks for. Single tokens come first.
    """
    found: list[Span] = []
    for _, row, n, columns in sorted(zip([n > 1 for n in lengths], rows, lengths, ends, strict=True)):
        own = Span(row, row + 1, n, columns)
        if found and found[-1].n == n and (n == 1 or found[-1].last == row):
            before = found[-1]
            both = Span(before.first, row + 1, n, max(before.columns, columns))
            waste = both.bytes(column_bytes) - before.bytes(column_bytes) - own.bytes(column_bytes)
            if waste <= call_bytes:
                found[-1] = both
                continue
        found.append(own)
    return found


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
    n, groups = query.shape[2], query.shape[1] // key.shape[1]
    if groups == 1 or n == 1 or attention_mask is None or attention_mask.shape[1] > 1 or position_bias is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    mask = attention_mask.repeat(1, 1, groups, 1)  # (b, 1, groups * n, columns)
    return _attend(query, key, value, mask, **kwargs), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs
) -> torch.Tensor:
    (batch, heads, n, _), groups = query.shape, query.shape[1] // key.shape[1]
    query = query.reshape(batch, key.shape[1], groups * n, -1)
    # The stand-in for the module knows of no groups, so nothing is repeated
    output, _ = sdpa_attention_forward(SimpleNamespace(is_causal=False), query, key, value, mask, **kwargs)
    return output.transpose(1, 2).reshape(batch, heads, n, -1).transpose(1, 2).contiguous()


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    `(1, heads, tokens, head_dim)` -> `(1, tokens, heads, head_dim)`, by the segments of [`attending`]. `key` and
    `value` are the whole cache, `(n_slots, key_heads, capacity, head_dim)`.
    """
    if kwargs.pop("position_bias", None) is not None:
        raise NotImplementedError("attention with a bias that depends on positions")
    kwargs["is_causal"] = False
    groups, outputs = query.shape[1] // key.shape[1], []
    for segment in _segments.get():
        rows = slice(segment.first, segment.last)
        own = query[0, :, segment.tokens].unflatten(1, (-1, segment.n)).transpose(0, 1)  # (rows, heads, n, head_dim)
        columns = slice(segment.columns)
        bias = segment.as_bias(groups, query.dtype)
        output = _attend(own, key[rows, :, columns], value[rows, :, columns], bias, **kwargs)
        outputs.append(output.flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


_segments: ContextVar[Sequence[Segment]] = ContextVar("segments")

AttentionInterface.register(GROUPED, grouped_attention)
AttentionInterface.register(PACKED, packed_attention)


def best_attention(model: PreTrainedModel) -> str:
    """The attention to read with: grouped where the model would use `sdpa` and lets attention be exchanged."""
    own = model.config.get_text_config()._attn_implementation
    return GROUPED if own == "sdpa" and getattr(model, "_supports_attention_backend", False) else own


@contextmanager
def attending(config: PreTrainedConfig, attention: str, segments: Sequence[Segment] = ()) -> Iterator[None]:
    """Let the model of `config` attend by `attention` for a while, and by `segments` where it is packed."""
    own, config._attn_implementation = config._attn_implementation, attention
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)
        config._attn_implementation = own
