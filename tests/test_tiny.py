# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transcripts for the warm-up: what `play_transcripts` takes for an environment."""

import functools

import pytest
from scripted import Pay

from trl_agents.agents import RandomAgent
from trl_agents.envs import make_env
from trl_agents.tiny import play_transcripts, tiny_tokenizer


@pytest.mark.parametrize("env", ["trl_agents/Bandit-v0", Pay, lambda: Pay(horizon=2)], ids=["id", "class", "factory"])
def test_an_environment_by_id_class_or_factory(env):
    rows = play_transcripts(env, RandomAgent(), range(2))["messages"]
    assert len(rows) == 2 and "ACTION=" in rows[0][1]["content"]


def test_no_instances():
    with pytest.raises(ValueError, match="an instance does not do"):
        play_transcripts(Pay(), RandomAgent(), range(2))
    assert "instance" not in play_transcripts.__doc__


def test_a_window_shows_what_followed():
    """The position alone, the reply, and, to learn from, the step as it went: the opening of the next row among it."""
    env = functools.partial(make_env, "trl_agents/TicTacToe-v0", show_legal_actions=False)
    rows = play_transcripts(env, RandomAgent(), range(3), rationale=None, context="window", window=0)["messages"][:]
    assert all([message["role"] for message in row] == ["user", "assistant", "user"] for row in rows)
    for row, following in zip(rows, rows[1:], strict=False):
        asked, reply, then = (message["content"] for message in row)
        action = reply.removeprefix("ACTION=")
        assert asked.count("Step=") == 1 and f" Action={action} Reward=" in then
        if "Result=" not in then:
            opened = then.splitlines()[-1]
            assert f"\n{opened}\n" in following[0]["content"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Step=1 State=000102010", ["Step=", "1", " State=", "000", "102", "010"]),
        ("ACTION=4", ["ACTION=", "4"]),
        ("    x = y\n", ["    ", "x", " =", " y", "\n"]),
        ("12 + 5 = 17", ["12", " +", " ", "5", " =", " ", "17"]),
    ],
)
def test_what_is_one_token(text, pieces):
    tokenizer = tiny_tokenizer([text] * 50)
    assert [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]] == pieces


def test_standing_texts_are_one_token():
    tokenizer = tiny_tokenizer(["a b"], phrases=["You play. Well.", "Well."])
    assert len(tokenizer("You play. Well.")["input_ids"]) == len(tokenizer("Well.")["input_ids"]) == 1
