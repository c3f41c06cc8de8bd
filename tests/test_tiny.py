# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transcripts for the warm-up: what `play_transcripts` takes for an environment."""

import pytest
from scripted import Pay

from trl_agents.agents import RandomAgent
from trl_agents.tiny import play_transcripts


@pytest.mark.parametrize("env", ["trl_agents/Bandit-v0", Pay, lambda: Pay(horizon=2)], ids=["id", "class", "factory"])
def test_an_environment_by_id_class_or_factory(env):
    rows = play_transcripts(env, RandomAgent(), range(2))["messages"]
    assert len(rows) == 2 and "ACTION=" in rows[0][1]["content"]


def test_no_instances():
    with pytest.raises(ValueError, match="an instance does not do"):
        play_transcripts(Pay(), RandomAgent(), range(2))
    assert "instance" not in play_transcripts.__doc__
