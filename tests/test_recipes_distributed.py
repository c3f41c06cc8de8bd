# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Recipes of several stages in two processes: plain ones, and under DeepSpeed, which knows one trainer a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SMALL_REFT = ["--dataset_kwargs", '{"n": 24, "min_steps": 1, "max_steps": 1, "max_value": 9}', "--num_test", 6]
SMALL_REFT += ["--warmup_epochs", 30, "--sft_epochs", 3, "--sft_batch_size", 8, "--max_steps", 2]
SMALL_REFT += ["--per_device_train_batch_size", 2, "--max_completion_length", 40, "--disable_tqdm", "true"]
SMALL_REFT += ["--st_samples", 8, "--st_epochs", 1, "--st_rounds", 2, "--num_votes", 3, "--rerank", "true"]
SMALL_REFT += ["--methods", "sft", "offline_st", "online_st", "reft", "reft_separate_critic"]


def run_two(script: str, *arguments, launcher: list[str]) -> subprocess.CompletedProcess:
    command = [*launcher, str(ROOT / "recipes" / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def plain() -> list[str]:
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]


def deepspeed(stage: int) -> list[str]:
    pytest.importorskip("deepspeed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*torchrun, __file__, str(stage)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "zero2", "zero3"])
def test_reft_in_two_processes(tmp_path, kind):
    """All its stages, one trainer after the other, and then once more: they are done."""
    launcher = plain() if kind == "plain" else deepspeed(int(kind[-1]))
    arguments = [*SMALL_REFT, "--output_dir", tmp_path, *(["--use_cpu", "true"] if kind == "plain" else [])]
    result = run_two("reft.py", *arguments, launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("| reft_separate_critic |") == 1  # by one process
    accuracy = json.loads((tmp_path / "metrics.json").read_text())
    assert list(accuracy) == ["greedy", "vote@3", "rerank@3"]
    weights = sorted(path.parent.name for path in tmp_path.glob("*/model.safetensors"))
    assert weights == sorted(["start", "warmup", "reranker", *SMALL_REFT[SMALL_REFT.index("--methods") + 1 :]])
    again = run_two("reft.py", *arguments, launcher=launcher)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "train_runtime" in result.stdout and "train_runtime" not in again.stdout
    assert json.loads((tmp_path / "metrics.json").read_text()) == accuracy


def main(stage: str, script: str, *arguments: str) -> None:
    """One of several processes: DeepSpeed without an accelerator, which `accelerate launch` does not start."""
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
    }
    import runpy

    import deepspeed.ops
    from accelerate import PartialState
    from transformers import TrainingArguments

    deepspeed.ops.__compatible_ops__.clear()  # or it compiles its own communication, for which it needs a compiler
    PartialState(backend="gloo")
    finish = TrainingArguments.__post_init__

    def keep_the_processes(self):
        self.accelerator_config = {"use_configured_state": True}
        finish(self)

    TrainingArguments.__post_init__ = keep_the_processes
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
