# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The value head is kept: beside the weights, under adapters, by the Hub, and through a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from scripted import Pay, ScriptedTrainer, acts, make_config, save_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from trl_agents import AgentPPOConfig, AgentPPOTrainer
from trl_agents.trainers.memory import MEMORY_FILE
from trl_agents.value_head import VALUE_HEAD_FILE


SCRIPT = acts("abc", "b?", "s", "cbs")  # episodes of different lengths; `?` ends one by itself
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
KINDS = ["full", "separate", "lora", "qlora"]  # what is trained; "separate" has a critic of its own


class ScriptedPPOTrainer(ScriptedTrainer, AgentPPOTrainer):
    """The real trainer, whose model's replies are written down."""


def make(folder, model, *, script=SCRIPT, kind="full", callbacks=None, optimizers=(None, None), **settings):
    """A trainer of two steps that writes a checkpoint after each."""
    defaults = {
        "num_generations": 1,
        "env_kwargs": {"actions": "abcs"},
        "invalid_action": "end",
        "value_head_init": "normal",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    kwargs = {"callbacks": callbacks, "optimizers": optimizers}
    if isinstance(model, str):  # else the adapter is on it already
        if "lora" in kind:
            kwargs["peft_config"] = LoraConfig(**LORA)
        if kind == "qlora":
            kwargs["quantization_config"] = quantization()
    if kind == "separate":
        defaults["separate_critic"] = True
    args = make_config(folder, AgentPPOConfig, **(defaults | settings))
    trainer = ScriptedPPOTrainer(model, env=Pay, args=args, **kwargs)
    trainer.script = script
    return trainer


def quantization():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def head_of(trainer):
    return {name: value.clone() for name, value in trainer.value_head.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def moments_of(trainer):
    """Adam's state of the head."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        f"{name}.{key}": torch.as_tensor(value).clone()
        for name, parameter in trainer.value_head.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def told(trainer):
    """The log, without how long things took."""
    return [
        {name: value for name, value in log.items() if "seconds" not in name and not name.endswith("_time")}
        for log in trainer.state.log_history
        if "loss" in log
    ]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=64)


# -- saved, loaded, resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_resumed(model_dir, tmp_path, kind):
    whole = make(tmp_path / "whole", model_dir, kind=kind)
    start = head_of(whole)
    whole.train()
    whole.save_model()
    head, moments = head_of(whole), moments_of(whole)
    assert not torch.equal(head["weight"], start["weight"]) and not torch.equal(head["bias"], start["bias"])
    assert moments["weight.exp_avg"].any() and moments["weight.step"] == 2

    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-2"):
        assert same(load_file(folder / VALUE_HEAD_FILE), head)
        weights = "adapter_model.safetensors" if "lora" in kind else "model.safetensors"
        assert not [name for name in load_file(folder / weights) if "value_head" in name]
        for loaded in load(folder, kind, tmp_path):
            assert same(head_of(loaded), head)
            assert loaded.value_head is loaded.causal_lm.value_head

    resumed = make(tmp_path / "resumed", model_dir, kind=kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same(head_of(resumed), head) and same(moments_of(resumed), moments)
    assert told(resumed) == told(whole)


def load(folder, kind, tmp_path):
    """A trainer for each way to come back to a saved model."""
    if "lora" not in kind:
        _, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        yield make(tmp_path / "loaded", str(folder), kind=kind)
        yield make(tmp_path / "loaded", AutoModelForCausalLM.from_pretrained(folder), kind=kind)
        return
    # A model with an adapter does not remember the adapter's folder
    settings = {"kind": kind, "value_head_init": str(folder)}
    quantized = {"quantization_config": quantization()} if kind == "qlora" else {}
    model = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, **quantized)
    yield make(tmp_path / "loaded", model, **settings)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(base, **quantized)
    yield make(tmp_path / "loaded", PeftModel.from_pretrained(base, folder, is_trainable=True), **settings)


def test_resumed_under_another_learning_rate_of_its_own(model_dir, tmp_path):
    settings = {"value_learning_rate": 3e-3, "lr_scheduler_type": "linear", "max_steps": 3}
    whole = make(tmp_path / "whole", model_dir, **settings)
    whole.train()
    resumed = make(tmp_path / "resumed", model_dir, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(head_of(resumed), head_of(whole)) and same(moments_of(resumed), moments_of(whole))
    assert told(resumed) == told(whole)


@pytest.mark.parametrize("rate", [None, 3e-3])
def test_an_optimizer_of_ones_own_learns_the_head(model_dir, tmp_path, rate):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = make(tmp_path / "out", model, value_learning_rate=rate, max_steps=1, optimizers=(optimizer, None))
    before = head_of(trainer)
    trainer.train()
    step = (head_of(trainer)["weight"] - before["weight"]).abs().max()
    assert step == pytest.approx(rate or 1e-3, rel=0.01)  # of Adam's first step


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_without_the_head(model_dir, tmp_path, kind):
    make(tmp_path / "out", model_dir, kind=kind, max_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*pin_memory.*")
        make(tmp_path / "resumed", model_dir, kind=kind).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / VALUE_HEAD_FILE).unlink()
    resumed = make(tmp_path / "resumed", model_dir, kind=kind)
    with pytest.warns(UserWarning, match=r"checkpoint-1 has no value_head.safetensors: .*critic_warmup_steps"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_models_head_comes_back(model_dir, tmp_path, kind):
    heads = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            heads[state.global_step] = head_of(trainer)

    trainer = make(
        tmp_path / "out",
        model_dir,
        kind=kind,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        num_eval_seeds=4,
        per_device_eval_batch_size=4,
        load_best_model_at_end=True,
        metric_for_best_model="agents/turns_mean",  # the same at each evaluation, so that the first stays the best
        greater_is_better=True,
        callbacks=[Keep()],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert same(head_of(trainer), heads[1]) and not same(heads[1], heads[3])


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """What is uploaded, in place of the Hub: for each commit its message and the files with their contents."""
    commits = []

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, path_in_repo="", ignore_patterns=(), **kwargs):
        folder = Path(folder_path)
        files = {
            str(Path(path_in_repo or "") / path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.relative_to(folder).parts[0].startswith(("_", "checkpoint-"))
        }
        commits.append((commit_message, files))
        info = CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message=commit_message,
            commit_description="", oid="0",
        )  # fmt: skip
        if not kwargs.get("run_as_future"):
            return info
        future = self.run_as_future(lambda: info)
        future.result()
        return future

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return commits


@pytest.mark.parametrize("kind", KINDS)
def test_pushed_to_the_hub(model_dir, tmp_path, hub, kind):
    trainer = make(tmp_path / "out", model_dir, kind=kind, hub_model_id="someone/agent", save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    (message, files), = hub  # fmt: skip
    assert {VALUE_HEAD_FILE, "README.md", "tokenizer.json"} <= files.keys()
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in files.items():
        (pushed / name).write_bytes(content)
    loaded = next(iter(load(pushed, kind, tmp_path)))
    assert same(head_of(loaded), head_of(trainer)) and head_of(trainer)["weight"].any()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_pushed_with_each_checkpoint(model_dir, tmp_path, hub, strategy):
    trainer = make(
        tmp_path / "out",
        model_dir,
        push_to_hub=True,
        hub_model_id="someone/agent",
        hub_strategy=strategy,
        hub_always_push=True,
    )
    trainer.train()
    for step in (1, 2):
        commits = [files for message, files in hub if message.startswith(f"Training in progress, step {step}")]
        head = (tmp_path / "out" / f"checkpoint-{step}" / VALUE_HEAD_FILE).read_bytes()
        assert commits[0][VALUE_HEAD_FILE] == head
        if strategy == "checkpoint":
            assert commits[1][f"last-checkpoint/{VALUE_HEAD_FILE}"] == head
            assert f"last-checkpoint/{MEMORY_FILE}" in commits[1]


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_and_gradient_checkpointing(model_dir, tmp_path, kind, checkpointing):
    trainer = make(
        tmp_path / "out",
        model_dir,
        kind=kind,
        bf16=True,
        gradient_checkpointing=checkpointing,
        model_init_kwargs={"dtype": "bfloat16"},
        learning_rate=1e-2,
    )
    before = head_of(trainer)
    trainer.train()
    assert all(log["grad_norm"] > 0 for log in told(trainer))
    after = head_of(trainer)
    assert after["weight"].dtype == after["bias"].dtype == torch.float32
    assert not torch.equal(before["weight"], after["weight"])
    saved = load_file(tmp_path / "out" / "checkpoint-2" / VALUE_HEAD_FILE)
    assert saved["weight"].dtype == torch.float32
    assert {value.dtype for name, value in saved.items() if name.startswith("trunk.")} <= {torch.bfloat16}
    trunk = next(p for name, p in trainer.model.named_parameters() if "norm" in name)
    assert trunk.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_number(model_dir, tmp_path):
    plain, checkpointed = (make(tmp_path / str(on), model_dir, gradient_checkpointing=on) for on in (False, True))
    plain.train()
    checkpointed.train()
    for log, other in zip(told(plain), told(checkpointed), strict=True):
        assert log == pytest.approx(other, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(plain.value_head.weight, checkpointed.value_head.weight)


# -- killed -----------------------------------------------------------------------------------------------------------

LONG_RUN = {
    "script": None,  # sampled: the luck has to be the same too
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,  # 8 episodes a rollout, of which two optimizer steps are made, each epoch anew
    "num_iterations": 2,
    "save_steps": 4,  # a rollout's end
    "kl_target": 0.05,
    "kl_horizon": 40,
    "beta": 0.2,
    "reward_normalization": "scale",
    "lr_scheduler_type": "cosine",
    "learning_rate": 5e-3,
    "value_learning_rate": 1e-2,
    "invalid_action": "random",
    "max_completion_length": 4,
    "max_grad_norm": 1.0,
}


class Slow(TrainerCallback):
    """Tells how far training is, and leaves time to be killed."""

    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)
        time.sleep(0.3)


def run_until_killed(model_dir, folder):
    make(folder, model_dir, callbacks=[Slow()], **LONG_RUN).train()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed(model_dir, tmp_path):
    process = subprocess.Popen(
        [sys.executable, __file__, model_dir, str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step 6"):  # in the middle of the second rollout
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, output
    assert {path.name for path in (tmp_path / "killed").glob("checkpoint-*")} == {"checkpoint-4"}

    resumed = make(tmp_path / "killed", model_dir, **LONG_RUN)
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole", model_dir, **LONG_RUN)
    whole.train()
    assert told(resumed) == told(whole)
    assert same(head_of(resumed), head_of(whole)) and same(moments_of(resumed), moments_of(whole))
    assert resumed.beta == whole.beta != LONG_RUN["beta"]
    coefficients = [log["agents/kl_coef"] for log in told(whole) if "agents/kl_coef" in log]
    assert len(coefficients) == 3 and len(set(coefficients)) == 3
    assert len({log["learning_rate"] for log in told(whole)}) == 12


if __name__ == "__main__":  # the process that is killed
    run_until_killed(sys.argv[1], sys.argv[2])
