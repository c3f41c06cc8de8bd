# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A critic with a trunk of its own: what it starts as, what learns from what, and what it cannot be combined with."""

import pytest
import torch
from peft import LoraConfig
from scripted import Pay, ScriptedTrainer, acts, make_config, save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from trl_agents import AgentPPOConfig, AgentPPOTrainer


SCRIPT = acts("abc", "caa", "bbb", "cba")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


class ScriptedPPOTrainer(ScriptedTrainer, AgentPPOTrainer):
    """The real trainer, whose model's replies are written down."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=32)


@pytest.fixture
def make_trainer(model_dir, tmp_path):
    def make(model=model_dir, peft_config=None, **config):
        config = {"num_generations": 1, "beta": 0.0, "separate_critic": True, **config}
        args = make_config(tmp_path / "out", AgentPPOConfig, **config)
        trainer = ScriptedPPOTrainer(model, env=Pay, args=args, peft_config=peft_config)
        trainer.script = SCRIPT
        return trainer

    return make


@pytest.fixture(scope="module")
def reward_model_dir(model_dir, tmp_path_factory):
    """Its trunk is not the policy's."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def values_of(trainer, ids=IDS):
    with trainer.value_head.listen() as heard, torch.no_grad():
        trainer.causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids))
    return heard[0]


def weights_of(trainer):
    named = {name: parameter.detach().clone() for name, parameter in trainer.causal_lm.named_parameters()}
    return [{name: value for name, value in named.items() if ("value_head" in name) == own} for own in (False, True)]


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_it_starts_as_a_copy_of_the_policys_trunk(make_trainer):
    shared, own = (make_trainer(separate_critic=flag, value_head_init="normal") for flag in (False, True))
    assert values_of(own).any() and torch.equal(values_of(own), values_of(shared))
    policy, critic = weights_of(own)
    for name, value in critic.items():
        if ".trunk." in name:
            assert torch.equal(value, policy[name.replace("value_head.trunk", "model")]), name
    assert len(critic) == len([name for name in policy if name.startswith("model.")]) + 2  # and the head


def test_it_starts_as_the_reward_model(make_trainer, reward_model_dir):
    trainer = make_trainer(value_head_init=reward_model_dir)
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward_model_dir)
    reward_model.config.pad_token_id = 0
    score = reward_model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[0, 0]
    assert values_of(trainer)[0, -1].item() == pytest.approx(score.item(), abs=1e-5)
    shared = make_trainer(value_head_init=reward_model_dir, separate_critic=False)
    assert abs(values_of(shared)[0, -1].item() - score.item()) > 1e-3  # on the policy's trunk it reads something else


def test_the_value_loss_moves_the_critic_alone(make_trainer):
    """As no gradient of it reaches the policy, which therefore learns the same at any weight of it."""
    trained = []
    for value_coef in (1.0, 0.0):
        settings = {"value_coef": value_coef, "max_grad_norm": 1e9, "max_steps": 1}  # then the values have an effect
        trainer = make_trainer(value_head_init="normal", optim="sgd", **settings)
        start, critic = weights_of(trainer)
        trainer.train()
        policy, critic_after = weights_of(trainer)
        assert changed(start, policy)
        assert bool(changed(critic, critic_after)) == (value_coef > 0)
        if value_coef:
            assert any(".trunk.layers.0" in name for name in changed(critic, critic_after))
        trained.append(policy)
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_its_trunk_learns_while_it_warms_up(make_trainer):
    trainer = make_trainer(value_head_init="normal", critic_warmup_steps=9, max_steps=2, learning_rate=0.01)
    policy, critic = weights_of(trainer)
    trainer.train()
    policy_after, critic_after = weights_of(trainer)
    assert not changed(policy, policy_after)
    assert any(".trunk.layers.0" in name for name in changed(critic, critic_after))


def test_its_own_learning_rate(make_trainer):
    trainer = make_trainer(value_head_init="normal", learning_rate=0.01, value_learning_rate=0.0)
    policy, critic = weights_of(trainer)
    trainer.train()
    policy_after, critic_after = weights_of(trainer)
    assert changed(policy, policy_after) and not changed(critic, critic_after)


@pytest.fixture(scope="module")
def gpt2_dir(model_dir, tmp_path_factory):
    """Absolute positions, which rotary ones hide the lack of, and dropout."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), AutoTokenizer.from_pretrained(model_dir)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
def test_padding_and_its_side_change_nothing(make_trainer, model_dir, gpt2_dir, kind):
    trainer = make_trainer(model_dir if kind == "rotary" else gpt2_dir, value_head_init="normal")
    alone = values_of(trainer)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(8) >= 3).long()[None]
    with trainer.value_head.listen() as heard, torch.no_grad():
        trainer.causal_lm(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(heard[0][:, 3:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("disable", [True, False])
def test_it_drops_out_when_the_policy_does(make_trainer, gpt2_dir, disable):
    trainer = make_trainer(gpt2_dir, value_head_init="normal", disable_dropout=disable)
    shares = {
        own: {module.p for name, module in trainer.causal_lm.named_modules() if is_dropout(module, name, own)}
        for own in (False, True)
    }
    assert shares[True] == shares[False] == ({0} if disable else {0.1})


def is_dropout(module, name, own):
    return isinstance(module, torch.nn.Dropout) and ("value_head" in name) == own


def test_in_half_precision_it_is_still_a_copy(make_trainer):
    """Rotary frequencies stay in float32, as in the policy."""
    settings = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True, "value_head_init": "normal"}
    shared, own = (make_trainer(separate_critic=flag, **settings) for flag in (False, True))
    ids = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(values_of(own, ids), values_of(shared, ids))
    assert {parameter.dtype for parameter in own.value_head.trunk.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in own.value_head.trunk.buffers()} == {torch.float32}


@pytest.mark.parametrize("saved", [True, False])
def test_a_saved_critic_of_the_other_kind_is_refused(make_trainer, tmp_path, saved):
    make_trainer(separate_critic=saved).save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=f"set separate_critic={saved}"):
        make_trainer(str(tmp_path / "saved"), separate_critic=not saved)
    assert make_trainer(str(tmp_path / "saved"), separate_critic=saved)


def test_the_saved_policy_has_no_critic(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "saved"))
    _, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_it_cannot_be_combined_with(make_trainer):
    with pytest.raises(ValueError, match="leave detach_value_head out"):
        make_trainer(detach_value_head=True)
    with pytest.raises(ValueError, match="or the adapter"):
        make_trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
