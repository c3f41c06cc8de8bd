# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Trajectories -> rows -> tensors, token by token."""

import pytest
import torch

from trl_agents.batch import NO_TURN, Row, pad_turn_index, pad_turns, padding_row, rows_of, sum_by_episode
from trl_agents.types import ParsedAction, StopReason, Trajectory, Turn


def turn(input_ids, action_ids, **kwargs):
    return Turn("", tuple(input_ids), tuple(action_ids), "", ParsedAction("a"), "a", **kwargs)


def episode(*turns, stop=StopReason.TERMINATED):
    return Trajectory(seed=0, turns=turns, stop=stop, final_observation="what follows is in no row")


CHAT = (turn([1, 2, 3], [10, 11]), turn([4], [12]), turn([5, 6], [13, 14, 15]))
FILLER = 99


class TestConversations:
    def test_one_row_holds_all_turns(self):
        (row,) = rows_of(episode(*CHAT), 4, FILLER)
        assert row.prompt_ids == [1, 2, 3]
        assert row.completion_ids == [10, 11, 4, 12, 5, 6, 13, 14, 15]
        assert row.turn_index == [0, 0, -1, 1, -1, -1, 2, 2, 2]
        assert row.mask == [1, 1, 0, 1, 0, 0, 1, 1, 1]
        assert list(row.turns) == [0, 1, 2]
        assert row.episode == 4
        assert row.logprobs is None

    @pytest.mark.parametrize("stop", [stop for stop in StopReason if not stop.is_fault])
    def test_whatever_ended_it(self, stop):
        assert rows_of(episode(*CHAT, stop=stop), 0, FILLER) == rows_of(episode(*CHAT), 0, FILLER)

    def test_logprobs_stand_beside_their_tokens(self):
        turns = turn([1], [10, 11], logprobs=(-1.0, -2.0)), turn([4, 5], [12], logprobs=(-3.0,))
        (row,) = rows_of(episode(*turns), 0, FILLER)
        assert row.logprobs == [-1.0, -2.0, 0.0, 0.0, -3.0]

    @pytest.mark.parametrize("known", [0, 1])
    def test_logprobs_of_some_turns_are_of_no_use(self, known):
        turns = [turn([1], [10]), turn([4], [12])]
        turns[known] = turn([1], [10], logprobs=(-1.0,))
        (row,) = rows_of(episode(*turns), 0, FILLER)
        assert row.logprobs is None

    def test_a_turn_in_which_nothing_was_sampled(self):
        (row,) = rows_of(episode(turn([1], []), turn([2], [10]), turn([3], [])), 0, FILLER)
        assert (row.prompt_ids, row.completion_ids, row.turn_index) == ([1], [2, 10, 3], [-1, 1, -1])
        assert list(row.turns) == [1]

    def test_what_is_returned_is_its_own(self):
        trajectory = episode(*CHAT)
        rows_of(trajectory, 0, FILLER)[0].completion_ids.append(0)
        assert rows_of(trajectory, 0, FILLER)[0].completion_ids[-1] == 15


class TestWindows:
    def test_one_row_a_turn(self):
        turns = turn([1, 2], [10, 11], appends=False), turn([1, 2, 3], [12], appends=False, logprobs=None)
        first, second = rows_of(episode(*turns), 2, FILLER)
        assert first == Row([1, 2], [10, 11], [0, 0], 2)
        assert second == Row([1, 2, 3], [12], [1], 2)
        assert (list(first.turns), list(second.turns)) == ([0], [1])
        assert second.mask == [1]

    def test_logprobs(self):
        turns = [turn([1], [10, 11], appends=False, logprobs=(-1.0, -2.0))] * 2
        assert [row.logprobs for row in rows_of(episode(*turns), 0, FILLER)] == [[-1.0, -2.0], [-1.0, -2.0]]

    def test_a_turn_in_which_nothing_was_sampled(self):
        first, second = rows_of(episode(turn([1], [], appends=False), turn([2], [10], appends=False)), 3, FILLER)
        assert first == padding_row(FILLER, 3)
        assert second == Row([2], [10], [1], 3)

    def test_a_new_window_in_the_middle(self):
        turns = turn([1], [10]), turn([2], [11]), turn([3, 4], [12], appends=False), turn([5], [13])
        assert rows_of(episode(*turns), 0, FILLER) == [
            Row([1], [10, 2, 11], [0, NO_TURN, 1], 0),
            Row([3, 4], [12, 5, 13], [2, NO_TURN, 3], 0),
        ]


class TestRowsThatWeighNothing:
    @pytest.mark.parametrize(
        "trajectory",
        [
            episode(*CHAT, stop=StopReason.ENV_ERROR),
            episode(*CHAT, stop=StopReason.ENV_TIMEOUT),
            episode(stop=StopReason.CONTEXT_FULL),
            episode(),
        ],
        ids=["error", "timeout", "full", "empty"],
    )
    def test_episodes_without_anything_to_learn(self, trajectory):
        assert rows_of(trajectory, 5, FILLER) == [padding_row(FILLER, 5)]

    def test_padding(self):
        row = padding_row(FILLER)
        assert row == Row([FILLER], [FILLER], [NO_TURN], -1)
        assert row.mask == [0] and list(row.turns) == []


class TestTensors:
    def test_pad_turns(self):
        values, mask = pad_turns([[1.0, -2.0, 3.0], [], [4.5]])
        assert values.dtype == torch.float32 and mask.dtype == torch.bool
        assert values.tolist() == [[1.0, -2.0, 3.0], [0.0, 0.0, 0.0], [4.5, 0.0, 0.0]]
        assert mask.tolist() == [[True, True, True], [False, False, False], [True, False, False]]

    @pytest.mark.parametrize(("values", "shape"), [([], (0, 1)), ([[], []], (2, 1))])
    def test_pad_no_turns(self, values, shape):
        padded, mask = pad_turns(values)
        assert padded.shape == mask.shape == shape and not mask.any()

    def test_pad_turn_index(self):
        rows = [*rows_of(episode(*CHAT), 0, FILLER), padding_row(FILLER), Row([1], [7, 8], [3, 3], 1)]
        index = pad_turn_index(rows, 11)
        assert index.dtype == torch.long
        assert index.tolist() == [
            [0, 0, -1, 1, -1, -1, 2, 2, 2, -1, -1],
            [-1] * 11,
            [3, 3, *[-1] * 9],
        ]

    def test_a_row_that_does_not_fit_is_an_error(self):
        with pytest.raises(RuntimeError):
            pad_turn_index(rows_of(episode(*CHAT), 0, FILLER), 8)


def test_sum_by_episode():
    rows = [Row([1], [2], [0], number) for number in (0, 0, 1, 3)] + [padding_row(FILLER)]
    assert sum_by_episode(rows, [1.0, 2.0, float("nan"), 4.0, 100.0]) == [3.0, 0.0, 4.0]
