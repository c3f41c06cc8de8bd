# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A run that is resumed is the uninterrupted one, to the last bit."""

import json
import warnings
from pathlib import Path

import pandas
import pytest
import torch
from resumed import CASES, lasting, make
from scripted import save_tiny_model

from trl_agents.trainers.memory import REFERENCE_FILE, WORK_FILE


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    config = Path(folder, "config.json")
    # Dropout, so that the random state matters to updates as well
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    return folder


def state_of(trainer):
    """All that the rest of a run depends on, in a form that can be compared."""
    models = [trainer.model, trainer.ref_model] if trainer.ref_model is not None else [trainer.model]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    tensors += [torch.as_tensor(value) for state in optimizer.state.values() for value in state.values()]
    rates = [group["lr"] for group in optimizer.param_groups]
    told = [rates, trainer.memory(), [lasting(log) for log in trainer.state.log_history]]
    return tensors, json.dumps(told, sort_keys=True)


def assert_same(trainer, other):
    (tensors, told), (other_tensors, other_told) = state_of(trainer), state_of(other)
    assert told == other_told
    assert len(tensors) == len(other_tensors) > 0
    assert all(torch.equal(one, two) for one, two in zip(tensors, other_tensors, strict=True))


def resume(case, checkpoint, folder, model_dir, **changes):
    """Into another folder: what the run needs of the first one's is in the checkpoint, and the pool beside it."""
    trainer = make(case, folder, model_dir, save_strategy="no", **changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(rollout that was begun|pool after step|start anew|first model again).*")
        return trainer, trainer.train(resume_from_checkpoint=str(checkpoint))


SLOW = {"grpo-adapter", "ppo-chat", "ppo-dataset", "ppo-lora", "self-play"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_resumed_run_is_the_uninterrupted_one(model_dir, tmp_path, case):
    whole = make(case, tmp_path / "whole", model_dir, save_steps=3)
    output = whole.train()
    resumed, resumed_output = resume(case, tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed", model_dir)
    assert_same(resumed, whole)
    assert resumed_output.training_loss == output.training_loss
    tables = [sorted((tmp_path / name / "completions").glob("*.parquet")) for name in ("whole", "resumed")]
    for table, other in zip(tables[0][1:], tables[1], strict=True):  # that of step 3 is the first
        assert pandas.read_parquet(table).equals(pandas.read_parquet(other))
    assert len(tables[0]) == (3 if CASES[case].get("log_completions") else 0)
    assert (tmp_path / "whole" / "checkpoint-3" / REFERENCE_FILE).exists() == ("sync_ref_model" in CASES[case])


# Where a rollout and an epoch end, and behind the first epoch
@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_from_other_places(model_dir, tmp_path, step):
    settings = {"save_steps": step, "max_steps": 7}
    whole = make("grpo-chat", tmp_path / "whole", model_dir, **settings)
    whole.train()
    assert whole.train_sampler.num_samples // 2 * 4 == 4  # steps an epoch
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    resumed, _ = resume("grpo-chat", checkpoint, tmp_path / "resumed", model_dir, max_steps=7)
    assert_same(resumed, whole)


def counted(trainer):
    """At which steps it plays."""
    steps, roll_out = [], trainer.roll_out

    def count(inputs):
        steps.append(trainer.state.global_step)
        return roll_out(inputs)

    trainer.roll_out = count
    return steps


def test_a_run_that_was_at_its_end(model_dir, tmp_path):
    """Killed after its last checkpoint, say in an evaluation: there is nothing left to train."""
    whole = make("grpo-chat", tmp_path / "whole", model_dir, max_steps=3)
    whole.train()
    trainer = make("grpo-chat", tmp_path / "resumed", model_dir, max_steps=3)
    steps = counted(trainer)
    output = trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert steps == [] and output.global_step == 3
    assert_same(trainer, whole)


def test_without_the_rollout_that_was_begun(model_dir, tmp_path):
    make("grpo-chat", tmp_path, model_dir, save_steps=3, max_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    for changes, told in (
        ({"num_iterations": 4}, "it was written with .*'num_iterations': 2.* and this run has .*'num_iterations': 4"),
        ({"beta": 0.0}, "it was written with .*'with_reference': True"),
        ({}, f"it has no {WORK_FILE.format(0)}"),
    ):
        changes = {"save_strategy": "no", "max_steps": 6, **changes}
        resumed = make("grpo-chat", tmp_path / "other", model_dir, **changes)
        steps = counted(resumed)
        with pytest.warns(UserWarning, match=f"is not gone on with from .*checkpoint-3: {told}"):
            output = resumed.train(resume_from_checkpoint=str(checkpoint))
        assert steps == ([3] if "num_iterations" in changes else [3, 4])  # in step with the data again
        (loss,) = [log["loss"] for log in resumed.state.log_history if log["step"] > 3 and "loss" in log]
        assert output.training_loss == pytest.approx(loss)  # of the steps it knows
        if "beta" in changes:
            (checkpoint / WORK_FILE.format(0)).unlink()


def test_lost_episodes_are_remembered(model_dir, tmp_path):
    trainer, other = (make("grpo-window", tmp_path, model_dir) for _ in range(2))
    trainer.lost_shares["train"].extend([0.25, 0.5])
    other.recall(json.loads(json.dumps(trainer.memory())))
    assert list(other.lost_shares["train"]) == [0.25, 0.5]
