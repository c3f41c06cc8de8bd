# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Greediness: episodes worked by hand, and players whose figures follow from what they do."""

import functools

import numpy as np
import pytest

from trl_agents import make_env
from trl_agents.agents import GreedyAgent, RandomAgent, play_episode
from trl_agents.diagnostics.greediness import (
    best_of,
    chosen_coverage,
    coverage_by_step,
    greediness,
    greedy_fraction,
    min_fraction,
    optimal_share,
    suffix_failure,
)
from trl_agents.evaluation import held_out_seeds, play_agents
from trl_agents.types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn


BANDIT = "trl_agents/Bandit-v0"


def episode(played, rewards=None, best=None, legal="abc", invalid=(), stop=StopReason.TERMINATED):
    """`episode("aab", [1, 0, 2], best="b")`: a letter a step; replies at the places `invalid` stated nothing."""
    legal = list(legal)
    turns = []
    for place, action in enumerate(played):
        parsed = ParsedAction(None, InvalidReason.NO_MATCH) if place in invalid else ParsedAction(action)
        info = {"legal_actions": legal} | ({} if best is None else {"optimal": action == best, "regret": 0.5})
        turns.append(Turn("", (), (), "", parsed, action, float(rewards[place]) if rewards else 0.0, info=info))
    return Trajectory(seed=0, turns=tuple(turns), stop=stop, reset_info={"legal_actions": legal})


def test_coverage_by_hand():
    assert coverage_by_step(episode("aabac", legal="abcd")) == [0.25, 0.25, 0.5, 0.5, 0.75]


def test_an_action_played_for_an_invalid_reply_is_covered_and_not_chosen():
    played = episode("abc", invalid=[1, 2])
    assert coverage_by_step(played)[-1] == 1.0
    assert chosen_coverage(played) == pytest.approx(1 / 3)


def test_min_fraction_by_hand():
    assert min_fraction(episode("aabbcc")) == 1.0
    assert min_fraction(episode("aaaabc")) == pytest.approx(3 * 1 / 6)
    assert min_fraction(episode("aabb")) == 0.0


def test_suffix_failure_by_hand():
    assert suffix_failure(episode("bbaaaa", best="b")) == 1.0  # played, but never from step T/2 on
    assert suffix_failure(episode("aaabaa", best="b")) == 0.0  # at step T/2
    assert suffix_failure(episode("aabaaa", best="b")) == 1.0  # one before it
    assert suffix_failure(episode("aaaaaab", best="b")) == 0.0
    assert suffix_failure(episode("ab")) is None  # nobody tells which is best


def test_greedy_fraction_by_hand():
    # first step left out; b (0.0 < 1.0): not; a: yes; c untried: not; c (3.0): yes
    assert greedy_fraction(episode("abacc", [1, 0, 1, 3, 3])) == 2 / 4
    # after "ab" both have a mean of 1: either is greedy
    assert greedy_fraction(episode("aba", [1, 1, 1])) == 1 / 2
    assert greedy_fraction(episode("abb", [1, 1, 1])) == 1 / 2
    assert greedy_fraction(episode("a")) is None


def test_optimal_share_by_hand():
    assert optimal_share(episode("abbb", best="b")) == 0.75
    assert optimal_share(episode("abbb")) is None


def test_best_of():
    inf = float("inf")
    assert best_of({"a": 1.0, "b": inf, "c": inf}) == {"b", "c"}  # not "a": nothing is close to infinity
    assert best_of({"a": 0.1 + 0.2, "b": 0.3}) == {"a", "b"}
    assert best_of({"a": float("nan"), "b": -inf}) == {"b"}
    assert best_of({"a": float("nan")}) == best_of({}) == set()


@pytest.mark.parametrize("n_arms", [5, 10])
def test_random_player_covers_as_chance_has_it(n_arms):
    """1 - (1 - 1/K)^t of the actions after t steps (65% of 10 arms after 10 steps)."""
    played = play_agents(BANDIT, {"random": RandomAgent()}, range(400), env_kwargs={"n_arms": n_arms, "horizon": 15})
    curve = np.array(greediness(played)["coverage_by_step"]["random"]["mean"])
    expected = 1 - (1 - 1 / n_arms) ** np.arange(1, 16)
    # The standard error of 400 episodes is at most .5/sqrt(400 K), rather less
    assert np.abs(curve - expected).max() < 4 * 0.5 / (400 * n_arms) ** 0.5
    assert curve[0] == pytest.approx(1 / n_arms)


def test_try_all_covers_everything_at_step_k():
    played = play_agents(BANDIT, {"greedy": GreedyAgent()}, range(5), env_kwargs={"n_arms": 7, "horizon": 10})
    result = greediness(played)
    curve = result["coverage_by_step"]["greedy"]
    assert curve["mean"][:7] == pytest.approx([step / 7 for step in range(1, 8)])
    assert curve["mean"][6:] == curve["low"][6:] == curve["high"][6:] == [1.0] * 4
    # Six steps more to try the rest, at which the best so far is not played; greedy ever after
    assert result["measures"]["greedy_fraction"]["greedy"]["mean"] == pytest.approx(3 / 9)


def test_table_beside_other_players():
    names, seeds = ["random", "ucb"], held_out_seeds(8)
    result = greediness(play_agents(BANDIT, names, seeds))
    assert result["n_episodes"] == 8
    for row in result["measures"].values():
        assert list(row) == names and all(one["low"] <= one["mean"] <= one["high"] for one in row.values())
    regret = np.mean(
        [sum(turn.info["regret"] for turn in t.turns) for t in play_agents(BANDIT, ["ucb"], seeds)["ucb"]]
    )
    assert result["measures"]["regret"]["ucb"]["mean"] == pytest.approx(regret)
    assert result["measures"]["invalid_rate"]["ucb"]["mean"] == 0.0


def test_faults_are_left_out_and_short_episodes_count_where_they_were():
    episodes = [episode("ab", legal="ab"), episode("a", legal="ab"), episode("", stop=StopReason.ENV_ERROR)]
    result = greediness({"me": episodes})
    assert result["n_episodes"] == 2
    assert result["coverage_by_step"]["me"]["mean"] == [0.5, 1.0]  # the second step was reached by one


def test_where_actions_change_there_is_no_coverage():
    env = make_env("trl_agents/TicTacToe-v0")
    played = [play_episode(env, RandomAgent(), seed=seed) for seed in range(4)]
    env.close()
    result = greediness({"random": played})
    assert "coverage" not in result["measures"] and result["coverage_by_step"] == {}
    assert "return" in result["measures"] and result["measures"]["invalid_rate"]["random"]["mean"] == 0


def test_any_environment_that_tells_its_actions():
    class Levers:
        instructions = "Pull a lever."

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            return "", {"legal_actions": ["x", "y"]}

        def step(self, action):
            self.steps += 1
            return "done", 1.0, self.steps == 4, False, {"legal_actions": ["x", "y"]}

        def close(self):
            pass

    measures = greediness(play_agents(functools.partial(Levers), ["random"], range(3)))["measures"]
    assert set(measures) == {
        *("coverage", "chosen_coverage", "min_fraction", "greedy_fraction", "return", "invalid_rate", "shortened")
    }
    assert measures["greedy_fraction"]["random"]["mean"] > 0
