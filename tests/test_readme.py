# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the README promises of its own code."""

import functools
import re
from pathlib import Path

from scripted import save_tiny_model

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, tiny


README = (Path(__file__).parents[1] / "README.md").read_text()


def code_of(section, number=0):
    """A block of Python of a section."""
    text = re.search(rf"^## {re.escape(section)}$.*?(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[number]


def test_an_environment_of_ones_own_trains_as_it_stands_there(tmp_path, monkeypatch):
    """Fewer than 20 lines, and one that trains; only model and length of the run are others here."""
    code = code_of("Train on your own environment")
    environment, training = code.split("\n\n\ncheck_env")
    assert len(environment.partition("class ")[2].splitlines()) < 20
    assert training.count("\n") == 2  # of check_env and of the trainer
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_model(tmp_path / "model", [environment])
    trained, own = [], AgentGRPOTrainer.train
    monkeypatch.setattr(AgentGRPOTrainer, "train", lambda trainer: trained.append(trainer) or own(trainer))
    settings = {"max_steps": 1, "max_completion_length": 16, "use_cpu": True, "bf16": False, "report_to": "none"}
    monkeypatch.setattr(AgentGRPOConfig, "__init__", small(AgentGRPOConfig.__init__, settings))
    exec(code.replace("Qwen/Qwen3-0.6B", folder), {"__name__": "__main__"})
    (trainer,) = trained
    assert trainer.state.global_step == 1
    assert {trajectory.stop.value for trajectory in trainer.trajectories} <= {"terminated", "truncated"}
    assert max(trajectory.steps for trajectory in trainer.trajectories) == 3


def test_it_trains_without_a_gpu_or_a_download(tmp_path, monkeypatch):
    """As it stands there, but for the length of the run."""
    environment = code_of("Train on your own environment").partition("\ncheck_env(")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny, "make_tiny_model", functools.partial(tiny.make_tiny_model, n_transcripts=8))
    monkeypatch.setattr(AgentGRPOConfig, "__init__", small(AgentGRPOConfig.__init__, {"max_steps": 1}))
    exec(environment + code_of("Train on your own environment", 1), {"__name__": "__main__"})
    assert (tmp_path / "trainer_output" / "checkpoint-1").is_dir()


def small(init, settings):
    return lambda config, *args, **kwargs: init(config, *args, **{**kwargs, **settings})
