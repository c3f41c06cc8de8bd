# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `AgentPPOTrainer` is tested with: a tiny model, and a trainer in which every number can be worked by hand."""

import pytest
import torch
from by_hand import ScriptedPPOTrainer, no_reward
from datasets import Dataset
from scripted import TEXTS, Pay, make_config, ready, save_tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from trl_agents import AgentPPOConfig
from trl_agents.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    """Absolute position embeddings, and dropout."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tiny_tokenizer(TEXTS, vocab_size=300)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(model_dir, tmp_path):
    """A trainer in which every number can be worked by hand: no groups, no whitening, no KL, unless asked for."""

    def make(script=None, *, env=Pay, model=model_dir, trainer_class=ScriptedPPOTrainer, kwargs=None, **config):
        kwargs = dict(kwargs or {})
        if env is None:
            kwargs.setdefault("reward_funcs", no_reward)
            kwargs.setdefault(
                "train_dataset", Dataset.from_dict({"prompt": ["Choose.", "paid 3", "noise", "what?"] * 2})
            )
        config = {"num_generations": 1, "whiten_advantages": False, "beta": 0.0, **config}
        args = make_config(tmp_path / "out", AgentPPOConfig, **config)
        trainer = trainer_class(model, env=env, args=args, **kwargs)
        trainer.script = script
        return ready(trainer)

    return make
