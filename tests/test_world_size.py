# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Two processes equal one, whatever shards the model. Files of `accelerate_configs/` are launched as they are, but for
the number of processes and the precision: a bandit by GRPO and tic-tac-toe by PPO. What is saved loads in one process.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import launch, start_on_cpu
from scripted import make_config, ready
from test_ppo_distributed import close, fixed_batch
from transformers import AutoModelForCausalLM

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer
from trl_agents.envs.bandit import Bandit
from trl_agents.envs.tictactoe import TicTacToe
from trl_agents.stages import let_another_trainer_follow
from trl_agents.tiny import tiny_model, tiny_tokenizer


N_EPISODES, N_STEPS = 8, 3
RUNS = {
    "bandit": (
        AgentGRPOTrainer,
        AgentGRPOConfig,
        "trl_agents/Bandit-v0",
        {
            "env_kwargs": {"n_arms": 3, "horizon": 3},
            "num_generations": N_EPISODES,  # the group lies on both processes
            "temperature": 0.8,
            "reward_normalization": "standardize",
            "scale_rewards": "group",
        },
    ),
    "tictactoe": (
        AgentPPOTrainer,
        AgentPPOConfig,
        "trl_agents/TicTacToe-v0",
        {
            "env_kwargs": {"opponent": "random", "seat": "random"},
            "num_generations": 1,
            # A row a move, of games of different lengths: the processes have different numbers of rows
            "context": "window",
            "window": 0,
            "gradient_accumulation_steps": 2,
            "value_head_init": "normal",
            "value_learning_rate": 3e-3,
            "whiten_advantages": True,
            "reward_normalization": "scale",
            "kl_in": "reward",
            "kl_target": 0.01,
        },
    ),
}
LOGGED = ("loss", "grad_norm", "reward", "kl", "agents/")


def recording(trainer_class):
    """The trainer, which keeps what its first rollout came to, and counts the passes it trains in."""

    class Recording(trainer_class):
        seeds, rows, n_passes = None, None, 0

        def roll_out(self, inputs):
            self.seeds = self.seeds or [row["seed"] for row in inputs]
            return super().roll_out(inputs)

        def assign_credit(self, rollout, rewards, batch):
            credit = super().assign_credit(rollout, rewards, batch)
            if self.rows is None and rollout is not None:
                masks = batch["completion_mask"].bool()
                self.rows = [
                    {"ids": ids[mask].tolist(), "advantages": advantages[mask].tolist()}
                    for ids, mask, advantages, row in zip(
                        batch["completion_ids"], masks, credit["advantages"], rollout.rows, strict=True
                    )
                    if row.turns  # the others only fill up
                ]
            return credit

        def compute_loss(self, *args, **kwargs):
            self.n_passes += 1
            return super().compute_loss(*args, **kwargs)

        def outcome(self):
            """Log-probabilities, and values, of rows that the policy has never seen."""
            trainer, batch = ready(self), fixed_batch()
            if not self.has_critic:
                return {"logps": trainer.score_batch(batch).tolist()}
            logps, values = trainer._values_of(batch)
            return {"logps": logps.tolist(), "values": values.tolist()}

    return Recording


def make_trainer(name, model, folder, n_processes=1, **settings):
    trainer_class, config_class, env, own = RUNS[name]
    n_rollouts = own.get("gradient_accumulation_steps", 1) * n_processes
    defaults = {
        "per_device_train_batch_size": N_EPISODES // n_rollouts,
        "max_completion_length": 8,
        "beta": 0.1,
        "max_steps": N_STEPS,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # so that a step follows the gradient's size and not the sign of a rounding error
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": N_STEPS,
    }
    args = make_config(folder, config_class, **{**defaults, **own, **settings})
    return recording(trainer_class)(model, env=env, args=args)


def train_all(model, folder, **settings):
    """Trains each of `RUNS`; returns what it came to, of which `seeds` and `rows` are this process's share."""
    found = {}
    for name in RUNS:
        trainer = make_trainer(name, model, Path(folder) / name, **settings)
        trainer.train()
        logs = [
            {key: value for key, value in log.items() if key.startswith(LOGGED) and not key.endswith("_seconds")}
            for log in trainer.state.log_history
            if "loss" in log
        ]
        found[name] = {"seeds": trainer.seeds, "rows": trainer.rows, "n_passes": trainer.n_passes, "logs": logs}
        found[name] |= {"type": trainer.accelerator.distributed_type.value, "outcome": trainer.outcome()}
        trainer.accelerator.wait_for_everyone()
        let_another_trainer_follow()
    return found


# -- one of two processes ---------------------------------------------------------------------------------------------


def main(model, folder):
    found = train_all(model, folder, n_processes=int(os.environ["WORLD_SIZE"]), **start_on_cpu())
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer([Bandit().instructions, TicTacToe().instructions] * 3, vocab_size=600)
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer, hidden_size=64, num_hidden_layers=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return train_all(model, tmp_path_factory.mktemp("alone"))


KINDS = {"cpu": "MULTI_CPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}


@pytest.mark.slow
@pytest.mark.parametrize("config", KINDS)
def test_two_processes_equal_one(config, model, alone, tmp_path):
    if KINDS[config] == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    launch(config, __file__, model, tmp_path)
    both = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for name, expected in alone.items():
        first, second = (found[name] for found in both)
        assert (first["type"], expected["type"]) == (KINDS[config], "NO")
        assert first["seeds"] + second["seeds"] == expected["seeds"]
        assert len(set(expected["seeds"])) == (1 if name == "bandit" else N_EPISODES)
        # The luck of an episode depends on its place among all, so two processes play what one plays
        rows = first["rows"] + second["rows"]
        assert [row["ids"] for row in rows] == [row["ids"] for row in expected["rows"]]
        for row, other in zip(rows, expected["rows"], strict=True):
            close(row["advantages"], other["advantages"], 1e-5)
        assert np.std(np.concatenate([row["advantages"] for row in rows])) > 0.1
        assert first["n_passes"] == second["n_passes"] == expected["n_passes"]
        if name == "tictactoe":
            assert len(first["rows"]) != len(second["rows"])

        assert len(first["logs"]) == len(expected["logs"]) == N_STEPS
        for log in (first["logs"][0], expected["logs"][0]):
            log.pop("agents/value_loss", None)  # the mean of the micro-batches' means, which hold other rows each
        assert first["logs"][0] == pytest.approx(expected["logs"][0], rel=1e-5, abs=1e-5)
        assert first["logs"][0]["grad_norm"] > 1.0
        for log in first["logs"]:
            assert np.isfinite(log["loss"])

        assert first["outcome"] == second["outcome"]
        folder = tmp_path / name / f"checkpoint-{N_STEPS}"
        _, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        loaded = make_trainer(name, str(folder), tmp_path / "loaded").outcome()
        untrained = make_trainer(name, model, tmp_path / "untrained").outcome()
        for key, values in loaded.items():
            close(values, first["outcome"][key], 1e-5)
            assert np.abs(np.array(values) - np.array(untrained[key])).max() > 1e-3


if __name__ == "__main__":  # one of several processes
    main(*sys.argv[1:])
