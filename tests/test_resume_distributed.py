# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is sharded over processes is written whole, and resumed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripted import save_tiny_model
from test_ppo_distributed import compare, found_in, launch

from trl_agents.checkpoints import UNFINISHED
from trl_agents.trainers.memory import MEMORY_FILE, REFERENCE_FILE, WORK_FILE


@pytest.mark.slow
def test_a_sharded_reference_that_follows_the_policy(tmp_path):
    pytest.importorskip("deepspeed")
    model_dir = save_tiny_model(tmp_path / "model", hidden_size=64)
    follows = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    settings, folder = json.dumps(follows), tmp_path / "out"
    launch("zero", model_dir, folder, 3, settings)
    names = {path.name for path in (folder / "checkpoint-1").iterdir()}
    assert names >= {MEMORY_FILE, REFERENCE_FILE, WORK_FILE.format(0), WORK_FILE.format(1)}
    assert not (folder / UNFINISHED).exists()
    first = load_file(Path(model_dir, "model.safetensors"))
    reference = load_file(folder / "checkpoint-1" / REFERENCE_FILE)
    assert {name: tensor.shape for name, tensor in reference.items()}.items() <= {
        name: tensor.shape for name, tensor in first.items()
    }.items()
    assert any(not torch.equal(tensor.float(), first[name].float()) for name, tensor in reference.items())

    launch("zero", model_dir, tmp_path / "resumed", 3, settings, folder / "checkpoint-1")
    compare(found_in(tmp_path / "resumed"), found_in(folder), 1e-6)
