# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Tables of players, worked by hand: means, and what is said of episodes that were cut short. By which rules players
play, and what becomes of environments that fail them.
"""

import functools
import time
import warnings

import pytest
from faulty_env import Doomed, Nonce
from scripted import Endless, Pay

from trl_agents.evaluation import play_agents, play_model
from trl_agents.tables import summarize
from trl_agents.tiny import tiny_model, tiny_tokenizer
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


def test_a_limit_that_everybody_meets_is_the_horizon():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limited = {name: [episode(4, StopReason.MAX_TURNS)] * 2 for name in ("random", "after")}
        limited["after"].append(episode(2, StopReason.ENV_ERROR))  # which no measure looks at
        assert summarize(limited)["shortened"]["after"].mean == 1.0
    limited["after"] = [episode(4, StopReason.MAX_TURNS), episode(2)]
    with pytest.warns(UserWarning, match="cut short: 100.0% of 'random', 50.0% of 'after'"):
        summarize(limited)


def test_a_table_that_is_printed_can_be_read():
    table = summarize({"after": [episode(4), episode(2)]})
    assert str({"return": table["return"]}) == "{'return': {'after': 3.00 [2.00, 4.00]}}"


def test_faults_are_left_out():
    table = summarize({"after": [episode(4), episode(2, StopReason.ENV_ERROR)]})
    assert table["return"]["after"].mean == 4 and table["shortened"]["after"].mean == 0


# -- by which rules ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Of random weights: its replies hold no action."""
    tokenizer = tiny_tokenizer(["Choose. paid 3 ACTION=a"], vocab_size=300)
    return tiny_model(tokenizer, 32, 1), tokenizer


def stops(trajectories):
    return [(trajectory.stop, len(trajectory.turns)) for trajectory in trajectories]


def texts(trajectories):
    return [turn.text for trajectory in trajectories for turn in trajectory.turns]


def test_scripted_players_are_limited():
    played = play_agents(Endless, ["random"], range(2), max_turns=7)
    assert stops(played["random"]) == [(StopReason.MAX_TURNS, 7)] * 2


@pytest.mark.parametrize(
    ("rules", "end"),
    [
        ({"max_turns": 5}, (StopReason.MAX_TURNS, 5)),
        ({"invalid_action": "end"}, (StopReason.INVALID_ACTION, 1)),
        ({"invalid_action": "retry"}, (StopReason.INVALID_ACTION, 3)),
        ({"invalid_action": "retry", "max_retries": 4}, (StopReason.INVALID_ACTION, 5)),
    ],
)
def test_models_play_by_the_rules_that_are_given(model, rules, end):
    assert stops(play_model(*model, Endless, range(2), max_new_tokens=3, **rules)) == [end] * 2


def test_an_episode_that_outgrows_its_length_is_cut(model):
    played = play_model(*model, Endless, [0], max_new_tokens=3, max_episode_length=100)
    assert played[0].stop is StopReason.CONTEXT_FULL and len(played[0].turns) > 1
    assert sum(len(turn.input_ids) + len(turn.action_ids) for turn in played[0].turns) <= 100


@pytest.mark.parametrize("truncation", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_models_sample_from_what_is_given(model, truncation):
    """From the most probable token alone, as greedy decoding does."""
    greedy = texts(play_model(*model, Pay, range(3), max_new_tokens=6, temperature=0.0, invalid_action="end"))
    free = texts(play_model(*model, Pay, range(3), max_new_tokens=6, invalid_action="end"))
    assert texts(play_model(*model, Pay, range(3), max_new_tokens=6, invalid_action="end", **truncation)) == greedy
    assert free != greedy


# -- environments that fail -------------------------------------------------------------------------------------------


class Hanging(Nonce):
    """For half a minute, by its seed: 3 in its first step, 4 in its reset."""

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        if seed == 4:
            time.sleep(30)
        return super().reset(seed=seed)

    def step(self, action):
        if self.seed == 3:
            time.sleep(30)
        return super().step(action)


@pytest.mark.parametrize(
    "waiting", [{"env_timeout": 0.1}, {"env_timeout": 0.1, "env_reset_timeout": 0.2}, {"env_reset_timeout": 0.1}]
)
def test_an_environment_that_hangs_costs_its_own_episode(model, waiting):
    """It was waited for, for ever: the models of recipes and of the command line have no trainer."""
    lost = (3, 4) if "env_timeout" in waiting else (4,)
    seeds = [2, *lost, 5]
    started = time.monotonic()
    played = play_model(*model, Hanging, seeds, max_new_tokens=3, **waiting)
    assert time.monotonic() - started < 20
    assert [one.seed for one in played if one.stop is StopReason.ENV_TIMEOUT] == list(lost)
    assert [one.seed for one in played if one.stop is StopReason.TERMINATED] == [2, 5]
    assert all("no answer to `" in one.error for one in played if one.seed in lost)


def test_an_environment_that_cannot_be_made_in_time(model):
    def make():
        time.sleep(20)
        return Pay()

    started = time.monotonic()
    with pytest.raises(ValueError, match="could not be begun"):
        play_model(*model, make, [0], env_timeout=0.1)
    assert time.monotonic() - started < 15


def test_by_default_it_is_not_waited_for_for_ever(model, monkeypatch):
    made = []

    def pool(factory, n_slots, timeout, reset_timeout, processes):
        made.append((timeout, reset_timeout, processes))
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_agents.evaluation.EnvPool", pool)
    with pytest.raises(KeyboardInterrupt):
        play_model(*model, Pay, [0])
    assert made == [(120.0, None, False)]  # a trainer's own


def test_an_environment_in_a_process_of_its_own_may_take_it_down(model, tmp_path):
    doomed = functools.partial(Doomed, str(tmp_path))
    played = play_model(*model, doomed, [12, 14], max_new_tokens=3, env_processes=True)
    assert [one.stop for one in played] == [StopReason.TERMINATED, StopReason.ENV_ERROR]
