# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Episodes as what a model learns from: played and logged, the best of them chosen, and turned into rows to fine-tune on.
What expert iteration and learning from logs are made of. How they are kept in files: [`episode_file`].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .contexts import Briefing, ChatContext, make_context
from .envs.make import make_env
from .episode_file import LoggedEpisode
from .episode_file import read_episodes as read_episodes
from .episode_file import write_episodes as write_episodes
from .evaluation import play_model
from .types import Trajectory, Turn


IGNORED = -100  # the label of a token that is not learnt


# -- logging ----------------------------------------------------------------------------------------------------------


def sample_episodes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    env: Any,
    seeds: Sequence[int],
    *,
    n: int = 1,
    seed: int = 0,
    **kwargs: Any,
) -> list[Trajectory]:
    """
    Let a language model play `n` episodes from each seed.

    Every process of a distributed run must call this with the same seeds: they are shared out, and every process gets
    all episodes.

    Args:
        model, tokenizer, env, seeds, kwargs:
            As for [`~evaluation.play_model`].
        n (`int`, *optional*, defaults to `1`):
            Episodes from each seed, which differ by the model's luck.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the model's luck.

    Returns:
        `list[Trajectory]`, the `n` of the first seed first.
    """
    state = PartialState()
    own = seeds[state.process_index :: state.num_processes]
    draws = [play_model(model, tokenizer, env, own, seed=seed * n + draw, **kwargs) for draw in range(n)]
    played = [list(group) for group in zip(*draws, strict=True)]
    parts = gather_object([played]) if state.num_processes > 1 else [played]
    groups = (parts[number % len(parts)][number // len(parts)] for number in range(len(seeds)))
    return [trajectory for group in groups for trajectory in group]


def log_episodes(
    trajectories: Iterable[Trajectory], env_id: str, env_kwargs: Mapping[str, Any] | None = None
) -> list[LoggedEpisode]:
    """
    Episodes that were just played, as the file will have them.

    Args:
        trajectories (`Iterable[Trajectory]`):
            Of a model, or of a scripted player whose actions [`~transcripts.put_into_words`] wrote down.
        env_id (`str`):
            Where they were played.
        env_kwargs (`Mapping`, *optional*):
            The environment's arguments.
    """
    env = make_env(env_id, **(env_kwargs or {}))
    briefing = Briefing.of(env)
    env.close()
    return [
        LoggedEpisode(
            trajectory.return_,
            trajectory,
            Briefing(trajectory.instructions, briefing.history_header, briefing.question),
            env_id,
            dict(env_kwargs or {}),
        )
        for trajectory in trajectories
    ]


def log_answers(
    prompts: Sequence[str | list[dict[str, Any]]], answers: Sequence[Sequence[str]], rewards: Sequence[float | None]
) -> list[LoggedEpisode]:
    """
    Answers to questions, as the file will have them.

    Args:
        prompts (`Sequence`):
            What was asked: texts or conversations.
        answers (`Sequence[Sequence[str]]`):
            The answers to each.
        rewards (`Sequence[float | None]`):
            One for each answer, in order. Answers without one, as reward functions give it to a question that they
            cannot judge, are left out.
    """
    pairs = [(prompt, answer) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    logged = []
    for (prompt, answer), reward in zip(pairs, rewards, strict=True):
        if reward is None:
            continue
        if isinstance(prompt, str):
            logged.append(LoggedEpisode(float(reward), prompt=prompt, completion=answer))
        else:
            reply = {"role": "assistant", "content": answer}
            logged.append(LoggedEpisode(float(reward), messages=(*prompt, reply), given=len(prompt)))
    return logged


# -- the best of them -------------------------------------------------------------------------------------------------


def best_episodes(
    episodes: Sequence[LoggedEpisode],
    *,
    share: float = 1.0,
    by_group: bool = False,
    min_reward: float | None = None,
    most: int | None = None,
    allow_invalid: bool = True,
) -> list[LoggedEpisode]:
    """
    The episodes to learn from.

    Those whose environment failed are left out, and of equal ones all but the first. What is left is chosen by reward,
    equal rewards in the order of `episodes`.

    Args:
        episodes (`Sequence[LoggedEpisode]`):
            What was played or answered.
        share (`float`, *optional*, defaults to `1.0`):
            Keep this share of them, the best, rounded up.
        by_group (`bool`, *optional*, defaults to `False`):
            Whether to take the share of each group, the episodes of one seed or prompt, rather than of all. Overall,
            episodes are also chosen for an easy start.
        min_reward (`float`, *optional*):
            Keep none below ([ReST](https://huggingface.co/papers/2308.08998) raises it from step to step).
        most (`int`, *optional*):
            Keep at most so many of a group, so that easy starts do not crowd out others.
        allow_invalid (`bool`, *optional*, defaults to `True`):
            Whether to keep episodes with invalid turns. Those turns are never learnt.

    Returns:
        `list[LoggedEpisode]` in the order of `episodes`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} is no share of the episodes: give a number above 0, up to 1.")
    if most is not None and most < 1:
        raise ValueError(f"most={most!r} keeps no episode: give 1 or more, or None.")
    usable = [
        number
        for number, episode in enumerate(episodes)
        if not episode.is_fault and (allow_invalid or not episode.has_invalid)
    ]
    groups, seen = {}, set()
    for number in usable:
        group = episodes[number].group
        key = (group, episodes[number].content)
        if key not in seen:
            seen.add(key)
            groups.setdefault(group, []).append(number)

    def best(numbers: list[int], n: int) -> list[int]:
        return sorted(numbers, key=lambda number: -episodes[number].reward)[:n]

    # The share is of the different episodes before the threshold: of 100 with 3 above it, a quarter is these 3
    if by_group:
        kept = [number for own in groups.values() for number in best(own, math.ceil(share * len(own)))]
    else:
        distinct = sorted(number for own in groups.values() for number in own)
        kept = best(distinct, math.ceil(share * len(distinct)))
    kept = {number for number in kept if min_reward is None or episodes[number].reward >= min_reward}
    if most is not None:
        kept = {number for own in groups.values() for number in best([one for one in own if one in kept], most)}
    return [episodes[number] for number in sorted(kept)]


# -- rows -------------------------------------------------------------------------------------------------------------


def training_rows(
    episodes: Iterable[LoggedEpisode],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: str = "chat",
    window: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eos_token_ids: list[int] | None = None,
) -> Dataset:
    """
    Rows for TRL's `SFTTrainer` that teach what was written in valid turns, and nothing else: not what was read, not
    invalid replies.

    They are tokens, made by the very contexts that ask the model in a rollout, so that it is trained on what it will
    be asked. Messages would not do: templates drop thoughts from earlier replies or add to the last one, and put text
    behind the end of a reply, which would be learnt; a mask of the assistant's tokens needs a template made for it,
    and spares no invalid reply. Turns whose prompt goes on where the last reply ended share a row: in a chat the whole
    episode is one, in a window each turn is one.

    Args:
        episodes (`Iterable[LoggedEpisode]`):
            What to learn from, as a rule the choice of [`best_episodes`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        context, window, chat_template_kwargs (*optional*):
            What the model reads each turn, as in [`AgentGRPOConfig`]. Logs of messages are rendered as they stand.
        eos_token_ids (`list[int]`, *optional*):
            Tokens that end a reply. Defaults to the tokenizer's own.

    Returns:
        [`~datasets.Dataset`] with the columns `input_ids` and `labels`; -100 is not learnt.
    """
    settings = (tokenizer, eos_token_ids, dict(chat_template_kwargs or {}))
    reads = make_context(context, *settings, window)
    end = _end_of_reply(ChatContext(*settings))
    input_ids, labels = [], []
    for episode in episodes:
        for ids, own_labels in _join(_exchanges(episode, reads, end)):
            input_ids.append(ids)
            labels.append(own_labels)
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})


def _end_of_reply(chat: ChatContext) -> int:
    """The token that a reply ends with: of those that end one, what the template closes replies with."""
    closing = chat.between("?", None)[:3]
    return next((token for token in closing if token in chat.eos_token_ids), chat.tokenizer.eos_token_id)


def _exchanges(episode: LoggedEpisode, context: Any, end: int) -> Iterator[tuple[list[int], list[int], bool]]:
    """What was read, what was written, whether to learn it: for each reply of an episode."""
    if episode.messages:
        for number, message in enumerate(episode.messages):
            if message["role"] == "assistant" and number >= episode.given:
                prompt_ids = context.encode(context.render(list(episode.messages[:number])))
                yield prompt_ids, [*context.encode_words(message["content"]), end], True
    elif episode.trajectory is None:
        tokenizer = context.tokenizer
        prompt_ids = tokenizer(episode.prompt)["input_ids"]
        yield prompt_ids, [*context.encode(episode.completion), tokenizer.eos_token_id], True
    else:
        reader, turns = None, episode.trajectory.turns
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            reader = reader or context.begin(episode.briefing, turn.observation, {})
            reply_ids = _reply_ids(turn, context, end)
            yield reader.prompt_ids, reply_ids, turn.parsed.is_valid
            if following is not None and turn.executed is None:
                reader.ask(tuple(reply_ids), following.observation)
            elif following is not None:
                reader.observe(tuple(reply_ids), turn.executed, turn.reward, following.observation, turn.info)


def _reply_ids(turn: Turn, context: Any, end: int) -> list[int]:
    """The sampled tokens, if they are known and this tokenizer's; else the text's."""
    if turn.action_ids and max(turn.action_ids) < len(context.tokenizer):
        if context.decode(turn.action_ids) == turn.text:
            return list(turn.action_ids)
    return [*context.encode_words(turn.text), *([] if turn.cut_off else [end])]


def _join(exchanges: Iterable[tuple[list[int], list[int], bool]]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of rows with as many exchanges in each as go on from one another."""
    ids: list[int] = []
    labels: list[int] = []
    for prompt_ids, reply_ids, learnt in exchanges:
        if prompt_ids[: len(ids)] != ids:
            if any(label != IGNORED for label in labels):
                yield ids, labels
            ids, labels = [], []
        read = prompt_ids[len(ids) :]
        ids = [*ids, *read, *reply_ids]
        labels = [*labels, *[IGNORED] * len(read), *(reply_ids if learnt else [IGNORED] * len(reply_ids))]
    if any(label != IGNORED for label in labels):
        yield ids, labels
