# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the README promises of its own code."""

import functools
import json
import re
import shlex
from pathlib import Path

import recipe_runs
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


def test_a_recipe_trains_on_it(tmp_path):
    """The command as it stands there, from the folder of the module; only shorter. It died after the training."""
    code = code_of("Train on your own environment")
    (tmp_path / "my_module.py").write_text(code.partition("\n\n\ncheck_env")[0])
    command = re.search(r"^accelerate launch path/to/trl-agents/recipes/(.*?[^\\])$", README, re.DOTALL | re.MULTILINE)
    script, *arguments = shlex.split(command[1].replace("\\\n", " "))
    small = ["--max_steps", 1, "--num_transcripts", 8, "--num_eval_episodes", 4, "--per_device_train_batch_size", 2]
    small += ["--num_generations", 2, "--use_cpu", "--disable_tqdm", "true"]
    result = recipe_runs.run(script, *arguments, *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "outputs" / "guess_the_number"
    table = json.loads((folder / "metrics.json").read_text())
    assert "regret" not in table and list(table["return"]) == ["random", "ucb", "thompson", "before", "after"]
    assert (folder / "returns.png").exists() and not (folder / "regret.png").exists()
    assert "](returns.png)" in (folder / "README.md").read_text() and (folder / "episodes_after.txt").exists()
    assert result.stdout.splitlines()[-1].startswith("Written to ")
    assert not re.search("gradient_checkpointing|pin_memory", result.stderr)  # libraries among themselves


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
