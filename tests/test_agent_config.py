# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`agent_config.json`: who writes it, what it says, and what is said of one that cannot be used."""

import functools
import inspect
import json
import sys

import pytest
from scripted import Endless, Pay, make_config, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_agents import ActionParser, AgentGRPOTrainer, make_env
from trl_agents.agent_config import AGENT_CONFIG_FILE, RULES, AgentConfig, read_agent_config
from trl_agents.evaluation import play_model
from trl_agents.exploration import EpsilonGreedy, Exploration, TryAll
from trl_agents.tiny import make_tiny_model


BANDIT = "trl_agents/Bandit-v0"
SMALL = {"n_arms": 2, "horizon": 2}


class Shouted(ActionParser):
    """A parser of a user's own."""


def of(tmp_path, env=BANDIT, parser=None, **settings):
    return AgentConfig.of_training(make_config(tmp_path, **settings), env, parser or ActionParser())


def test_the_defaults_are_those_of_play_model():
    parameters = inspect.signature(play_model).parameters
    for name, value in AgentConfig().arguments().items():
        default = parameters[name].default
        assert value == {"env_kwargs": {}, "exploration": [], "parser": ActionParser()}.get(name, default)


@pytest.mark.parametrize("off", [None, -1])
def test_all_ways_to_say_that_top_k_is_off_can_be_read(tmp_path, off):
    of(tmp_path, top_k=off).save(tmp_path)
    assert read_agent_config(tmp_path).top_k == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"context": "window", "window": 3, "env_kwargs": SMALL, "max_completion_length": 7},
        {"eval_temperature": 0.0, "action_stop": True, "chat_template_kwargs": {"enable_thinking": False}},
        {"temperature": 0.7, "exploration": ["try_all", "epsilon_greedy=0.1"]},
        {"top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_turns": 50},
        {"invalid_action": "end", "max_retries": 0, "max_episode_length": 900},
    ],
)
def test_what_is_written_is_read(tmp_path, settings):
    parser = ActionParser([r"Move: (.+)", r"(\w+)!"], template="Move: {action}") if "window" in settings else None
    written = of(tmp_path, parser=parser, **settings)
    written.save(tmp_path)
    read = read_agent_config(tmp_path)
    assert read == written
    assert read.temperature == settings.get("eval_temperature", settings.get("temperature", 1.0))
    assert read.max_completion_length == settings.get("max_completion_length", written.max_completion_length)
    assert read.action_parser == (parser or ActionParser())
    given = {name: value for name, value in settings.items() if name in RULES}
    assert {name: read.arguments()[name] for name in given} == given


def test_usual_rules_are_not_in_the_file(tmp_path):
    """Which is as it was before there were any in it; a file without them means the usual ones."""
    of(tmp_path).save(tmp_path)
    written = json.loads((tmp_path / AGENT_CONFIG_FILE).read_text())
    assert not set(written) & set(RULES) and len(written) == 13
    of(tmp_path, max_turns=9).save(tmp_path)
    assert json.loads((tmp_path / AGENT_CONFIG_FILE).read_text()) == {**written, "max_turns": 9}


def test_an_engine_may_be_shorter_than_an_episode(tmp_path):
    lengths = {"max_episode_length": 900, "vllm_max_model_length": 700}
    assert of(tmp_path, **lengths).max_episode_length == 700
    assert of(tmp_path, max_episode_length=900).max_episode_length == 900


class Nudge(TryAll):
    """A mechanism of a user's own."""


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (TryAll(), ("try_all",)),
        (Exploration([TryAll(), EpsilonGreedy(0.2)]), ("try_all", "epsilon_greedy=0.2")),
        (["try_all", Nudge()], ("try_all", "Nudge")),
        ("epsilon_greedy=0.1", ("epsilon_greedy=0.1",)),  # as it was written, though 0.1 is the default
        (None, ()),
        (Exploration(), ()),
    ],
)
def test_exploration_in_each_of_its_forms(tmp_path, given, names):
    """Objects broke it: they are no sequences."""
    assert of(tmp_path, exploration=given).exploration == names
    listed = make_config(tmp_path, exploration=given).to_dict()["exploration"]
    assert listed == (given if given is None or isinstance(given, str) else list(names))


def test_a_class_that_can_be_imported_is_known_by_its_name(tmp_path):
    config = of(tmp_path, Pay, env_kwargs={"horizon": 2})
    assert config.env_id == "scripted:Pay" and make_env(config.env_id, **config.env_kwargs).horizon == 2


def test_an_environment_without_an_id(tmp_path, monkeypatch):
    class Local(Pay):
        pass

    assert of(tmp_path, Local).env_id is None and of(tmp_path, lambda: Pay()).env_id is None
    assert of(tmp_path, functools.partial(Pay, horizon=3)).env_id is None
    for module in ("__main__", "tools"):  # of a script or notebook; that of a suite, in an id
        monkeypatch.setattr(Pay, "__module__", module)
        monkeypatch.setitem(sys.modules, module, sys.modules["scripted"])
        assert of(tmp_path, Pay).env_id is None
    made = functools.partial(make_env, BANDIT, n_arms=3, means=object())
    config = of(tmp_path, made, env_kwargs={"horizon": 4})
    config.save(tmp_path)
    read = read_agent_config(tmp_path)
    assert (read.env_id, read.env_kwargs) == (BANDIT, {"n_arms": 3, "horizon": 4})
    assert read.left_out == ("means",)  # which no file can hold


def test_a_parser_of_ones_own_is_named(tmp_path):
    of(tmp_path, parser=Shouted(r"MOVE (\w+)")).save(tmp_path)
    read = read_agent_config(tmp_path)
    assert read.parser_class == f"{Shouted.__module__}.Shouted"
    assert read.action_parser == ActionParser(r"MOVE (\w+)")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting property name"),
        ("[]", "it holds no JSON object"),
        ("{}", "its version is None"),
        ('{"version": 2, "context": "letters"}', "its version is 2, and this release of trl-agents knows 1"),
        ('{"version": 1, "context": "letters"}', "context='letters', which should be 'chat' or 'window'"),
        ('{"version": 1, "window": true}', "window=True"),
        ('{"version": 1, "max_completion_length": 0}', "max_completion_length=0"),
        ('{"version": 1, "temperature": NaN}', "temperature=nan"),
        ('{"version": 1, "env_kwargs": null}', "env_kwargs=None, which should be an object"),
        ('{"version": 1, "exploration": "try_all"}', "exploration='try_all'"),
        ('{"version": 1, "action_parser": {"patterns": ["("]}}', "is not a regular expression"),
        ('{"version": 1, "top_p": 1.5}', "top_p=1.5, which should be a number from 0 to 1"),
        ('{"version": 1, "top_k": -1}', "top_k=-1"),
        ('{"version": 1, "min_p": "0"}', "min_p='0'"),
        ('{"version": 1, "max_turns": 0}', "max_turns=0"),
        ('{"version": 1, "max_episode_length": 1.5}', "max_episode_length=1.5"),
        (
            '{"version": 1, "invalid_action": "ask"}',
            "invalid_action='ask', which should be 'random', 'retry' or 'end'",
        ),
        ('{"version": 1, "max_retries": null}', "max_retries=None"),
        ("[" * 100_000, "does not tell"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, told):
    (tmp_path / AGENT_CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError) as raised:
        read_agent_config(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / AGENT_CONFIG_FILE} ") and told in str(raised.value)


def test_what_an_unknown_setting_says_is_passed_over(tmp_path):
    (tmp_path / AGENT_CONFIG_FILE).write_text('{"version": 1, "window": 3, "mood": "good"}')
    assert read_agent_config(tmp_path) == AgentConfig(window=3)


def test_there_is_none(tmp_path):
    """In a folder, and of a Hub id, also without a network."""
    assert read_agent_config(tmp_path) is None
    assert read_agent_config("nobody/no-such-model") is None
    assert read_agent_config("no name: of anything") is None


def test_of_a_hub_id_that_is_cached(tmp_path, monkeypatch):
    (tmp_path / AGENT_CONFIG_FILE).write_text('{"version": 1, "window": 3}')
    asked = []

    def download(*where):
        asked.append(where)
        return str(tmp_path / AGENT_CONFIG_FILE)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_agent_config("you/your-agent").window == 3 and asked == [("you/your-agent", AGENT_CONFIG_FILE)]


def test_the_trainer_writes_it_whenever_it_saves(tmp_path):
    """Also into checkpoints; what it says lets the model play."""
    settings = {"env_kwargs": SMALL, "max_completion_length": 6, "max_steps": 1, "save_strategy": "steps"}
    settings |= {"context": "window", "window": 1, "save_steps": 1}
    trainer = AgentGRPOTrainer(
        save_tiny_model(tmp_path / "tiny"), args=make_config(tmp_path / "out", **settings), env=BANDIT
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    how = read_agent_config(tmp_path / "saved")
    assert how == read_agent_config(tmp_path / "out" / "checkpoint-1")
    expected = AgentConfig(BANDIT, SMALL, "window", 1, 6)
    assert how == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    (played,) = play_model(model, tokenizer, how.env_id, [0], **how.arguments())
    assert played.steps == 2


def test_the_warmed_up_model_has_it(tmp_path):
    env = functools.partial(make_env, BANDIT, **SMALL)
    folder = make_tiny_model(env, tmp_path, n_transcripts=4, max_completion_length=9, max_steps=1, use_cpu=True)
    assert read_agent_config(folder) == AgentConfig(BANDIT, SMALL, max_completion_length=9)
    assert json.loads((tmp_path / AGENT_CONFIG_FILE).read_text())["version"] == 1


def test_the_warmed_up_model_has_the_limit_of_what_does_not_end_by_itself(tmp_path):
    settings = {"n_transcripts": 4, "max_steps": 1, "use_cpu": True, "disable_tqdm": True}
    folder = make_tiny_model(Endless, tmp_path, max_turns=5, **settings)
    assert read_agent_config(folder) == AgentConfig("scripted:Endless", max_turns=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"invalid_action": "retry", "max_retries": 1, "advantage_estimator": "group"},
        {"invalid_action": "end", "max_turns": 2},
        {"invalid_action": "retry", "max_episode_length": 60, "advantage_estimator": "group"},
    ],
)
def test_it_plays_as_the_trainer_lets_it(tmp_path, settings):
    """Greedily: the same replies, and the same ends."""
    args = make_config(tmp_path / "out", top_k=1, **settings)
    trainer = AgentGRPOTrainer(save_tiny_model(tmp_path / "tiny"), args=args, env=Pay)
    expected = trainer.play(range(3))
    trainer.agent_config.save(tmp_path)
    how = read_agent_config(tmp_path).arguments()
    played = play_model(trainer.model, trainer.processing_class, Pay, range(3), **how)
    assert [one.stop for one in played] == [one.stop for one in expected]
    assert [[turn.text for turn in one.turns] for one in played] == [
        [turn.text for turn in one.turns] for one in expected
    ]
