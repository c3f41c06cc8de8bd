# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The value head on a model of its own: what it reads, what it leaves alone, how it is kept."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scripted import TEXTS, save_tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    OPTConfig,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from trl_agents.tiny import tiny_model, tiny_tokenizer
from trl_agents.value_head import (
    VALUE_HEAD_FILE,
    ValueHead,
    hidden_size_of,
    save_value_head,
    split_value_head,
    warn_of_missing_head,
    without_value_head,
)


IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer, hidden_size=32, num_hidden_layers=1)


def random_head(width=32, seed=0, **kwargs):
    head = ValueHead(width, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, generator=generator)
    nn.init.normal_(head.bias, generator=generator)
    return head


def same(head, other):
    return torch.equal(head.weight, other.weight) and torch.equal(head.bias, other.bias)


class TestReading:
    def test_it_starts_at_zero_in_float32(self):
        head = ValueHead(4)
        assert head.weight.dtype == head.bias.dtype == torch.float32
        assert head.weight.abs().sum() == head.bias.abs().sum() == 0
        values = head(torch.randn(2, 3, 4))
        assert values.shape == (2, 3) and (values == 0).all()

    def test_a_linear_function_of_the_state(self):
        head = ValueHead(2)
        head.load_state_dict({"weight": torch.tensor([[2.0, -1.0]]), "bias": torch.tensor([0.5])})
        assert head(torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])).tolist() == [[-0.5, 0.5]]

    def test_float32_whatever_the_trunk_computes_in(self):
        head, states = random_head(), torch.randn(2, 3, 32).bfloat16()
        exact = head(states.float())
        assert torch.equal(head(states), exact) and exact.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(states), exact)

    def test_it_hears_the_models_own_forward_pass(self, model):
        head = random_head().attach(model)
        with torch.no_grad():
            states = model.model(IDS).last_hidden_state
            with head.listen() as heard:
                logits = model(IDS).logits
                model(IDS[:, :2])
            expected = states @ head.weight[0] + head.bias
        assert [values.shape for values in heard] == [(1, 5), (1, 2)]
        torch.testing.assert_close(heard[0], expected)
        torch.testing.assert_close(logits, model(IDS).logits, rtol=0, atol=0)

    def test_it_hears_only_while_it_listens(self, model):
        head = random_head().attach(model)
        with head.listen() as outer:
            with head.listen() as inner:
                model(IDS)
            assert (len(outer), len(inner)) == (0, 1)
            model(IDS)
        model(IDS)
        assert (len(outer), len(inner)) == (1, 1)

    def test_it_stops_listening_when_the_model_fails(self, model):
        head = random_head().attach(model)
        with pytest.raises(IndexError), head.listen() as heard:
            model(torch.tensor([[10_000]]))
        model(IDS)
        assert heard == []

    @pytest.mark.parametrize("detach", [False, True])
    def test_the_trunk_learns_unless_it_is_kept_from_it(self, model, detach):
        head = random_head(detach=detach).attach(model)
        with head.listen() as heard:
            model(IDS)
        heard[0].sum().backward()
        reached = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
        assert {"value_head.weight", "value_head.bias"} <= reached
        assert ("model.layers.0.mlp.up_proj.weight" in reached) == (not detach)
        assert ("model.embed_tokens.weight" in reached) == (not detach)

    def test_under_an_adapter_it_is_trained_in_full(self, model):
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        random_head().attach(wrapped.get_base_model())
        trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if "lora_" not in name} == {
            "base_model.model.value_head.weight",
            "base_model.model.value_head.bias",
        }


class TestWidth:
    def test_of_common_models(self, model):
        assert hidden_size_of(model) == 32
        assert hidden_size_of(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=20))) == 16

    def test_of_a_model_that_projects_before_its_head(self):
        config = OPTConfig(
            hidden_size=16,
            word_embed_proj_dim=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            ffn_dim=16,
            vocab_size=20,
        )
        model = AutoModelForCausalLM.from_config(config)
        assert hidden_size_of(model) == 8 == model.model(IDS).last_hidden_state.shape[-1]


class TestKeeping:
    def test_saved_and_loaded_bit_equal(self, tmp_path):
        head, loaded = random_head(), ValueHead(32)
        save_value_head(dict(head.state_dict()), tmp_path / "new" / "folder")
        assert loaded.load(str(tmp_path / "new" / "folder")) is True
        assert same(head, loaded) and head.weight.any()

    def test_a_head_in_half_precision_is_saved_in_float32(self, tmp_path):
        head, loaded = random_head().bfloat16(), ValueHead(32)
        save_value_head(dict(head.state_dict()), tmp_path)
        loaded.load(str(tmp_path))
        assert loaded.weight.dtype == torch.float32 and torch.equal(loaded.weight, head.weight.float())

    def test_a_folder_without_one(self, tmp_path):
        head = random_head()
        before = head.weight.clone()
        assert head.load(str(tmp_path)) is False and head.load(str(tmp_path / "nowhere")) is False
        assert torch.equal(head.weight, before)

    def test_a_repository_out_of_reach(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it may try for half a minute
        assert ValueHead(32).load("someone/a-model-that-is-not-in-the-cache") is False

    def test_the_head_of_another_model(self, tmp_path):
        save_value_head(dict(random_head(16).state_dict()), tmp_path)
        with pytest.raises(ValueError, match=f"{VALUE_HEAD_FILE} reads 16 features, but this model has 32"):
            ValueHead(32).load(str(tmp_path))

    def test_split_from_the_policys_weights(self, model):
        head = random_head().attach(model)
        for prefix in ("", "base_model.model.", "module."):
            weights = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
            policy, of_head = split_value_head(weights)
            assert sorted(of_head) == ["bias", "weight"] and torch.equal(of_head["weight"], head.weight)
            assert len(policy) == len(weights) - 2 and not any("value_head" in name for name in policy)

    def test_out_of_sight_for_a_while(self, model):
        plain = [name for name, _ in model.named_parameters()]
        head = random_head().attach(model)
        with pytest.raises(KeyError), without_value_head(model):
            assert [name for name, _ in model.named_parameters()] == plain
            raise KeyError
        assert model.value_head is head and len(list(model.parameters())) == len(plain) + 2
        with without_value_head(head):  # a model that has none
            pass

    def test_the_warning_names_the_file_and_what_to_do(self):
        with pytest.warns(UserWarning, match=f"some/where has no {VALUE_HEAD_FILE}.*critic_warmup_steps"):
            warn_of_missing_head("some/where")


class TestFromARewardModel:
    def test_a_head_without_bias(self, model, tmp_path):
        reward_model = Qwen3ForSequenceClassification(self.config_of(model))
        nn.init.normal_(reward_model.score.weight)
        reward_model.save_pretrained(tmp_path)
        head = random_head()
        head.load_reward_model(str(tmp_path))
        assert torch.equal(head.weight, reward_model.score.weight) and head.bias.item() == 0
        assert head.weight.any()

    def test_it_reads_what_the_reward_model_says(self, tmp_path):
        config = GPT2Config(n_embd=32, n_layer=1, n_head=1, vocab_size=20, num_labels=1, pad_token_id=0)
        reward_model = GPT2ForSequenceClassification(config).eval()
        nn.init.normal_(reward_model.score.weight)
        reward_model.save_pretrained(tmp_path)
        head = ValueHead(32)
        head.load_reward_model(str(tmp_path))
        with torch.no_grad():
            states = reward_model.transformer(IDS).last_hidden_state
            torch.testing.assert_close(head(states)[:, -1:], reward_model(IDS).logits)

    def test_a_head_in_half_precision(self, model, tmp_path):
        Qwen3ForSequenceClassification(self.config_of(model)).bfloat16().save_pretrained(tmp_path)
        head = ValueHead(32)
        head.load_reward_model(str(tmp_path))
        assert head.weight.dtype == torch.float32 and head.weight.any()

    def test_of_another_width(self, tmp_path):
        config = GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=20, num_labels=1)
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="reads 16 features, but this model has 32"):
            ValueHead(32).load_reward_model(str(tmp_path))

    def test_a_head_with_bias(self, tmp_path):
        config = RobertaConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=20,
            num_labels=1,
        )
        reward_model = RobertaForSequenceClassification(config)
        nn.init.normal_(reward_model.classifier.out_proj.bias)
        reward_model.save_pretrained(tmp_path)
        head = ValueHead(32)
        head.load_reward_model(str(tmp_path))
        assert torch.equal(head.weight, reward_model.classifier.out_proj.weight) and head.weight.any()
        assert torch.equal(head.bias, reward_model.classifier.out_proj.bias) and head.bias.any()

    @staticmethod
    def config_of(model):
        config = model.config
        config.num_labels = 1
        return config


def test_a_saved_policy_is_what_any_loader_expects(tmp_path):
    folder = save_tiny_model(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_value_head(dict(random_head().state_dict()), folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "value_head")
