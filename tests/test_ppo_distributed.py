# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""PPO in several processes: two equal one, and what DeepSpeed shards is saved whole."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from scripted import Pay, ScriptedBackend, ScriptedTrainer, acts, make_config, ready, save_tiny_model
from transformers import AutoModelForCausalLM

from trl_agents import AgentGRPOConfig, AgentPPOConfig, AgentPPOTrainer
from trl_agents.value_head import VALUE_HEAD_FILE


# Episodes of one to three turns, so that the processes have different numbers of steps; `?` ends one by itself.
SCRIPT = acts("abc", "b?", "s", "cbs", "cca", "bs", "?", "bbb")
HEAD = ("value_head.weight", "value_head.bias")


class ScriptedPPOTrainer(AgentPPOTrainer):
    """As [`ScriptedTrainer`]; each process plays its share. Keeps the credit of every rollout."""

    script = None

    def _make_backend(self, model, n_slots, *args):
        if self.script is None:
            return super()._make_backend(model, n_slots, *args)
        share = len(self.script) // self.accelerator.num_processes
        start = self.accelerator.process_index * share
        return ScriptedBackend(self.text_tokenizer, self.script[start : start + share])

    def assign_credit(self, rollout, rewards, batch):
        credit = super().assign_credit(rollout, rewards, batch)
        self.__dict__.setdefault("credits", []).append(credit | {"completion_ids": batch["completion_ids"]})
        return credit


def launch(job, *arguments, n_processes=2, timeout=240):
    """Runs `JOBS[job]` of this file in `n_processes` processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(n_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, job, *map(str, arguments)]
        environment = os.environ | {name: str(value) for name, value in place.items()}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]


# -- plain processes --------------------------------------------------------------------------------------------------

RUNS = {
    "turn": {"advantage_level": "turn"},
    "token": {"advantage_level": "token"},
    "window": {"context": "window", "value_learning_rate": 0.3},
    "mean of samples": {"loss_type": "grpo", "gae_lambda": 1.0, "num_iterations": 2, "max_steps": 4},
    "in the loss": {"kl_in": "loss", "critic_warmup_steps": 1},
}


def train_plainly(model_dir, folder, n_processes):
    """Trains a few steps of each run as one of `n_processes`; returns what must not depend on their number."""
    results = {}
    for name, settings in RUNS.items():
        defaults = {
            "per_device_train_batch_size": 8 // n_processes,
            "num_generations": 1,
            "max_steps": 2,
            "whiten_advantages": True,
            "kl_in": "reward",
            "beta": 0.1,
            "value_head_init": "normal",
            "reward_normalization": "scale",
            "optim": "sgd",
            "learning_rate": 0.3,
            "max_grad_norm": 0.0,
            "env_kwargs": {"actions": "abcs"},
            "invalid_action": "end",
            "max_completion_length": 8,
            "ddp_find_unused_parameters": False,
        }
        args = make_config(Path(folder) / name, AgentPPOConfig, **(defaults | settings))
        trainer = ScriptedPPOTrainer(model_dir, env=Pay, args=args)
        trainer.script = SCRIPT
        trainer.train()
        logs = trainer.state.log_history[:-1]
        results[name] = {
            "weights": {key: value.tolist() for key, value in trainer.model.state_dict().items()},
            "logs": [{k: v for k, v in log.items() if k.startswith("agents/") and "seconds" not in k} for log in logs],
            "losses": [log["loss"] for log in logs],
            "credit": [
                {
                    key: [row[: int(m.sum())].tolist() for row, m in zip(credit[key], credit["value_mask"] >= 0)]
                    for key in ("advantages", "old_values", "returns", "value_mask")
                }
                for credit in trainer.credits
            ],
        }
    return results


def plain_job(model_dir, folder):
    found = train_plainly(model_dir, folder, 2)
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


JOBS = {"plain": plain_job}


def zero_config(stage, **settings):
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            # None of these small weights may stay whole, or nothing would be sharded
            "stage3_param_persistence_threshold": 0,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }


def zero_trainer(model_dir, folder, stage, peft_config=None, **settings):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 1,
        "beta": 0.1,
        "value_head_init": "normal",
        "env_kwargs": {"actions": "abcs"},
        "invalid_action": "end",
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "value_learning_rate": 3e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "deepspeed": zero_config(stage),
    }
    args = make_config(folder, AgentPPOConfig, **(defaults | settings))
    trainer = ScriptedPPOTrainer(model_dir, env=Pay, args=args, peft_config=peft_config)
    trainer.script = SCRIPT
    return trainer


def zero_job(model_dir, folder, stage, resume=""):
    trainer = zero_trainer(model_dir, folder, int(stage))
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    print(trainer.state.log_history)


JOBS |= {"zero": zero_job}

if __name__ == "__main__":  # one of several processes
    JOBS[sys.argv[1]](*sys.argv[2:])
