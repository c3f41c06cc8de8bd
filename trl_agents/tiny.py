# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A small causal language model and its tokenizer, made on the spot: what the recipes run on without a download.

Random weights cannot act, so the model is first warmed up on transcripts of a scripted player in the environment
([`play_transcripts`] + TRL's `SFTTrainer`); it then writes well-formed replies and plays as that player does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .actions import ActionParser
from .agents import Agent, RandomAgent, play_episode
from .contexts import Briefing, last, opening_message, transition_line, window_message
from .envs.make import make_env
from .sft import fine_tune
from .types import Trajectory


# Seeds of the transcripts start here: apart from training seeds (from 0) and held-out ones (from 1e9).
TRANSCRIPT_SEEDS = 500_000_000

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


def save_tiny_start(dataset: Dataset, output_dir: str | Path, seed: int = 0) -> str:
    """
    Make a small model that knows nothing, with a tokenizer for the `prompt` and `completion` of `dataset`, and save
    both. Returns `output_dir`.
    """
    texts = [row["prompt"] + row["completion"] for row in dataset]
    tokenizer = tiny_tokenizer(texts)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            tiny_model(tokenizer, seed=seed).save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
    return str(output_dir)


def plain_rationale(observation: str, action: str) -> str:
    """
    A thought as short as the paper's instruction asks for: what the last action gave, if the observation says so, and
    whether to go on with it. It only puts into words what the player does, but gives training words to decide by.

    What failed: "red gave 1: stay. ACTION=red" (the small model wrote the word and the action independently of each
    other), a colon between reward and word, and the same two words after either reward (RLFT raised "keep" after every
    reward alike and, in one run of two, stayed there). With words of their own for each reward, the warm-up itself
    teaches the model to tell rewards apart.
    """
    last = re.search(r"Action=(\S.*?) Reward=(-?\d\S*)", observation)
    if last is None:
        return f"try {action}."
    words = ("keep", "explore") if float(last[2]) > 0 else ("retry", "switch")
    return f"{last[1]} gave {last[2]} {words[0] if action == last[1] else words[1]} {action}."


def board_rationale(observation: str, action: str) -> str:
    """
    The board as it stands, copied from the observation: what a move depends on, close to where it is decided and at
    the same distance every time. It tells nothing of the action.
    """
    states = re.findall(r"State=(\S+)", observation)
    return f"Board {states[-1]}." if states else f"try {action}."


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
        rationale, context, window, parser (*optional*):
            As for [`play_transcripts`].
        batch_size (`int`, *optional*, defaults to `4`):
            Conversations a step, over all processes: episodes in a chat, turns in a window.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to train without a progress bar.
        **sft_kwargs:
            Arguments of [`~trl.SFTConfig`] in place of the defaults here.

    Returns:
        `str`: `output_dir`, for `from_pretrained`.
    """
    seeds = range(TRANSCRIPT_SEEDS + seed * n_transcripts, TRANSCRIPT_SEEDS + (seed + 1) * n_transcripts)
    agent = agent or RandomAgent(repeat=0.25)
    dataset = play_transcripts(env, agent, seeds, parser=parser, rationale=rationale, context=context, window=window)
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
    return fine_tune(
        model, dataset, output_dir, epochs=1, batch_size=batch_size, tokenizer=tokenizer, seed=seed, **settings
    )


def play_transcripts(
    env: Any,
    agent: Agent,
    seeds: Sequence[int],
    *,
    parser: ActionParser | None = None,
    rationale: Callable[[str, str], str] | None = plain_rationale,
    context: str = "chat",
    window: int | None = None,
) -> Dataset:
    """
    Let a scripted player play, and write its episodes down as the conversations a model would have had.

    Args:
        env (`str` or `Callable`):
            Environment id, class or factory.
        agent ([`Agent`]):
            The player.
        seeds (`Sequence[int]`):
            One episode each.
        parser ([`ActionParser`], *optional*):
            Its `format` writes the action down.
        rationale (`Callable[[str, str], str]`, *optional*):
            Given the observation and the chosen action, the thought written before it. None: the action alone.
        context (`str`, *optional*, defaults to `"chat"`):
            `"chat"`: one conversation an episode; `"window"`: one exchange a turn.
        window (`int`, *optional*):
            With `"window"`, the number of transitions kept.

    Returns:
        `Dataset` with a column `messages` in the conversational format that TRL's trainers read.
    """
    parser = parser or ActionParser()
    env = make_env(env)
    briefing = Briefing.of(env)
    conversations = []
    for seed in seeds:
        trajectory = put_into_words(play_episode(env, agent, seed=seed), parser, rationale)
        if context == "chat":
            conversations.append(_chat_messages(trajectory, briefing))
        elif context == "window":
            conversations.extend(_window_messages(trajectory, briefing, window))
        else:
            raise ValueError(f'context={context!r} is unknown: choose "chat" or "window".')
    env.close()
    return Dataset.from_dict({"messages": conversations})


def _standing_texts(env: Any) -> list[str]:
    """What opens every episode, the instructions, and the other standing texts: most of a short one's tokens."""
    made = make_env(env)
    try:
        briefing = Briefing.of(made)
    finally:
        made.close()
    return [text for text in (briefing.instructions, briefing.history_header, briefing.question) if text]


def put_into_words(
    trajectory: Trajectory,
    parser: ActionParser | None = None,
    rationale: Callable[[str, str], str] | None = plain_rationale,
) -> Trajectory:
    """
    A scripted player's episode as a model would have written it: the `text` of each turn is a thought and the action.

    Args:
        trajectory ([`Trajectory`]):
            What [`play_episode`] played.
        parser, rationale (*optional*):
            As for [`play_transcripts`].
    """
    parser, turns = parser or ActionParser(), []
    for turn in trajectory.turns:
        stated = parser.format(turn.executed)
        text = f"{rationale(turn.observation, turn.executed)} {stated}" if rationale else stated
        turns.append(replace(turn, text=text))
    return replace(trajectory, turns=tuple(turns))


def _chat_messages(trajectory: Trajectory, briefing: Briefing) -> list[dict[str, str]]:
    messages = []
    for number, turn in enumerate(trajectory.turns):
        content = turn.observation if number else opening_message(briefing, turn.observation)
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.text}]
    # The last observation too: what follows an action is worth learning to read, even when no reply follows
    return [*messages, {"role": "user", "content": trajectory.final_observation}]


def _window_messages(trajectory: Trajectory, briefing: Briefing, window: int | None) -> list[list[dict[str, str]]]:
    conversations, lines, opened = [], [], trajectory.turns[0].observation
    for turn, following in zip(trajectory.turns, [*trajectory.turns[1:], None], strict=True):
        observed = trajectory.final_observation if following is None else following.observation
        conversations.append(
            [
                {"role": "user", "content": window_message(briefing, last(lines, window), opened)},
                {"role": "assistant", "content": turn.text},
                {"role": "user", "content": observed},  # never seen when it plays, and worth learning from
            ]
        )
        if following is not None:
            lines.append(transition_line(len(lines), turn.observation, turn.executed, turn.reward, turn.info))
            opened = observed.removeprefix(lines[-1]).strip("\n")
    return conversations
