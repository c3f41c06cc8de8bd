# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The model card's code says what the agent was trained with, and runs as it stands."""

import functools

import pytest
from scripted import make_config, save_tiny_model
from transformers import AutoTokenizer

from trl_agents import ActionParser, make_env
from trl_agents.agent_config import AgentConfig
from trl_agents.cards import correct_card
from trl_agents.trainers.card import card_section


ENV = "trl_agents/Bandit-v0"
TEMPLATE = (  # which cannot be rendered without its argument
    "{% if tag is not defined %}{{ raise_exception('no tag') }}{% endif %}"
    "{{ tag }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
)


class Shouted(ActionParser):
    """A parser of a user's own."""


def code_of(card):
    return card.split("```python\n")[1].split("```")[0]


def card(folder, parser=None, **settings):
    settings = {"env_kwargs": {"n_arms": 2, "horizon": 2}, "max_completion_length": 3, **settings}
    args = make_config(folder, **settings)
    return card_section(ENV, AgentConfig.of_training(args, ENV, parser or ActionParser()), args, str(folder))


def test_defaults_are_left_out(tmp_path):
    code = code_of(card(tmp_path))
    assert "parser" not in code and "chat_template_kwargs" not in code and "trust_remote_code" not in code
    assert len(code.strip().splitlines()) <= 10


def test_parser_is_part_of_the_code(tmp_path):
    code = code_of(card(tmp_path, ActionParser(r"Move: (red|green)", template="Move: {action}")))
    assert "from trl_agents import ActionParser" in code
    assert "parser=ActionParser(patterns=['Move: (red|green)'], template='Move: {action}')" in code


def test_a_parser_of_ones_own_keeps_its_name(tmp_path):
    code = code_of(card(tmp_path, Shouted(r"MOVE (\w+)")))
    assert f"from {Shouted.__module__} import Shouted" in code and r"parser=Shouted(patterns=['MOVE (\\w+)'])" in code


def test_a_pattern_does_not_break_the_table(tmp_path):
    lines = card(tmp_path, ActionParser(r"(red|green)")).splitlines()
    (row,) = [line for line in lines if line.startswith("| actions")]
    assert r"(red\|green)" in row
    assert row.replace(r"\|", "").count("|") == 3


def test_the_temperature_is_the_one_it_is_evaluated_at(tmp_path):
    assert "temperature=0.7" in code_of(card(tmp_path, temperature=0.7))
    assert "temperature=0.0" in code_of(card(tmp_path, temperature=0.7, eval_temperature=0.0))


@pytest.mark.parametrize("env", ["reasoning_gym:countdown", functools.partial(make_env, "reasoning_gym:countdown")])
def test_an_id_is_quoted(tmp_path, env):
    args = make_config(tmp_path)
    section = card_section("partial", AgentConfig.of_training(args, env, ActionParser()), args, "")
    assert 'tokenizer, "reasoning_gym:countdown", held_out_seeds' in code_of(section)


def test_remote_code(tmp_path):
    assert code_of(card(tmp_path, trust_remote_code=True)).count(", trust_remote_code=True)") == 2


TRLS_CARD = """# Model Card for x

This model is a fine-tuned version of [{base}](https://huggingface.co/{base}).

## Quick start

```python
{code}
```

## Training procedure
"""
ASKS = 'question = "time machine"\ngenerator = pipeline("text-generation", model="{model}")'


@pytest.mark.parametrize(
    ("base", "code", "said", "unsaid"),
    [
        ("None", ASKS.format(model="None"), 'AutoModelForCausalLM.from_pretrained("out/x")', ["time machine", "None"]),
        ("None", 'rewarder = pipeline(model="None")', 'rewarder = pipeline(model="out/x")', ["None", "CausalLM"]),
        ("org/base", ASKS.format(model="you/x"), ASKS.format(model="you/x"), ["CausalLM"]),
    ],
    ids=["made on the spot", "a reward model", "of a model of the Hub"],
)
def test_what_trl_does_not_know(tmp_path, base, code, said, unsaid):
    (tmp_path / "README.md").write_text(TRLS_CARD.format(base=base, code=code))
    for _ in range(2):
        correct_card(tmp_path, "out/x")
        text = (tmp_path / "README.md").read_text()
        assert said in text and not [each for each in unsaid if each in text]
        assert ("[org/base]" in text) == (base == "org/base") and text.endswith("\n## Training procedure\n")


@pytest.mark.parametrize("context", ["chat", "window"])
def test_the_code_runs(tmp_path, capsys, context):
    """With a parser of its own, and a template's argument."""
    folder = save_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = {"context": context, "window": 1} if context == "window" else {}
    code = code_of(card(folder, ActionParser(r"Move: (.+)"), chat_template_kwargs={"tag": "T"}, **settings))
    exec(code, {})
    assert capsys.readouterr().out.count("return") == 8
