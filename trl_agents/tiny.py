# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A small causal language model and its tokenizer, made on the spot: what the recipes run on without a download.

Random weights cannot act, so the model is first warmed up on transcripts of a scripted player in the environment
([`~transcripts.play_transcripts`] + TRL's `SFTTrainer`); it then writes well-formed replies and plays as that player
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .actions import ActionParser
from .agent_config import AgentConfig
from .agents import Agent, RandomAgent
from .contexts import Briefing
from .envs.make import make_env
from .seeds import transcript_seeds
from .sft import fine_tune
from .transcripts import plain_rationale, play_transcripts


# ChatML, as Qwen's, without system prompt and tools.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What a token may span: a word with the "=" or ":" after it ("ACTION="), or up to three digits from the left, as in
# Llama 3 (a board's rows become three tokens). Fewer tokens, and a name and its value always one apart.
_PIECES = r"[0-9]{1,3}| ?\p{L}+[=:]?| ?[^\s\p{L}0-9]+|\n|[^\S\n]+"


def tiny_tokenizer(
    texts: Iterable[str], vocab_size: int = 800, phrases: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer trained on `texts`: what occurs often there becomes one token, anything else is spelled.

    Args:
        texts (`Iterable[str]`):
            What the model will read and write.
        vocab_size (`int`, *optional*, defaults to `800`):
            Most tokens, at least 256 bytes + 3 special ones.
        phrases (`Iterable[str]`, *optional*):
            Texts that become one token each, beyond `vocab_size`: standing texts, in which a model made on the spot
            has nothing to read word by word.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The template's own words too: every turn has them
    phrases = dict.fromkeys(["user\n", "assistant\n", *phrases])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 128,
    num_hidden_layers: int = 2,
    max_position_embeddings: int = 4096,
    seed: int = 0,
) -> PreTrainedModel:
    """A Qwen3 of about half a million parameters with random weights (the same for the same `seed`)."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=max(hidden_size // 32, 1),
        num_key_value_heads=max(hidden_size // 32, 1),
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        # 0.02 is made for widths of thousands; at this width it would take most of the warm-up to grow out of it
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def save_tiny_start(
    dataset: Dataset,
    output_dir: str | Path,
    seed: int = 0,
    *,
    envs: Iterable[Any] = (),
    phrases: Iterable[str] = (),
) -> str:
    """
    Make a small model that knows nothing, with a tokenizer for the `prompt` and `completion` of `dataset`, and save
    both.

    Args:
        dataset ([`~datasets.Dataset`]):
            Its `prompt` and `completion` are texts or messages.
        output_dir (`str` or `Path`):
            Where they are saved.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the weights.
        envs (`Iterable`, *optional*):
            Environment ids, classes or factories, whose standing texts become one token each.
        phrases (`Iterable[str]`, *optional*):
            Other texts that do.

    Returns:
        `str`: `output_dir`, for `from_pretrained`.
    """
    texts = [_text(row["prompt"]) + _text(row["completion"]) for row in dataset]
    tokenizer = tiny_tokenizer(texts, phrases=[*(text for env in envs for text in _standing_texts(env)), *phrases])
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            tiny_model(tokenizer, seed=seed).save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
    return str(output_dir)


def _text(messages: str | list[dict[str, str]]) -> str:
    return messages if isinstance(messages, str) else "\n".join(message["content"] for message in messages)


def make_tiny_model(
    env: Any,
    output_dir: str | Path,
    *,
    n_transcripts: int = 800,
    seed: int = 0,
    agent: Agent | None = None,
    rationale: Callable[[str, str], str] | None = plain_rationale,
    context: str = "chat",
    window: int | None = None,
    parser: ActionParser | None = None,
    max_turns: int | None = None,
    max_completion_length: int = 256,
    batch_size: int = 4,
    disable_tqdm: bool = False,
    **sft_kwargs: Any,
) -> str:
    """
    Make the small model and its tokenizer, warm them up on transcripts of a scripted player, save them.

    Every process of a distributed run must call this; they train together.

    Args:
        env (`str` or `Callable`):
            Environment id, class or factory: what the model will play.
        output_dir (`str` or `Path`):
            Where the model and the tokenizer are saved.
        n_transcripts (`int`, *optional*, defaults to `800`):
            Number of episodes to learn from.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the weights, the episodes (none of which training or evaluation meets again) and the order of both.
        agent ([`Agent`], *optional*):
            Whose episodes. Defaults to a random player that repeats itself a quarter of the time, so that transcripts
            show both: going on and changing.
        rationale, context, window, parser, max_turns (*optional*):
            As for [`~transcripts.play_transcripts`].
        max_completion_length (`int`, *optional*, defaults to `256`):
            Token budget of a reply, for the file that tells how the model plays ([`AgentConfig`]).
        batch_size (`int`, *optional*, defaults to `4`):
            Conversations a step, over all processes: episodes in a chat, turns in a window.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to train without a progress bar.
        **sft_kwargs:
            Arguments of [`~trl.SFTConfig`] in place of the defaults here.

    Returns:
        `str`: `output_dir`, for `from_pretrained`.
    """
    seeds = transcript_seeds(n_transcripts, seed)
    agent = agent or RandomAgent(repeat=0.25)
    reading = {"context": context, "window": window, "max_turns": max_turns}
    dataset = play_transcripts(env, agent, seeds, parser=parser, rationale=rationale, **reading)
    texts = ["\n".join(message["content"] for message in row) for row in dataset["messages"][:200]]
    tokenizer = tiny_tokenizer(texts, phrases=_standing_texts(env))
    model = tiny_model(tokenizer, seed=seed)
    # Loss on all tokens, not only the replies: reading an episode is what teaches the model to look things up in it
    settings = {
        "max_steps": max(len(dataset) // batch_size, 1),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "disable_tqdm": disable_tqdm,
        "learning_rate": 3e-3,
        **sft_kwargs,
    }
    fine_tune(model, dataset, output_dir, epochs=1, batch_size=batch_size, tokenizer=tokenizer, seed=seed, **settings)
    how = AgentConfig(**reading, max_completion_length=max_completion_length)
    if PartialState().is_main_process:
        how.in_env(env, {}).read_by(parser or ActionParser()).save(output_dir)
    PartialState().wait_for_everyone()
    return str(output_dir)


def _standing_texts(env: Any) -> list[str]:
    """What opens every episode, the instructions, and the other standing texts: most of a short one's tokens."""
    made = make_env(env)
    try:
        briefing = Briefing.of(made)
    finally:
        made.close()
    return [text for text in (briefing.instructions, briefing.history_header, briefing.question) if text]
