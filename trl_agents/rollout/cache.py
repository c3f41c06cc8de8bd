# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A key-value cache of independent slots: every row has its own length, so episodes advance side by side.

[`SlotLayer`] holds one layer's states, [`SlotCache`] all of them.
"""

from __future__ import annotations

import inspect
import weakref

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's `forward` calls its cache. transformers renamed it, code from the Hub may not have."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


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
        if positions.dim() == 1:  # packed: attention picks from the whole what it looks at
            self.keys[index, :, positions] = key_states[0].transpose(0, 1)
            self.values[index, :, positions] = value_states[0].transpose(0, 1)
            return self.keys, self.values
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
        return max(self.owner.columns - self.owner.positions.shape[-1], 0) if self.owner.positions is not None else 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """
    A [`~transformers.Cache`] whose rows (slots) have independent lengths.

    Before each forward pass [`SlotCache.aim`] says which slots the batch rows are and at which positions their new
    tokens stand, or [`SlotCache.aim_packed`] says it token by token. Columns beyond a row's position may hold
    anything: the mask `column <= position` hides them and the row's next tokens overwrite them. So dropping a suffix,
    or a whole episode, is free.

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
        self.index: torch.Tensor | None = None  # (b, 1), the same slots, to write with; packed: (tokens,)
        self.positions: torch.Tensor | None = None  # (b, n); packed: (tokens,)
        self.columns = 0  # number of columns any row of the batch may attend to
        super().__init__(layers=[SlotLayer(self) for _ in range(n_layers)])

    def aim(self, rows: torch.Tensor | None, positions: torch.Tensor, columns: int) -> None:
        """
        Point the next forward pass at `rows` (None: slots 0..b-1) and `positions` of shape `(b, n)`, all of them below
        `columns`.
        """
        index = (torch.arange(len(positions), device=positions.device) if rows is None else rows)[:, None]
        self._aim(rows, index, positions, columns)

    def aim_packed(self, index: torch.Tensor, positions: torch.Tensor, columns: int) -> None:
        """Point the next pass, of one row, at the slot and the column (below `columns`) of each of its tokens."""
        self._aim(None, index, positions, columns)

    def _aim(self, rows: torch.Tensor | None, index: torch.Tensor, positions: torch.Tensor, columns: int) -> None:
        self.rows, self.index, self.positions, self.columns = rows, index, positions, columns
        if columns > self.capacity:
            self.capacity = -(-columns // self.GROWTH) * self.GROWTH

    @property
    def column_bytes(self) -> int:
        """Size of one slot's keys and values in one column of one layer; 0 before anything was written."""
        keys, values = getattr(self.layers[0], "keys", None), getattr(self.layers[0], "values", None)
        return 0 if keys is None else keys[0, :, 0].nbytes + values[0, :, 0].nbytes

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copy the first `length` columns of one slot to others: a group's prompt is computed once."""
        if targets:
            for layer in self.layers:
                layer.copy(source, targets, length)
