# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which releases of TRL are taken, and that others are told before anything else."""

import os
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet
from scripted import Pay, ScriptedTrainer, make_config, save_tiny_model
from trl import GRPOTrainer

from trl_agents._trl import check_trl, release


@pytest.mark.parametrize("version", ["0.17.0", "1.13.0", "1.17.0", "2.0.0"])
def test_other_releases_of_trl_are_refused(version):
    with pytest.raises(ValueError, match=f"trl {version} is installed.*pip install"):
        check_trl(version=version)


def test_another_trl_is_told_before_anything_it_lacks(tmp_path):
    """A release without what we import must not fail at the import."""
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("__version__ = '0.20.0'")
    code = "from trl_agents import AgentGRPOTrainer"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "trl 0.20.0 is installed" in result.stderr.splitlines()[-1]


def test_patch_releases_of_trl_pass():
    check_trl(version="1.16.3")


def test_a_trl_for_gpus_alone_is_refused_without_one(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ImportError, match=r"trl 1.15.0 trains on GPUs alone.*!=1.15"):
        check_trl(version="1.15.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_trl(version="1.15.0")


def test_a_trl_that_moved_its_methods_is_refused():
    class Renamed(GRPOTrainer):
        _generate_and_score_completions = None

    class Changed(GRPOTrainer):
        def _calculate_rewards(self, batch):
            pass

    for moved, name in ((Renamed, "_generate_and_score_completions"), (Changed, "_calculate_rewards")):
        with pytest.raises(ImportError, match=f"has moved `{moved.__name__}.{name}`.*pip install"):
            check_trl(moved)


def test_the_trainer_asks_first(monkeypatch, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr(release, "SUPPORTED_TRL", SpecifierSet("<1"))
    with pytest.raises(ImportError, match="trl-agents works with trl<1"):
        ScriptedTrainer(model, env=Pay, args=make_config(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
