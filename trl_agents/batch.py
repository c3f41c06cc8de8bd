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
    bootstrap: int | None = None  # where the value of what follows a truncated episode is read, before this token

    @property
    def mask(self) -> list[int]:
        """1 for the tokens the model sampled, 0 for those it read."""
        return [int(turn != NO_TURN) for turn in self.turn_index]

    @property
    def turns(self) -> range:
        """The turns this row trains."""
        present = [turn for turn in self.turn_index if turn != NO_TURN]
        return range(present[0], present[-1] + 1) if present else range(0)


def rows_of(trajectory: Trajectory, episode: int, filler_id: int, with_final: bool = False) -> list[Row]:
    """
    The training rows of one episode: one row as long as turns append, a new row wherever the prompt was rendered anew.

    An episode in which the environment failed, or in which nothing was sampled, gives one row of `filler_id` that
    weighs nothing. `with_final` adds what a truncated episode would have gone on with, for a critic to bootstrap from.
    """
    if trajectory.stop.is_fault or not trajectory.turns:
        return [padding_row(filler_id, episode)]
    with_logprobs = any(turn.logprobs is not None for turn in trajectory.turns)
    with_logprobs &= all(turn.logprobs is not None or turn.forced for turn in trajectory.turns)
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
            # Nothing sampled a forced reply, so there is nothing to correct for
            row.logprobs.extend([math.nan] * len(turn.action_ids) if turn.logprobs is None else turn.logprobs)
    rows = [row if row.completion_ids else padding_row(filler_id, episode) for row in rows]
    if with_final and trajectory.final_ids:
        final = list(trajectory.final_ids)
        if turn.appends:
            rows[-1] = _with_final(rows[-1], final)
        else:
            rows.append(Row(final, [filler_id], [NO_TURN], episode, [0.0] if with_logprobs else None, bootstrap=0))
    return rows


def _with_final(row: Row, final_ids: list[int]) -> Row:
    length = len(final_ids)
    return Row(
        row.prompt_ids,
        row.completion_ids + final_ids,
        row.turn_index + [NO_TURN] * length,
        row.episode,
        None if row.logprobs is None else row.logprobs + [0.0] * length,
        bootstrap=len(row.completion_ids) + length,
    )


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


@dataclass(frozen=True)
class Steps:
    """
    Where the steps of credit lie in a batch of rows `(B, T)`: the turns of each of `N` episodes, or their tokens.

    `row[n, k]` and `position[n, k]` say before which token the value of episode n's step k is read. `index[b, t]` is
    the step that token t of row b belongs to, [`NO_TURN`] for tokens that carry no loss.
    """

    row: torch.Tensor  # (N, K)
    position: torch.Tensor  # (N, K)
    mask: torch.Tensor  # (N, K)
    index: torch.Tensor  # (B, T)
    ends: list[dict[int, int]]  # of each episode: turn -> its last step
    bootstraps: list[tuple[int, int] | None]  # of each episode: row and position, where it was truncated

    def place(self, turn_values: Sequence[Sequence[float]]) -> torch.Tensor:
        """One number a turn -> `(N, K)`: at the turn's last step, or the one before if nothing was sampled in it."""
        placed = torch.zeros(self.mask.shape)  # (N, K)
        for number, (ends, values) in enumerate(zip(self.ends, turn_values, strict=True)):
            if not ends:
                continue
            step = 0
            for turn, value in enumerate(values):
                step = ends.get(turn, step)
                placed[number, step] += value
        return placed

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """One number a token `(B, T)` -> the one before which each step begins `(N, K)`, 0 where there is no step."""
        return torch.where(self.mask, values[self.row, self.position], 0)

    def scatter(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """The inverse of [`gather`]: `(N, K)` -> `(B, T)`, 0 where no step begins."""
        placed = values.new_zeros(len(self.index), width)  # (B, T)
        placed[self.row[self.mask], self.position[self.mask]] = values[self.mask]
        return placed

    def sum_tokens(self, values: torch.Tensor, episodes: torch.Tensor) -> torch.Tensor:
        """The sum of the tokens' numbers `(B, T)` within each step `(N, K)`; `episodes[b]` is row b's."""
        sums = values.new_zeros(self.mask.shape)  # (N, K)
        counts = self.index != NO_TURN
        rows = episodes[:, None].expand_as(self.index)
        return sums.index_put_((rows[counts], self.index[counts]), values[counts], accumulate=True)


def steps_of(rows: Sequence[Row], n_episodes: int, width: int, by_turn: bool) -> Steps:
    """The steps of `n_episodes` episodes, whose rows come in the order of their turns."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(n_episodes)]
    ends: list[dict[int, int]] = [{} for _ in range(n_episodes)]
    bootstraps: list[tuple[int, int] | None] = [None] * n_episodes
    index = torch.full((len(rows), width), NO_TURN)  # (B, T)
    for number, row in enumerate(rows):
        if row.episode < 0:
            continue
        steps, last = found[row.episode], ends[row.episode]
        numbers = []
        for position, turn in enumerate(row.turn_index):
            if turn != NO_TURN and not (by_turn and turn in last):
                last[turn] = len(steps)
                steps.append((number, position))
            numbers.append(NO_TURN if turn == NO_TURN else len(steps) - 1)
        index[number, : len(numbers)] = torch.tensor(numbers)
        if row.bootstrap is not None:
            bootstraps[row.episode] = (number, row.bootstrap)
    length = max(map(len, found), default=0) or 1
    padded = torch.zeros(n_episodes, length, 2, dtype=torch.long)
    for number, steps in enumerate(found):
        if steps:
            padded[number, : len(steps)] = torch.tensor(steps)
    mask = torch.arange(length) < torch.tensor([len(steps) for steps in found], dtype=torch.long)[:, None]
    return Steps(padded[..., 0], padded[..., 1], mask, index, ends, bootstraps)


def pad_turn_index(rows: Sequence[Row], width: int) -> torch.Tensor:
    """The rows' `turn_index`, right-padded to TRL's completion width `(B, T)`."""
    index = torch.full((len(rows), width), NO_TURN)  # (B, T)
    for number, row in enumerate(rows):
        index[number, : len(row.turn_index)] = torch.tensor(row.turn_index)
    return index


def used_columns(mask: torch.Tensor) -> tuple[int, int]:
    """From which column to which a padded batch's mask `(B, S)` has a token in some row; everywhere if it has none."""
    used = mask.any(dim=0).nonzero().flatten()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, mask.shape[1])
