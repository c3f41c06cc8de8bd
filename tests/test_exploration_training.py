# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Exploration mechanisms through the real trainer: what is trained on, what is paid, what the evaluation shows."""

import math

import pytest
import torch
from scripted import Pay, ScriptedTrainer, generate, make_config, ready, save_tiny_model

from trl_agents.batch import rows_of
from trl_agents.types import ParsedAction, StopReason, Trajectory, Turn


@pytest.fixture
def make_trainer(tmp_path):
    model = save_tiny_model(tmp_path / "model")

    def make(script=None, env=Pay, **config):
        trainer = ScriptedTrainer(model, env=env, args=make_config(tmp_path / "out", **config))
        trainer.script = script
        return ready(trainer)

    return make


def of_turns(trainer, batch, row):
    """The text and the advantages of what a row trains."""
    mask = (batch["tool_mask"][row] * batch["completion_mask"][row]).bool()
    text = trainer.processing_class.decode(batch["completion_ids"][row][mask])
    return text, batch["advantages"][row][mask]


def test_forced_replies_are_trained_on(make_trainer):
    # All episodes play a, b, c: there is nothing to tell them apart until the model chooses
    script = [[f"ACTION={letter}"] for letter in "acab"]
    trainer = make_trainer(script, lambda: Pay(horizon=4), exploration=["try_all"], max_completion_length=200)
    batch = generate(trainer)
    for row, letter in enumerate("acab"):
        text, advantages = of_turns(trainer, batch, row)
        assert text.count("has not been tried yet") == 3 and text.endswith(f"ACTION={letter}<|im_end|>")
        # Returns-to-go: 0, 3 in the first group's last turn; every earlier one differs by just that
        expected = {"a": -1.5, "c": 1.5}[letter] if row < 2 else {"a": -0.5, "b": 0.5}[letter]
        torch.testing.assert_close(advantages, torch.full_like(advantages, expected))


def test_drafts_are_read_and_not_trained_on(make_trainer):
    script = [["ACTION=c", f"ACTION={letter}"] for letter in "abab"]
    trainer = make_trainer(
        script, lambda: Pay(horizon=1), exploration=["self_correction=what? noise"], max_completion_length=30
    )
    batch = generate(trainer)
    for row, letter in enumerate("abab"):
        text, advantages = of_turns(trainer, batch, row)
        assert text == f"ACTION={letter}<|im_end|>"
        assert advantages.unique().item() == {"a": -0.5, "b": 0.5}[letter]
        prompt = trainer.processing_class.decode(batch["prompt_ids"][row])
        assert "ACTION=c<|im_end|>" in prompt


def test_the_bonus_is_paid_in_training_only(make_trainer):
    script = [[f"ACTION={letter}" for letter in word] for word in ("aaa", "aba", "abc", "ccc")]
    trainer = make_trainer(script, exploration=["exploration_bonus=10"], advantage_estimator="group")
    generate(trainer)
    # a 0, b 1, c 3, and 10 for each action the first time
    assert trainer.turn_rewards == [[10, 0, 0], [10, 11, 0], [10, 11, 13], [13, 3, 3]]
    trainer.model.eval()
    trainer._normalize(trainer.trajectories, "eval")
    assert trainer.turn_rewards == [[0, 0, 0], [0, 1, 0], [0, 1, 3], [3, 3, 3]]


def test_the_share_of_forced_replies_is_logged(make_trainer):
    script = [["ACTION=a", "ACTION=b"]] * 4
    trainer = make_trainer(script, lambda: Pay(horizon=5), exploration=["try_all"], max_completion_length=200)
    generate(trainer)
    assert trainer._metrics["train"]["agents/forced_share"] == [3 / 5]


def test_training_with_every_mechanism(make_trainer):
    trainer = make_trainer(
        context="window",
        exploration=["epsilon_greedy=0.3", "context_randomization", "context_summary", "exploration_bonus"],
        max_completion_length=60,
        max_steps=1,
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_without_an_environment_there_is_nothing_to_explore(tmp_path):
    args = make_config(tmp_path / "out", exploration=["try_all"])
    with pytest.raises(ValueError, match="no effect without `env`"):
        ScriptedTrainer(save_tiny_model(tmp_path / "model"), args=args)


def test_an_environment_without_the_argument_is_refused(make_trainer):
    with pytest.raises(ValueError, match="reasoning"):
        make_trainer(exploration=["no_reasoning"])


def test_forced_tokens_have_no_likelihood_under_the_sampler():
    def turn(logprobs, forced):
        return Turn("", (1,), (5, 6), "", ParsedAction("a"), "a", logprobs=logprobs, forced=forced)

    sampled = turn((-0.5, -1.0), False)
    (row,) = rows_of(Trajectory(0, (turn(None, True), sampled), StopReason.TERMINATED), 0, 9)
    assert all(math.isnan(value) for value in row.logprobs[:2]) and row.logprobs[2:] == [0.0, -0.5, -1.0]
    (row,) = rows_of(Trajectory(0, (turn(None, True), turn(None, False)), StopReason.TERMINATED), 0, 9)
    assert row.logprobs is None
