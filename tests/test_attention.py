# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Attention for reading behind a long past: transformers' own numbers, without repeated keys."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations import sdpa_attention
from transformers.models.auto import AutoModelForCausalLM

from trl_agents.rollout import slots as slots_module
from trl_agents.rollout.attention import GROUPED, Span, attending, best_attention, grouped_attention, spans
from trl_agents.rollout.slots import SlotModel


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
    slots.read([0, 1], [[1, 2, 3], [4, 5, 6]], [0, 0])
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


class TestSpans:
    """In bytes: a column has 1, a call costs 10."""

    def test_neighbours_of_one_length(self):
        assert spans([0, 1, 2], [1, 1, 1], [20, 22, 21], 1, 10) == [Span(0, 3, 1, 22)]
        assert spans([0, 1, 2], [4, 4, 3], [20, 20, 20], 1, 10) == [Span(0, 2, 4, 20), Span(2, 3, 3, 20)]

    def test_what_is_looked_at_in_vain_costs(self):
        assert spans([0, 1], [1, 1], [20, 30], 1, 10) == [Span(0, 2, 1, 30)]
        assert spans([0, 1], [1, 1], [20, 31], 1, 10) == [Span(0, 1, 1, 20), Span(1, 2, 1, 31)]

    def test_rows_between(self):
        """Single tokens come first, whatever reads more between them, and other rows stay apart."""
        assert spans([0, 1, 2], [1, 5, 1], [9, 9, 9], 1, 10) == [Span(0, 3, 1, 9), Span(1, 2, 5, 9)]
        assert spans([0, 2], [5, 5], [9, 9], 1, 10) == [Span(0, 1, 5, 9), Span(2, 3, 5, 9)]
        # A row that nobody asked for would be read up to the longest column
        assert spans([0, 2], [1, 1], [11, 11], 1, 10) == [Span(0, 1, 1, 11), Span(2, 3, 1, 11)]

    def test_whatever_the_spans(self, monkeypatch):
        """One call for all, where that can be, one for each row, and what is in between: the same logits."""
        torch.manual_seed(0)
        model = qwen3()
        rows = [torch.randint(2, 60, (length,)).tolist() for length in (30, 4, 17, 9)]
        found = []
        for call_bytes in (0.0, 2e3, 1e9):
            monkeypatch.setitem(slots_module.CALL_BYTES, "cpu", call_bytes)
            slots = SlotModel(model, 5, packs=True)
            slots.read([1, 2, 3, 4], [row[:-2] for row in rows], [0] * 4)
            slots.read([1, 3, 4], [rows[i][-2:-1] for i in (0, 2, 3)], [len(rows[i]) - 2 for i in (0, 2, 3)])
            # Slot 2 reads two tokens between the others' single ones
            starts = [len(row) - 1 for row in rows]
            starts[1] -= 1
            found.append(
                slots.read([1, 2, 3, 4], [row[start:] for row, start in zip(rows, starts, strict=True)], starts)
            )
        expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        for logits in found:
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    def test_a_copied_row_between_others_keeps_what_it_was_given(self):
        model = qwen3()
        slots = SlotModel(model, 3, packs=True)
        short, long = [5, 6], [7, 8, 9, 10, 11, 12]
        slots.read([0, 1, 2], [long, short, long], [0, 0, 0])
        slots.copy(0, [1], len(long))
        slots.read([0, 2], [[13], [14]], [len(long)] * 2)  # one call, which reads something in row 1 as well
        found = slots.read([1], [[15]], [len(long)])
        torch.testing.assert_close(found, model(torch.tensor([[*long, 15]])).logits[:, -1], rtol=1e-4, atol=1e-5)
