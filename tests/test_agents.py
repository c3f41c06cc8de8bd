# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math
import re
import statistics

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

from trl_agents.agents import (
    AGENTS,
    BanditAgent,
    GreedyAgent,
    MinimaxAgent,
    RandomAgent,
    ThompsonAgent,
    UCBAgent,
    make_agent,
    play_episode,
)
from trl_agents.envs import Bandit, TicTacToe
from trl_agents.types import StopReason


N_INSTANCES = 500
BONUSES = ("sqrt_n", "half_ln", "ucb1")

# Mean cumulative regret after 50 steps over 20,000 instances, computed apart from this code and rounded to 0.1:
# (means, noise, arms) -> greedy, then UCB with each of `BONUSES`.
REFERENCE = {
    ("uniform", "low", 10): (4.6, 9.3, 11.7, 15.6),
    ("uniform", "medium", 5): (8.9, 8.7, 9.1, 10.9),
    ("normal", "medium", 5): (12.5, 11.6, 11.9, 15.8),
}
PLAYERS = (GreedyAgent(), *(UCBAgent(bonus) for bonus in BONUSES))
CELLS = [(*cell, *pair) for cell, row in REFERENCE.items() for pair in zip(PLAYERS, row, strict=True)]

# Mean of the greatest of K standard normals (order statistics tables).
MAX_OF_NORMALS = {5: 1.16296, 10: 1.53875, 20: 1.86748}


def regret(env, agent, n_instances=N_INSTANCES):
    """Mean cumulative regret and its standard error."""
    episodes = (play_episode(env, agent, seed=seed) for seed in range(n_instances))
    regrets = [sum(turn.info["regret"] for turn in episode.turns) for episode in episodes]
    return statistics.fmean(regrets), statistics.stdev(regrets) / n_instances**0.5


def after(agent, history, legal_actions=("a", "b", "c")):
    """The agent, having played `history`: pairs of action and reward."""
    agent.reset(legal_actions=list(legal_actions), seed=0)
    for action, reward in history:
        agent.update(action, reward, {})
    return agent


class Shrinking:
    """Each action is legal once, as in a board game."""

    instructions = "Take what is left."

    def reset(self, *, seed=None, options=None):
        self.left = ["a", "b", "c", "d"]
        return "", {"legal_actions": list(self.left)}

    def step(self, action):
        self.left.remove(action)
        return "", 1.0, not self.left, False, {"legal_actions": list(self.left)}


class Secretive(dict):
    """An `info` from which only what a player may know can be read."""

    def __getitem__(self, key):
        assert key == "legal_actions"
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default


class SecretiveBandit(Bandit):
    def _info(self, **of_step):
        return Secretive(super()._info(**of_step))


class TestRegret:
    @pytest.mark.parametrize("n_arms", [5, 20])
    @pytest.mark.parametrize("distribution", ["gaussian", "bernoulli"])
    def test_random_on_uniform_means(self, n_arms, distribution):
        mean, error = regret(Bandit(n_arms=n_arms, distribution=distribution), RandomAgent())
        assert abs(mean - 50 * (n_arms / (n_arms + 1) - 1 / 2)) < 4 * error

    @pytest.mark.parametrize(("n_arms", "noise", "sigma"), [(5, "low", 0.1), (10, "medium", 1), (20, "high", 3)])
    def test_random_on_normal_means(self, n_arms, noise, sigma):
        mean, error = regret(Bandit(n_arms=n_arms, means="normal", noise=noise), RandomAgent())
        assert abs(mean - 50 * sigma * MAX_OF_NORMALS[n_arms]) < 4 * error

    @pytest.mark.parametrize(("means", "noise", "n_arms", "agent", "expected"), CELLS)
    def test_reference(self, means, noise, n_arms, agent, expected):
        mean, error = regret(Bandit(n_arms=n_arms, means=means, noise=noise), agent)
        assert abs(mean - expected) < 4 * error + 0.05

    @pytest.mark.parametrize(
        "kwargs", [{"distribution": "bernoulli"}, {"noise": "low"}, {"means": "normal", "noise": 0.1}]
    )
    def test_thompson_beats_ucb1(self, kwargs):
        env = Bandit(**kwargs)
        thompson, error = regret(env, make_agent("thompson", env), 200)
        ucb, ucb_error = regret(env, make_agent("ucb", env), 200)
        assert thompson + 4 * error < ucb - 4 * ucb_error


class TestRules:
    @pytest.mark.parametrize("agent", PLAYERS, ids=lambda agent: getattr(agent, "bonus", "greedy"))
    def test_every_action_once_in_order(self, agent):
        after(agent, [])
        for action, reward in zip("abc", [-5.0, 0.0, 5.0], strict=True):
            assert agent.act("", {}) == action
            agent.update(action, reward, {})
        assert agent.act("", {}) == "c"

    @pytest.mark.parametrize("agent", PLAYERS, ids=lambda agent: getattr(agent, "bonus", "greedy"))
    def test_first_of_equals(self, agent):
        assert after(agent, [("c", 1.0), ("a", 0.0), ("b", 1.0)]).act("", {}) == "b"

    def test_greedy_forgets_how_often(self):
        history = [("a", 1.0), ("a", 0.0), ("a", 0.9), ("b", 0.6), ("c", 0.0)]
        assert after(GreedyAgent(), history).act("", {}) == "a"  # mean 0.633, not the sum or the last

    @pytest.mark.parametrize(
        ("bonus", "expected"),
        [
            ("ucb1", 0.5 + math.sqrt(2 * math.log(7) / 4)),
            ("sqrt_n", 0.5 + math.sqrt(1 / 4)),
            ("half_ln", 0.5 + math.sqrt(0.5 * math.log(7) / 4)),
        ],
    )
    def test_ucb_bonus(self, bonus, expected):
        agent = after(UCBAgent(bonus), [("a", 0.5)] * 4 + [("b", 1.0)] * 2 + [("c", 0.0)])
        assert agent.score("a") == pytest.approx(expected)

    def test_thompson_beta_posterior(self):
        agent = after(ThompsonAgent(), [("a", 1.0)], legal_actions=["a", "b"])
        assert_share(agent, "a", 2 / 3)  # P(Beta(2, 1) > Beta(1, 1))
        agent = after(ThompsonAgent(), [("a", 0.0), ("a", 0.0)], legal_actions=["a", "b"])
        assert_share(agent, "a", 1 / 4)  # P(Beta(1, 3) > Beta(1, 1))

    def test_thompson_gaussian_posterior(self):
        # By hand: precision 1/4 + 2/0.25 = 8.25, mean (1/4 + 3/0.25) / 8.25, against the prior N(1, 4).
        agent = ThompsonAgent("gaussian", sigma=0.5, prior_mean=1.0, prior_std=2.0)
        after(agent, [("a", 1.0), ("a", 2.0)], legal_actions=["a", "b"])
        mean, variance = 12.25 / 8.25, 1 / 8.25
        draws = [agent.score("a") for _ in range(4000)]
        assert statistics.fmean(draws) == pytest.approx(mean, abs=4 * (variance / 4000) ** 0.5)
        assert statistics.stdev(draws) == pytest.approx(variance**0.5, rel=4 / 8000**0.5)
        assert_share(agent, "a", statistics.NormalDist().cdf((mean - 1) / math.sqrt(variance + 4)))

    def test_random_is_uniform(self):
        agent = after(RandomAgent(), [("a", 100.0)])
        for action in "abc":
            assert_share(agent, action, 1 / 3)


class TestShortSightedGreed:
    """What is untried is worth nothing: the failure that language models show."""

    def test_never_leaves_what_brought_something(self):
        agent = after(GreedyAgent(untried=0.0), [("b", 1.0), ("b", 0.0), ("b", 0.0)])
        assert {agent.act("", {}) for _ in range(50)} == {"b"}

    def test_draws_among_equals_while_nothing_has(self):
        agent = after(GreedyAgent(untried=0.0), [("b", 0.0)])
        assert {agent.act("", {}) for _ in range(100)} == {"a", "b", "c"}

    def test_keeps_the_first_that_pays(self):
        """Where every arm pays, the first that is drawn is kept."""
        env = Bandit(n_arms=5, horizon=20, distribution="bernoulli", means=[1.0] * 5)
        episodes = [play_episode(env, GreedyAgent(untried=0.0), seed=seed) for seed in range(20)]
        assert all(len({turn.executed for turn in episode.turns}) == 1 for episode in episodes)
        assert len({episode.turns[0].executed for episode in episodes}) == 5

    def test_epsilon(self):
        assert_share(after(GreedyAgent(untried=0.0, epsilon=0.3), [("b", 1.0)]), "b", 0.7 + 0.3 / 3)
        with pytest.raises(ValueError, match="epsilon=2"):
            GreedyAgent(epsilon=2)


def assert_share(agent, action, expected, n=4000):
    share = sum(agent.act("", {}) == action for _ in range(n)) / n
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))


@pytest.mark.parametrize("name", [name for name in AGENTS if name not in ("linucb", "minimax")])
class TestEveryBanditAgent:
    def test_plays_what_is_legal_now(self, name):
        episode = play_episode(Shrinking(), make_agent(name), seed=0)
        assert sorted(turn.executed for turn in episode.turns) == ["a", "b", "c", "d"]

    def test_reads_no_secrets(self, name):
        env = SecretiveBandit(distribution="bernoulli")
        assert play_episode(env, make_agent(name, env), seed=0).steps == 50

    def test_same_seed_same_episode(self, name):
        env = Bandit(means="normal")
        agent = make_agent(name, env)
        episodes = [[turn.executed for turn in play_episode(env, agent, seed=seed).turns] for seed in (1, 2, 1)]
        assert episodes[0] == episodes[2] != episodes[1]

    def test_meets_the_luck_of_all(self, name):
        env = Bandit(n_arms=2, means=(0.4, 0.6))
        lucky = {label: [env.reset(seed=9)] and [env.step(label)[1] for _ in range(50)] for label in env.labels}
        turns = play_episode(env, make_agent(name, env), seed=9).turns
        assert [turn.reward for turn in turns] == [lucky[turn.executed][step] for step, turn in enumerate(turns)]


@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("seat", ["first", "second"])
def test_minimax_never_loses(seat, fastest):
    for opponent, returns in (("random", {0.0, 1.0}), ("optimal", {0.0})):
        env = TicTacToe(opponent=opponent, seat=seat)
        assert {play_episode(env, MinimaxAgent(fastest), seed=seed).return_ for seed in range(40)} <= returns


def test_the_repeating_random_player_repeats():
    env = Bandit(horizon=50)
    agent, repeats = RandomAgent(repeat=0.5), 0
    for seed in range(100):
        played = [turn.executed for turn in play_episode(env, agent, seed=seed).turns]
        repeats += sum(a == b for a, b in zip(played, played[1:], strict=False))
    share = 0.5 + 0.5 / 5  # it also draws the same arm anew
    assert repeats / 4900 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4900))
    with pytest.raises(ValueError, match="repeat=1.5"):
        RandomAgent(repeat=1.5)


class TestPlayEpisode:
    def test_trajectory(self):
        env = Bandit(n_arms=2, horizon=3, distribution="bernoulli", means=(0, 1))
        episode = play_episode(env, GreedyAgent(), seed=4)
        assert episode.seed == 4
        assert episode.stop is StopReason.TERMINATED
        assert episode.instructions == env.instructions
        assert episode.reset_info["legal_actions"] == ["blue", "green"]
        assert [turn.observation for turn in episode.turns] == [
            "",
            "Step=0 Action=blue Reward=0",
            "Step=1 Action=green Reward=1",
        ]
        assert episode.final_observation == "Step=2 Action=green Reward=1"
        for turn, action in zip(episode.turns, ["blue", "green", "green"], strict=True):
            assert turn.text == turn.executed == turn.parsed.action == action
            assert turn.input_ids == turn.action_ids == ()
        assert [turn.info["regret"] for turn in episode.turns] == [1, 0, 0]
        assert (episode.return_, episode.steps) == (2.0, 3)

    def test_truncated(self):
        env = TimeLimit(Bandit(), max_episode_steps=4)
        episode = play_episode(env, RandomAgent(), seed=0)
        assert (episode.stop, episode.steps) == (StopReason.TRUNCATED, 4)
        assert episode.instructions == Bandit().instructions

    def test_max_turns(self):
        episode = play_episode(Bandit(), RandomAgent(), seed=0, max_turns=4)
        assert (episode.stop, episode.steps) == (StopReason.MAX_TURNS, 4)
        at_the_end = play_episode(Bandit(horizon=4), RandomAgent(), seed=0, max_turns=4)
        assert at_the_end.stop is StopReason.TERMINATED

    def test_an_episode_without_an_end_is_refused(self, monkeypatch):
        """It was waited for, without a word."""
        monkeypatch.setattr("trl_agents.agents.ENDLESS", 20)
        with pytest.raises(ValueError, match="seed 5 is still going on after 20 turns.*limit it with max_turns"):
            play_episode(Bandit(), RandomAgent(), seed=5)
        assert play_episode(Bandit(horizon=20), RandomAgent(), seed=5).steps == 20
        assert play_episode(Bandit(), RandomAgent(), seed=5, max_turns=30).steps == 30

    def test_the_player_does_not_share_the_numbers_of_the_environment(self):
        agent, env = after(RandomAgent(), []), Bandit()
        env.reset(seed=0)
        drawn = np.random.default_rng(0).random(5)
        assert not np.isclose([agent.rng.random() for _ in range(5)], drawn).any()
        assert env._means == drawn.tolist()  # it is what the environment draws


class TestMakeAgent:
    @pytest.mark.parametrize(("name", "cls"), AGENTS.items())
    def test_names(self, name, cls):
        assert type(make_agent(name)) is cls

    def test_ucb_is_ucb1(self):
        assert make_agent("ucb").bonus == "ucb1"

    @pytest.mark.parametrize(
        ("kwargs", "prior"),
        [
            ({"distribution": "bernoulli"}, ("beta", 1.0, 0.0, 1.0)),
            ({"noise": "low"}, ("gaussian", 0.1, 0.5, math.sqrt(1 / 12))),
            ({"means": "normal", "noise": 3}, ("gaussian", 3.0, 0.0, 3.0)),
            ({"means": [5, 6, 7, 8, 9], "noise": "high"}, ("gaussian", 3.0, 0.0, 1.0)),
        ],
    )
    def test_thompson_prior_fits_the_bandit(self, kwargs, prior):
        agent = make_agent("thompson", TimeLimit(Bandit(**kwargs), 10))
        assert (agent.prior, agent.sigma, agent.prior_mean, agent.prior_std) == pytest.approx(prior)

    def test_settings_behind_the_name(self):
        agent = make_agent("thompson:prior=gaussian,prior_std=2,sigma=0.5")
        assert (agent.prior, agent.sigma, agent.prior_mean, agent.prior_std) == ("gaussian", 0.5, 0.0, 2.0)
        assert make_agent("minimax:fastest=true").fastest is True and make_agent("greedy:untried=0").untried == 0
        # What they do not say is as the bandit tells
        agent = make_agent("thompson:prior_std=2", Bandit(means="normal", noise=3))
        assert (agent.prior, agent.sigma, agent.prior_std) == ("gaussian", 3.0, 2.0)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("thompson:prio=gaussian", "'thompson' has no setting 'prio'. Did you mean prior"),
            ("ucb:bonus=log", "bonus='log' is unknown"),
            ("ucb:", "'ucb' has no setting ''. Its settings: bonus; write ucb:bonus=ucb1"),
            ("ucb:bonus", "'ucb:bonus' gives bonus no value: write ucb:bonus=ucb1"),
            ("greedy:epsilon=much", "epsilon='much' of 'greedy' is no float"),
            ("minimax:fastest=2", "fastest='2' of 'minimax' is no bool"),
            ("thomson:prior=gaussian", "'thomson:prior=gaussian' is unknown. Did you mean thompson"),
        ],
    )
    def test_settings_that_are_none(self, name, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_agent(name)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="'epsilon' is unknown. Use one of 'random', 'greedy', 'ucb', 'thompson'"):
            make_agent("epsilon")


class TestMistakes:
    def test_bonus(self):
        with pytest.raises(ValueError, match="bonus='log' is unknown. Use one of 'ucb1', 'sqrt_n', 'half_ln'"):
            UCBAgent("log")

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"prior": "normal"}, "prior='normal' is unknown"),
            ({"prior": "gaussian", "sigma": 0}, "sigma=0 "),
            ({"prior": "gaussian", "prior_std": -1}, "prior_std=-1 "),
            ({"prior": "gaussian", "prior_std": math.inf}, "prior_std=inf "),
        ],
    )
    def test_thompson(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            ThompsonAgent(**kwargs)

    @pytest.mark.parametrize("reward", [-0.1, 1.1, math.nan])
    def test_beta_prior_on_other_rewards(self, reward):
        with pytest.raises(ValueError, match=rf"reward={reward}.*Use prior='gaussian', thompson:prior=gaussian"):
            after(ThompsonAgent(), [("a", reward)])

    def test_environment_without_legal_actions(self):
        class Mute(Shrinking):
            def reset(self, *, seed=None, options=None):
                return "", {}

        with pytest.raises(ValueError, match="Mute does not tell"):
            play_episode(Mute(), RandomAgent(), seed=0)

    def test_agent_needs_a_rule(self):
        with pytest.raises(TypeError, match="score"):
            BanditAgent()
