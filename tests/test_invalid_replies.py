# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A model that is not understood is told of: random moves in place of its own bring plausible returns."""

import warnings

import pytest
from scripted import Pay, ScriptedTrainer, acts, make_config, save_tiny_model

from trl_agents import ActionParser


def warnings_of(tmp_path, script, parser=None, **settings):
    """What training on such replies says of them, in two rollouts."""
    args = make_config(tmp_path / "out", **{"max_completion_length": 30, **settings})
    trainer = ScriptedTrainer(save_tiny_model(tmp_path / "model"), env=Pay, args=args, action_parser=parser)
    trainer.script = script
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    return [str(each.message) for each in told if "stated no legal action" in str(each.message)]


def test_another_pattern_than_the_instructions_ask_for(tmp_path):
    (told,) = warnings_of(tmp_path, acts("abc", "caa", "bbb", "cba"), ActionParser(r"My move: (\w+)"))
    for part in ("100% of the replies", "such reply: 'ACTION=a'", r"'My move: (\\w+)'", "max_completion_length=30"):
        assert part in told
    assert "max_completion_length=30" in told


@pytest.mark.parametrize(("script", "share"), [(acts("???", "???", "??a", "???"), "92%"), (acts(*["??a"] * 4), None)])
def test_nine_tenths_are_too_many(tmp_path, script, share):
    told = warnings_of(tmp_path, script)
    assert [text[:3] for text in told] == ([share] if share else [])
    assert all("reply: 'what?'" in text and "ACTION=X" in text for text in told)


def test_a_long_reply_is_shortened(tmp_path):
    (told,) = warnings_of(tmp_path, [["what? " * 200] * 3] * 4, max_completion_length=1500)
    assert "what? wh..." in told and len(told) < 900


def test_what_a_mechanism_wrote_is_none_of_the_model_s_replies(tmp_path):
    (told,) = warnings_of(tmp_path, acts(*["????"] * 4), exploration=["epsilon_greedy=0.3"], env_kwargs={"horizon": 4})
    assert told.startswith("100%")
