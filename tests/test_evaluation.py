# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tables of players, worked by hand: means, and what is said of episodes that were cut short."""

import warnings

import pytest

from trl_agents.evaluation import summarize
from trl_agents.types import ParsedAction, StopReason, Trajectory, Turn


def episode(n_steps, stop=StopReason.TERMINATED):
    """Each step has a regret of 1/2 and pays 1."""
    turn = Turn("", (), (), "", ParsedAction("red"), "red", 1.0, info={"regret": 0.5})
    return Trajectory(seed=0, turns=(turn,) * n_steps, stop=stop, reset_info={"legal_actions": ["red", "blue"]})


@pytest.mark.parametrize("stop", [StopReason.CONTEXT_FULL, StopReason.MAX_TURNS, StopReason.INVALID_ACTION])
def test_shortened_episodes_are_counted_and_told(stop):
    played = {"ucb": [episode(4)] * 4, "after": [episode(4), episode(1, stop), episode(4), episode(4)]}
    with pytest.warns(UserWarning, match="cut short: 25.0% of 'after'"):
        table = summarize(played)
    assert table["shortened"]["after"].mean == 0.25 and table["shortened"]["ucb"].mean == 0.0
    assert table["regret"]["after"].mean == (3 * 2.0 + 0.5) / 4  # not left out: the ones that went wrong would be gone
    assert table["regret"]["ucb"].mean == 2.0


@pytest.mark.parametrize("stop", [StopReason.TERMINATED, StopReason.TRUNCATED])
def test_whole_episodes_are_not(stop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = summarize({"after": [episode(4, stop), episode(3, stop)]})
    assert str(table["shortened"]["after"]) == "0.00 [0.00, 0.00]"


def test_a_table_that_is_printed_can_be_read():
    table = summarize({"after": [episode(4), episode(2)]})
    assert str({"return": table["return"]}) == "{'return': {'after': 3.00 [2.00, 4.00]}}"


def test_faults_are_left_out():
    table = summarize({"after": [episode(4), episode(2, StopReason.ENV_ERROR)]})
    assert table["return"]["after"].mean == 4 and table["shortened"]["after"].mean == 0
