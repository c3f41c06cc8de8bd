# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`recipes/exploration.py` as a user runs it, with everything small: the table, what is kept, mistakes told first."""

import json

import pytest
from recipe_runs import parse, recipe

from trl_agents.agent_config import read_agent_config
from trl_agents.episodes import sample_episodes


SMALL = ["--num_transcripts", 12, "--num_eval_episodes", 4, "--env_kwargs", '{"n_arms": 3, "horizon": 4}']
SMALL += ["--max_steps", 1, "--per_device_train_batch_size", 4, "--num_generations", 2, "--rollout_batch_size", 8]
SMALL += ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", 1]
NAMES = ["none", "try_all", "context_randomization+context_summary"]


def run(output_dir, *arguments, names=NAMES):
    module = recipe("exploration")
    settings = parse(module, module.DEFAULT_CONFIG, "--output_dir", output_dir, *SMALL, *arguments)
    settings[0].mechanisms = list(names)
    module.main(*settings)
    return json.loads((output_dir / "metrics.json").read_text())


def test_every_mechanism_before_and_after(tmp_path, capsys):
    table = run(tmp_path)
    columns = [f"{measure}{when}" for measure in ("coverage", "regret", "invalid_rate") for when in ("", ", RLFT")]
    assert list(table) == columns
    for column, row in table.items():
        assert list(row) == ([*NAMES] if column.endswith("RLFT") else ["random", "ucb", *NAMES])
    # Three arms, four steps: whatever the model does, each has been tried
    assert table["coverage"]["try_all"]["mean"] == table["coverage, RLFT"]["try_all"]["mean"] == 1.0
    assert (tmp_path / "measures.png").stat().st_size > 10_000
    for name in NAMES:
        card = (tmp_path / f"rlft_{name}" / "README.md").read_text()
        assert "## Results" in card and f"| {name} |" in card
        assert (tmp_path / f"rlft_{name}" / "learning_curve.png").exists()
    # Nothing is trained twice, and a mechanism can be added
    stamps = {path: path.stat().st_mtime for path in tmp_path.glob("*/model.safetensors")}
    more = run(tmp_path, names=[*NAMES, "epsilon_greedy=0.5"])
    assert list(more["coverage, RLFT"]) == [*NAMES, "epsilon_greedy=0.5"]
    assert more["regret, RLFT"]["none"] == table["regret, RLFT"]["none"]
    assert all(path.stat().st_mtime == stamp for path, stamp in stamps.items())


def test_without_training(tmp_path):
    table = run(tmp_path, "--max_steps", 0, names=["none", "self_consistency=2"])
    assert list(table) == ["coverage", "regret", "invalid_rate"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["warmup"]
    with pytest.raises(ValueError, match=r"agent 'GreedyAgent\(untried=0.0, epsilon=0.1\)', now .*epsilon=0.5"):
        run(tmp_path, "--max_steps", 0, "--transcript_epsilon", 0.5, names=["none"])


def test_the_model_plays_as_it_is_trained(tmp_path, monkeypatch):
    """`action_stop` and what else is not usual held for the training alone."""
    asked = []

    def sample(model, tokenizer, env_id, seeds, **how):
        asked.append(how)
        return sample_episodes(model, tokenizer, env_id, seeds, **how)

    monkeypatch.setattr("trl_agents.episodes.sample_episodes", sample)
    rules = {
        "action_stop": True,
        "top_p": 0.9,
        "top_k": 3,
        "max_turns": 3,
        "invalid_action": "end",
        "env_timeout": 60.0,
    }
    given = [part for name, value in rules.items() for part in (f"--{name}", value)]
    env = [
        "--env_id",
        "gymnasium:CliffWalking-v1",
        "--env_kwargs",
        "{}",
        "--players",
        "random",
        "--eval_temperature",
        0,
    ]
    table = run(tmp_path, *given, *env, "--max_steps", 0, names=["none", "try_all"])
    assert [how["exploration"] for how in asked] == [[], ["try_all"]]
    for how in asked:
        assert {name: how[name] for name in rules} == rules and how["temperature"] == 0 and "seed" not in how
        assert (how["context"], how["max_new_tokens"]) == ("window", 32)
    assert list(table) == ["coverage", "return", "invalid_rate"]
    assert read_agent_config(tmp_path / "warmup").max_turns == 3


def test_without_regrets_returns_are_compared(tmp_path):
    env = ["--env_id", "trl_agents/TicTacToe-v0", "--env_kwargs", '{"opponent": "random"}', "--players", "random"]
    assert list(run(tmp_path, *env, "--max_steps", 0, names=["none"])) == ["return", "invalid_rate"]


@pytest.mark.parametrize(
    ("arguments", "names", "said"),
    [
        (["--exploration", "try_all"], NAMES, "`mechanisms` says"),
        ([], ["try_everything"], "'try_everything' is unknown"),
        ([], ["nonee"], "'nonee' is unknown: choose of none, try_all, .* Did you mean none"),
        ([], ["none+try_all"], "'none' is unknown"),
        ([], ["try_all+selfcorrection"], "'selfcorrection' is unknown: .* Did you mean self_correction"),
        (["--num_eval_episodes", 0], NAMES, "num_eval_episodes=0"),
        (["--num_transcripts", -5], NAMES, "num_transcripts=-5"),
        (["--transcript_epsilon", 3], NAMES, "epsilon=3.0 is a probability"),
        (["--players", "nobody"], NAMES, "'nobody' is unknown"),
        (["--context", "chat"], NAMES, "context='window'"),
        ([], ["self_correction+self_consistency"], "use one of them"),
    ],
)
def test_mistakes_are_told_first(tmp_path, arguments, names, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "out", *arguments, names=names)
    assert not (tmp_path / "out").exists()
