# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A key-value cache of independent slots: every row has its own length, so episodes advance side by side."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """
    One layer's keys and values, allocated ahead: `(n_slots, n_heads, capacity, head_dim)`.

    `update` writes each row's new states at that row's own positions and returns views, so a decoding step neither
    copies nor grows anything (transformers' `DynamicCache` concatenates the whole cache at every token).
    """

    def __init__(self, owner: SlotCache):
        super().__init__()
        self.owner = owner

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
        rows, positions, columns = self.owner.rows, self.owner.positions, self.owner.columns
        index = torch.arange(self.owner.n_slots, device=positions.device) if rows is None else rows
        if rows is None:  # a contiguous block of slots from 0 on: reading is a view
            index = index[: positions.shape[0]]
        # Indexing with `(rows, :, positions)` puts the sliced head axis last: (b, n, heads, head_dim)
        self.keys[index[:, None], :, positions] = key_states.transpose(1, 2)
        self.values[index[:, None], :, positions] = value_states.transpose(1, 2)
        if rows is None:
            keys, values = self.keys[: positions.shape[0]], self.values[: positions.shape[0]]
        else:
            keys, values = self.keys[rows], self.values[rows]
        return keys[:, :, :columns], values[:, :, :columns]

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
        self.positions: torch.Tensor | None = None  # (b, n)
        self.columns = 0  # number of columns any row of the batch may attend to
        super().__init__(layers=[SlotLayer(self) for _ in range(n_layers)])

    def aim(self, rows: torch.Tensor | None, positions: torch.Tensor) -> None:
        """Point the next forward pass at `rows` (None: slots 0..b-1) and `positions` of shape `(b, n)`."""
        self.rows, self.positions = rows, positions
        self.columns = int(positions.max()) + 1
        if self.columns > self.capacity:
            self.capacity = -(-self.columns // self.GROWTH) * self.GROWTH

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copy the first `length` columns of one slot to others: a group's prompt is computed once."""
        if targets:
            for layer in self.layers:
                layer.copy(source, targets, length)
