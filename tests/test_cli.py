# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command `trl-agents`: what each command writes and says, and what it says to mistakes."""

from __future__ import annotations

import builtins
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings

import pytest
from scripted import save_tiny_model

from trl_agents.cli import evaluate, main
from trl_agents.cli.named import close_to
from trl_agents.cli.play import read_action
from trl_agents.cli.players import name_player, name_players
from trl_agents.viewer import read_records


BANDIT = "trl_agents/Bandit-v0"
SMALL = '{"n_arms": 3, "horizon": 4, "distribution": "bernoulli"}'
COMMAND = [sys.executable, "-m", "trl_agents"]


def answers(monkeypatch, *lines):
    """A person who writes `lines` and then presses Ctrl-D; an exception is raised as it stands."""
    waiting = iter(lines)

    def read(prompt=""):
        print(prompt, end="")
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)


def error_of(capsys, *arguments):
    """What `trl-agents` says to a mistake: one line, and the exit code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("trl-agents: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


# -- the command as such ----------------------------------------------------------------------------------------------


def test_help_answers_at_once():
    """Well under a second of computing time, and torch is not loaded. (Not wall time: machines are shared.)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and all(name in done.stdout for name in ("play", "eval", "diagnose", "view"))
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0
    code = "import sys; from trl_agents.cli import make_parser; make_parser(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=120).strip() == "False"


@pytest.mark.parametrize("command", ["play", "eval", "diagnose", "view"])
def test_each_command_helps_with_examples(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "examples:" in text and f"trl-agents {command} " in text


@pytest.mark.parametrize(
    "arguments", [[], ["pley"], ["play"], ["play", BANDIT, "--seed", "-1"], ["eval", "--env_kwargs"]]
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and "error: " in error and "--help` tells more" in error and error.count("\n") == 1


def test_what_libraries_deprecate_is_not_told_to_users(capsys, monkeypatch):
    def run(args):
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.warn(f"a {category.__name__}", category, stacklevel=1)
        return 0

    monkeypatch.setattr("trl_agents.cli.view.run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["view", "x"]) == 0
    assert capsys.readouterr().err == "trl-agents: note: a UserWarning\n"


def test_console_script_and_assets_are_declared():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"trl-agents": "trl_agents.cli:main"}
    assert project["tool"]["setuptools"]["package-data"] == {"trl_agents": ["assets/*"]}


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["play", "trl_agents/Bandid-v0"],
            ["no environment 'trl_agents/Bandid-v0'", "Did you mean trl_agents/Bandit-v0"],
        ),
        (["play", "TicTacTo-v0"], ["Did you mean trl_agents/TicTacToe-v0?"]),
        (["play", "CartPol-v1"], ["Did you mean CartPole-v1"]),
        (["play", "CartPole-v1"], ["is no text environment", "`instructions`"]),
        (["play", "no_such_module:Env-v0"], ["no_such_module"]),
        (["play", "treasure.py:TreasureHall"], ["names a file: write treasure:TreasureHall."]),
        (["play", "envs/treasure.py:TreasureHall"], ["write treasure:TreasureHall", "from its folder, envs"]),
        (["play", BANDIT, "--env_kwargs", '{"n_arm": 3}'], ["no argument 'n_arm'", "Did you mean n_arms?", "horizon"]),
        (["play", BANDIT, "--env_kwargs", '{"n_arms": 1}'], ["n_arms=1", "at least 2"]),
        (["play", BANDIT, "--player", "minimax"], ["'minimax' cannot play trl_agents/Bandit-v0", "board"]),
        (["eval", "ucbb"], ["no player 'ucbb'", "Did you mean ucb", "random, greedy, ucb"]),
        (["eval", "ucb:bonus=log"], ["bonus='log' is unknown"]),
        (["eval", "mine=ucb:bons=log"], ["no setting 'bons'", "Did you mean bonus?"]),
        (["diagnose", "thomson:prior=gaussian", "--output_dir", "x"], ["Did you mean thompson"]),
        (["eval", "random", "random"], ["Two players are called 'random'", "before=MODEL"]),
        (["eval", "./nothing"], ["There is no folder ./nothing"]),
        (["eval", "random", "--env", "Bandits-v0"], ["Did you mean trl_agents/Bandit-v0?"]),
        (["diagnose", "ucb", "--output_dir", "x", "--env", "Bandits-v0"], ["Did you mean trl_agents/Bandit-v0?"]),
        (["eval", "random", "--window", "3"], ["--window 3", "add that"]),
        (
            ["eval", "random", "ucb", "--exploration", "try_all"],
            ["--exploration try_all", "random and ucb", "name a model"],
        ),
        (["diagnose", "ucb", "--output_dir", "x", "--exploration", "try_all"], ["--exploration try_all"]),
        (["view", "nothing.jsonl"], ["There is no file or folder nothing.jsonl"]),
    ],
)
def test_mistakes_are_one_line(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, *arguments)
    assert all(part in error for part in told), error
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["eval", "random", "--temperature", "-1"], "'-1' is no number of at least 0"),
        (["eval", "random", "--temperature", "nan"], "'nan' is no number"),
        (["eval", "random", "--window", "-1", "--context", "window"], "'-1' is no whole number"),
        (["diagnose", "ucb", "--output_dir", "x", "--parts", "greedyness"], "choose from"),
        (["eval", "random", "--top_p", "1.5"], "'1.5' is no number from 0 to 1"),
        (["eval", "random", "--invalid_action", "ask"], "choose from"),
        (["eval", "random", "--env_timeout", "0"], "'0' is no number above 0"),
        (["eval", "random", "--max_turns", "0"], "'0' is no whole number of at least 1"),
    ],
)
def test_arguments_are_checked_before_a_model_is_loaded(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_device_or_type_that_is_not_there(capsys, tmp_path, model):
    settings = ["--num_episodes", "1", "--output_dir", str(tmp_path)]
    for name, value in (("--device", "cuda:77"), ("--device", "toaster"), ("--dtype", "float7"), ("--dtype", "nn")):
        assert f"{name} {value}" in error_of(capsys, "eval", f"m={model}", *settings, name, value)


def test_where_an_episode_cannot_be_saved_it_is_not_begun(capsys, tmp_path, monkeypatch):
    """Not told after somebody has played it."""
    answers(monkeypatch, AssertionError("the episode has begun"))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(capsys, "play", BANDIT, "--save", str(tmp_path / "file" / "a.jsonl"))
    assert "is a folder" in error_of(capsys, "play", BANDIT, "--save", str(tmp_path))


def test_env_kwargs_must_be_an_object(capsys):
    for value in ("{n_arms: 3}", "[1]", ""):
        with pytest.raises(SystemExit) as left:
            main(["play", BANDIT, "--env_kwargs", value])
        assert left.value.code == 2 and "JSON" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for command in (["eval", "random"], ["diagnose", "random"]):
        error = error_of(capsys, *command, "--output_dir", str(tmp_path / "file" / "out"))
        assert "cannot be written" in error and "file/out" in error


def test_a_folder_without_a_model_names_its_checkpoints(capsys, tmp_path):
    assert "holds no model" in error_of(capsys, "eval", str(tmp_path))
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    assert f"Did you mean {tmp_path / 'run' / 'checkpoint-20'}?" in error_of(capsys, "eval", str(tmp_path / "run"))
    assert "Did you mean" in error_of(capsys, "eval", str(tmp_path / "rum"))  # a sibling's name


@pytest.mark.parametrize("named", ["run/checkpoint-21", "runs", "Run", "last=run/checkpoint-2000"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(capsys, tmp_path, monkeypatch, named):
    """The Hub was asked for a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_agents.cli.players.load_model", None)
    monkeypatch.setattr("trl_agents.cli.model_arguments.read_agent_config", None)
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    close = "run/checkpoint-20" if "/" in named else "run"
    error = error_of(capsys, "eval", named)
    assert f"There is no folder {named.rpartition('=')[2]}. Did you mean {close}?" in error and "hf download" in error


def test_names_of_the_hub_are_left_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2-tuned", "Qwen3-0.6B", "Qwen/mine"):
        (tmp_path / folder).mkdir(parents=True)
    for named in ("gpt2", "Qwen/Qwen3-0.6B", "org/Qwen3-0.6B-Base"):
        assert name_player(named).source == named
    (tmp_path / "gpt2x").mkdir()
    with pytest.raises(ValueError, match="Did you mean gpt2x"):
        name_player("gpt2")
    cached = tmp_path / "hub" / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(cached))
    assert name_player("gpt2").source == "gpt2"  # is there, whatever lies here


def test_a_model_the_hub_does_not_give(capsys, tmp_path):
    error = error_of(capsys, "eval", "nobody/no-such-model", "--output_dir", str(tmp_path))
    assert "No model could be loaded from 'nobody/no-such-model'" in error


def test_a_file_that_is_no_episodes_file(capsys, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"turns": [{"text": "a"}]}\n{"a": 1}\n')
    for path in (tmp_path / "notes.jsonl", tmp_path):
        assert "line 2: this is no episode" in error_of(capsys, "view", str(path))
    (tmp_path / "empty").mkdir()
    assert "holds no episodes file" in error_of(capsys, "view", str(tmp_path / "empty"))


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no environment"):
        main(["play", "nothing", "--debug"])


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    from trl_agents.cli import play

    monkeypatch.setattr(play, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["play", BANDIT])


def test_close_to():
    assert close_to("bandit", ["trl_agents/Bandit-v0", "x"]) == " Did you mean trl_agents/Bandit-v0?"
    assert close_to("a", ["b"], ["aa"]) == " Did you mean aa?"
    assert close_to("zebra", ["b"], []) == ""


# -- play -------------------------------------------------------------------------------------------------------------


def play_best_known(seed, actions):
    """Return and regret of `actions`, from the environment itself."""
    from trl_agents import make_env

    env = make_env(BANDIT, **json.loads(SMALL))
    env.reset(seed=seed)
    steps = [env.step(action) for action in actions]
    return sum(step[1] for step in steps), sum(step[4]["regret"] for step in steps)


def test_a_person_plays(monkeypatch, capsys, tmp_path):
    answers(monkeypatch, "blu", "GREEN", "?", " red ", "", "ACTION=blue", "ACTION=mauve", "red")
    saved = tmp_path / "mine.jsonl"
    assert main(["play", BANDIT, "--env_kwargs", SMALL, "--seed", "5", "--save", str(saved)]) == 0
    text = capsys.readouterr().out
    assert text.count("You face a bandit problem") == 2  # once more for `?`
    assert "Legal actions: blue, green, red" in text
    assert "'blu' is no legal action. Did you mean blue? Write one of: blue, green, red" in text
    assert "'ACTION=mauve' is no legal action." in text
    return_, regret = play_best_known(5, ["green", "red", "blue", "red"])
    assert f"Return {return_:.2f} in 4 steps, regret {regret:.2f}" in text and "Seed 5." in text
    [record] = read_records(saved)
    assert [turn["action"] for turn in record["turns"]] == ["green", "red", "blue", "red"]
    assert (record["player"], record["seed"], record["stop"]) == ("you", 5, "terminated")


@pytest.mark.parametrize("end", ["quit", "q", EOFError, KeyboardInterrupt])
def test_a_person_leaves(monkeypatch, capsys, end):
    answers(monkeypatch, "blue", end)
    assert main(["play", BANDIT, "--env_kwargs", SMALL, "--seed", "5"]) == 0
    return_, regret = play_best_known(5, ["blue"])
    captured = capsys.readouterr()
    assert f"Return {return_:.2f} so far, left after 1 step, regret {regret:.2f}" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("end", ["QUIT", "Exit", "Q"])
def test_a_person_leaves_where_any_text_is_an_action(monkeypatch, capsys, end):
    """In capitals it was played."""
    answers(monkeypatch, "3", end)
    assert main(["play", "scripted:Words", "--seed", "5"]) == 0
    assert "Return 1.00 so far, left after 1 step" in capsys.readouterr().out


def test_what_does_not_end_by_itself_is_limited(monkeypatch, capsys, tmp_path):
    """It hung, and nothing could limit it."""
    out = ["--output_dir", str(tmp_path / "eval")]
    limited = ["--env", "scripted:Endless", "--max_turns", "3"]
    assert main(["eval", "greedy", *limited, "--num_episodes", "2", *out]) == 0
    assert [len(record["turns"]) for record in read_records(tmp_path / "eval" / "episodes.jsonl")] == [3, 3]
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["settings"]["max_turns"] == 3
    capsys.readouterr()
    assert main(["play", "scripted:Endless", "--player", "greedy", "--seed", "1", "--max_turns", "3"]) == 0
    assert "in 3 steps" in capsys.readouterr().out
    answers(monkeypatch, *"abc", AssertionError("a fourth turn"))
    assert main(["play", "scripted:Endless", "--seed", "1", "--max_turns", "3"]) == 0
    assert "Return 4.00 in 3 steps" in capsys.readouterr().out
    monkeypatch.setattr("trl_agents.agents.ENDLESS", 20)
    new = ["--output_dir", str(tmp_path / "new")]
    for command in (
        ["eval", "greedy", "--env", "scripted:Endless"],
        ["play", "scripted:Endless", "--player", "greedy"],
    ):
        assert "still going on after 20 turns" in error_of(capsys, *command, *(new if command[0] == "eval" else []))


def test_an_environment_that_fails_every_time_is_told(capsys, tmp_path, model, monkeypatch):
    """Of a table without columns it was said that a picture cannot have none."""
    monkeypatch.setattr("scripted.Pay.step", lambda env, action: time.sleep(20))
    settings = ["--max_new_tokens", "3", "--env_timeout", "0.1"]
    out = ["--num_episodes", "1", "--output_dir", str(tmp_path / "eval")]
    error = error_of(capsys, "eval", f"mine={model}", "--env", "scripted:Pay", *settings, *out)
    assert "failed in every episode; the first time: no answer to `step` within 0.1 s" in error
    assert list((tmp_path / "eval").iterdir()) == []  # nothing to go on from
    assert main(["play", "scripted:Pay", "--player", model, "--seed", "1", *settings]) == 0
    assert "The environment failed: no answer to `step` within 0.1 s" in capsys.readouterr().err


def test_usual_settings_are_told_as_before(tmp_path):
    """An evaluation that nobody limits has the `metrics.json` it always had."""
    assert main(["eval", "random", "--num_episodes", "1", "--env_kwargs", SMALL, "--output_dir", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "metrics.json").read_text())["settings"]
    assert not {"max_turns", "env_timeout", "top_p", "invalid_action", "max_episode_length"} & set(told)


def test_a_person_plays_tic_tac_toe(monkeypatch, capsys):
    """Against the optimal opponent: two in a row are answered, and the outcome is told."""
    answers(monkeypatch, *"012345678", *"012345678")
    assert main(["play", "trl_agents/TicTacToe-v0", "--env_kwargs", '{"opponent": "optimal"}', "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert "Legal actions: 0, 1, 2, 3, 4, 5, 6, 7, 8" in text and "Return -1.00" in text and ", loss. Seed 1." in text


def test_the_same_seed_is_the_same_episode_for_players(capsys):
    texts = []
    for _ in range(2):
        assert main(["play", BANDIT, "--env_kwargs", SMALL, "--seed", "3", "--player", "ucb"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    return_, regret = play_best_known(3, [line[2:] for line in texts[0].splitlines() if line.startswith("> ")])
    assert f"Return {return_:.2f} in 4 steps, regret {regret:.2f}" in texts[0]


@pytest.mark.parametrize(
    ("written", "legal_actions", "action"),
    [
        ("blue", ["blue", "red"], "blue"),
        ("BLUE", ["blue", "red"], "blue"),
        ("A", ["a", "A"], "A"),
        ("b", ["B", "bb"], "B"),
        ("Action: red", ["blue", "red"], "red"),
        ("bluered", ["blue", "red"], None),
        ("", ["blue"], None),
        ("anything", None, "anything"),
        ("ACTION=this", None, "this"),
        ("quit", None, None),
        ("quit", ["quit"], "quit"),
        ("QUIT", None, None),
        ("Exit", None, None),
        ("Q", None, None),
        ("?", None, None),
        ("ACTION=quit", None, "quit"),
        ("Q", ["q", "r"], "q"),
    ],
)
def test_read_action(written, legal_actions, action):
    assert read_action(written, legal_actions) == action


def test_ctrl_c_at_the_terminal_is_no_traceback():
    command = [*COMMAND, "play", BANDIT, "--env_kwargs", SMALL, "--seed", "1"]
    playing = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    text = b""
    while not text.endswith(b"\n> "):
        chunk = os.read(playing.stdout.fileno(), 4096)
        assert chunk, playing.stderr.read()
        text += chunk
    time.sleep(0.2)  # until it waits for the line
    playing.send_signal(signal.SIGINT)
    out, err = playing.communicate(timeout=60)
    assert playing.returncode == 0 and err == b"" and b"left after 0 steps" in out


def test_output_that_nobody_reads_on():
    many = '{"horizon": 5000}'  # more text than a pipe holds
    done = subprocess.run(
        f"{sys.executable} -m trl_agents play {BANDIT} --player random --seed 1 --env_kwargs '{many}' | head -1;"
        " echo ${PIPESTATUS[0]}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and done.stdout.splitlines()[-1] == "0"


# -- eval, diagnose, view ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model as small as can be, of random weights."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_eval_compares_players_and_models_on_the_same_seeds(capsys, tmp_path, model):
    folder = tmp_path / "eval"
    arguments = ["--env_kwargs", SMALL, "--num_episodes", "4", "--max_new_tokens", "6", "--output_dir", str(folder)]
    assert main(["eval", "random", "ucb", f"mine={model}", *arguments, "--context", "window"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "100.0% of mine's" in captured.err  # a model of random weights
    metrics = json.loads((folder / "metrics.json").read_text())
    for measure in ("return", "regret", "coverage", "invalid_rate"):
        assert list(metrics[measure]) == ["random", "ucb", "mine"]
        for value in metrics[measure].values():
            assert f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" in captured.out
    assert metrics["settings"]["env_kwargs"] == json.loads(SMALL)
    records = read_records(folder / "episodes.jsonl")
    seeds = [[record["seed"] for record in records if record["player"] == name] for name in ("random", "ucb", "mine")]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds[0])) == 4
    returns = [record["return"] for record in records if record["player"] == "mine"]
    assert metrics["return"]["mine"]["mean"] == pytest.approx(sum(returns) / 4)
    assert (folder / "regret.png").read_bytes().startswith(b"\x89PNG") and (folder / "episodes.html").exists()


def test_eval_goes_on_where_it_was_interrupted(capsys, tmp_path, model, monkeypatch):
    settings = ["--env_kwargs", SMALL, "--num_episodes", "3", "--max_new_tokens", "6"]
    players = ["random", f"mine={model}", "ucb"]
    whole, folder = tmp_path / "whole", tmp_path / "eval"
    assert main(["eval", *players, *settings, "--output_dir", str(whole)]) == 0
    play, asked = evaluate.play_named, []

    def interrupted(player, *arguments, **more):
        asked.append(player.label)
        if asked.count("ucb") == 1 and player.label == "ucb":
            raise KeyboardInterrupt
        return play(player, *arguments, **more)

    monkeypatch.setattr(evaluate, "play_named", interrupted)
    assert main(["eval", *players, *settings, "--output_dir", str(folder)]) == 130
    assert not (folder / "metrics.json").exists()
    capsys.readouterr()
    assert main(["eval", *players, *settings, "--output_dir", str(folder)]) == 0
    assert asked == ["random", "mine", "ucb", "ucb"]
    assert "mine had finished when this was interrupted" in capsys.readouterr().err
    for name in ("episodes.jsonl", "episodes.html"):
        assert (folder / name).read_text() == (whole / name).read_text()
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (folder, whole)]
    assert [{**one, "settings": None} for one in metrics][0] == {**metrics[1], "settings": None}
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    # What is whole is measured anew: a model may have been trained on in the meantime
    assert main(["eval", *players, *settings, "--output_dir", str(folder)]) == 0 and len(asked) == 7


@pytest.mark.parametrize("change", ["settings", "weights", "broken"])
def test_eval_does_not_go_on_with_what_is_another_s(tmp_path, change, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    settings = ["--env_kwargs", SMALL, "--num_episodes", "2", "--max_new_tokens", "4", "--output_dir"]
    play, asked = evaluate.play_named, []
    monkeypatch.setattr(
        evaluate, "play_named", lambda player, *a, **k: asked.append(player.label) or play(player, *a, **k)
    )
    folder = tmp_path / "eval"
    assert main(["eval", f"mine={model}", "./nothing=minimax", *settings, str(folder)]) == 2  # it cannot play this
    assert asked == ["mine", "./nothing"]
    if change == "weights":
        os.utime(tmp_path / "model" / "config.json", ns=(1, 1))
    elif change == "broken":
        next((folder / "_unfinished").iterdir()).write_text('{"made')
    more = ["--seed", "1"] if change == "settings" else []
    assert main(["eval", f"mine={model}", *settings, str(folder), *more]) == 0
    assert asked == ["mine", "./nothing", "mine"] and not (folder / "_unfinished").exists()


def test_eval_without_regret(capsys, tmp_path):
    arguments = ["--env", "trl_agents/TicTacToe-v0", "--num_episodes", "3", "--output_dir", str(tmp_path)]
    assert main(["eval", "random", "best=minimax", *arguments]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "regret" not in metrics and metrics["return"]["best"]["mean"] >= metrics["return"]["random"]["mean"]
    assert (tmp_path / "measures.png").exists() and "measures.png" in capsys.readouterr().out


def test_what_an_earlier_evaluation_wrote_is_replaced_as_a_whole(capsys, tmp_path):
    """Its picture stayed beside the figures of another environment."""
    few, other = ["--num_episodes", "2", "--output_dir", str(tmp_path)], ["--env", "trl_agents/TicTacToe-v0"]
    (tmp_path / "notes.png").write_text("the user's own")
    assert main(["eval", "random", *few, *other]) == 0
    assert "earlier evaluation" not in capsys.readouterr().err
    assert main(["eval", "random", *few, "--env_kwargs", SMALL]) == 0
    error = capsys.readouterr().err
    assert f"{tmp_path} holds an earlier evaluation, of random in trl_agents/TicTacToe-v0, which this one rep" in error
    names = {"notes.png", "regret.png", "metrics.json", "episodes.jsonl", "episodes.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    # The same anew is what a user asks for who trained on in the meantime
    assert main(["eval", "random", *few, "--env_kwargs", SMALL]) == 0
    assert capsys.readouterr().err == "" and {path.name for path in tmp_path.iterdir()} == names
    # Pictures that no evaluation has left are somebody else's
    (tmp_path / "metrics.json").write_text('{"regret": {}}')
    (tmp_path / "measures.png").write_text("a recipe's")
    assert main(["eval", "random", *few, "--env_kwargs", SMALL]) == 0
    assert (tmp_path / "measures.png").read_text() == "a recipe's"


def test_name_player(tmp_path, model, monkeypatch):
    assert (name_player("ucb").label, name_player("ucb").is_scripted) == ("ucb", True)
    bayes = name_player("bayes=thompson:prior=gaussian,sigma=2")
    assert (bayes.label, bayes.source, bayes.is_scripted) == ("bayes", "thompson:prior=gaussian,sigma=2", True)
    assert name_player("thompson:prior=gaussian").label == "thompson:prior=gaussian"
    assert (name_player("a=ucb").label, name_player("a=ucb").source) == ("a", "ucb")
    assert name_player(f"{model}/").label == model and not name_player(model).is_scripted
    assert name_player("Qwen/Qwen3-0.6B").source == "Qwen/Qwen3-0.6B"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "config.json").write_text("{}")
    assert name_player("lr=1").source == "lr=1"  # a folder's own name
    assert [player.label for player in name_players(["a=ucb", "ucb"])] == ["a", "ucb"]


PAYING_FINES = """\
class Fines:
    instructions = "ACTION=a or ACTION=b?"

    def reset(self, *, seed=None, options=None):
        return "", {"legal_actions": ["a", "b"]}

    def step(self, action):
        return "", -0.05, True, False, {"legal_actions": ["a", "b"]}

    def close(self):
        pass
"""


def test_players_take_settings(capsys, tmp_path, monkeypatch):
    """What Thompson's prior asks for where rewards leave [0, 1] can be said on the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "paying_fines.py").write_text(PAYING_FINES)
    settings = ["--env", "paying_fines:Fines", "--num_episodes", "2", "--output_dir", "x"]
    error = error_of(capsys, "eval", "thompson", *settings)
    assert "reward=-0.05" in error and "thompson:prior=gaussian" in error
    assert main(["eval", "thompson:prior=gaussian", "bayes=thompson:prior=gaussian,sigma=2", *settings]) == 0
    assert list(json.loads((tmp_path / "x" / "metrics.json").read_text())["return"])[1] == "bayes"
    settings = ["--parts", "greediness", "--num_instances", "2", "--quiet", "--env_kwargs", SMALL]
    assert main(["diagnose", "ucb:bonus=sqrt_n", *settings, "--output_dir", "y"]) == 0
    assert main(["play", "paying_fines:Fines", "--player", "thompson:prior=gaussian"]) == 0


SLOW_TO_MAKE = """\
import threading

class Slow:
    def __init__(self):
        threading.Event().wait(20)
"""


@pytest.mark.parametrize("command", [["eval", "random"], ["diagnose", "random", "--parts", "greediness"]])
def test_an_environment_that_cannot_be_made_in_time(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_to_make.py").write_text(SLOW_TO_MAKE)
    settings = ["--env", "slow_to_make:Slow", "--env_timeout", "0.2", "--output_dir", "x"]
    assert "could not be begun" in error_of(capsys, *command, *settings)


def test_mechanisms_are_named(capsys, tmp_path, model):
    settings = ["--env_kwargs", SMALL, "--num_episodes", "2", "--max_new_tokens", "6", "--output_dir", str(tmp_path)]
    assert main(["eval", f"mine={model}", *settings, "--exploration", "try_all"]) == 0
    turns = read_records(tmp_path / "episodes.jsonl")[0]["turns"]
    assert turns[0]["forced"] and "forced" not in turns[-1]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", "random", "--exploration", "try_everything"])
    assert "try_everything' is unknown: choose of try_all" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "random", "--exploration", "try_al"])
    error = capsys.readouterr().err
    assert "try_al' is unknown: choose of try_all" in error and "Did you mean try_all?" in error


def test_diagnose_writes_one_folder_and_compares(capsys, tmp_path, model):
    settings = ["--env_kwargs", SMALL, "--num_instances", "2", "--max_new_tokens", "6", "--max_new_tokens_ucb", "6"]
    before, after = tmp_path / "before", tmp_path / "after"
    assert main(["diagnose", "random", *settings, "--output_dir", str(before)]) == 0
    assert "trl-agents: note: knowing_doing is left out" in capsys.readouterr().err
    parts = ["--parts", "greediness", "knowing_doing"]
    assert (
        main(["diagnose", f"mine={model}", *settings, *parts, "--output_dir", str(after), "--compare", str(before)])
        == 0
    )
    assert f"Report: {after / 'report.html'}" in capsys.readouterr().out
    diagnosis = json.loads((after / "diagnostics.json").read_text())
    assert diagnosis["player"] == "mine" and set(diagnosis["parts"]) == {"greediness", "knowing_doing"}
    report = (after / "report.html").read_text()
    assert "Diagnosis of random and mine" in report and 'href="../before/episodes.html"' in report
    mean = diagnosis["parts"]["greediness"]["measures"]["regret"]["mine"]["mean"]
    assert f"<span>{mean:.2f} " in report and "it was not measured" not in report
    assert len(read_records(after / "episodes.jsonl")) == 4 and (after / "episodes.html").exists()
    # A report that compares is not replaced by one that does not, unless the figures are newer
    assert main(["view", str(after)]) == 0
    assert (after / "report.html").read_text() == report
    assert f"Report: {after / 'report.html'}" in capsys.readouterr().out
    os.utime(after / "report.html", ns=(1, 1))
    assert main(["view", str(after)]) == 0
    assert "Diagnosis of mine" in (after / "report.html").read_text()
    capsys.readouterr()
    # The folder alone makes both pages anew
    (after / "report.html").unlink()
    (after / "episodes.html").unlink()
    assert main(["view", str(after)]) == 0
    assert "4 episodes" in capsys.readouterr().out and "read the episodes" in (after / "report.html").read_text()
    error = error_of(capsys, "diagnose", "random", "--output_dir", str(tmp_path / "c"), "--compare", str(tmp_path))
    assert "there is no" in error and "diagnostics.json" in error
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "diagnostics.json").write_text('{"parts"')
    error = error_of(
        capsys, "diagnose", "random", "--output_dir", str(tmp_path / "c"), "--compare", str(tmp_path / "broken")
    )
    assert "is no JSON" in error and not (tmp_path / "c" / "diagnostics.json").exists()


def test_view_a_file_a_folder_and_another_place(capsys, tmp_path, monkeypatch):
    (tmp_path / "round_1").mkdir()
    row = {"turns": [{"text": "ACTION=a", "reward": 1}], "seed": 0}
    (tmp_path / "round_1" / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "more.jsonl").write_text(json.dumps({**row, "player": "ucb"}) + "\n")
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n')  # no episodes: passed over in a folder
    assert main(["view", str(tmp_path / "more.jsonl")]) == 0
    assert (tmp_path / "more.html").exists() and "1 episode:" in capsys.readouterr().out
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["view", str(tmp_path), "--output", str(tmp_path / "all" / "page.html"), "--open"]) == 0
    assert opened == [(tmp_path / "all" / "page.html").as_uri()]
    page = (tmp_path / "all" / "page.html").read_text()
    assert '"player":"ucb"' in page and '"player":"round_1/episodes"' in page
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(
        capsys, "view", str(tmp_path), "--output", str(tmp_path / "file" / "x.html")
    )
