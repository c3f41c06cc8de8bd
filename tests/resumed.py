# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Runs in parts: what the tests of resuming share. As a script, the process that is killed."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scripted import make_config
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer, OpponentPool
from trl_agents.envs.make import make_env


# What differs from run to run
TIMES = ("seconds", "_time", "runtime", "per_second")

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
BANDIT = {"env": "trl_agents/Bandit-v0", "env_kwargs": {"n_arms": 2, "horizon": 2}}
GRPO = {"advantage_estimator": "group", "beta": 0.1}
PPO = {"num_generations": 1, "beta": 0.1, "kl_target": 0.01, "kl_horizon": 50, "value_learning_rate": 0.05}
# Four optimizer steps a rollout, so that most checkpoints are in the middle of one, and a log for every three
LONG = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "logging_steps": 3,
    "max_steps": 9,
    "max_completion_length": 3,
}


def paid(completions, log_extra, **kwargs):
    """A reward that most completions differ in, and that logs numbers of NumPy's."""
    log_extra("length", list(np.array([len(completion) for completion in completions])))
    return [sum(map(ord, str(completion))) % 17 / 17 for completion in completions]


CASES = {
    "grpo-chat": {**BANDIT, **GRPO, **LONG, "reward_normalization": "standardize", "num_train_seeds": 3},
    "grpo-window": {
        **BANDIT,
        **GRPO,
        "context": "window",
        "window": 1,
        "exploration": ["try_all", "epsilon_greedy=0.3", "context_summary", "exploration_bonus=1"],
        "num_train_seeds": 5,
        "steps_per_generation": 1,
        "max_steps": 5,
        "max_completion_length": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_eval_seeds": 2,
        "per_device_eval_batch_size": 2,
    },
    "grpo-dataset": {
        **LONG,
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "use_adaptive_entropy": True,
        "log_completions": True,
    },
    "grpo-adapter": {**BANDIT, **GRPO, **LONG, "given": True, "num_train_seeds": 3},
    "ppo-chat": {**BANDIT, **PPO, **LONG, "reward_normalization": "scale", "num_train_seeds": 5},
    "ppo-window": {
        **BANDIT,
        **PPO,
        **LONG,
        "context": "window",
        "window": 1,
        "separate_critic": True,
        "whiten_advantages": True,
        "num_train_seeds": 5,
    },
    "ppo-dataset": {**PPO, **LONG, "lr_scheduler_type": "cosine"},
    "ppo-lora": {**BANDIT, **PPO, **LONG, "lora": True, "num_train_seeds": 5},
    "self-play": {
        **PPO,
        "self_play": True,
        "context": "window",
        "window": 0,
        "num_train_seeds": 5,
        "max_completion_length": 3,
        "max_steps": 5,
        "logging_steps": 2,
    },
}


class Log(TrainerCallback):
    """Writes what is logged, a line each, as it is logged; and tells how far training is."""

    def __init__(self, file):
        self.file = Path(file)

    def on_log(self, args, state, control, logs=None, **kwargs):
        with self.file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **lasting(logs)}) + "\n")

    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)


def lasting(log):
    """An entry of the log without times."""
    return {name: value for name, value in log.items() if not any(part in name for part in TIMES)}


def make(case, folder, model_dir, **changes):
    """The trainer of a case."""
    settings = {"save_strategy": "steps", "shuffle_dataset": True, "learning_rate": 0.01, **CASES[case], **changes}
    env, lora, given, plays_itself = (settings.pop(name, None) for name in ("env", "lora", "given", "self_play"))
    classes = [(AgentGRPOTrainer, AgentGRPOConfig), (AgentPPOTrainer, AgentPPOConfig)]
    trainer_class, config_class = classes["kl_target" in settings]
    args = make_config(folder, config_class, **settings)
    kwargs = {"callbacks": [Log(Path(folder) / "log.jsonl")]}
    model = model_dir
    if lora:
        kwargs["peft_config"] = LoraConfig(**LORA)
    if given:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(**LORA))
    if plays_itself:
        pool = OpponentPool(size=2, every=1, latest=0.5, seed=3)
        env = functools.partial(make_env, "trl_agents/TicTacToe-v0", opponent=pool, seat="random")
    if env is None:
        rows = [{"prompt": f"paid {number}"} for number in range(5)]
        kwargs |= {"reward_funcs": paid, "train_dataset": Dataset.from_list(rows)}
    trainer = trainer_class(model, env=env, args=args, **kwargs)
    if plays_itself:
        pool.bind(trainer)
    return trainer


if __name__ == "__main__":
    case, folder, model_dir, settings = sys.argv[1:]
    trainer = make(case, folder, model_dir, **json.loads(settings))
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
