# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Two processes, of which one has it worse than the other: neither waits for ever, and both do the same passes."""

import faulthandler
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from launching import launch, start_on_cpu
from resumed import make
from scripted import Pay, make_config, save_tiny_model

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer
from trl_agents.trainers import memory
from trl_agents.trainers.memory import WORK_FILE


class Down(Pay):
    """Fails wherever the second process plays."""

    def step(self, action):
        if os.environ["RANK"] == "1":
            raise RuntimeError("the second process is down")
        return super().step(action)


def environments_fail(model, folder, settings, rank):
    """All of one process's: it has no row that weighs anything, and fills up to as many as the other has."""
    told = []
    for kind in ("grpo", "ppo"):
        classes = {"grpo": (AgentGRPOTrainer, AgentGRPOConfig), "ppo": (AgentPPOTrainer, AgentPPOConfig)}
        own = {"num_generations": 1, "whiten_advantages": True} if kind == "ppo" else {"advantage_estimator": "group"}
        trainer_class, config_class = classes[kind]
        own |= {"gradient_accumulation_steps": 2, "context": "window", "max_fault_share": 1.0, "max_steps": 1}
        trainer = trainer_class(model, env=Down, args=make_config(f"{folder}/{kind}", config_class, **own, **settings))
        passes, compute_loss = [], trainer.compute_loss

        def count(*args, passes=passes, compute_loss=compute_loss, **kwargs):
            passes.append(1)
            return compute_loss(*args, **kwargs)

        trainer.compute_loss = count
        trainer.train()
        log = trainer.state.log_history[0]
        told.append({"passes": len(passes), "lost": log["agents/lost_share"], "norm": log["grad_norm"]})
    return told


def work_is_gone(model, folder, settings, rank):
    """One process's part of a checkpoint: both play a new rollout, or one would wait for the other's."""
    settings = {**settings, "num_train_seeds": 16, "save_steps": 3, "max_steps": 3}
    trainer = make("ppo-window", f"{folder}/begun", model, **settings)
    trainer.train()
    checkpoint = Path(f"{folder}/begun/checkpoint-3")
    if rank == 1:
        (checkpoint / WORK_FILE.format(1)).unlink()
    trainer.accelerator.wait_for_everyone()
    trainer = make("ppo-window", f"{folder}/again", model, **{**settings, "max_steps": 4, "save_strategy": "no"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    told = [str(each.message) for each in caught if "is not gone on with" in str(each.message)]
    return {"step": trainer.state.global_step, "told": told}


JOBS = [environments_fail, work_is_gone]


def main(model, folder):
    faulthandler.dump_traceback_later(240, exit=True)  # a process that waits does not stay behind for ever
    settings, rank = start_on_cpu(), int(os.environ["RANK"])
    found = {job.__name__: job(model, folder, settings, rank) for job in JOBS}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_in_two_processes(tmp_path):
    launch("cpu", __file__, save_tiny_model(tmp_path / "model"), tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["environments_fail"] == second["environments_fail"]
    for told in first["environments_fail"]:
        assert told["passes"] == 2 and told["lost"] == 0.5 and 0 < told["norm"] < np.inf
    assert first["work_is_gone"] == second["work_is_gone"]
    assert first["work_is_gone"]["step"] == 4
    (told,) = first["work_is_gone"]["told"]
    assert "checkpoint-3: it has no agent_work_1.pt. The next one is played at once" in told


def test_processes_that_found_different_checkpoints(monkeypatch):
    monkeypatch.setattr(memory, "gather_object", lambda own: [*own, "out/checkpoint-2"])
    assert memory.agreed_on("out/checkpoint-2") == "out/checkpoint-2"
    with pytest.raises(ValueError, match=r"different checkpoints .* \[None, 'out/checkpoint-2'\]"):
        memory.agreed_on(None)


if __name__ == "__main__":  # one of two processes
    main(*sys.argv[1:])
