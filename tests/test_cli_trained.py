# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`trl-agents` lets a model play as it was trained, says so, and lets the command line win."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace

import pytest
from scripted import save_tiny_model

import trl_agents.evaluation
from trl_agents import ActionParser
from trl_agents.agent_config import AGENT_CONFIG_FILE, AgentConfig
from trl_agents.cli import main
from trl_agents.viewer import read_records


BANDIT = "trl_agents/Bandit-v0"
SMALL = {"n_arms": 3, "horizon": 4, "distribution": "bernoulli"}
TRAINED = AgentConfig(BANDIT, SMALL, context="window", window=2, max_completion_length=6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def agent(tmp_path, weights):
    """Makes a model's folder that says how it was trained."""

    def make(name, config=TRAINED):
        folder = shutil.copytree(weights, tmp_path / name)
        config.save(folder)
        return f"{name}={folder}"

    return make


@pytest.fixture
def played(monkeypatch):
    """What `play_model` was asked for, in turn."""
    play, asked = trl_agents.evaluation.play_model, []

    def record(model, tokenizer, env_id, seeds, **how):
        asked.append({"env": env_id, **how})
        return play(model, tokenizer, env_id, seeds, **how)

    monkeypatch.setattr(trl_agents.evaluation, "play_model", record)
    return asked


def evaluate(capsys, tmp_path, *arguments):
    """What `eval` says on stderr, and what it writes."""
    folder = tmp_path / "eval"
    code = main(["eval", *arguments, "--num_episodes", "2", "--output_dir", str(folder)])
    told = capsys.readouterr().err
    return code, told, json.loads((folder / "metrics.json").read_text()) if code == 0 else None


def test_a_model_plays_as_it_was_trained(capsys, tmp_path, agent, played):
    trained = replace(TRAINED, temperature=0.5, action_stop=True, exploration=("try_all",))
    trained = replace(trained, action_parser=ActionParser(r"Move: (\w+)"), chat_template_kwargs={"tag": 1})
    code, told, metrics = evaluate(capsys, tmp_path, "random", "ucb", agent("mine", trained))
    assert code == 0
    (asked,) = played
    assert asked["env"] == BANDIT and {name: asked[name] for name in trained.arguments()} == trained.arguments()
    (line,) = [line for line in told.splitlines() if "mine plays as" in line]
    for part in (
        f"its {AGENT_CONFIG_FILE} says: env {BANDIT}, env_kwargs {json.dumps(SMALL)}, context window, window 2, ",
        'max_new_tokens 6, action_stop true, temperature 0.5, action_pattern ["Move: (\\\\w+)"]',
        'exploration ["try_all"]',
    ):
        assert part in line, line
    assert metrics["settings"]["env_kwargs"] == SMALL
    assert metrics["settings"]["models"]["mine"]["max_completion_length"] == 6
    assert {len(record["turns"]) for record in read_records(tmp_path / "eval" / "episodes.jsonl")} == {4}  # all


def test_a_model_plays_by_the_rules_of_its_training(capsys, tmp_path, agent, played):
    """They were neither in the file nor used, and its evaluation differed from the trainer's without a word."""
    rules = {"top_p": 0.9, "top_k": 40, "min_p": 0.1, "max_episode_length": 900, "invalid_action": "retry"}
    rules |= {"max_retries": 1, "max_turns": 2}
    mine = agent("mine", replace(TRAINED, **rules))
    code, told, metrics = evaluate(capsys, tmp_path, "random", mine)
    (asked,) = played
    assert code == 0 and {name: asked[name] for name in rules} == rules
    shown = ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in rules.items()
    )
    assert all(part in told for part in shown.split(", ")), told
    assert metrics["settings"]["max_turns"] == 2 and metrics["settings"]["models"]["mine"]["top_p"] == 0.9
    lengths = {record["player"]: len(record["turns"]) for record in read_records(tmp_path / "eval" / "episodes.jsonl")}
    assert lengths == {"random": 2, "mine": 2}  # the limit is everybody's: two tries of one step are two turns
    given = {"top_p": "1", "top_k": "0", "min_p": "0", "max_episode_length": "800", "invalid_action": "end"}
    given |= {"max_retries": "0", "max_turns": "3"}
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert evaluate(capsys, tmp_path, mine, *arguments, "--env_timeout", "7")[0] == 0
    assert {name: str(played[1][name]).removesuffix(".0") for name in given} == given and played[1]["env_timeout"] == 7


def test_models_that_disagree_on_the_limit(capsys, tmp_path, agent, played):
    models = [agent("one", replace(TRAINED, max_turns=3)), agent("two")]
    code, error, _ = evaluate(capsys, tmp_path, *models)
    assert code == 2 and played == []
    assert "one was trained with the max_turns 3, two with no limit: say with --max_turns" in error
    code, _, metrics = evaluate(capsys, tmp_path, *models, "--max_turns", "2")
    assert code == 0 and [asked["max_turns"] for asked in played] == [2, 2]
    other = replace(TRAINED, env_id="trl_agents/TicTacToe-v0", env_kwargs={}, max_turns=3)  # says nothing of a bandit
    code, _, metrics = evaluate(capsys, tmp_path, agent("three", other), "--env", BANDIT)
    assert code == 0 and played[-1]["max_turns"] is None and "max_turns" not in metrics["settings"]


def test_a_diagnosis_has_the_limits_and_rules_of_its_own(capsys, tmp_path, agent, played, monkeypatch):
    monkeypatch.setattr("trl_agents.diagnostics.players.play_model", trl_agents.evaluation.play_model)
    rules = {"top_p": 0.9, "invalid_action": "end", "max_episode_length": 300, "max_turns": 2}
    few = ["--num_instances", "1", "--parts", "greediness", "--env_timeout", "9"]
    mine = agent("mine", replace(TRAINED, **rules))
    assert main(["diagnose", mine, *few, "--output_dir", str(tmp_path / "out")]) == 0
    (asked,) = played
    assert (asked["max_turns"], asked["env_timeout"]) == (2, 9)
    # Greedily, with room for the values, and random actions for invalid ones
    assert not {"top_p", "invalid_action", "max_episode_length"} & set(asked)
    told = json.loads((tmp_path / "out" / "diagnostics.json").read_text())["settings"]
    assert told["max_turns"] == 2 and "max_episode_length" not in told
    lengths = [len(record["turns"]) for record in read_records(tmp_path / "out" / "episodes.jsonl")]
    assert set(lengths) == {2}


def test_what_is_given_wins(capsys, tmp_path, agent, played):
    given = ["--context", "chat", "--max_new_tokens", "5", "--env_kwargs", '{"n_arms": 2, "horizon": 3}']
    given += ["--temperature", "0", "--no-action_stop", "--exploration", "--action_pattern", "Go: (.+)"]
    mine = agent("mine", replace(TRAINED, action_stop=True, exploration=("try_all",), chat_template_kwargs={"a": 1}))
    code, told, _ = evaluate(capsys, tmp_path, mine, *given)
    (asked,) = played
    wanted = AgentConfig(None, {"n_arms": 2, "horizon": 3}, "chat", None, 5, 0.0, chat_template_kwargs={"a": 1})
    wanted = replace(wanted, action_parser=ActionParser("Go: (.+)")).arguments()
    assert code == 0 and {name: asked[name] for name in wanted} == wanted
    assert f'says: env {BANDIT}, chat_template_kwargs {{"a": 1}}.' in told


def test_another_environment_has_other_arguments(capsys, tmp_path, agent, played):
    code, told, metrics = evaluate(capsys, tmp_path, agent("mine"), "--env", "trl_agents/TicTacToe-v0")
    assert code == 0 and played[0]["env_kwargs"] == {} and metrics["settings"]["env"] == "trl_agents/TicTacToe-v0"
    assert "env_kwargs" not in told.split("Check")[0]


def test_the_file_can_be_ignored(capsys, tmp_path, agent, played):
    code, told, _ = evaluate(capsys, tmp_path, agent("mine"), "--ignore_agent_config", "--max_new_tokens", "4")
    assert code == 0 and played[0]["context"] == "chat" and played[0]["env_kwargs"] == {} and "plays as" not in told


def test_each_model_has_its_own_settings(capsys, tmp_path, agent, played):
    chat = replace(TRAINED, context="chat", window=None, max_completion_length=5)
    code, told, _ = evaluate(capsys, tmp_path, agent("before", chat), agent("after"), "--window", "1")
    assert code == 0 and told.count("plays as its") == 2
    shown = [(asked["context"], asked["window"], asked["max_new_tokens"]) for asked in played]
    assert shown == [("chat", None, 5), ("window", 1, 6)]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"env_kwargs": {"n_arms": 2, "horizon": 2}},
            ["one was trained with the env_kwargs", "two with", '"n_arms": 3', '"n_arms": 2', "--env_kwargs"],
        ),
        ({"env_id": "trl_agents/TicTacToe-v0"}, ["one was trained with the environment", "two with", "--env "]),
    ],
)
def test_models_that_disagree_on_the_environment(capsys, tmp_path, agent, played, other, told):
    models = [agent("one"), agent("two", replace(TRAINED, **other))]
    code, error, _ = evaluate(capsys, tmp_path, *models)
    assert code == 2 and played == [] and all(part in error for part in told), error
    code, _, metrics = evaluate(capsys, tmp_path, *models, "--env", BANDIT, "--env_kwargs", json.dumps(SMALL))
    assert code == 0 and metrics["settings"]["env_kwargs"] == SMALL


@pytest.mark.parametrize(
    ("text", "told"), [("{", "Expecting property name"), ('{"version": 9}', "its version is 9"), ("[]", "no JSON")]
)
def test_a_file_that_cannot_be_used(capsys, tmp_path, agent, text, told):
    mine = agent("mine")
    file = tmp_path / "mine" / AGENT_CONFIG_FILE
    file.write_text(text)
    for arguments in (["eval", mine], ["diagnose", mine], ["play", BANDIT, "--player", mine]):
        where = [] if arguments[0] == "play" else ["--output_dir", str(tmp_path / "out")]
        assert main([*arguments, *where]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(file) in error and told in error and "--ignore_agent_config" in error
    assert main(["play", BANDIT, "--player", mine, "--ignore_agent_config", "--max_new_tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (replace(TRAINED, env_id=None), "mine was trained in an environment without an id: say with --env"),
        (replace(TRAINED, exploration=("Mine",)), "Add --exploration, with other mechanisms or alone"),
        *(
            (replace(TRAINED, env_id=env_id), f"names the environment {env_id!r}, which would import or call")
            for env_id in (
                "tools:os:system",
                "openenv:http://a.b",
                "some_module:Env-v0",
                "gymnasium:some_module:E-v0",
                "m:Cls",
            )
        ),
    ],
)
def test_what_no_file_can_decide(capsys, tmp_path, agent, played, config, told):
    """A file may come from anywhere: no code is run because it says so."""
    code, error, _ = evaluate(capsys, tmp_path, agent("mine", config))
    assert code == 2 and told in error and played == []


def test_what_no_file_can_hold_is_told(capsys, tmp_path, agent):
    config = replace(TRAINED, left_out=("means",), parser_class="my.Parser")
    code, told, _ = evaluate(capsys, tmp_path, agent("mine", config))
    assert code == 0 and "mine was trained with means among env_kwargs" in told
    assert "a parser of its own, my.Parser" in told


def test_play_watches_it_as_it_was_trained(capsys, agent, played):
    assert main(["play", BANDIT, "--player", agent("mine"), "--seed", "3"]) == 0
    told = capsys.readouterr()
    assert "in 4 steps" in told.out and "mine plays as its" in told.err
    assert (played[0]["context"], played[0]["window"], played[0]["env_kwargs"]) == ("window", 2, SMALL)


def test_diagnose_takes_it_too(capsys, tmp_path, agent):
    """All but the temperature: a diagnosis is one of greedy decoding, which makes models comparable."""
    mine = agent("mine", replace(TRAINED, context="chat", window=None, temperature=0.7))
    arguments = ["diagnose", mine, "--num_instances", "2", "--max_new_tokens_ucb", "6", "--parts", "greediness"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    diagnosis = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    assert diagnosis["env"] == {"id": BANDIT, "kwargs": SMALL}
    settings = diagnosis["settings"]
    assert (settings["context"], settings["max_new_tokens"], settings["temperature"]) == ("chat", 6, 0.0)
    assert "context chat, max_new_tokens 6." in told and "temperature" not in told


# -- the examples ----------------------------------------------------------------------------------------------------


def examples():
    """What the README and the help texts show of the commands that let models play."""
    from pathlib import Path

    from trl_agents.cli import COMMANDS, EXAMPLES

    readmes = [(Path(__file__).parents[1] / name).read_text() for name in ("README.md", "recipes/README.md")]
    texts = [*readmes, EXAMPLES, *(module.EXAMPLES for module in COMMANDS.values())]
    lines = {line.strip() for text in texts for line in text.splitlines()}
    return sorted(line for line in lines if line.startswith(("trl-agents eval ", "trl-agents diagnose ")))


@pytest.mark.parametrize("line", [line for line in examples() if "outputs/grpo_bandit_tiny" in line])
def test_the_examples_let_the_first_model_play_as_it_was_trained(capsys, tmp_path, monkeypatch, weights, played, line):
    monkeypatch.chdir(tmp_path)
    chat = replace(TRAINED, context="chat", window=None)
    for folder in ("outputs/grpo_bandit_tiny", "outputs/grpo_bandit_tiny/warmup"):
        shutil.copytree(weights, folder, dirs_exist_ok=True)
        chat.save(folder)
    command, *arguments = shlex.split(line, comments=True)[1:]
    before = ["diagnose", "outputs/grpo_bandit_tiny/warmup", "--output_dir", "outputs/diagnosis/before"]
    few = ["--num_instances", "1", "--parts", "greediness"]
    if "--compare" in arguments:
        assert main([*before, *few]) == 0
    assert main([command, *arguments, *(few if command == "diagnose" else ["--num_episodes", "1"])]) == 0
    assert "context chat, max_new_tokens 6" in capsys.readouterr().err
    if command == "diagnose":
        found = json.loads(
            (tmp_path / arguments[arguments.index("--output_dir") + 1] / "diagnostics.json").read_text()
        )
        assert (found["env"]["kwargs"], found["settings"]["context"]) == (SMALL, "chat")
    else:
        assert all((asked["env_kwargs"], asked["context"]) == (SMALL, "chat") for asked in played) and played


# -- many invalid replies ---------------------------------------------------------------------------------------------


def test_many_invalid_replies_are_told(capsys, tmp_path, agent):
    """In a line, of models alone: the agent's weights are random."""
    _, told, metrics = evaluate(capsys, tmp_path, "random", agent("mine"))
    assert metrics["invalid_rate"]["mine"]["mean"] > 0.2
    (line,) = [line for line in told.splitlines() if "without a legal action" in line]
    assert "of mine's" in line and "random's" not in line
    assert all(flag in line for flag in ("--context", "--max_new_tokens", "--env_kwargs", "--action_pattern"))
    parts = ["--parts", "greediness", "knowing_doing", "--num_instances", "2", "--max_new_tokens_ucb", "6"]
    assert main(["diagnose", agent("his"), *parts, "--output_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if "without a legal action" in line]
    assert "in greediness" in line and "in knowing_doing" in line and "--max_new_tokens_ucb" in line


def test_few_invalid_replies_are_not(capsys, tmp_path):
    from trl_agents.cli.players import warn_of_invalid

    with pytest.warns(UserWarning, match="21.0% of b's. Random"):
        warn_of_invalid({"of a's": 0.2, "of b's": 0.21}, "--max_new_tokens")
    assert main(["eval", "random", "--num_episodes", "2", "--output_dir", str(tmp_path)]) == 0
    assert "legal action" not in capsys.readouterr().err
