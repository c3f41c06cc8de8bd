# Licensed under the Apache License, Version 2.0 (see LICENSE).
import statistics

import numpy as np
import pytest

from trl_agents.agents import Agent, LinUCBAgent, RandomAgent, make_agent, play_episode
from trl_agents.envs import Bandit, ContextualBandit


# Mean regret after 50 steps on people made up apart from this code, with the same size, share of ratings and rank:
# arms -> random, best fixed arm, LinUCB on the scaled vector and on the vector as it is.
REFERENCE = {5: (113, 105, 39, 70), 10: (133, 128, 80, 103), 20: (149, 141, 102, 119)}
# Populations of that kind differ by so much among themselves (standard deviation of the regret)
SPREAD = 3.5


class FixedAgent(Agent):
    def __init__(self, action):
        self.action = action

    def act(self, observation, info):
        return self.action


def regret(env, agent, n_episodes=60):
    """Mean cumulative regret and its standard error."""
    episodes = (play_episode(env, agent, seed=seed) for seed in range(n_episodes))
    regrets = [sum(turn.info["regret"] for turn in episode.turns) for episode in episodes]
    return statistics.fmean(regrets), statistics.stdev(regrets) / n_episodes**0.5


@pytest.mark.parametrize("n_arms", REFERENCE)
def test_reference(n_arms):
    env = ContextualBandit(n_arms=n_arms, users="all")
    as_is = ContextualBandit(n_arms=n_arms, users="all", scale=False, digits=8)
    players = ((env, RandomAgent()), (env, FixedAgent(env.best_arm)), (env, LinUCBAgent()), (as_is, LinUCBAgent()))
    for (played, agent), expected in zip(players, REFERENCE[n_arms], strict=True):
        mean, error = regret(played, agent)
        assert abs(mean - expected) < 3 * (error**2 + SPREAD**2) ** 0.5, (type(agent).__name__, mean, expected)


def test_expected_random_regret():
    """Every arm is as likely for every person, so it is known without playing."""
    env = ContextualBandit(n_arms=5)
    rewards = env._rewards[env._pool]
    expected = 50 * (rewards.max(1) - rewards.mean(1)).mean()
    mean, error = regret(env, RandomAgent(), 200)
    assert abs(mean - expected) < 4 * error


def offer(agent, features, legal_actions=("a", "b", "c")):
    return agent.act("", {"features": features, "legal_actions": list(legal_actions)})


def started(alpha=0.5):
    agent = LinUCBAgent(alpha)
    agent.reset(legal_actions=["a", "b", "c"], seed=0)
    return agent


def test_scores_by_hand():
    """A = I + x x^T for x = (1, 2): A^-1 = [[5, -2], [-2, 2]] / 6, theta = 3 A^-1 x = (1/2, 1)."""
    agent = started()
    assert offer(agent, (1.0, 2.0)) == "a"  # the first of equals
    assert agent.score("a") == agent.score("b") == pytest.approx(0.5 * 5**0.5)
    agent.update("a", 3.0, {"features": (9.0, 9.0)})  # the next person's, who has nothing to do with this reward
    offer(agent, (2.0, 1.0))
    assert agent.score("a") == pytest.approx(0.5 * 2 + 1 + 0.5 * ((5 * 4 - 4 * 2 + 2) / 6) ** 0.5)
    assert agent.score("b") == pytest.approx(0.5 * 5**0.5)


def test_is_ridge_regression():
    rng = np.random.default_rng(0)
    agent, xs, rewards = started(alpha=0.0), rng.standard_normal((40, 4)), rng.standard_normal(40)
    for x, reward in zip(xs, rewards, strict=True):
        offer(agent, x)
        agent.update("b", reward, {})
    theta = np.linalg.solve(np.eye(4) + xs.T @ xs, xs.T @ rewards)
    x = rng.standard_normal(4)
    offer(agent, x)
    assert agent.score("b") == pytest.approx(theta @ x)
    assert agent.score("a") == 0


def test_the_bonus_makes_it_try():
    for alpha, expected in ((0.0, "a"), (0.5, "b")):
        agent = started(alpha)
        assert offer(agent, (1.0,)) == "a"
        agent.update("a", 0.01, {})
        assert offer(agent, (1.0,)) == expected


def test_only_legal_actions():
    agent = started()
    assert offer(agent, (1.0,), ("c",)) == "c"
    agent.update("c", -1.0, {})
    assert offer(agent, (1.0,), ("c", "d")) == "d"  # a new one


def test_learns_what_a_bandit_player_cannot():
    env = ContextualBandit(n_arms=5)
    linear, error = regret(env, make_agent("linucb", env), 30)
    blind, blind_error = regret(env, make_agent("ucb", env), 30)
    assert linear + 4 * error < blind - 4 * blind_error


def test_each_episode_starts_anew():
    env, agent = ContextualBandit(n_arms=5, horizon=20), make_agent("linucb")
    episodes = [[turn.executed for turn in play_episode(env, agent, seed=seed).turns] for seed in (1, 2, 1)]
    assert episodes[0] == episodes[2] != episodes[1]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="alpha=-1"):
        LinUCBAgent(alpha=-1)
    with pytest.raises(ValueError, match=r"info\['features'\]"):
        play_episode(Bandit(), make_agent("linucb"), seed=0)
