# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transcripts: what `play_transcripts` takes for an environment, and what a chat and a window show."""

import functools

import pytest
from scripted import Endless, Pay

from trl_agents.agents import RandomAgent, play_episode
from trl_agents.contexts import Briefing
from trl_agents.envs import make_env
from trl_agents.transcripts import chat_messages, play_transcripts, put_into_words, window_messages


@pytest.mark.parametrize("env", ["trl_agents/Bandit-v0", Pay, lambda: Pay(horizon=2)], ids=["id", "class", "factory"])
def test_an_environment_by_id_class_or_factory(env):
    rows = play_transcripts(env, RandomAgent(), range(2))["messages"]
    assert len(rows) == 2 and "ACTION=" in rows[0][1]["content"]


def test_what_does_not_end_by_itself_is_limited(monkeypatch):
    rows = play_transcripts(Endless, RandomAgent(), range(2), max_turns=4)["messages"]
    assert [len(row) for row in rows] == [9, 9]  # four exchanges, and what the last action led to
    monkeypatch.setattr("trl_agents.agents.ENDLESS", 20)
    with pytest.raises(ValueError, match="max_turns"):
        play_transcripts(Endless, RandomAgent(), range(2))


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


def test_a_context_of_another_name():
    with pytest.raises(ValueError, match="context='page' is unknown"):
        play_transcripts(Pay, RandomAgent(), range(2), context="page")


def test_messages_of_one_episode():
    """Both forms hold the same replies; a window of one looks back on the last step alone."""
    env = make_env("trl_agents/Bandit-v0", n_arms=3, horizon=3)
    episode, briefing = put_into_words(play_episode(env, RandomAgent(), seed=0), rationale=None), Briefing.of(env)
    steps = [turn.info["transition"] for turn in episode.turns]
    chat, window = chat_messages(episode, briefing), window_messages(episode, briefing, 1)
    replies = [f"ACTION={turn.executed}" for turn in episode.turns]
    assert [message["content"] for message in chat[1::2]] == [row[1]["content"] for row in window] == replies
    opening = f"{env.instructions}\n{env.question}"
    assert [message["content"] for message in chat[::2]] == [opening, *steps]
    history = f"{env.instructions}\n{env.history_header}\n{steps[1]}\n{env.question}"
    assert window[2][0]["content"] == history and window[2][2]["content"] == steps[2]
