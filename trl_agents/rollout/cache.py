# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A key-value cache of independent slots: every row has its own length, so episodes advance side by side.

[`SlotLayer`] holds one layer's states, [`SlotCache`] all of them, [`SlotModel`] is a model that reads and writes them.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention import attending, best_attention


class SlotLayer(CacheLayerMixin):
    """
    One layer's keys and values, allocated ahead: `(n_slots, n_heads, capacity, head_dim)`.

    `update` writes each row's new states at that row's own positions and returns views, so a decoding step neither
    copies nor grows anything (transformers' `DynamicCache` concatenates the whole cache at every token).
    """

    def __init__(self, owner: SlotCache):
        super().__init__()
        self.owner = weakref.proxy(owner)  # no cycle: the memory is free as soon as the rollout is over

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        n_slots, capacity = self.owner.n_slots, self.owner.capacity
        _, n_heads, _, key_dim = key_states.shape
        self.keys = key_states.new_zeros((n_slots, n_heads, capacity, key_dim))
        self.values = value_states.new_zeros((n_slots, value_states.shape[1], capacity, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.grow()
        index, positions, columns = self.owner.index, self.owner.positions, self.owner.columns
        # Indexing with `(rows, :, positions)` puts the sliced head axis last: (b, n, heads, head_dim)
        self.keys[index, :, positions] = key_states.transpose(1, 2)
        self.values[index, :, positions] = value_states.transpose(1, 2)
        # Reading a contiguous block of slots from 0 on is a view, other rows are copied
        rows = slice(len(positions)) if self.owner.rows is None else self.owner.rows
        return self.keys[rows, :, :columns], self.values[rows, :, :columns]

    def grow(self) -> None:
        missing = self.owner.capacity - self.keys.shape[2]
        if missing > 0:
            pad = (0, 0, 0, missing)
            self.keys = torch.nn.functional.pad(self.keys, pad)
            self.values = torch.nn.functional.pad(self.values, pad)

    def copy(self, source: int, targets: list[int], length: int) -> None:
        self.keys[targets, :, :length] = self.keys[source, :, :length]
        self.values[targets, :, :length] = self.values[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.columns, 0

    def get_seq_length(self) -> int:
        return self.owner.columns - self.owner.positions.shape[1] if self.owner.positions is not None else 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """
    A [`~transformers.Cache`] whose rows (slots) have independent lengths.

    Before each forward pass [`SlotCache.aim`] says which slots the batch rows are and at which positions their new
    tokens stand. Columns beyond a row's position may hold anything: the mask `column <= position` hides them and the
    row's next tokens overwrite them. So dropping a suffix, or a whole episode, is free.

    Args:
        n_slots (`int`):
            Number of rows.
        n_layers (`int`):
            Number of the model's layers.
    """

    # Growing in steps keeps reallocations rare without holding twice what is needed.
    GROWTH = 256

    def __init__(self, n_slots: int, n_layers: int):
        self.n_slots = n_slots
        self.capacity = self.GROWTH
        self.rows: torch.Tensor | None = None  # (b,) slots of the batch rows; None: slots 0..b-1
        self.index: torch.Tensor | None = None  # (b, 1), the same slots, to write with
        self.positions: torch.Tensor | None = None  # (b, n)
        self.columns = 0  # number of columns any row of the batch may attend to
        super().__init__(layers=[SlotLayer(self) for _ in range(n_layers)])

    def aim(self, rows: torch.Tensor | None, positions: torch.Tensor, columns: int) -> None:
        """
        Point the next forward pass at `rows` (None: slots 0..b-1) and `positions` of shape `(b, n)`, all of them below
        `columns`.
        """
        self.rows, self.positions, self.columns = rows, positions, columns
        self.index = (torch.arange(len(positions), device=positions.device) if rows is None else rows)[:, None]
        if columns > self.capacity:
            self.capacity = -(-columns // self.GROWTH) * self.GROWTH

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copy the first `length` columns of one slot to others: a group's prompt is computed once."""
        if targets:
            for layer in self.layers:
                layer.copy(source, targets, length)


class SlotModel:
    """
    A causal language model whose batch rows are slots of a [`SlotCache`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model that [`SlotModel.unsupported`] has no objection to.
        n_slots (`int`):
            Number of slots.
    """

    def __init__(self, model: PreTrainedModel, n_slots: int):
        self.model = model
        self.config = model.config.get_text_config()
        self.device = model.device
        self.cache = SlotCache(n_slots, self.config.num_hidden_layers)
        self.attention = best_attention(model)
        self.window = getattr(self.config, "sliding_window", None)
        self.layer_types = set(getattr(self.config, "layer_types", None) or [])
        if not self.layer_types and not _makes_sliding_masks(model):
            self.window = None  # an entry of the configuration that the model's code does not read

    @staticmethod
    def unsupported(model: PreTrainedModel) -> str | None:
        """Why this model cannot decode in slots, or None. The answer costs a few short forward passes, once."""
        config = model.config.get_text_config()
        attention = config._attn_implementation
        if attention not in ("sdpa", "eager"):
            return f"its attention is {attention!r}, which takes no per-row mask"
        other = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if "local" in (getattr(config, "attention_layers", None) or []):
            other.add("local attention of its own")
        if other or getattr(model, "_is_stateful", False):
            return f"it has layers without a plain key-value cache ({', '.join(sorted(other)) or 'stateful'})"
        known = _VERIFIED.get(model)
        if known is None or known[0] != attention:
            known = _VERIFIED[model] = (attention, _disagreement(model))
        return known[1]

    @torch.no_grad()
    def read(self, rows: list[int] | None, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """
        Feed each of `rows` (None: slots 0..b-1) its `tokens` from column `starts` on. Returns the logits `(b, V)`
        after each row's last token.
        """
        lengths = [len(row) for row in tokens]
        width = max(lengths)
        # Padding is on the left, so that the last logits are those of the last token, but it is written behind the
        # row's end, where the row's next tokens overwrite it
        padded = torch.tensor([[*[0] * (width - len(row)), *row] for row in tokens], device=self.device)  # (b, n)
        offsets = torch.tensor(lengths, device=self.device)[:, None] + torch.arange(width, device=self.device)
        columns = torch.tensor(starts, device=self.device)[:, None] + offsets % width  # (b, n)
        # To the model it stands at the last token's position: it may not run past a table of learnt positions, nor
        # change rotary embeddings that depend on the largest position
        ends = torch.tensor([start + length - 1 for start, length in zip(starts, lengths, strict=True)])
        slots = None if rows is None else torch.tensor(rows, device=self.device)
        self.cache.aim(slots, columns, max(starts) + width)
        with attending(self.config, self.attention):
            output = self.model(
                input_ids=padded,
                position_ids=columns.minimum(ends.to(self.device)[:, None]),
                attention_mask=self._mask(columns),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]

    def _mask(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        columns = torch.arange(self.cache.columns, device=self.device)
        causal = (columns <= positions[..., None])[:, None]  # (b, 1, n, columns)
        if self.window is None or self.layer_types == {"full_attention"}:
            return self._as_attention_mask(causal)
        recent = causal & (columns > positions[..., None] - self.window)[:, None]
        if not self.layer_types:
            return self._as_attention_mask(recent)
        masks = {"full_attention": causal, "sliding_attention": recent}
        return {name: self._as_attention_mask(mask) for name, mask in masks.items()}

    def _as_attention_mask(self, allowed: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation != "eager":
            return allowed
        dtype = self.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=self.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


# Answers of `_disagreement`, each with the attention it was found with.
_VERIFIED: weakref.WeakKeyDictionary[Any, tuple[str, str | None]] = weakref.WeakKeyDictionary()


def _makes_sliding_masks(model: torch.nn.Module) -> bool:
    """Whether the code of some part of the model makes masks with a sliding window."""
    modules = {type(part).__module__ for part in model.modules()}
    return any(hasattr(sys.modules.get(name), "create_sliding_window_causal_mask") for name in modules)


@torch.no_grad()
def _disagreement(model: PreTrainedModel) -> str | None:
    """
    Why this model's own forward passes say something else than [`SlotModel`], or None.

    Architectures may take positions and masks for themselves (ALiBi, prompt tuning, code from the Hub), and the wrong
    distribution would be sampled without a sign. So a few rows are read in ragged blocks and compared.
    """
    luck = random.Random(0)
    vocab_size = min(model.config.get_text_config().vocab_size, 256)  # ids of images and the like come late
    rows = [[luck.randrange(vocab_size) for _ in range(length)] for length in (6, 8, 12)]
    cuts = [(0, 0, 0), (2, 4, 8), (5, 7, 11), (6, 8, 12)]  # ragged, side by side at different positions, a token each
    training = model.training
    model.eval()
    try:
        slots, errors = SlotModel(model, len(rows)), []
        for number, (starts, ends) in enumerate(zip(cuts, cuts[1:], strict=False)):
            tokens = [row[start:end] for row, start, end in zip(rows, starts, ends, strict=True)]
            logits = slots.read([0, 1, 2] if number == 0 else None, tokens, starts)
            for row, end, found in zip(rows, ends, logits, strict=True):
                if number > 0:
                    ids = torch.tensor([row[:end]], device=slots.device)
                    expected = model(input_ids=ids, use_cache=False).logits[0, -1].float()
                    errors.append((found.float() - expected).norm() / (expected - expected.mean()).norm())
        # Rounding is far below, and what is wrong with positions or masks far above
        tolerance = 5e-3 if slots.cache.layers[0].keys.dtype in (torch.float32, torch.float64) else 0.1
        # The median: in half precision a token of a mixture may meet another expert. Most rows are not the longest,
        # which is right by chance where positions are counted from the length of the cache.
        error = torch.stack(errors).median().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as exception:
        return f"it takes no positions, masks and cache of the usual form ({type(exception).__name__}: {exception})"
    finally:
        model.train(training)
    return None if error < tolerance else f"with a cache of slots its logits are off by {error:.0%}"
