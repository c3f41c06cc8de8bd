# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What trainers say of the data and arguments they are given, before they load a model."""

import pytest
from datasets import Dataset
from scripted import Pay, make_config, save_tiny_model

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer, check_run
from trl_agents.rewards import numeric_reward
from trl_agents.seeds import validation_seeds


TRAINERS = {AgentGRPOTrainer: AgentGRPOConfig, AgentPPOTrainer: AgentPPOConfig}


def questions(number, column="prompt"):
    return Dataset.from_dict({column: ["1 + 1?"] * number, "answer": ["2"] * number})


def make(tmp_path, trainer=AgentGRPOTrainer, model="no/model", settings=(), **arguments):
    return trainer(model, args=make_config(tmp_path / "out", TRAINERS[trainer], **dict(settings)), **arguments)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_too_few_questions_train_nothing(tmp_path, trainer):
    few = {"reward_funcs": numeric_reward, "train_dataset": questions(3)}
    with pytest.raises(ValueError, match="3 prompts to train on, but each generation batch takes 4 .*Give more"):
        make(tmp_path, trainer, settings={"gradient_accumulation_steps": 2}, **few)
    folder = save_tiny_model(tmp_path / "model")
    settings = {"max_steps": 1, "max_completion_length": 4}
    trained = make(tmp_path, trainer, folder, settings, reward_funcs=numeric_reward, train_dataset=questions(2))
    trained.train()  # as many as a batch takes
    assert trained.state.global_step == 1


def test_what_has_no_length_is_not_counted(tmp_path):
    stream = questions(1).to_iterable_dataset()
    make(tmp_path, model=save_tiny_model(tmp_path / "model"), reward_funcs=numeric_reward, train_dataset=stream)


ENOUGH = {"reward_funcs": numeric_reward, "train_dataset": questions(4)}
MISTAKES = {
    "no prompts": ({**ENOUGH, "train_dataset": questions(4, "question")}, r"'prompt', but.*'question'.*prompt_comple"),
    "no prompts to evaluate": ({**ENOUGH, "eval_dataset": {"svamp": questions(4, "text")}}, r"'prompt', but.*'text'"),
    "nothing to learn from": ({"train_dataset": questions(4)}, "neither `env` nor `reward_funcs`.*`env` .an id"),
    "nothing to answer": ({"reward_funcs": numeric_reward}, "neither `env` nor `train_dataset`"),
    "another name": ({"environment": Pay}, "`AgentGRPOTrainer` has no argument 'environment'. Pass .* as `env`"),
    "a setting": ({"env": Pay, "env_kwargs": {}}, r"no argument 'env_kwargs'. .*args=AgentGRPOConfig\(env_kwargs="),
    "no such": ({"env": Pay, "parser": None}, "no argument 'parser'.*`action_parser`"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistake_is_named_before_a_model_is_loaded(tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **arguments)


@pytest.mark.parametrize("seeds", [["a"] * 8, [1.5] * 8, [None] * 8, [[1]] * 8])
def test_seeds_are_whole_numbers(tmp_path, seeds):
    with pytest.raises(ValueError, match="seed=.* is no whole number: .*column 'seed'"):
        make(tmp_path, env=Pay, train_dataset=Dataset.from_dict({"seed": seeds}))


def test_check_run_knows_the_trainers_arguments(tmp_path):
    with pytest.raises(ValueError, match="no argument 'parser'"):
        check_run(Pay, make_config(tmp_path), parser=None)


@pytest.mark.parametrize("settings", [{"generation_batch_size": 16}, {}])
def test_check_run_without_an_environment(tmp_path, settings):
    args = make_config(tmp_path, AgentPPOConfig, **settings)
    if settings:
        with pytest.raises(ValueError, match="4 prompts to train on, but each generation batch takes 8"):
            check_run(None, args, **ENOUGH)
    else:
        check_run(None, args, **ENOUGH)


# -- evaluation without `eval_strategy` --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_evaluate_plays_the_validation_seeds(tmp_path, model_dir, trainer):
    evaluated = make(tmp_path, trainer, model_dir, {"num_eval_seeds": 4}, env=Pay)
    metrics = evaluated.evaluate()
    assert metrics["eval_agents/turns_mean"] == 3.0
    assert evaluated.eval_dataset["seed"] == list(validation_seeds(4))
    evaluated.evaluate(Dataset.from_dict({"prompt": [""], "seed": [5]}))
    assert {trajectory.seed for trajectory in evaluated.trajectories} == {5}


@pytest.mark.parametrize(
    ("settings", "dataset", "message"),
    [
        ({}, questions(2), r"column 'seed', but its columns are \['prompt', 'answer'\]"),
        ({"num_eval_seeds": 0}, None, "num_eval_seeds=0, or pass an `eval_dataset`"),
        (
            {"per_device_eval_batch_size": 3},
            None,
            "of 3 .*num_generations_eval=2: .*_batch_size=3 a multiple",
        ),
    ],
)
def test_what_cannot_be_evaluated_on(tmp_path, model_dir, settings, dataset, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, model=model_dir, settings=settings, env=Pay).evaluate(dataset)
