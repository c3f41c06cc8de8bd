# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What benchmarks play: the bandit, a tokenizer for it, a model with random weights, and the reply that is always given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import get_json_schema

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, opening_message
from trl_agents.envs import make_env


# ChatML with tools: what TRL's loop asks of a template. What a tool says is a message of the user, so that `trl` and
# `ours` read the same.
CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\n# Tools' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
{{- '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}

CALL = '<tool_call>{"name": "press", "arguments": {"button": "red"}}</tool_call>'
FILLER = " so"
PARSER = ActionParser(patterns=[r'"button": "(\w+)"'])


def press(button: str) -> str:
    """
    Press a button.

    Args:
        button: The colour of the button.
    """


def make_bandit(turns: int) -> Any:
    return make_env("trl_agents/Bandit-v0", n_arms=5, horizon=turns, distribution="bernoulli")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of this game, and numbers by their digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bandit = make_bandit(2)
    bandit.reset(seed=0)
    texts = [opening_message(Briefing.of(bandit), ""), bandit.step("red")[0], json.dumps(get_json_schema(press))]
    tokenizer.train_from_iterator([*texts, CALL, FILLER, *["system", "user", "assistant"] * 9], trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in ("<tool_call>", "</tool_call>")])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    made.response_template = RESPONSE_TEMPLATE
    return made


# Of Qwen3, with random weights
SHAPES = {
    name: {
        "vocab_size": 151936,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    for name, hidden_size in (("0.6B", 1024), ("1.7B", 2048))
}


def small_shape(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> dict[str, int]:
    heads = hidden_size // 32
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": min(heads // 2, 2),
        "head_dim": 32,
    }


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights."""
    return model_of_shape(tokenizer, small_shape(tokenizer, hidden_size, layers))


def model_of_shape(tokenizer: PreTrainedTokenizerFast, shape: dict[str, int]) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        **shape,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


class Script:
    """The reply that is always given: some filler words, the call, `after` more of them, the end-of-turn token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: int, device: str, after: int = 0):
        (filler,) = tokenizer.encode(FILLER)
        ids = [filler, *tokenizer.encode(CALL), *[filler] * after, tokenizer.eos_token_id]
        self.tokens, self.shortest = tokens, len(ids) - 1
        if tokens < self.shortest:
            raise ValueError(f"--tokens {tokens} is too short a reply: it takes {self.shortest} at least.")
        self.ids = torch.tensor(ids, device=device)

    def overwrite(
        self, logits: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        `logits` (b, V), of which only the scripted tokens at `positions` (b,) are left, of replies that have `lengths`
        (b,) tokens, or all the same number.
        """
        lengths = self.tokens if lengths is None else lengths
        place = (positions % lengths - lengths + len(self.ids)).clamp(min=0)  # all that comes early is filler
        return torch.full_like(logits, -math.inf).scatter_(1, self.ids[place][:, None], 0.0)


class ScriptedLogits(LogitsProcessor):
    """The script inside `generate`."""

    def __init__(self, script: Script, prompt_length: int):
        self.script, self.prompt_length = script, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        positions = torch.full((len(scores),), input_ids.shape[1] - self.prompt_length, device=scores.device)
        return self.script.overwrite(scores, positions)


@contextmanager
def scripted_generate(model: Qwen3ForCausalLM, script: Script) -> Iterator[None]:
    """Let `model.generate`, whoever calls it, say what the script says."""
    plain = model.generate

    def generate(**kwargs: Any) -> torch.Tensor:
        processor = ScriptedLogits(script, kwargs["input_ids"].shape[1])
        return plain(**kwargs, logits_processor=LogitsProcessorList([processor]))

    model.generate = generate
    try:
        yield
    finally:
        del model.generate
