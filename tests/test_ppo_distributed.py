# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""PPO in several processes: two equal one, and what DeepSpeed shards is saved whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from launching import free_port, let_gloo_go_at_exit
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from scripted import Pay, ScriptedBackend, acts, make_config, ready, save_tiny_model
from transformers import AutoModelForCausalLM, training_args

from trl_agents import AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer
from trl_agents.value_head import VALUE_HEAD_FILE


# Episodes of one to three turns, so that the processes have different numbers of steps; `?` ends one by itself.
SCRIPT = acts("abc", "b?", "s", "cbs", "cca", "bs", "?", "bbb")


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
        self.__dict__.setdefault("credits", []).append(credit | {"mask": batch["completion_mask"]})
        return credit

    def values_of(self, batch):
        return self._values_of(batch)


def launch(job, *arguments, n_processes=2, timeout=600):
    """Runs `JOBS[job]` of this file in `n_processes` processes that know of each other."""
    port, processes = free_port(), []
    for rank in range(n_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
    "token": {"advantage_level": "token", "ddp_find_unused_parameters": True},  # which the head must survive
    "window": {"context": "window", "value_learning_rate": 0.3},
    "mean of samples": {"loss_type": "grpo", "gae_lambda": 1.0, "num_iterations": 2, "max_steps": 4},
    "in the loss": {"kl_in": "loss", "critic_warmup_steps": 1, "max_steps": 3},
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
                    key: [
                        row[mask.bool()].tolist() for row, mask in zip(credit[key], credit["mask"], strict=True)
                    ]  # without padding, of which each process has its own width
                    for key in ("advantages", "old_values", "returns", "value_mask")
                }
                for credit in trainer.credits
            ],
        }
    return results


def plain_job(model_dir, folder):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    found = train_plainly(model_dir, folder, 2)
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def single_job(model_dir, folder):
    """One episode a process, which PPO can learn from."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    args = make_config(folder, AgentPPOConfig, per_device_train_batch_size=1, num_generations=1, max_steps=1)
    trainer = ScriptedPPOTrainer(model_dir, env=Pay, args=args)
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] > 0 and trainer.args.generation_batch_size == 2


JOBS = {"plain": plain_job, "single": single_job}


def close(left, right, tolerance=1e-6):
    np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    model_dir = save_tiny_model(tmp_path / "model")
    (tmp_path / "two").mkdir()
    launch("plain", model_dir, tmp_path / "two")
    alone_in_all = train_plainly(model_dir, tmp_path / "one", 1)
    two = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in range(2)]
    start = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    for name, alone in alone_in_all.items():
        first, second = (found[name] for found in two)
        assert len(alone["credit"]) > 1 and len(alone["losses"]) > 1
        for here, there, both in zip(first["credit"], second["credit"], alone["credit"], strict=True):
            for key, rows in both.items():
                joined = here[key] + there[key]
                if name == "window":  # each process pads its rows, with rows that weigh nothing
                    joined, rows = [[row for row in part if np.any(row)] for part in (joined, rows)]
                assert len(joined) == len(rows)
                for row, expected in zip(joined, rows, strict=True):
                    close(row, expected, 1e-5)
            assert any(np.any(row) for row in both["advantages"]) and any(np.any(row) for row in both["old_values"])
        close(first["losses"], alone["losses"], 1e-5)
        for logs, expected in zip(first["logs"], alone["logs"], strict=True):
            assert logs == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert any(log.get("agents/kl_mean", 0) != 0 for log in alone["logs"])
        for key, weights in alone["weights"].items():
            close(first["weights"][key], weights, 1e-5)
            assert first["weights"][key] == second["weights"][key]
            if key in start:
                assert not torch.equal(torch.tensor(weights), start[key])


@pytest.mark.slow
def test_one_episode_a_process(tmp_path):
    launch("single", save_tiny_model(tmp_path / "model"), tmp_path / "out")


# -- DeepSpeed --------------------------------------------------------------------------------------------------------


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


def start_deepspeed():
    """Accelerate has no DeepSpeed without an accelerator, but takes up what it finds started."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__.clear()  # or it compiles its own communication, for which it needs a compiler
    PartialState(backend="gloo")


def zero_trainer(model_dir, folder, stage=None, **settings):
    """Two steps of PPO, sharded unless `stage` is None."""
    defaults = {
        "per_device_train_batch_size": 8 if stage is None else 4,
        "num_generations": 1,
        "beta": 0.1,
        "value_head_init": "normal",
        "env_kwargs": {"actions": "abcs"},
        "invalid_action": "end",
        "max_completion_length": 8,
        "adam_epsilon": 1e-3,  # so that a step follows the gradient's size and not the sign of a rounding error
        "learning_rate": 1e-3,
        "value_learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    if stage is not None:
        start_deepspeed()
        training_args.is_torch_bf16_gpu_available = lambda: True  # asked for because `use_cpu` is off
        defaults |= {
            "deepspeed": zero_config(int(stage)),
            "use_cpu": False,
            "accelerator_config": {"use_configured_state": True},
        }
    kwargs = {"peft_config": settings.pop("peft_config", None)}
    args = make_config(folder, AgentPPOConfig, **(defaults | settings))
    trainer = ScriptedPPOTrainer(model_dir, env=Pay, args=args, **kwargs)
    trainer.script = SCRIPT
    return trainer


def fixed_batch():
    """Rows that the policy has never seen."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 250, (2, 12), generator=generator)
    ones = torch.ones_like(ids)
    return {
        "prompt_ids": ids[:, :4],
        "prompt_mask": ones[:, :4],
        "completion_ids": ids[:, 4:],
        "completion_mask": ones[:, 4:],
    }


def outcome(trainer):
    """What a run came to, the same on each process: its losses, and log-probabilities and values of a fixed batch."""
    logps, values = ready(trainer).values_of(fixed_batch())
    return {"logps": logps.tolist(), "values": values.tolist(), "logs": told(trainer)}


def told(trainer):
    kept = ("loss", "grad_norm", "learning_rate", "reward", "agents/value_loss", "agents/value_mean", "agents/kl_mean")
    return [{name: log[name] for name in kept if name in log} for log in trainer.state.log_history if "loss" in log]


def zero_job(model_dir, folder, stage, settings="{}", resume=""):
    trainer = zero_trainer(model_dir, folder, stage, **json.loads(settings))
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    found = outcome(trainer) | {"rates": rates, "dtype": str(trainer.value_head.weight.dtype)}
    if os.environ["RANK"] == "0":
        Path(folder, "found.json").write_text(json.dumps(found))


def lora_job(model_dir, folder, stage):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = zero_trainer(model_dir, folder, stage, peft_config=lora, value_learning_rate=None)
    trainer.train()
    trainer.save_model()
    found = outcome(trainer)
    if os.environ["RANK"] == "0":
        Path(folder, "found.json").write_text(json.dumps(found))


def grpo_job(model_dir, folder, stage):
    start_deepspeed()
    args = make_config(
        folder,
        per_device_train_batch_size=2,
        num_generations=4,
        env_kwargs={"n_arms": 2, "horizon": 2},
        max_completion_length=6,
        max_steps=1,
        use_cpu=False,
        accelerator_config={"use_configured_state": True},
        deepspeed=zero_config(int(stage)),
    )
    trainer = AgentGRPOTrainer(model_dir, env="trl_agents/Bandit-v0", args=args)
    trainer.train()
    trainer.save_model()
    if os.environ["RANK"] == "0":
        Path(folder, "found.json").write_text(json.dumps(trainer.state.log_history[0]))


JOBS |= {"zero": zero_job, "lora": lora_job, "grpo": grpo_job}


def found_in(folder):
    return json.loads((folder / "found.json").read_text())


def compare(found, expected, tolerance):
    close(found["logps"], expected["logps"], tolerance)
    close(found["values"], expected["values"], tolerance)
    for log, other in zip(found["logs"], expected["logs"], strict=True):
        assert log == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return save_tiny_model(tmp_path_factory.mktemp("sharded"), hidden_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("separate_critic", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_shards_is_saved_whole(sharded_model, tmp_path, stage, separate_critic):
    folder, critic = tmp_path / "out", {"separate_critic": separate_critic}
    launch("zero", sharded_model, folder, stage, json.dumps(critic))
    found = found_in(folder)
    alone = zero_trainer(sharded_model, tmp_path / "alone", **critic)
    alone.train()
    compare(found, outcome(alone), 1e-4)  # sharding changes nothing
    assert found["rates"][-1] == pytest.approx(3 * found["rates"][0])

    for saved in (folder, folder / "checkpoint-2"):
        assert not [name for name in load_file(saved / "model.safetensors") if "value_head" in name]
        _, notes = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
        assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        head = load_file(saved / VALUE_HEAD_FILE)
        assert head["weight"].any() and {tensor.dtype for tensor in head.values()} == {torch.float32}
        trainer = zero_trainer(str(saved), tmp_path / "loaded", **critic)
        assert all(torch.equal(head[name], value) for name, value in trainer.value_head.state_dict().items())
        loaded = outcome(trainer)
        close(loaded["values"], found["values"])
        close(loaded["logps"], found["logps"], 1e-5)

    launch("zero", sharded_model, tmp_path / "resumed", stage, json.dumps(critic), folder / "checkpoint-1")
    compare(found_in(tmp_path / "resumed"), found, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_best_model_in_half_precision(sharded_model, tmp_path, stage):
    folder = tmp_path / "out"
    settings = {
        "bf16": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "agents/turns_mean",  # the same at each evaluation: the first stays the best
        "eval_strategy": "steps",
        "eval_steps": 1,
        "num_eval_seeds": 8,
        "per_device_eval_batch_size": 4,
        "num_generations_eval": 1,
    }
    launch("zero", sharded_model, folder, stage, json.dumps(settings))
    found = found_in(folder)
    best, last = (load_file(folder / f"checkpoint-{step}" / VALUE_HEAD_FILE) for step in (1, 2))
    saved = load_file(folder / VALUE_HEAD_FILE)
    assert torch.equal(saved["weight"], best["weight"]) and not torch.equal(best["weight"], last["weight"])
    assert saved["weight"].dtype == torch.float32 and found["dtype"] == "torch.bfloat16"
    trainer = zero_trainer(str(folder), tmp_path / "loaded", bf16=True)
    close(outcome(trainer)["values"], found["values"], 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters(sharded_model, tmp_path, stage):
    folder = tmp_path / "out"
    launch("lora", sharded_model, folder, stage)
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter and not [name for name in adapter if "value_head" in name]
    model = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    trainer = zero_trainer(model, tmp_path / "loaded", value_head_init=str(folder))
    found, loaded = found_in(folder), outcome(trainer)
    close(loaded["values"], found["values"], 1e-5)
    close(loaded["logps"], found["logps"], 1e-5)
    assert np.any(found["values"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_groups(sharded_model, tmp_path, stage):
    folder = tmp_path / "out"
    launch("grpo", sharded_model, folder, stage)
    assert np.isfinite(found_in(folder)["loss"])
    assert not (folder / VALUE_HEAD_FILE).exists()
    trained = load_file(folder / "model.safetensors")
    start = load_file(Path(sharded_model) / "model.safetensors")
    # Stage 2 writes tied weights under both of their names
    assert start.keys() <= trained.keys() <= start.keys() | {"lm_head.weight"}
    assert any(not torch.equal(trained[name], start[name]) for name in start)


if __name__ == "__main__":  # one of several processes
    let_gloo_go_at_exit()
    JOBS[sys.argv[1]](*sys.argv[2:])
