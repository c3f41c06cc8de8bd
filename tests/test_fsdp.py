# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""FSDP2 in two processes: whole weights for a rollout and shards afterwards, past selves, adapters, resuming."""

import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from launching import launch, start_on_cpu
from peft import AutoPeftModelForCausalLM, LoraConfig
from scripted import make_config, save_tiny_model
from test_ppo_distributed import close
from test_world_size import recording
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trl_agents import AgentPPOConfig, AgentPPOTrainer, OpponentPool
from trl_agents.envs.make import make_env
from trl_agents.fsdp import HOOKS, unsharded
from trl_agents.trainers.checks import check_fsdp


def make_trainer(model, folder, settings, pool=None, env="trl_agents/TicTacToe-v0", **kwargs):
    arguments = {name: kwargs.pop(name) for name in ("peft_config", "reward_funcs", "train_dataset") if name in kwargs}
    defaults = {
        "per_device_train_batch_size": 2,
        "num_generations": 1,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "value_head_init": "normal",
    }
    if env is not None:
        defaults |= {"context": "window", "window": 0}
        env = functools.partial(make_env, env, opponent=pool or "random")
    args = make_config(folder, AgentPPOConfig, **{**defaults, **settings, **kwargs})
    trainer = recording(AgentPPOTrainer)(model, env=env, args=args, **arguments)
    if pool is not None:
        pool.bind(trainer)
    return trainer


def is_sharded(model):
    """Whether all is as FSDP2 wants it: pieces, and the hooks that gather them."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooked = all(any("fsdp" in h.__module__ for h in getattr(m, kind).values()) for m in modules for kind in HOOKS)
    return len(modules) > 2 and hooked and all(type(p).__name__ == "DTensor" for p in model.parameters())


def whole(model, settings, folder, rank):
    """As many forward passes as a process likes."""
    trainer = make_trainer(model, f"{folder}/whole", settings)
    trainer.train()
    ids = torch.arange(3, 15)[None]
    expected = trainer.accelerator.get_state_dict(trainer.model)  # in the first process
    with trainer.weights_for_rollout() as unwrapped:
        found = {name: parameter.detach().clone() for name, parameter in unwrapped.named_parameters()}
        for _ in range(1 + 3 * rank):
            logits = unwrapped(ids).logits
    assert is_sharded(trainer.model)
    logits_sharded = trainer.model.eval()(ids).logits
    torch.testing.assert_close(logits_sharded, logits)
    if rank == 0:
        assert all(torch.equal(expected[name], parameter) for name, parameter in found.items())


def past_selves(model, settings, folder, rank):
    pool = OpponentPool(every=1, size=4)
    trainer = make_trainer(model, f"{folder}/past_selves", settings, pool)
    trainer.train()
    assert list(pool.snapshots) == [0, 1, 2] and pool.current < 2
    newest = trainer.accelerator.get_state_dict(trainer.model)
    if rank == 0:
        assert all(torch.equal(newest[name], weights) for name, weights in pool.snapshots[2].items())
        assert newest.keys() - pool.snapshots[2].keys() <= {"lm_head.weight", "value_head.weight", "value_head.bias"}
    sums = [{step: sum(w.sum().item() for w in kept.values()) for step, kept in pool.snapshots.items()}]
    sums = gather_object(sums)
    assert sums[0] == sums[1] and len(set(sums[0].values())) == 3
    playing = dict(pool.opponent.model.named_parameters())
    assert all(torch.equal(playing[name], weights) for name, weights in pool.snapshots[pool.current].items())
    with pytest.raises(ValueError, match="before `trainer.train"):
        OpponentPool().bind(trainer)


def resumed(model, settings, folder, rank):
    """With a critic of its own, whose trunk is sharded too."""
    settings = {**settings, "separate_critic": True}
    trainer = make_trainer(model, f"{folder}/resumed", settings, save_strategy="steps", save_steps=1)
    trainer.train()
    expected = trainer.outcome()
    trainer = make_trainer(model, f"{folder}/again", settings)
    trainer.train(resume_from_checkpoint=f"{folder}/resumed/checkpoint-1")
    assert trainer.outcome() == expected
    return expected


def answers(model, settings, folder, rank):
    """TRL's own generation, which is over sooner in one process."""
    rows = Dataset.from_dict({"prompt": ["one", "two", "three", "four"]})
    rewards = {"reward_funcs": lambda completions, **kwargs: [float(len(text)) for text in completions]}
    trainer = make_trainer(model, f"{folder}/answers", settings, env=None, train_dataset=rows, **rewards)
    trainer.generation_config.max_new_tokens = 2 + 5 * rank
    trainer.train()
    assert is_sharded(trainer.model)
    assert trainer.state.log_history[0]["completions/max_length"] > 2


def adapter(model, settings, folder, rank):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(model, f"{folder}/adapter", settings, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return trainer.outcome()


JOBS = [whole, past_selves, resumed, answers, adapter]


def main(model, folder):
    settings, rank, found = start_on_cpu(), int(os.environ["RANK"]), {}
    for job in JOBS:
        found[job.__name__] = job(model, settings, folder, rank)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_in_two_processes(tmp_path):
    model = save_tiny_model(tmp_path / "model", hidden_size=64, num_hidden_layers=2)
    launch("fsdp2", __file__, model, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    cpu = {"use_cpu": True}
    loaded = make_trainer(
        str(tmp_path / "resumed/checkpoint-2"), tmp_path / "loaded", cpu, separate_critic=True
    ).outcome()
    close(loaded["values"], found["resumed"]["values"], 1e-5)
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    loaded = make_trainer(policy, tmp_path / "loaded", cpu, value_head_init=str(tmp_path / "adapter")).outcome()
    close(loaded["logps"], found["adapter"]["logps"], 1e-5)
    close(loaded["values"], found["adapter"]["values"], 1e-5)


# -- in one process ---------------------------------------------------------------------------------------------------


class Sharded(nn.Linear):
    """As FSDP2 shows itself: what `unsharded` asks of it is written down."""

    def __init__(self):
        super().__init__(2, 2)
        self.asked = []

    def unshard(self):
        self.asked.append("unshard")

    def reshard(self):
        self.asked.append("reshard")


@pytest.fixture
def sharded(monkeypatch):
    monkeypatch.setattr("trl_agents.fsdp.FSDPModule", Sharded)
    module, seen = Sharded(), []
    for kind in ("pre", "post"):

        def of_fsdp(*args, kind=kind):
            seen.append(f"fsdp {kind}")

        of_fsdp.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
        register = module.register_forward_pre_hook if kind == "pre" else module.register_forward_hook
        register(of_fsdp)
    module.register_forward_hook(lambda *args: seen.append("another"))
    return module, seen


def test_its_hooks_rest_and_come_back(sharded):
    module, seen = sharded
    x = torch.zeros(1, 2)
    with pytest.raises(KeyError), unsharded(nn.Sequential(module)):
        module(x)
        assert (seen, module.asked) == (["another"], ["unshard"])
        raise KeyError  # also when a rollout fails
    assert module.asked == ["unshard", "reshard"]
    module(x)
    assert seen == ["another", "fsdp pre", "fsdp post", "another"]


def test_unknown_hooks_are_told(sharded):
    module, _ = sharded
    module._forward_hooks.popitem(last=False)
    with pytest.raises(RuntimeError, match="other FSDP hooks"), unsharded(module):
        pass
    assert len(module._forward_pre_hooks) == 1


def fake(version=2, efficient=False, ref_model=None, processes=2, use_vllm=False, plays=True, has_critic=False):
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)
    accelerator = SimpleNamespace(num_processes=processes, state=SimpleNamespace(fsdp_plugin=plugin))
    kinds = {"use_vllm": use_vllm, "plays": plays, "has_critic": has_critic}
    return SimpleNamespace(accelerator=accelerator, ref_model=ref_model, beta=0.1, **kinds)


def test_what_would_hang_or_go_wrong_is_refused():
    check_fsdp(fake())
    check_fsdp(fake(efficient=True))
    check_fsdp(fake(version=1, use_vllm=True))
    check_fsdp(fake(version=1, plays=False))  # is TRL's GRPO
    with pytest.raises(ValueError, match="fsdp_version: 1"):
        check_fsdp(fake(version=1, plays=False, has_critic=True))
    with pytest.raises(ValueError, match="fsdp_version: 1 .* Use fsdp_version: 2"):
        check_fsdp(fake(version=1))
    with pytest.raises(ValueError, match=r"fsdp_cpu_ram_efficient_loading: true .* \(beta=0.1\)"):
        check_fsdp(fake(efficient=True, ref_model="a model"))


def test_plays_on_its_device_before_training(tmp_path):
    trainer = make_trainer(save_tiny_model(tmp_path / "model"), tmp_path / "out", {"use_cpu": True}, beta=0.0)
    moved = []
    trainer.model.to = lambda device: moved.append(device)
    with trainer.weights_for_rollout():
        assert moved == []  # one process, whose model is where it belongs
    trainer.is_fsdp_enabled, state = True, trainer.accelerator.state
    trainer.accelerator = SimpleNamespace(device="cuda:1", num_processes=1, state=state, unwrap_model=lambda m: m)
    trainer._place_untrained()
    assert moved == ["cuda:1"]
    trainer.accelerator.num_processes = 2
    trainer.accelerator.state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=True))
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: true leaves"):
        trainer._place_untrained()


if __name__ == "__main__":  # one of two processes
    main(*sys.argv[1:])
