# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The tokenizer made on the spot, and a model that knows nothing with it."""

import functools

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_agents.envs import make_env
from trl_agents.tiny import save_tiny_start, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Step=1 State=000102010", ["Step=", "1", " State=", "000", "102", "010"]),
        ("ACTION=4", ["ACTION=", "4"]),
        ("    x = y\n", ["    ", "x", " =", " y", "\n"]),
        ("12 + 5 = 17", ["12", " +", " ", "5", " =", " ", "17"]),
    ],
)
def test_what_is_one_token(text, pieces):
    tokenizer = tiny_tokenizer([text] * 50)
    assert [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]] == pieces


def test_standing_texts_are_one_token():
    tokenizer = tiny_tokenizer(["a b"], phrases=["You play. Well.", "Well."])
    assert len(tokenizer("You play. Well.")["input_ids"]) == len(tokenizer("Well.")["input_ids"]) == 1


@pytest.mark.parametrize("form", [str, lambda text: [{"role": "user", "content": text}]], ids=["texts", "messages"])
def test_a_start_for_texts_and_messages(tmp_path, form):
    """Words of the dataset, the environments' instructions and other phrases are what the tokenizer knows."""
    rows = Dataset.from_list([{"prompt": form("Which turnip?"), "completion": form("This turnip.")}] * 9)
    env = functools.partial(make_env, "trl_agents/Bandit-v0", n_arms=3)
    assert save_tiny_start(rows, tmp_path, 3, envs=[env], phrases=["Let me see. "]) == str(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    for text in (" turnip", env().instructions, env().question, "Let me see. "):
        assert len(tokenizer(text)["input_ids"]) == 1
    assert len(tokenizer(" parsnip")["input_ids"]) > 1 and model.config.vocab_size == len(tokenizer)
