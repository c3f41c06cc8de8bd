# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The recipes as a user runs them: every YAML parses, the default runs and writes what it promises."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from recipe_runs import CONFIGS, RECIPES, ROOT, parse, recipe, run
from trl import ModelConfig

from trl_agents import AgentGRPOConfig


OPPONENTS = ("random", "noisy", "optimal")
SEATS = ("first", "second")
MODEL_KEYS = {field.name for field in dataclasses.fields(ModelConfig)}
PLAYERS = {"random", "ucb", "thompson", "before", "after"}


def configs_of(*names: str):
    paths = [path for name in names for path in sorted((RECIPES / "configs").glob(f"{name}_*.yaml"))]
    return pytest.mark.parametrize("config", paths, ids=[path.stem for path in paths])


@configs_of(*CONFIGS)
def test_every_config_parses(config, tmp_path):
    name = next(name for name in CONFIGS if config.stem.startswith(name))
    script_args, training_args, _ = parse(recipe(name), config, "--output_dir", str(tmp_path))
    given = yaml.safe_load(config.read_text())
    for key, value in given.items():  # every line has an effect
        parsed = [getattr(args, key) for args in (script_args, training_args) if hasattr(args, key)]
        assert key in ("output_dir", "bf16", "report_to", "dtype", *MODEL_KEYS) or value in parsed, key
    if isinstance(training_args, AgentGRPOConfig):
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
    assert "Traceback" not in result.stderr
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
    signs = ["Warming up a small model on 12 episodes", "Playing 6 held-out episodes before", "Training: 2 updates"]
    places = [result.stdout.index(sign) for sign in [*signs, "Playing 6 held-out episodes after"]]
    assert places == sorted(places) and "episodes_after.txt" in result.stdout.splitlines()[-1]
    assert f"Written to {output_dir}: " in result.stdout
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


@pytest.mark.parametrize("name", [".", "warmup"])
def test_the_cards_say_which_model_they_are_of(short_run, name):
    """TRL's said "Model Card for None", linked to huggingface.co/None, and asked of a time machine."""
    folder = (short_run / name).resolve()
    card = (folder / "README.md").read_text()
    assert f"# Model Card for {folder.name}\n" in card and "time machine" not in card
    assert "None" not in card.replace("| `None` |", "")
    exec(card.split("```python\n")[1].split("for episode")[0].split("```")[0], {})  # loads the model


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_the_default_recipe_learns(tmp_path, seed):
    """The main promise: regret from the random player's to below UCB's, within minutes."""
    result = run("grpo_bandit.py", "--output_dir", tmp_path, "--seed", seed, "--disable_tqdm", "true", timeout=3000)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    regret = metrics["regret"]
    assert regret["after"]["mean"] <= regret["ucb"]["mean"]
    assert regret["after"]["high"] < regret["before"]["low"]
    assert metrics["invalid_rate"]["after"]["mean"] < 0.02


# -- ppo_tictactoe ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["random", pytest.param("first", marks=pytest.mark.slow), "self_play"])
def short_games(request, tmp_path_factory):
    """The recipe with everything small: seats by chance, a fixed seat, and against itself."""
    output_dir = tmp_path_factory.mktemp(request.param)
    small = ["--max_steps", 2, "--num_transcripts", 12, "--num_eval_episodes", 12, "--per_device_train_batch_size", 2]
    small += ["--steps_per_generation", 2, "--output_dir", output_dir, "--disable_tqdm", "true"]
    if request.param == "first":
        small += ["--env_kwargs", '{"opponent": "noisy", "seat": "first"}', "--rationale", "none"]
    if request.param == "self_play":
        config = RECIPES / "configs" / "ppo_tictactoe_self_play.yaml"
        small += ["--config", config, "--pool_every", 1, "--pool_size", 2]
    result = run("ppo_tictactoe.py", *small)
    assert result.returncode == 0, result.stderr[-3000:]
    return output_dir


def test_metrics_of_games(short_games):
    metrics = json.loads((short_games / "metrics.json").read_text())
    assert set(metrics) == {"returns", "invalid_rate"}
    assert set(metrics["returns"]) == set(metrics["invalid_rate"]) == {"random", "before", "after", "optimal"}
    for player, opponents in metrics["returns"].items():
        assert list(opponents) == list(OPPONENTS)
        for opponent, seats in opponents.items():
            assert set(seats) == set(SEATS), (player, opponent)
            for score in seats.values():
                assert set(score) == {"mean", "low", "high", "win", "draw", "loss"}
                assert score["low"] <= score["mean"] <= score["high"]
                assert score["win"] + score["draw"] + score["loss"] == pytest.approx(1)
                assert score["win"] - score["loss"] == pytest.approx(score["mean"])
    assert all(score["draw"] == 1 for score in metrics["returns"]["optimal"]["optimal"].values())
    assert metrics["invalid_rate"]["random"]["mean"] == metrics["invalid_rate"]["optimal"]["mean"] == 0


def test_pictures_and_drawn_games(short_games):
    for name in ("returns.png", "outcomes.png", "learning_curve.png"):
        data = (short_games / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    for player in ("before", "after"):
        text = (short_games / f"games_{player}.txt").read_text()
        assert text.count("Against ") == 12 and "----------    ----------" in text
        assert text.count("moving first]") + text.count("moving second]") == 12


@pytest.mark.parametrize("short_games", ["random", "self_play"], indirect=True)
def test_the_card_plays_the_game(short_games):
    card = (short_games / "README.md").read_text()
    assert "| optimal, second |" in card and "returns.png" in card and "outcomes.png" in card
    code = card.split("Let it play:")[1].split("```python\n")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("\n[terminated, return ") == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env_id", "trl_agents/Bandit-v0", "--env_kwargs", "{}"], "'trl_agents/Bandit-v0' is not tic-tac-toe"),
        (["--env_kwargs", '{"seat": "third"}'], "seat='third'"),
        (["--self_play", "true"], "opponent=.*'noisy'.* has no effect with self_play"),
        (["--action_pattern", r"ACTION=([1-9])"], "No pattern can produce the legal action '0'"),
        (["--num_transcripts", "0"], "num_transcripts=0: give more than 0"),
        (["--resume_from_checkpoint", "true"], "holds no whole checkpoint"),
    ],
    ids=["another game", "the seat", "two opponents", "an unreachable action", "no transcripts", "no checkpoint"],
)
def test_mistakes_in_the_game_are_told_first(tmp_path, arguments, said):
    module = recipe("ppo_tictactoe")
    settings = parse(module, module.DEFAULT_CONFIG, *arguments, "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=said):
        module.main(*settings)
    assert not (tmp_path / "out").exists(), "something was written before the error"


@pytest.mark.long
@pytest.mark.slow
def test_the_default_game_is_learnt(tmp_path):
    """The main promise: from near the random player to +0.75 against it, and to -0.2 against the optimal one."""
    result = run("ppo_tictactoe.py", "--output_dir", tmp_path, "--disable_tqdm", "true", timeout=5400)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    before, after = metrics["returns"]["before"], metrics["returns"]["after"]
    assert before["random"]["first"]["mean"] < 0.55
    assert after["random"]["first"]["mean"] >= 0.75
    assert after["optimal"]["first"]["mean"] >= -0.2
    assert after["optimal"]["second"]["mean"] > before["optimal"]["second"]["high"]
    assert metrics["invalid_rate"]["after"]["mean"] < 0.02


@pytest.mark.long
@pytest.mark.slow
def test_self_play_learns_to_draw_with_the_optimal_player(tmp_path):
    """It never met that player in training, and loses to it less than before."""
    config = RECIPES / "configs" / "ppo_tictactoe_self_play.yaml"
    result = run(
        "ppo_tictactoe.py", "--config", config, "--output_dir", tmp_path, "--disable_tqdm", "true", timeout=5400
    )
    assert result.returncode == 0, result.stderr[-3000:]
    returns = json.loads((tmp_path / "metrics.json").read_text())["returns"]
    for seat in SEATS:
        assert returns["after"]["optimal"][seat]["low"] > returns["before"]["optimal"][seat]["high"]


# -- reft -------------------------------------------------------------------------------------------------------------

SMALL_REFT = ["--dataset_kwargs", '{"n": 24, "min_steps": 1, "max_steps": 1, "max_value": 9}', "--num_test", 6]
SMALL_REFT += ["--warmup_epochs", 30, "--sft_epochs", 3, "--sft_batch_size", 8, "--max_steps", 2]
SMALL_REFT += ["--per_device_train_batch_size", 2, "--max_completion_length", 40, "--disable_tqdm", "true"]
SMALL_REFT += [
    "--logging_steps",
    1,
    "--st_samples",
    8,
    "--st_epochs",
    1,
    "--st_rounds",
    2,
    "--num_votes",
    3,
    "--rerank",
    "true",
]
METHODS = ["sft", "offline_st", "online_st", "reft", "reft_no_partial", "reft_no_kl", "reft_separate_critic"]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["words", "program"])
def test_reft_compares_all_methods(tmp_path, style):
    arguments = ["reft.py", "--output_dir", tmp_path, "--style", style, *SMALL_REFT, "--methods", *METHODS]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    accuracy = json.loads((tmp_path / "metrics.json").read_text())
    assert list(accuracy) == ["greedy", "vote@3", "rerank@3"]
    for values in accuracy.values():
        assert list(values) == ["warmup", *METHODS]
        assert all(set(value) == {"mean", "low", "high"} and 0 <= value["mean"] <= 1 for value in values.values())
    assert "| reft_no_kl |" in result.stdout
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for method in METHODS:
        card = (tmp_path / method / "README.md").read_text()
        assert "| reft_no_kl |" in card and (tmp_path / method / "accuracy.png").exists()
        assert (tmp_path / method / "value_head.safetensors").exists() == method.startswith("reft")
        assert (tmp_path / method / "learning_curve.png").exists() == method.startswith("reft")
    # The ablations ablate
    logs = {method: last_log(tmp_path / method) for method in METHODS if method.startswith("reft")}
    assert [name for name, log in logs.items() if "agents/kl_mean" not in log] == ["reft_no_kl"]
    reward = "program_reward" if style == "program" else "numeric_reward"
    assert f"rewards/{reward}/mean" in logs["reft"]
    assert f"rewards/{reward}_partial_0/mean" in logs["reft_no_partial"]
    sizes = {method: (tmp_path / method / "value_head.safetensors").stat().st_size for method in logs}
    assert [name for name, size in sizes.items() if size > 2 * sizes["reft"]] == ["reft_separate_critic"]
    # A second run finds its stages done, and measures the same
    times = {path: path.stat().st_mtime for path in tmp_path.glob("*/model.safetensors")}
    again = run(*arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert times == {path: path.stat().st_mtime for path in times} and len(times) == 3 + len(METHODS)
    assert json.loads((tmp_path / "metrics.json").read_text()) == accuracy
    other = run("reft.py", "--output_dir", tmp_path, "--style", style, *SMALL_REFT, "--seed", "7")
    assert other.returncode != 0 and "seed 0, now 7" in other.stderr


def last_log(folder):
    """Of the last checkpoint's training log."""
    state = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return next(log for log in reversed(json.loads(state.read_text())["log_history"]) if "reward" in log)


@pytest.mark.slow
def test_an_interrupted_reft_goes_on_where_it_was(tmp_path):
    """Killed in its last update with a checkpoint of the fourth, after one rollout: those four are not made again."""
    arguments = ["reft.py", "--output_dir", tmp_path, *SMALL_REFT, "--rerank", "false", "--methods", "reft"]
    arguments += ["--max_steps", 5, "--save_steps", 4, "--save_total_limit", 3]
    assert run(*arguments).returncode == 0
    (tmp_path / "reft" / "stage.json").unlink()
    whole = (tmp_path / "reft" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "reft" / "checkpoint-5")
    again = run(*arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "reft" / "model.safetensors").read_bytes() == whole
    assert again.stdout.count("'agents/value_loss'") == 1
    (tmp_path / "reft" / "stage.json").unlink()
    other = run(*arguments, "--beta", "0.5")
    assert other.returncode != 0 and "was begun with other settings (beta 0.01, now 0.5)" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "gsm9k", "--dataset_kwargs", "{}"], "'gsm9k' is unknown"),
        (["--dataset", "gsm8k"], "only \"arithmetic\" has such settings, not 'gsm8k'"),
        (["--dataset_kwargs", '{"max_value": 1}'], "max_value"),
        (["--dataset", "questions.json", "--dataset_kwargs", "{}"], "--test_dataset"),
        (["--load_in_4bit", "true"], "add use_peft"),
        (["--partial_reward", "1.5"], "partial"),
        (["--dataset_kwargs", '{"nn": 9}'], "nn: no setting"),
        (["--num_test", "0"], "num_test=0: give more than 0"),
        (["--warmup_epochs", "-1"], "warmup_epochs=-1.0: give more than 0"),
        (["--sft_batch_size", "0"], "sft_batch_size=0"),
        (["--st_rounds", "0"], "st_rounds=0"),
        (["--rerank", "true"], "num_votes=0 samples none"),
        (["--num_votes", "-1"], "num_votes=-1: give a number of answers"),
        (["--reward_weights", "1", "2"], r"reward_weights=\[1.0, 2.0\]: this recipe sets"),
        (["--exploration", "try_all"], "exploration=.*leave it out"),
        (["--max_completion_length", "0"], "max_completion_length=0: give more than 0"),
        (["--resume_from_checkpoint", "outputs"], "leave resume_from_checkpoint out"),
    ],
)
def test_mistakes_in_reft_are_told_first(tmp_path, arguments, said):
    module = recipe("reft")
    settings = parse(module, module.DEFAULT_CONFIG, *arguments, "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=said):
        module.main(*settings)
    assert not (tmp_path / "out").exists(), "something was written before the error"
