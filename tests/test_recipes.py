# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The recipes as a user runs them: every YAML parses, the default runs and writes what it promises."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, TrlParser

from trl_agents import AgentGRPOConfig


ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
PLAYERS = {"random", "ucb", "thompson", "before", "after"}


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(script: str, *arguments: str, timeout: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPES / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def parse(module, config: Path, *arguments: str):
    parser = TrlParser((module.ScriptArguments, AgentGRPOConfig, ModelConfig))
    # bf16 needs a GPU to be accepted on some machines; whether it is there is not what is tested
    return parser.parse_args_and_config(["--config", str(config), "--bf16", "false", *arguments])


@pytest.mark.parametrize(
    "config", sorted((RECIPES / "configs").glob("grpo_bandit_*.yaml")), ids=lambda path: path.stem
)
def test_every_config_parses(config, tmp_path):
    script_args, training_args, _ = parse(recipe("grpo_bandit"), config, "--output_dir", str(tmp_path))
    given = yaml.safe_load(config.read_text())
    assert script_args.env_id == given["env_id"]
    assert training_args.env_kwargs == given["env_kwargs"]
    assert training_args.max_steps == given["max_steps"]
    assert training_args.generation_batch_size % training_args.num_generations == 0


def test_every_config_has_a_section():
    text = (RECIPES / "README.md").read_text()
    for config in (RECIPES / "configs").glob("*.yaml"):
        assert config.name in text, f"recipes/README.md does not name {config.name}"
    for script in RECIPES.glob("*.py"):
        assert script.name in text, f"recipes/README.md does not name {script.name}"


def test_help_names_the_options():
    result = run("grpo_bandit.py", "--help")
    assert result.returncode == 0, result.stderr
    for option in (
        "--env_id",
        "--num_eval_episodes",
        "--invalid_action_penalty",
        "--advantage_estimator",
        "--use_peft",
    ):
        assert option in result.stdout


def test_unknown_environment_is_named(tmp_path):
    result = run("grpo_bandit.py", "--env_id", "trl_agents/Bandt-v0", "--output_dir", tmp_path / "out")
    assert result.returncode != 0
    assert "trl_agents/Bandt-v0" in result.stderr and "trl_agents/Bandit-v0" in result.stderr
    assert not (tmp_path / "out").exists(), "something was written before the error"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The default recipe with everything small: it writes what the long one does."""
    output_dir = tmp_path_factory.mktemp("recipe")
    small = ["--max_steps", 2, "--num_transcripts", 12, "--num_eval_episodes", 6, "--per_device_train_batch_size", 2]
    small += ["--num_generations", 2, "--output_dir", output_dir, "--disable_tqdm", "true"]
    result = run("grpo_bandit.py", *small)
    assert result.returncode == 0, result.stderr[-3000:]
    return output_dir


def test_metrics_json(short_run):
    metrics = json.loads((short_run / "metrics.json").read_text())
    for measure in ("regret", "coverage", "invalid_rate"):
        assert set(metrics[measure]) == PLAYERS
        for value in metrics[measure].values():
            assert set(value) == {"mean", "low", "high"}
            assert value["low"] <= value["mean"] <= value["high"]
    assert metrics["invalid_rate"]["random"]["mean"] == 0
    assert metrics["regret"]["random"]["mean"] > 0


@pytest.mark.parametrize("name", ["regret.png", "learning_curve.png"])
def test_pictures(short_run, name):
    data = (short_run / name).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_sample_episodes(short_run):
    for player in ("before", "after"):
        text = (short_run / f"episodes_{player}.txt").read_text()
        assert text.count("Episode ") == 6 and "return" in text


def test_the_card_runs_the_agent(short_run):
    """The ten lines of the model card, as they stand, play the saved model."""
    card = (short_run / "README.md").read_text()
    assert "trl_agents/Bandit-v0" in card and "| after |" in card and "regret.png" in card and "2504.16078" in card
    code = card.split("Let it play:")[1].split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("Step=19") == 8


@pytest.mark.long
@pytest.mark.slow
def test_the_default_recipe_learns(tmp_path):
    """The main promise: regret from the random player's to below UCB's, within minutes."""
    result = run("grpo_bandit.py", "--output_dir", tmp_path, "--disable_tqdm", "true", timeout=3000)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    regret = metrics["regret"]
    assert regret["after"]["mean"] <= regret["ucb"]["mean"]
    assert regret["after"]["high"] < regret["before"]["low"]
    assert metrics["invalid_rate"]["after"]["mean"] < 0.02
