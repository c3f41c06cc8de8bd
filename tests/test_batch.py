# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Trajectories -> rows -> tensors, token by token."""

import pytest
import torch

from trl_agents.batch import (
    NO_TURN,
    Row,
    pad_turn_index,
    pad_turns,
    padding_row,
    rows_of,
    steps_of,
    sum_by_episode,
)
from trl_agents.types import ParsedAction, StopReason, Trajectory, Turn


def turn(input_ids, action_ids, **kwargs):
    return Turn("", tuple(input_ids), tuple(action_ids), "", ParsedAction("a"), "a", **kwargs)


def episode(*turns, stop=StopReason.TERMINATED, final_ids=()):
    final = {"final_observation": "what follows is in no row", "final_ids": tuple(final_ids)}
    return Trajectory(seed=0, turns=turns, stop=stop, **final)


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


class TestWhatFollows:
    def test_a_conversation_goes_on(self):
        trajectory = episode(*CHAT[:2], stop=StopReason.TRUNCATED, final_ids=[7, 8])
        (row,) = rows_of(trajectory, 3, FILLER, with_final=True)
        assert row == Row([1, 2, 3], [10, 11, 4, 12, 7, 8], [0, 0, -1, 1, -1, -1], 3, bootstrap=6)
        assert list(row.turns) == [0, 1]
        (without,) = rows_of(trajectory, 3, FILLER)
        assert without == Row([1, 2, 3], [10, 11, 4, 12], [0, 0, -1, 1], 3) and without.bootstrap is None

    def test_a_window_is_rendered_anew(self):
        turns = turn([1, 2], [10, 11], appends=False), turn([1, 2, 3], [12], appends=False)
        *rows, final = rows_of(
            episode(*turns, stop=StopReason.MAX_TURNS, final_ids=[4, 5]), 2, FILLER, with_final=True
        )
        assert rows == rows_of(episode(*turns), 2, FILLER)
        assert final == Row([4, 5], [FILLER], [NO_TURN], 2, bootstrap=0)
        assert final.mask == [0] and list(final.turns) == []

    def test_logprobs_of_what_was_only_read(self):
        one = turn([1], [10], logprobs=(-1.0,))
        (row,) = rows_of(episode(one, final_ids=[7, 8]), 0, FILLER, with_final=True)
        assert row.logprobs == [-1.0, 0.0, 0.0]
        one = turn([1], [10], logprobs=(-1.0,), appends=False)
        assert [row.logprobs for row in rows_of(episode(one, final_ids=[7]), 0, FILLER, with_final=True)] == [
            [-1.0],
            [0.0],
        ]

    def test_without_anything_that_follows_nothing_changes(self):
        for trajectory in (episode(*CHAT), episode(), episode(*CHAT, stop=StopReason.ENV_ERROR, final_ids=[7])):
            assert rows_of(trajectory, 1, FILLER, with_final=True) == rows_of(trajectory, 1, FILLER)


# A conversation of two turns, truncated; a fault; windows of two turns, terminated; padding
MIXED = [
    *rows_of(episode(*CHAT[:2], final_ids=[7, 8]), 0, FILLER, with_final=True),
    padding_row(FILLER, 1),
    Row([1], [10, 11], [0, 0], 2),
    Row([2], [12, 13, 14], [1, 1, 1], 2),
    padding_row(FILLER),
]
EPISODES = torch.tensor([0, 1, 2, 2, 0])


class TestSteps:
    def test_turns(self):
        steps = steps_of(MIXED, 3, 6, by_turn=True)
        assert steps.mask.tolist() == [[True, True], [False, False], [True, True]]
        assert steps.row[steps.mask].tolist() == [0, 0, 2, 3]
        assert steps.position[steps.mask].tolist() == [0, 3, 0, 0]
        no = NO_TURN
        assert steps.index.tolist() == [
            [0, 0, no, 1, no, no],
            [no] * 6,
            [0, 0, no, no, no, no],
            [1, 1, 1, no, no, no],
            [no] * 6,
        ]
        assert steps.ends == [{0: 0, 1: 1}, {}, {0: 0, 1: 1}]
        assert steps.bootstraps == [(0, 6), None, None]

    def test_tokens(self):
        steps = steps_of(MIXED, 3, 6, by_turn=False)
        assert steps.mask.sum(1).tolist() == [3, 0, 5]
        assert steps.row[steps.mask].tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
        assert steps.position[steps.mask].tolist() == [0, 1, 3, 0, 1, 0, 1, 2]
        no = NO_TURN
        assert steps.index[[0, 2, 3]].tolist() == [
            [0, 1, no, 2, no, no],
            [0, 1, no, no, no, no],
            [2, 3, 4, no, no, no],
        ]
        assert steps.ends == [{0: 1, 1: 2}, {}, {0: 1, 1: 4}]

    def test_rewards_are_placed_on_a_turns_last_step(self):
        rewards = [[1.0, 2.0], [9.0], [3.0, 4.0]]
        assert steps_of(MIXED, 3, 6, by_turn=True).place(rewards).tolist() == [[1, 2], [0, 0], [3, 4]]
        assert steps_of(MIXED, 3, 6, by_turn=False).place(rewards).tolist() == [
            [0, 1, 2, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 3, 0, 0, 4],
        ]

    @pytest.mark.parametrize(("empty", "expected"), [(0, [1 + 2, 4]), (1, [1 + 2, 4]), (2, [1, 2 + 4])])
    def test_rewards_of_turns_without_a_token_go_to_the_step_before(self, empty, expected):
        turns = [turn([1], [] if number == empty else [10]) for number in range(3)]
        steps = steps_of(rows_of(episode(*turns), 0, FILLER), 1, 6, by_turn=True)
        assert steps.place([[1.0, 2.0, 4.0]]).tolist() == [expected]  # before the first there is none: to that one

    @pytest.mark.parametrize("by_turn", [False, True])
    def test_gather_and_scatter(self, by_turn):
        steps = steps_of(MIXED, 3, 6, by_turn)
        values = torch.arange(5 * 7.0).reshape(5, 7) + 1  # one position more than tokens
        gathered = steps.gather(values)
        assert (gathered[~steps.mask] == 0).all()
        scattered = steps.scatter(gathered, 6)
        assert scattered.shape == (5, 6)
        begins = scattered != 0
        assert begins.sum() == steps.mask.sum() and torch.equal(scattered[begins], values[:, :6][begins])
        assert torch.equal(steps.gather(scattered), gathered)
        assert gathered[0, :2].tolist() == ([1.0, 4.0] if by_turn else [1.0, 2.0])

    def test_sums_over_the_tokens_of_a_step(self):
        values = torch.arange(1, 31.0).reshape(5, 6)
        assert steps_of(MIXED, 3, 6, by_turn=True).sum_tokens(values, EPISODES).tolist() == [
            [1 + 2, 4],
            [0, 0],
            [13 + 14, 19 + 20 + 21],
        ]
        assert steps_of(MIXED, 3, 6, by_turn=False).sum_tokens(values, EPISODES).tolist() == [
            [1, 2, 4, 0, 0],
            [0, 0, 0, 0, 0],
            [13, 14, 19, 20, 21],
        ]

    def test_no_steps(self):
        for rows, n_episodes in (([padding_row(FILLER, 0), padding_row(FILLER)], 1), ([padding_row(FILLER)], 0)):
            steps = steps_of(rows, n_episodes, 2, by_turn=True)
            assert steps.mask.shape == (n_episodes, 1) and not steps.mask.any()
            assert steps.place([[1.0]] * n_episodes).tolist() == [[0.0]] * n_episodes
            assert (steps.scatter(torch.ones(n_episodes, 1), 2) == 0).all()


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
