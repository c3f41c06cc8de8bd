# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The recipe that learns from an expert: small as a user runs it, its mistakes, and (slow) what it learns."""

import json

import pytest
from recipe_runs import RECIPES, parse, recipe, run

from trl_agents.episodes import sample_episodes
from trl_agents.expert_data import expert_dataset


SMALL = ["--env_kwargs", '{"n_arms": 3, "horizon": 4, "distribution": "bernoulli"}', "--num_episodes", 24]
SMALL += ["--num_thought_episodes", 16, "--sft_batch_size", 8, "--num_eval_episodes", 6, "--rlft_steps", 1]
SMALL += ["--per_device_train_batch_size", 2, "--num_generations", 2, "--rollout_batch_size", 2]
SMALL += ["--max_completion_length", 40, "--logging_steps", 1, "--disable_tqdm", "true"]
STAGES = ["start", "behaviour", "thought", "behaviour_rlft"]
PLAYERS = ["random", "greedy", "ucb (expert)"]


@pytest.mark.slow
def test_every_stage_is_made_measured_and_kept(tmp_path):
    result = run("expert_sft.py", *SMALL, "--output_dir", tmp_path, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for measure in ("regret", "coverage", "invalid_rate", "suffix_failure", "agreement"):
        assert list(metrics[measure]) == [*PLAYERS, *STAGES]
        assert all(value["low"] <= value["mean"] <= value["high"] for value in metrics[measure].values())
    assert metrics["agreement"]["ucb (expert)"]["mean"] == 1
    assert metrics["invalid_rate"]["start"]["mean"] > 0.8  # it knows nothing
    assert metrics["coverage"]["ucb (expert)"]["mean"] == 1
    for name in ("regret.png", "measures.png", "behaviour_rlft/learning_curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for stage in STAGES:
        assert (tmp_path / f"episodes_{stage}.txt").read_text().count("[terminated, return") == 6
        assert (tmp_path / stage / "model.safetensors").exists()
        if stage != "start":
            assert "| behaviour_rlft |" in (tmp_path / stage / "README.md").read_text()
    # A second run finds its stages done, and measures the same
    times = {path: path.stat().st_mtime for path in tmp_path.glob("*/model.safetensors")}
    again = run("expert_sft.py", *SMALL, "--output_dir", tmp_path, timeout=900)
    assert again.returncode == 0, again.stderr[-3000:]
    assert times == {path: path.stat().st_mtime for path in times} and len(times) == len(STAGES)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    module = recipe("expert_sft")
    with pytest.raises(ValueError, match="a stage that was run with other settings .sft "):
        module.main(*parse(module, module.DEFAULT_CONFIG, *SMALL, "--output_dir", tmp_path, "--sft_epochs", 2))


def test_minimax_in_a_window(tmp_path):
    """Another expert, another context, one form, no RL."""
    arguments = [
        "--env_id",
        "trl_agents/TicTacToe-v0",
        "--env_kwargs",
        '{"opponent": "random"}',
        "--expert",
        "minimax",
    ]
    arguments += ["--expert_kwargs", "{}", "--context", "window", "--window", 0, "--forms", "thought"]
    arguments += ["--rlft_steps", 0, "--players", "random", "--output_dir", tmp_path]
    result = run("expert_sft.py", *SMALL, *arguments, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["return"]) == ["random", "minimax (expert)", "start", "thought"] and "regret" not in metrics
    assert metrics["return"]["minimax (expert)"]["mean"] > 0.5


def test_the_clone_plays_and_learns_as_it_is_told(tmp_path, monkeypatch):
    """Template arguments, `action_stop` and exploration held for the RL stage alone."""
    played, cloned = [], []

    def sample(model, tokenizer, env_id, seeds, **how):
        played.append(how)
        return sample_episodes(model, tokenizer, env_id, seeds, **how)

    def clone(*args, **how):
        cloned.append(how)
        return expert_dataset(*args, **how)

    monkeypatch.setattr("trl_agents.episodes.sample_episodes", sample)
    monkeypatch.setattr("trl_agents.expert_data.expert_dataset", clone)
    rules = {"action_stop": True, "top_k": 3, "max_turns": 3, "invalid_action": "end", "env_timeout": 60.0}
    given = [part for name, value in rules.items() for part in (f"--{name}", value)]
    given += ["--exploration", "try_all", "--chat_template_kwargs", '{"tag": 1}', "--forms", "behaviour", "thought"]
    given += ["--rlft_steps", 0, "--output_dir", tmp_path]
    module = recipe("expert_sft")
    module.main(*parse(module, module.DEFAULT_CONFIG, *SMALL, *given))
    assert cloned and all((how["chat_template_kwargs"], how["max_turns"]) == ({"tag": 1}, 3) for how in cloned)
    assert [how["max_new_tokens"] for how in played] == [16, 16, 40]  # start, behaviour, thought
    assert [how["env_kwargs"]["reasoning"] for how in played] == [False, False, True]
    for how in played:
        assert {name: how[name] for name in rules} == rules and "seed" not in how
        assert (how["exploration"], how["chat_template_kwargs"]) == (["try_all"], {"tag": 1})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["coverage"]["behaviour"]["mean"] == 1  # each arm of three is tried in three turns
    assert metrics["shortened"]["random"]["mean"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--expert", "greedy", "--expert_kwargs", "{}"], "GreedyAgent has no thoughts"),
        (["--expert", "ucbb", "--expert_kwargs", "{}"], "'ucbb' is unknown"),
        (["--expert_kwargs", '{"bonus": "no"}'], "bonus='no'"),
        (["--context", "window", "--window", 3, "--env_kwargs", '{"horizon": 5}'], "window=3 hides steps"),
        (["--rlft_forms", "behaviour", "--forms", "thought"], "rlft_forms"),
        (["--players", "nobody"], "'nobody' is unknown"),
        (["--num_episodes", 0], "num_episodes=0"),
        (["--action_pattern", "ACTION=(red)"], "No pattern can produce the legal action 'blue'"),
        (["--use_peft", "true"], "leave out use_peft"),
        (["--resume_from_checkpoint", "outputs"], "leave resume_from_checkpoint out"),
    ],
)
def test_mistakes_are_told_first(tmp_path, arguments, said):
    module = recipe("expert_sft")
    settings = parse(module, module.DEFAULT_CONFIG, *arguments, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=said):
        module.main(*settings)
    assert not (tmp_path / "out").exists(), "something was written before the error"


@pytest.mark.long
@pytest.mark.slow
def test_the_default_recipe_clones(tmp_path):
    """The main promise: from nothing to the expert's regret by either form."""
    config = RECIPES / "configs" / "expert_sft_tiny.yaml"
    result = run("expert_sft.py", "--config", config, "--output_dir", tmp_path, "--disable_tqdm", "true", timeout=5400)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    regret, agreement = metrics["regret"], metrics["agreement"]
    assert agreement["behaviour"]["mean"] > 0.9 and metrics["invalid_rate"]["behaviour"]["mean"] < 0.02
    assert abs(regret["behaviour"]["mean"] - regret["ucb (expert)"]["mean"]) < 0.2
    assert regret["behaviour"]["high"] < regret["random"]["low"]
