# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Shapes of a few models as their `config.json` on the Hub gives them, for machines without a network. Only what shapes
and costs depend on; everything else keeps the default of the architecture in transformers.

The parameter counts that follow from them are those of the models' pages (tests/test_estimate.py).
"""

from __future__ import annotations

from typing import Any


_QWEN3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
_QWEN3 |= {"max_position_embeddings": 40960, "sliding_window": None}
_QWEN2: dict[str, Any] = {"model_type": "qwen2", "use_sliding_window": False}
_LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}


def _layers(layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    return {**dict(zip(names, (layers, hidden, intermediate, heads), strict=True)), **more}


# https://huggingface.co/<name>/blob/main/config.json
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _QWEN3 | _layers(28, 1024, 3072, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": _QWEN3 | _layers(28, 2048, 6144, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-4B": _QWEN3 | _layers(36, 2560, 9728, 32, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _QWEN3 | _layers(36, 4096, 12288, 32, tie_word_embeddings=False),
    "Qwen/Qwen2.5-1.5B": _QWEN2
    | _layers(28, 1536, 8960, 12, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
    | {"max_position_embeddings": 131072},
    "Qwen/Qwen2.5-7B": _QWEN2
    | _layers(28, 3584, 18944, 28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    | {"max_position_embeddings": 131072},
    "google/gemma-2-2b-it": {"model_type": "gemma2", "vocab_size": 256000, "head_dim": 256}
    | _layers(26, 2304, 9216, 8, num_key_value_heads=4, max_position_embeddings=8192, sliding_window=4096),
    "meta-llama/Llama-3.1-8B": _LLAMA
    | _layers(32, 4096, 14336, 32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
    "codellama/CodeLlama-7b-hf": _LLAMA
    | _layers(32, 4096, 11008, 32, num_key_value_heads=32, vocab_size=32016, max_position_embeddings=16384),
    "EleutherAI/pythia-2.8b-deduped": {"model_type": "gpt_neox", "vocab_size": 50304, "tie_word_embeddings": False}
    | _layers(32, 2560, 10240, 32, max_position_embeddings=2048),
}
for _name in ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B"):
    PUBLISHED[f"{_name}-Instruct"] = PUBLISHED[_name] | {"max_position_embeddings": 32768}
# The same shape under another name
SAME = {
    "google/gemma-2-2b": "google/gemma-2-2b-it",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "EleutherAI/pythia-2.8b": "EleutherAI/pythia-2.8b-deduped",
}
# What recipes make on the spot when no model is named (trl_agents/tiny.py), with its largest vocabulary
TINY: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 800, "head_dim": 32, "max_position_embeddings": 4096}
TINY |= _layers(2, 128, 256, 4, num_key_value_heads=4, tie_word_embeddings=True)
