# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Gymnasium's environments as text."""

import functools

import gymnasium
import numpy as np
import pytest
from adapted import check_100_episodes, train_two_steps
from gymnasium.spaces import Box, Discrete, Text

from trl_agents.envs import make_env
from trl_agents.envs.adapters import GymnasiumEnvironment
from trl_agents.envs.adapters.gymnasium_suite import strip_ansi


IDS = {"FrozenLake-v1": {}, "Taxi-v4": {"max_episode_steps": 30}, "CliffWalking-v1": {"max_episode_steps": 30}}


@pytest.mark.parametrize("name", [*IDS, "Blackjack-v1", "CartPole-v1"])
def test_100_episodes(name):
    episodes = check_100_episodes(functools.partial(make_env, f"gymnasium:{name}", **IDS.get(name, {})))
    ends = {(episode[-1][2], episode[-1][3]) for episode in episodes.values()}
    if name == "CliffWalking-v1":
        assert (False, True) in ends  # the time limit truncates
    elif name != "Taxi-v4":
        assert (True, False) in ends


@pytest.mark.parametrize("name", IDS)
def test_trains(name, tmp_path):
    env = f"gymnasium:{name}"
    action = make_env(env).reset(seed=0)[1]["legal_actions"][0]
    train_two_steps(env, tmp_path, action, env_kwargs=IDS[name])


def test_frozen_lake_in_words():
    env = make_env("gymnasium:FrozenLake-v1", is_slippery=False)
    observation, info = env.reset(seed=0)
    assert observation == "[S]FFF\nFHFH\nFFFH\nHFFG" and info["legal_actions"] == ["left", "down", "right", "up"]
    walk = ["down", "down", "right", "right", "down", "right"]
    *_, last = (env.step(action) for action in walk)
    assert last[0].endswith("HFF[G]") and last[1:4] == (1.0, True, False)
    assert "left, down, right, up" in env.instructions and "ACTION=" in env.instructions


def test_taxi_mask_and_words():
    env = make_env("gymnasium:Taxi-v4")
    inner = env.env.unwrapped
    env.reset(seed=0)
    inner.s = inner.encode(0, 0, 0, 1)  # at R, where the passenger is, who wants to go to G
    observation, reward, *_, info = env.step("pickup")
    assert "Passenger: in the taxi. Destination: G (row 0, column 4)." in observation and reward == -1
    names = ("south", "north", "east", "west", "pickup", "dropoff")
    allowed = [name for name, bit in zip(names, inner.action_mask(inner.s), strict=True) if bit]
    assert info["legal_actions"] == allowed != list(names)


def test_blackjack_in_words():
    assert make_env("gymnasium:Blackjack-v1").reset(seed=1)[0] == "Your sum: 20. The dealer shows 7."


class Toy(gymnasium.Env):
    action_space, observation_space = Discrete(3, start=5), Box(0, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return np.array([0.123456, 1.0]), {"action_mask": np.array([0, 1, 1], dtype=np.int8)}

    def step(self, action):
        self.played = action
        return np.zeros(2), np.float32(0.5), np.bool_(True), False, {}


def test_any_environment_by_numbers():
    env = GymnasiumEnvironment(Toy())
    observation, info = env.reset()
    assert observation == "Observation: [0.123, 1.   ]" and info["legal_actions"] == ["6", "7"]
    assert env.step("7")[1:4] == (0.5, True, False) and env.env.played == 7
    with pytest.raises(ValueError, match="'8' is unknown. The actions are: 5, 6, 7"):
        env.step("8")


def test_describe_and_names():
    with pytest.raises(TypeError, match="`describe` returned 5 .int., not a str"):
        GymnasiumEnvironment(Toy(), describe=lambda seen, env: 5).reset()
    env = GymnasiumEnvironment(Toy(), describe=lambda seen, env: f"\x1b[1m{seen[1]:.0f}\x1b[0m", actions=list("abc"))
    assert env.reset()[0] == "1" and env.reset()[1]["legal_actions"] == ["b", "c"]
    pendulum = make_env("gymnasium:Pendulum-v1", actions={"push": [2.0], "pull": [-2.0]}, max_episode_steps=2)
    assert pendulum.reset(seed=0)[1]["legal_actions"] == ["push", "pull"]
    assert pendulum.step("push")[2:4] == (False, False) and pendulum.step("pull")[2:4] == (False, True)


@pytest.mark.parametrize("actions", [{"c": 7, "b": 6, "a": 5}, {"c": 7, "a": 5}])
def test_a_mask_is_one_of_numbers(actions):
    """Names may come in another order, or be fewer."""
    allowed = [name for name in actions if name != "a"]
    assert GymnasiumEnvironment(Toy(), actions=actions).reset()[1]["legal_actions"] == allowed


class Taxi(Toy):
    pass


@pytest.mark.parametrize("name", ["FrozenLake", "Taxi", "Blackjack"])
def test_somebody_s_own_of_a_known_name(name):
    gymnasium.register(f"mine/{name}-v0", Toy)
    try:
        env = make_env(f"gymnasium:mine/{name}-v0", disable_env_checker=True)
    finally:
        del gymnasium.registry[f"mine/{name}-v0"]
    for made in (env, GymnasiumEnvironment(Taxi())):
        assert made.reset()[0].startswith("Observation:") and made.reset()[1]["legal_actions"] == ["6", "7"]
        assert "high sum of rewards" in made.instructions


class Echo(gymnasium.Env):
    action_space = observation_space = Text(20)
    instructions = "Say something."

    def reset(self, *, seed=None, options=None):
        return "?", {}

    def step(self, action):
        return action, 0.0, True, False, {}


def test_text_spaces():
    env = GymnasiumEnvironment(Echo())
    assert env.instructions == "Say something." and env.reset() == ("?", {}) and env.step("so")[0] == "so"


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("FrozenLke-v1", {}, "has no environment 'FrozenLke-v1'. Did you mean 'FrozenLake-v1'"),
        ("FrozenLake-v9", {}, "Registered: FrozenLake-v1"),
        ("Pendulum-v1", {}, r"action space Box\(.*Name the actions .*actions=\{'left'"),
        ("FrozenLake-v1", {"actions": ["a", "b"]}, "names 2 actions, but FrozenLake has 4"),
        ("FrozenLake-v1", {"actions": list("abcA")}, "gives two actions one name"),
        ("FrozenLake-v1", {"actions": [0, 1, 2, 3]}, r"actions=\[0, 1, 2, 3\]: give a list of names"),
        ("FrozenLake-v1", {"actions": 4}, "actions=4: give a list of names"),
        ("FrozenLake-v1", {"actions": {}}, "actions={}: give a list of names"),
        ("FrozenLake-v1", {"size": 3}, "does not take env_kwargs="),
    ],
)
def test_mistakes(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_env(f"gymnasium:{name}", **kwargs)


@pytest.mark.parametrize(
    ("drawn", "text"),
    [
        ("\x1b[41mS\x1b[0mFF", "[S]FF"),
        ("\x1b[34;1mR\x1b[0m \x1b[35mG\x1b[0m", "R G"),
        ("\x1b[1;43m \x1b[0m|", "[ ]|"),
        ("\x1b]0;title\x07a\x1b[2J\x1b(Bb", "ab"),
    ],
)
def test_strip_ansi(drawn, text):
    assert strip_ansi(drawn) == text
