# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A whole diagnosis into a folder: its files, going on where it was interrupted, what it refuses and leaves out."""

import json
import math
import threading
import time
import warnings

import pytest
import torch
from matplotlib.image import imread
from scripted import Endless, Pay

from trl_agents.agents import UCBAgent
from trl_agents.diagnostics import diagnose
from trl_agents.diagnostics.folder import PICTURES
from trl_agents.episodes import read_episodes
from trl_agents.tiny import tiny_model, tiny_tokenizer


ENV = "trl_agents/Bandit-v0"
SMALL = {"n_instances": 3, "horizon": 6, "n_targets": 2, "n_histories": 2, "n_repetitions": 10, "progress": False}
FILES = ["coverage.png", "diagnostics.json", "episodes.jsonl", "frequency_bias.png", "knowing_doing.png"]


def blue(prompt):
    return "<ucb_values>blue: 1</ucb_values> ACTION=blue"


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Pictures take most of the time: they are drawn in the test that looks at them."""
    if request.node.name != "test_everything_into_one_folder":
        empty = {part: (name, lambda _part, path, _title: path.touch()) for part, (name, _) in PICTURES.items()}
        monkeypatch.setattr("trl_agents.diagnostics.folder.PICTURES", empty)


@pytest.fixture(scope="module")
def model():
    tokenizer = tiny_tokenizer(["Step=1 Action=blue Reward=0.53 So far you have tried/seen: ACTION="], vocab_size=320)
    return tiny_model(tokenizer, 32, 1), tokenizer


def is_interval(value):
    return set(value) == {"mean", "low", "high"} and value["low"] <= value["mean"] <= value["high"]


def test_what_does_not_end_by_itself_is_limited(tmp_path):
    """For a model, for scripted players and for text; without a limit the settings are told as ever."""
    settings = {"n_instances": 2, "n_targets": 2, "n_histories": 2, "n_repetitions": 3, "progress": False}
    for number, player in enumerate((lambda prompt: "ACTION=b", UCBAgent())):
        folder = tmp_path / str(number)
        result = diagnose(player, Endless, folder, parts=["greediness"], max_turns=4, **settings)
        curves = result["parts"]["greediness"]["coverage_by_step"]
        assert all(len(curve["mean"]) == 4 for curve in curves.values()) and result["settings"]["max_turns"] == 4
    result = diagnose(UCBAgent(), Pay, tmp_path / "pay", parts=["greediness"], **settings)
    assert not {"max_turns", "env_timeout"} & set(result["settings"])


def test_everything_into_one_folder(tmp_path, model):
    """A model with random weights: nonsense, and yet figures."""
    budgets = {"max_new_tokens": 6, "max_new_tokens_ucb": 9}
    result = diagnose(model, ENV, tmp_path, name="me", **SMALL, **budgets)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert json.loads((tmp_path / "diagnostics.json").read_text()) == result
    assert result["player"] == "me" and result["env"] == {"id": ENV, "kwargs": {"horizon": 6}}
    assert list(result["parts"]) == ["greediness", "frequency_bias", "knowing_doing"] and result["skipped"] == {}

    greediness = result["parts"]["greediness"]
    assert list(greediness["coverage_by_step"]) == ["me", "random", "ucb"]
    assert all(len(curve["mean"]) == 6 for curve in greediness["coverage_by_step"].values())
    assert all(is_interval(value) for row in greediness["measures"].values() for value in row.values())
    assert greediness["measures"]["chosen_coverage"]["me"]["mean"] == 0.0
    bias = result["parts"]["frequency_bias"]
    assert bias["max_entropy"] == pytest.approx(math.log(5)) and len(bias["entropy"]["mean"]) == 11
    assert list(bias["windows"]) == ["0-1", "4-6", "9-10"]
    assert bias["naive_forward_passes"] == 4 * 11 * 5
    joint = result["parts"]["knowing_doing"]["joint"]
    assert joint["wrong"]["other"] == 100.0 and result["parts"]["knowing_doing"]["missing_block"] == 18
    assert all(is_interval(value) for value in result["invalid_rate"].values())
    assert result["invalid_rate"]["greediness"]["mean"] == result["invalid_rate"]["knowing_doing"]["mean"] == 1.0
    assert result["invalid_rate"]["frequency_bias"]["mean"] > 0.5

    for picture in ("coverage.png", "frequency_bias.png", "knowing_doing.png"):
        assert imread(tmp_path / picture).std() > 0.05  # something is drawn
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows] == ["greediness"] * 3 + ["knowing_doing"] * 3
    for row in rows:
        assert row["player"].startswith("me") and len(row["turns"]) == 6 and row["stop"] == "terminated"
        assert ("<ucb_values>" in row["instructions"]) == (row["part"] == "knowing_doing")
        for turn in row["turns"]:
            assert turn["valid"] is False and turn["reason"] and turn["action"] and {"regret", "optimal"} <= set(turn)
    assert len(read_episodes(tmp_path / "episodes.jsonl")) == 6


def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    import importlib

    module = importlib.import_module("trl_agents.diagnostics.diagnose")
    whole = diagnose(blue, ENV, tmp_path / "whole", **SMALL)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "knowing_doing", interrupted)
        with pytest.raises(KeyboardInterrupt):
            diagnose(blue, ENV, tmp_path / "cut", **SMALL)
    kept = json.loads((tmp_path / "cut" / "diagnostics.json").read_text())
    assert list(kept["parts"]) == ["greediness", "frequency_bias"]
    assert len((tmp_path / "cut" / "episodes.jsonl").read_text().splitlines()) == 3

    with monkeypatch.context() as patch:  # what is done is not done again
        patch.setattr(module, "greediness", interrupted)
        patch.setattr(module, "frequency_bias", interrupted)
        again = diagnose(blue, ENV, tmp_path / "cut", **SMALL)
    for result in (whole, again):
        del result["parts"]["frequency_bias"]["seconds"]
    assert again == whole
    assert (tmp_path / "cut/episodes.jsonl").read_text() == (tmp_path / "whole/episodes.jsonl").read_text()
    assert not list((tmp_path / "cut").glob("*.part"))


def test_an_interrupted_write_leaves_the_file_before_it(tmp_path, monkeypatch):
    diagnose(blue, ENV, tmp_path, parts=["greediness"], **SMALL)
    before = (tmp_path / "diagnostics.json").read_text()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space"):
        diagnose(blue, ENV, tmp_path, parts=["frequency_bias"], **SMALL)
    assert (tmp_path / "diagnostics.json").read_text() == before


def test_parts_may_be_added(tmp_path):
    first = diagnose(blue, ENV, tmp_path, parts=["knowing_doing"], **SMALL)
    assert list(first["parts"]) == ["knowing_doing"]
    both = diagnose(blue, ENV, tmp_path, parts=["greediness"], **SMALL)
    assert set(both["parts"]) == {"knowing_doing", "greediness"}
    assert both["parts"]["knowing_doing"] == first["parts"]["knowing_doing"]
    assert both["parts"]["greediness"]["measures"]["coverage"]["blue"]["mean"] == pytest.approx(1 / 5)
    assert both["parts"]["greediness"]["measures"]["greedy_fraction"]["blue"]["mean"] == 1.0


def test_a_mechanism_is_at_work_in_the_episodes(tmp_path):
    settings = SMALL | {"horizon": 7, "exploration": ["try_all"], "parts": ["greediness", "knowing_doing"]}
    result = diagnose(blue, ENV, tmp_path, **settings)
    assert result["parts"]["greediness"]["measures"]["coverage"]["blue"]["mean"] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    forced = {row["part"]: ["forced" in turn for turn in row["turns"]] for row in rows}
    assert forced == {"greediness": [True] * 5 + [False] * 2, "knowing_doing": [False] * 7}
    with pytest.raises(ValueError, match="exploration"):
        diagnose(blue, ENV, tmp_path, **SMALL | {"horizon": 7})
    with pytest.raises(ValueError, match="writes no replies"):
        diagnose("ucb", ENV, tmp_path / "ucb", exploration="try_all", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "settings.seed was 0, now 1"),
        ({"horizon": 7}, "env.kwargs.horizon was 6, now 7"),
        ({"n_instances": 4}, "settings.n_instances was 3, now 4"),
        ({"name": "you"}, "player was 'blue', now 'you'"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    diagnose(blue, ENV, tmp_path, parts=["greediness"], **SMALL)
    before = (tmp_path / "diagnostics.json").read_text()
    with pytest.raises(ValueError, match=message):
        diagnose(blue, ENV, tmp_path, parts=["greediness"], **SMALL | change)
    assert (tmp_path / "diagnostics.json").read_text() == before


def test_a_model_that_was_trained_on_is_another_one(tmp_path, model):
    settings = {**SMALL, "name": "me", "parts": ["frequency_bias"]}
    diagnose(model, ENV, tmp_path, **settings)
    diagnose(model, ENV, tmp_path, **settings)
    weights = model[0].model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weights[0, 0] += 1e-3
    try:
        with pytest.raises(ValueError, match="settings.weights was"):
            diagnose(model, ENV, tmp_path, **settings)
    finally:
        with torch.no_grad():
            weights[0, 0] -= 1e-3


def test_scripted_players_have_no_gap(tmp_path):
    with pytest.warns(UserWarning, match="knowing_doing is left out: a scripted player"):
        result = diagnose("ucb", ENV, tmp_path, **SMALL)
    assert list(result["parts"]) == ["greediness", "frequency_bias"] and list(result["skipped"]) == ["knowing_doing"]
    assert list(result["parts"]["greediness"]["measures"]["regret"]) == ["ucb", "random"]  # not beside itself
    agent, settings = UCBAgent("sqrt_n"), {**SMALL, "parts": ["greediness"], "references": ["ucb"]}
    other = diagnose(agent, ENV, tmp_path / "b", **settings)
    assert list(other["parts"]["greediness"]["measures"]["regret"]) == ["UCBAgent", "ucb"]
    agent.reset(legal_actions=["blue"], seed=0)  # what it remembers of an episode makes it no other player
    assert diagnose(agent, ENV, tmp_path / "b", **settings) == other
    with pytest.raises(ValueError, match="settings.bonus was 'sqrt_n', now 'ucb1'"):
        diagnose(UCBAgent(), ENV, tmp_path / "b", **settings)


def test_an_environment_without_legal_actions(tmp_path):
    settings = {**SMALL, "horizon": None, "env_kwargs": {"actions": None}}
    with pytest.warns(UserWarning) as caught:
        result = diagnose(lambda prompt: "ACTION=a", Pay, tmp_path, name="a", **settings)
    assert len(caught) == 3
    assert result["parts"] == {} and len(result["skipped"]) == 3
    assert all("info['legal_actions']" in reason for reason in result["skipped"].values())
    assert json.loads((tmp_path / "diagnostics.json").read_text()) == result


def test_an_environment_whose_actions_change(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = diagnose(
            lambda prompt: "ACTION=4", "trl_agents/TicTacToe-v0", tmp_path, name="4", **SMALL | {"horizon": None}
        )
    assert list(result["parts"]) == ["greediness"] and set(result["skipped"]) == {"frequency_bias", "knowing_doing"}
    assert "coverage" not in result["parts"]["greediness"]["measures"]
    assert result["invalid_rate"]["greediness"]["mean"] > 0  # the middle is taken once


def test_an_environment_of_one_s_own(tmp_path):
    result = diagnose(lambda prompt: "ACTION=c", Pay, tmp_path, name="c", **SMALL)
    assert result["env"] == {"id": "Pay", "kwargs": {"horizon": 6}}
    assert result["parts"]["greediness"]["measures"]["return"]["c"]["mean"] == 18.0
    assert result["parts"]["frequency_bias"]["windows"]["9-10"]["greedy"] == 1.0  # it pays best wherever it was tried


def test_an_environment_that_breaks(tmp_path):
    with pytest.raises(
        ValueError, match="failed in every episode; the first time: RuntimeError: the environment broke"
    ):
        diagnose(lambda prompt: "ACTION=x", Pay, tmp_path, env_kwargs={"actions": "abx"}, **SMALL)


class NeverBegins(Pay):
    def reset(self, **kwargs):
        threading.Event().wait(20)
        return super().reset(**kwargs)


def test_an_environment_that_does_not_begin_is_not_waited_for(tmp_path):
    started = time.monotonic()
    with pytest.raises(ValueError, match="could not be begun"):
        diagnose(lambda prompt: "ACTION=a", NeverBegins, tmp_path, parts=["greediness"], env_timeout=0.1, **SMALL)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such/model", ENV), "No model could be loaded from 'no/such/model'"),
        (("uxb", ENV), "Did you mean ucb"),
        ((3, ENV), "player=3 is no player"),
        (("ucb", "trl_agents/Bandid-v0"), "No environment could be made from the id 'trl_agents/Bandid-v0'"),
        (("ucb", "trl_agents/TicTacToe-v0"), "does not take env_kwargs={'horizon': 6}"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(*arguments, tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such part"):
        diagnose("ucb", ENV, tmp_path, parts=["greed"], **SMALL)
    with pytest.raises(ValueError, match="n_instances=0"):
        diagnose("ucb", ENV, tmp_path, **SMALL | {"n_instances": 0})
    (tmp_path / "diagnostics.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="is no diagnosis"):
        diagnose("ucb", ENV, tmp_path, **SMALL)


def test_a_saved_model_by_its_folder(tmp_path, model):
    for part in model:
        part.save_pretrained(tmp_path / "model")
    result = diagnose(
        str(tmp_path / "model"), ENV, tmp_path / "out", parts=["frequency_bias"], context="chat", **SMALL
    )
    assert result["player"] == str(tmp_path / "model")
    loaded = result["parts"]["frequency_bias"]
    same = diagnose(model, ENV, tmp_path / "same", parts=["frequency_bias"], context="chat", **SMALL)
    assert loaded["entropy"] == same["parts"]["frequency_bias"]["entropy"]
    assert loaded["tokens"] < loaded["naive_tokens"]
