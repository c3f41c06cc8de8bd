# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Forward passes leave out what carries no loss: columns of padding, and logits of tokens that were only read."""

import pytest
import torch
from scripted import (
    Pay,
    ScriptedTrainer,
    acts,
    generate,
    loss_and_gradients,
    make_config,
    perturb,
    ready,
    save_tiny_model,
)
from trl.trainer.utils import split_tensor_dict

from trl_agents import AgentPPOConfig, AgentPPOTrainer
from trl_agents._trl import RolloutGRPOTrainer, scoring
from trl_agents.batch import used_columns


LONG, SHORT = "abcab", "s"  # two of each: the second half of the batch is much shorter than the first


class ScriptedPPOTrainer(ScriptedTrainer, AgentPPOTrainer):
    """Likewise with a critic."""


class Watched:
    """Notes what the model was asked: masks of its passes, and how many tokens had a label."""

    def __init__(self, trainer):
        self.masks, self.n_labels = [], 0
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        if kwargs.get("labels") is not None:  # not a pass of the rollout
            self.masks.append(kwargs["attention_mask"])
            self.n_labels += int((kwargs["labels"] != -100).sum())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_trainer(model_dir, tmp_path):
    def make(kind, context):
        config = {"context": context, "beta": 0.1, "num_iterations": 2, "per_device_train_batch_size": 2}
        config |= {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "env_kwargs": {"actions": "abcs"}}
        if kind == "grpo":
            args = make_config(tmp_path / "out", advantage_estimator="group", **config)
        else:
            args = make_config(tmp_path / "out", AgentPPOConfig, num_generations=1, value_head_init="normal", **config)
        args.env_kwargs["horizon"] = len(LONG)
        trainer = {"grpo": ScriptedTrainer, "ppo": ScriptedPPOTrainer}[kind](model_dir, env=Pay, args=args)
        trainer.script = acts(LONG, LONG.replace("c", "?"), SHORT, "?s")
        return ready(trainer)

    return make


def train(trainer):
    """The rollout's batch, each half's loss and gradients, and what the model was asked on the way."""
    watched = Watched(trainer)
    batch = generate(trainer)
    perturb(trainer.model)
    halves = [loss_and_gradients(trainer, half) for half in split_tensor_dict(batch, 2)]
    return batch, halves, watched


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("context", ["chat", "window"])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_what_is_left_out_changes_nothing(make_trainer, monkeypatch, kind, context, on_gpu):
    if on_gpu:  # TRL's head computes logits where there is a label; elsewhere it computes all and throws some away
        monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    batch, halves, watched = train(make_trainer(kind, context))
    sampled = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert all(mask.any(dim=0).all() for mask in watched.masks)
    assert watched.n_labels == 3 * sampled.sum()  # old policy, reference, new policy
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "used_columns", lambda mask: (0, mask.shape[1]))
        patch.setattr(RolloutGRPOTrainer, "_tokens_to_score", lambda self, width: None)
        plain_batch, plain_halves, plainly = train(make_trainer(kind, context))
    assert not all(mask.any(dim=0).all() for mask in plainly.masks)
    assert plainly.n_labels == 3 * batch["completion_mask"].sum()
    assert len(plainly.masks) == len(watched.masks)  # processes keep in step

    for name, values in plain_batch.items():
        kept = sampled if values.shape == sampled.shape and "logps" in name else ...
        torch.testing.assert_close(batch[name][kept], values[kept], rtol=0, atol=1e-6, msg=name)
    for (loss, gradients), (plain_loss, plain_gradients) in zip(halves, plain_halves, strict=True):
        torch.testing.assert_close(loss, plain_loss, rtol=0, atol=1e-6)
        torch.testing.assert_close(gradients, plain_gradients, rtol=1e-5, atol=1e-6)
        assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3


def test_multiples_of_the_users_stay(make_trainer):
    trainer = make_trainer("grpo", "window")
    trainer.pad_to_multiple_of = 16
    _, _, watched = train(trainer)
    assert not any(mask.shape[1] % 16 for mask in watched.masks)


def test_used_columns():
    assert used_columns(torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]])) == (1, 4)
    assert used_columns(torch.ones(2, 3)) == (0, 3)
    assert used_columns(torch.zeros(2, 3)) == (0, 3)
