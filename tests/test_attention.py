# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Attention for reading behind a long past: transformers' own numbers, without repeated keys."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations import sdpa_attention
from transformers.models.auto import AutoModelForCausalLM

from trl_agents.rollout.attention import GROUPED, attending, best_attention, grouped_attention
from trl_agents.rollout.cache import SlotModel


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}


def qwen3(**kwargs):
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2, **kwargs)
    return Qwen3ForCausalLM._from_config(config, attn_implementation=config._attn_implementation).eval()


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_equals_sdpa(n, key_heads):
    torch.manual_seed(0)
    query = torch.randn(3, 6, n, 8)
    key, value = torch.randn(3, key_heads, 11, 8), torch.randn(3, key_heads, 11, 8)
    positions = torch.tensor([0, 4, 6])[:, None] + torch.arange(n)
    mask = (torch.arange(11) <= positions[..., None])[:, None]  # (b, 1, n, columns)
    module = SimpleNamespace(num_key_value_groups=6 // key_heads, is_causal=True)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert found.shape == (3, n, 6, 8) and found.is_contiguous()
    torch.testing.assert_close(found, expected)


def test_a_model_reads_by_it_and_repeats_nothing(monkeypatch):
    model = qwen3()
    slots = SlotModel(model, 2)
    assert slots.attention == GROUPED
    repeated = []
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda states, groups: repeated.append(groups))
    slots.read(None, [[1, 2, 3], [4, 5, 6]], [0, 0])
    assert not repeated and model.config._attn_implementation == "sdpa"


def test_the_model_s_own_attention_comes_back():
    config = qwen3().config
    with pytest.raises(RuntimeError), attending(config, GROUPED):
        assert config._attn_implementation == GROUPED
        raise RuntimeError
    assert config._attn_implementation == "sdpa"


def test_only_in_place_of_sdpa():
    assert best_attention(qwen3(attn_implementation="eager")) == "eager"
    bloom = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)  # attends in code of its own
    model = AutoModelForCausalLM.from_config(bloom)
    assert best_attention(model) == model.config._attn_implementation
