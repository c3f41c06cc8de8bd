# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""recipes/expert_iteration.py as a user runs it: environments and questions, a file of episodes, an interruption."""

import json
import subprocess
import sys

import pytest
import yaml
from recipe_runs import RECIPES, ROOT, parse, recipe, run

from trl_agents.agents import RandomAgent, UCBAgent
from trl_agents.episodes import best_episodes, log_episodes, read_episodes, write_episodes
from trl_agents.evaluation import play_agents
from trl_agents.transcripts import put_into_words


CONFIGS = sorted((RECIPES / "configs").glob("expert_iteration_*.yaml"))  # the tiny one is the last
QUESTIONS = RECIPES / "configs" / "expert_iteration_questions.yaml"
BANDIT = {"n_arms": 2, "horizon": 3, "distribution": "bernoulli"}
SMALL = ["--env_kwargs", json.dumps(BANDIT), "--num_transcripts", 60, "--num_eval", 8, "--num_seeds", 8]
SMALL += ["--num_samples", 4, "--rounds", 2, "--keep_share", 0.5, "--num_train_epochs", 1, "--disable_tqdm", "true"]


def run_here(*arguments, config=CONFIGS[-1]):
    """Without a process of its own, whose start takes longer than all the rest."""
    module = recipe("expert_iteration")
    module.main(*parse(module, config, *arguments))


def test_an_environment_without_an_end_of_its_own(tmp_path):
    """Its scripted player, its warm-up and its rounds had no limit."""
    limited = ["--env_id", "scripted:Endless", *SMALL, "--env_kwargs", "{}", "--max_turns", 4]
    run_here(*limited, "--rounds", 1, "--num_transcripts", 120, "--output_dir", tmp_path)
    shortened = table_of(tmp_path)["shortened"]
    assert list(shortened) == ["random", "ucb", "start", "round_1"] and all(
        one["mean"] == 1 for one in shortened.values()
    )
    with pytest.raises(ValueError, match="max_turns=0: give more than 0"):
        run_here(*limited, "--max_turns", 0, "--output_dir", tmp_path)


def table_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("config", CONFIGS, ids=[config.stem for config in CONFIGS])
def test_every_line_of_a_config_has_an_effect(config, tmp_path):
    parsed = parse(recipe("expert_iteration"), config, "--output_dir", tmp_path)
    for key, value in yaml.safe_load(config.read_text()).items():
        found = [getattr(args, key) for args in parsed if hasattr(args, key)]
        assert key in ("output_dir", "bf16", "report_to") or value in found, key


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Episodes of two players, one of whom wrote nonsense once."""
    players = {"random": RandomAgent(), "ucb": UCBAgent()}
    played = play_agents("trl_agents/Bandit-v0", players, range(12), env_kwargs=BANDIT)
    episodes = [put_into_words(episode) for own in played.values() for episode in own]
    path = tmp_path_factory.mktemp("logs") / "logged.jsonl"
    write_episodes(path, log_episodes(episodes, "trl_agents/Bandit-v0", BANDIT))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, logs):
    folder = tmp_path_factory.mktemp("bandit")
    result = run("expert_iteration.py", *SMALL, "--episodes", logs, "--replay", "true", "--output_dir", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_what_a_run_leaves(finished):
    folder, said = finished
    stages = ["start", "offline", "round_1", "round_2"]
    table = table_of(folder)
    for measure in ("return", "regret", "coverage", "invalid_rate"):
        assert list(table[measure]) == ["random", "ucb", *stages]
        assert all(value["low"] <= value["mean"] <= value["high"] for value in table[measure].values())
    assert said.splitlines()[-1].startswith(f"Written to {folder}: metrics.json, offline/, regret.png, round_1/")
    assert "| round_2 |" in said and (folder / "regret.png").read_bytes().startswith(b"\x89PNG")
    for stage in stages:
        card = (folder / stage / "README.md").read_text()
        assert "| round_2 |" in card and "regret.png" in card and (folder / stage / "regret.png").exists()
    first, second = (read_episodes(folder / stage / "episodes.jsonl") for stage in stages[2:])
    assert len(first) == len(second) == 8 * 4
    assert {episode.trajectory.seed for episode in first} == set(range(8))
    assert {episode.trajectory.seed for episode in second} == set(range(8, 16))
    assert 0 < len(best_episodes(first, share=0.5, by_group=True)) <= 16


def test_what_was_played_can_be_learnt_from(finished, tmp_path):
    """A round's file is read by --episodes, and with no rounds it is all that is learnt."""
    folder, _ = finished
    file = folder / "round_1" / "episodes.jsonl"
    run_here(*SMALL, "--rounds", 0, "--episodes", file, "--output_dir", tmp_path)
    assert list(table_of(tmp_path)["return"]) == ["random", "ucb", "start", "offline"]
    weights = [(tmp_path / stage / "model.safetensors").read_bytes() for stage in ("start", "offline")]
    assert weights[0] == (folder / "start" / "model.safetensors").read_bytes() != weights[1]


def test_an_interrupted_round_goes_on(finished, logs):
    """Round 2 was ended after playing: what was played stays, what was trained before too, and the end is the same."""
    folder, _ = finished
    before = table_of(folder)
    weights = (folder / "round_2" / "model.safetensors").read_bytes()
    (folder / "round_2" / "stage.json").unlink()
    (folder / "round_2" / "model.safetensors").unlink()
    kept = [folder / "round_1" / "model.safetensors", folder / "round_2" / "episodes.jsonl"]
    times = [path.stat().st_mtime for path in kept]
    arguments = [*SMALL, "--episodes", logs, "--replay", "true", "--output_dir", folder]
    run_here(*arguments)
    assert times == [path.stat().st_mtime for path in kept]
    assert (folder / "round_2" / "model.safetensors").read_bytes() == weights and table_of(folder) == before
    with pytest.raises(ValueError, match="share 0.5, now 0.25"):
        run_here(*arguments, "--keep_share", 0.25)


def test_a_game_without_regrets(tmp_path):
    """Tic-tac-toe in a window: a row each turn, and another picture."""
    small = ["--env_id", "trl_agents/TicTacToe-v0", "--env_kwargs", '{"opponent": "random"}', "--players", "random"]
    small += ["--context", "window", "--window", 0, "--num_transcripts", 60, "--num_eval", 4, "--num_seeds", 4]
    run_here(*small, "--rounds", 1, "--num_samples", 2, "--keep_share", 0.5, "--output_dir", tmp_path)
    assert "regret" not in table_of(tmp_path) and list(table_of(tmp_path)["return"]) == ["random", "start", "round_1"]
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("start_from", ["first", "last"])
def test_questions(tmp_path, start_from):
    small = ["--arithmetic", '{"n": 24, "min_steps": 1, "max_steps": 1, "max_value": 9}', "--num_eval", 6]
    small += ["--warmup_epochs", 40, "--num_samples", 4, "--rounds", 2, "--disable_tqdm", "true", "--keep_most", 2]
    small += ["--warmup_batch_size", 8, "--start_from", start_from]
    run_here(*small, "--output_dir", tmp_path, config=QUESTIONS)
    assert list(table_of(tmp_path)["greedy"]) == ["start", "round_1", "round_2"]
    assert "| round_2 |" in (tmp_path / "round_2" / "README.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    episodes = read_episodes(tmp_path / "round_1" / "episodes.jsonl")
    assert len(episodes) == 24 * 4 and {episode.reward for episode in episodes} == {0.0, 1.0}
    assert all(episode.prompt.startswith("Question:\n") for episode in episodes)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Both play a share, and one writes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", "29611", str(RECIPES / "expert_iteration.py"), *map(str, SMALL)]
    command += ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(table_of(tmp_path)["return"]) == ["random", "ucb", "start", "round_1", "round_2"]
    episodes = read_episodes(tmp_path / "round_1" / "episodes.jsonl")
    assert [episode.trajectory.seed for episode in episodes] == [seed for seed in range(8) for _ in range(4)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "arithmetic"], "dataset='arithmetic': one of the two must be null"),
        (["--env_id", "trl_agents/Bandt-v0"], "trl_agents/Bandt-v0"),
        (["--env_kwargs", '{"n_arms": 1}'], "n_arms"),
        (["--load_in_4bit", "true"], "add use_peft"),
        (["--keep_share", "1.5"], "share=1.5"),
        (["--keep_most", "0"], "most=0"),
        (["--raise_reward", "0.1"], "raise_reward=0.1"),
        (["--rounds", "0"], "rounds=0"),
        (["--num_samples", "0"], "num_samples=0"),
        (["--num_eval", "0"], "num_eval=0: give more than 0"),
        (["--num_seeds", "-1"], "num_seeds=-1"),
        (["--context", "chat", "--window", "3"], "window=3 has no effect"),
        (["--context", "window", "--window", "-2"], "window=-2: neither may be negative"),
        (["--temperature", "-1"], "temperature=-1.0, .*neither may be negative"),
        (["--players", "rnd"], "'rnd' is unknown"),
    ],
)
def test_mistakes_are_told_first(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        run_here(*arguments, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "something was written before the error"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"messages": 3, "reward": 1}', "`messages` must be a list"),
        (b'{"messages": "\xff"}', "this is no JSON .*0xff"),
        (b'{"reward": ' + b"9" * 5000 + b"}", "this is no JSON .*digits"),
    ],
)
def test_a_broken_file_is_told_first(tmp_path, text, said):
    (tmp_path / "logs.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=f"logs.jsonl, line 1: {said}"):
        run_here("--episodes", tmp_path / "logs.jsonl", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_default_recipe_learns(tmp_path):
    """The main promise: less regret after the last round than before the first, by more than the intervals."""
    result = run("expert_iteration.py", "--output_dir", tmp_path, "--disable_tqdm", "true", timeout=3000)
    assert result.returncode == 0, result.stderr[-3000:]
    regret = table_of(tmp_path)["regret"]
    last = list(regret)[-1]
    assert regret[last]["high"] < regret["start"]["low"]
