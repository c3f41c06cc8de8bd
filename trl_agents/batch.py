# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Trajectories -> rows -> padded tensors. The only padding code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .types import Trajectory


# Marks tokens without a turn (observations, template, padding) in `turn_index`.
NO_TURN = -1


@dataclass(frozen=True, slots=True)
class Row:
    """
    One training sequence: `prompt_ids` are only read, `completion_ids` hold sampled and read tokens.

    `turn_index[t]` is the number of the turn that sampled completion token t, [`NO_TURN`] where nothing was sampled.
    A row without any sampled token weighs nothing.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    turn_index: list[int]
    episode: int  # position of its trajectory in the rollout, -1 for a padding row
    logprobs: list[float] | None = None  # of the sampled tokens, 0 elsewhere; None if not known

    @property
    def mask(self) -> list[int]:
        """1 for the tokens the model sampled, 0 for those it read."""
        return [int(turn != NO_TURN) for turn in self.turn_index]

    @property
    def turns(self) -> range:
        """The turns this row trains."""
        present = [turn for turn in self.turn_index if turn != NO_TURN]
        return range(present[0], present[-1] + 1) if present else range(0)


def rows_of(trajectory: Trajectory, episode: int, filler_id: int) -> list[Row]:
    """
    The training rows of one episode: one row as long as turns append, a new row wherever the prompt was rendered anew.

    An episode in which the environment failed, or in which nothing was sampled, gives one row of `filler_id` that
    weighs nothing.
    """
    if trajectory.stop.is_fault or not trajectory.turns:
        return [padding_row(filler_id, episode)]
    with_logprobs = all(turn.logprobs is not None for turn in trajectory.turns)
    rows: list[Row] = []
    for number, turn in enumerate(trajectory.turns):
        if number == 0 or not turn.appends:
            row = Row(list(turn.input_ids), [], [], episode, [] if with_logprobs else None)
            rows.append(row)
        else:
            row.completion_ids.extend(turn.input_ids)
            row.turn_index.extend([NO_TURN] * len(turn.input_ids))
            if with_logprobs:
                row.logprobs.extend([0.0] * len(turn.input_ids))
        row.completion_ids.extend(turn.action_ids)
        row.turn_index.extend([number] * len(turn.action_ids))
        if with_logprobs:
            row.logprobs.extend(turn.logprobs)
    return [row if row.completion_ids else padding_row(filler_id, episode) for row in rows]


def padding_row(filler_id: int, episode: int = -1) -> Row:
    """A row that weighs nothing, so that every process makes the same forward passes."""
    return Row([filler_id], [filler_id], [NO_TURN], episode)


def sum_by_episode(rows: Sequence[Row], values: Sequence[float]) -> list[float]:
    """One number a row -> one an episode, in order. NaN counts nothing, and neither do padding rows."""
    sums = dict.fromkeys(sorted({row.episode for row in rows if row.episode >= 0}), 0.0)
    for row, value in zip(rows, values, strict=True):
        if row.episode >= 0 and not math.isnan(value):
            sums[row.episode] += value
    return list(sums.values())


def pad_turns(values: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged per-turn values -> `(N, K)` padded with zeros, and the mask `(N, K)` of the turns that exist."""
    n_turns = max((len(row) for row in values), default=0)
    padded = torch.zeros(len(values), max(n_turns, 1))  # (N, K)
    mask = torch.zeros_like(padded, dtype=torch.bool)  # (N, K)
    for index, row in enumerate(values):
        padded[index, : len(row)] = torch.as_tensor(row, dtype=padded.dtype)
        mask[index, : len(row)] = True
    return padded, mask


def pad_turn_index(rows: Sequence[Row], width: int) -> torch.Tensor:
    """The rows' `turn_index`, right-padded to TRL's completion width `(B, T)`."""
    index = torch.full((len(rows), width), NO_TURN)  # (B, T)
    for number, row in enumerate(rows):
        index[number, : len(row.turn_index)] = torch.tensor(row.turn_index)
    return index
