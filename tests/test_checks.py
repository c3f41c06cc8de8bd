# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is said of settings before there is a model: `check_run`, and warnings of settings that go badly together."""

import functools
import warnings

import pytest
from datasets import Dataset
from peft import LoraConfig
from scripted import Pay, make_config
from transformers import BitsAndBytesConfig
from trl import GRPOConfig

from trl_agents import ActionParser, AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer, check_run
from trl_agents.envs import Bandit
from trl_agents.trainers import checks, packages


MISTAKES = {
    "unknown id": ("trl_agents/Bandid-v0", {}, {}, "Bandid-v0.*trl_agents/Bandit-v0"),
    "environment's argument name": (
        "trl_agents/Bandit-v0",
        {"env_kwargs": {"n_arm": 3}},
        {},
        "no argument 'n_arm'. Did you mean n_arms. Its arguments: n_arms, horizon",
    ),
    "class's argument name": (Pay, {"env_kwargs": {"horizont": 3}}, {}, "Did you mean horizon. .*: horizon, actions"),
    "no text": ("FrozenLake-v1", {}, {}, r"is no text .*are Discrete\(16\). Say 'gymnasium:FrozenLake-v1'"),
    "environment's argument": (Bandit, {"env_kwargs": {"horizon": 0}}, {}, "horizon=0"),
    "unreachable action": (Pay, {}, {"action_parser": ActionParser(r"ACTION=(\d)")}, "No pattern can produce"),
    "setting": (Pay, {"repetition_penalty": 1.1}, {}, "repetition_penalty=1.1"),
    "weights": (Pay, {"reward_weights": [1.0]}, {"reward_funcs": [len, len]}, "for 2 reward functions"),
    "few seeds": (Pay, {"num_train_seeds": 1}, {}, "1 seeds to train on.*takes 2"),
    "dataset": (Pay, {}, {"train_dataset": Dataset.from_dict({"prompt": ["?"] * 4})}, r"'seed'.*\['prompt'\]"),
    "module": ("nomodule:Foo-v0", {}, {}, "'nomodule:Foo-v0' names no environment: No module named 'nomodule'"),
    "evaluation's dataset": (Pay, {}, {"eval_dataset": Dataset.from_dict({"prompt": ["?"]})}, "column 'seed'"),
    "parser": (Pay, {}, {"action_parser": r"ACTION=(.*)"}, "pass an `ActionParser`"),
    "gathering": (Pay, {"ds3_gather_for_generation": False}, {}, "ds3_gather_for_generation=False.*Use True"),
    "two rollouts": (Pay, {}, {"rollout_func": print}, "`rollout_func` and `env`"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_run_names_the_mistake(tmp_path, mistake):
    env, settings, kwargs, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        check_run(env, make_config(tmp_path / "out", **settings), **kwargs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0.*eval_temperature"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"num_generations": 3}, r"num_generations \(3\).*Use a num_generations that divides.*_batch_size=4"),
        ({"env_kwargs": "[3]"}, r"env_kwargs='\[3\]' must be a dictionary"),
        ({"env_kwargs": "{n_arms: 5}"}, r"env_kwargs='{n_arms: 5}' is no JSON .*double quotes, '{\"n_arms\": 10}'"),
    ],
)
def test_configurations_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path / "out", **settings)


def test_check_run_wants_our_configuration(tmp_path):
    with pytest.raises(ValueError, match="`GRPOConfig`.*`AgentGRPOConfig`"):
        check_run(Pay, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_without_legal_actions_an_invalid_reply_ends_the_episode(tmp_path):
    with pytest.warns(UserWarning, match="Pay lists no .*'end' or 'retry'"):
        check_run(Pay, make_config(tmp_path / "out", env_kwargs={"actions": ""}))


def test_check_run_lets_pass_what_trains(tmp_path):
    check_run("trl_agents/Bandit-v0", make_config(tmp_path, env_kwargs={"max_episode_steps": 3, "n_arms": 3}))
    check_run(Pay, make_config(tmp_path / "out", beta=0.1))  # the reference's model is not there yet
    check_run("trl_agents/Bandit-v0", make_config(tmp_path / "out", reward_weights=[1.0]), reward_funcs=len)
    assert not (tmp_path / "out").exists()


def test_check_run_asks_for_the_installed_trl(monkeypatch, tmp_path):
    def refuse():
        raise ImportError("trl is too old")

    monkeypatch.setattr(checks, "check_trl", refuse)
    with pytest.raises(ImportError, match="too old"):
        check_run(Pay, make_config(tmp_path))


class Rounds(Pay):
    """In the second round there is nothing but b."""

    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        return observation, reward, self.steps == self.horizon, False, {**info, "legal_actions": ["b"]}


@pytest.mark.parametrize("name", ["exploration_bonus=1", "try_all", "context_randomization"])
def test_mechanisms_whose_actions_change(tmp_path, name):
    context = {"context": "window"} if name == "context_randomization" else {}
    args = make_config(tmp_path / "out", exploration=[name], **context)
    said = f"exploration={name.partition('=')[0]} needs legal actions that stay the same.*leave it out, or let"
    for make in (check_run, functools.partial(AgentGRPOTrainer, "no/model")):
        with pytest.raises(ValueError, match=said):
            make(env=Rounds, args=args)
    check_run(Pay, args)
    broken = make_config(tmp_path / "out", exploration=[name], env_kwargs={"actions": "x"}, **context)
    check_run(Pay, broken)  # an environment that raises is for the rollout


class Forgets(Pay):
    """Lists its actions when an episode begins, and never again."""

    def step(self, action):
        return *super().step(action)[:-1], {}


CHOOSING = ["try_all", "epsilon_greedy", "context_randomization", "context_summary", "exploration_bonus"]


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize(("env", "actions"), [(Pay, ""), (Forgets, "abc")])
def test_mechanisms_without_actions(tmp_path, name, env, actions):
    """They had nothing to choose from, did nothing, and said nothing."""
    settings = {"exploration": ["self_correction", name], "env_kwargs": {"actions": actions}, "context": "window"}
    said = f"exploration={name} .* legal actions, and this environment lists none.*leave it out, or let"
    refuse(tmp_path, said, AgentGRPOConfig, settings, env=env)


def test_mechanisms_that_do_without_actions(tmp_path):
    kinds = ["self_correction", "thinking_budget=8"]
    check_run(Pay, make_config(tmp_path, exploration=kinds, env_kwargs={"actions": ""}, invalid_action="end"))


def test_mechanisms_are_named_as_settings_name_them(tmp_path):
    with pytest.raises(ValueError, match="^context_randomization renders the history anew.*use context='window'"):
        make_config(tmp_path, exploration=["context_randomization"])


PACKAGES = {
    "tensorboard": (None, {"report_to": "tensorboard"}, {}, "pip install tensorboard"),
    "wandb": (None, {"report_to": ["tensorboard", "wandb"]}, {}, "pip install wandb"),
    "comet_ml": (None, {"report_to": "comet_ml"}, {}, "pip install comet-ml"),
    "vllm": ("is_vllm_available", {"use_vllm": True}, {}, r'pip install -e "\.\[vllm\]"'),
    "peft": ("is_peft_available", {}, {"peft_config": LoraConfig()}, "pip install peft"),
    "8 bits": (
        "is_bitsandbytes_available",
        {},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        r'pip install -e "\.\[qlora\]"',
    ),
    "8 bits of the settings": (
        "is_bitsandbytes_available",
        {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}},
        {},
        r'pip install -e "\.\[qlora\]"',
    ),
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("env", [Pay, None])
def test_a_package_that_is_missing(tmp_path, monkeypatch, package, env):
    check, settings, kwargs, message = PACKAGES[package]
    if check is None:
        monkeypatch.setitem(packages.TRACKERS, package.replace("_", "-"), lambda: False)
    else:
        monkeypatch.setattr(packages, check, lambda: False)
    if env is None:
        kwargs = {**kwargs, "reward_funcs": len, "train_dataset": Dataset.from_dict({"prompt": ["?"] * 2})}
    with pytest.raises(ImportError, match=message):
        check_run(env, make_config(tmp_path / "out", **settings), **kwargs)
    with pytest.raises(ImportError, match=message):
        AgentGRPOTrainer("no/model", env=env, args=make_config(tmp_path / "out", **settings), **kwargs)


def test_dr_grpo_divides_by_one_reply(tmp_path):
    with pytest.warns(UserWarning, match="max_completion_length=12.*max_grad_norm=1.0.*dapo"):
        check_run(Pay, make_config(tmp_path, loss_type="dr_grpo"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_run(Pay, make_config(tmp_path, loss_type="dr_grpo", max_turns=1))  # one reply a row: it is the budget
        check_run(Pay, make_config(tmp_path))


def test_retries_shift_the_turns_of_the_baseline(tmp_path):
    with pytest.warns(UserWarning, match="'retry' with advantage_estimator='turn'.*'group'"):
        make_config(tmp_path, invalid_action="retry")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_config(tmp_path, invalid_action="retry", advantage_estimator="group")
        make_config(tmp_path, invalid_action="random")


def test_retries_do_not_matter_to_a_critic(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_config(tmp_path, AgentPPOConfig, invalid_action="retry")


@pytest.mark.parametrize("env", [Pay, None])
def test_settings_of_ppo_want_its_trainer(tmp_path, env):
    """Groups of one are compared with themselves: all advantages were 0, and nobody said so."""
    args = make_config(tmp_path / "out", AgentPPOConfig, num_generations=1)
    questions = {"reward_funcs": len, "train_dataset": Dataset.from_dict({"prompt": ["?"] * 4})}
    with pytest.raises(ValueError, match="`AgentPPOConfig`.*use `AgentPPOTrainer`, or pass an `AgentGRPOConfig`"):
        AgentGRPOTrainer("no/model", env=env, args=args, **({} if env else questions))


@pytest.mark.parametrize("env", [Pay, None])
def test_processes_that_do_not_know_of_each_other(tmp_path, monkeypatch, env):
    """As accelerate's `use_cpu` leaves them, which no script is told."""
    questions = {"reward_funcs": len, "train_dataset": Dataset.from_dict({"prompt": ["?"] * 4})}
    args = make_config(tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for make in (check_run, functools.partial(AgentGRPOTrainer, "no/model")):
        with pytest.raises(ValueError, match=r"2 processes.*counts 1.*--use_cpu true.*AgentGRPOConfig\(use_cpu=True"):
            make(env=env, args=args, **({} if env else questions))


def test_a_model_that_is_nowhere(tmp_path):
    """transformers takes the path for an id, and says at length that it is none."""
    (tmp_path / "empty" / "checkpoint-2").mkdir(parents=True)
    for name, said in (
        ("nowhere", "There is no folder .*/nowhere, and it is no Hub id"),
        ("empty", "Did you mean .*-2"),
    ):
        for make in (check_run, lambda **kwargs: AgentGRPOTrainer(kwargs.pop("model"), **kwargs)):
            with pytest.raises(ValueError, match=said):
                make(env=Pay, args=make_config(tmp_path / "out"), model=str(tmp_path / name))


QUESTIONS = {"reward_funcs": len, "train_dataset": Dataset.from_dict({"prompt": ["?"] * 4})}


def refuse(tmp_path, message, config=AgentPPOConfig, settings=(), **arguments):
    """Both `check_run` and the trainer do."""
    trainer = {AgentPPOConfig: AgentPPOTrainer}.get(config, AgentGRPOTrainer)
    for make in (check_run, functools.partial(trainer, "no/model")):
        with pytest.raises(ValueError, match=message):
            make(args=make_config(tmp_path / "out", config, **dict(settings)), **arguments)


@pytest.mark.parametrize("env", [Pay, None])
def test_no_adapter_beside_a_second_trunk(tmp_path, env):
    arguments = {"env": env, "peft_config": LoraConfig(), **({} if env else QUESTIONS)}
    refuse(tmp_path, "separate_critic=True trains", settings={"separate_critic": True}, **arguments)


@pytest.mark.parametrize("config", [AgentGRPOConfig, AgentPPOConfig])
def test_without_an_environment_nothing_is_played(tmp_path, config):
    refuse(tmp_path, "`action_parser` was given without `env`", config, env=None, action_parser=ActionParser())
    explores = {"exploration": ["try_all"]}
    refuse(tmp_path, r"exploration=\['try_all'\] has no effect without", config, explores, env=None, **QUESTIONS)


@pytest.mark.parametrize("name", ["missing_eos_reward", "missing_eos_penalty"])
def test_scores_of_answers_that_ran_out_of_tokens_are_no_matter_of_episodes(tmp_path, name):
    refuse(tmp_path, f"{name}=0.0 has no effect.*`invalid_action_penalty`", settings={name: 0.0}, env=Pay)
    check_run(None, make_config(tmp_path, AgentPPOConfig, **{name: 0.0}), **QUESTIONS)
