# Licensed under the Apache License, Version 2.0 (see LICENSE).
r"""
Episodes in a file: written, read back, the best of them chosen, and turned into rows to fine-tune on. What expert
iteration and learning from logs are made of.

The file is JSON lines, an episode a line. An environment's episode, here over several lines:

    {"env_id": "trl_agents/Bandit-v0", "env_kwargs": {"n_arms": 2}, "seed": 7, "return": 1.0, "stop": "truncated",
     "instructions": "You are ...", "history_header": "So far ...", "question": "What ...?",
     "turns": [{"observation": "", "text": "try blue. ACTION=blue", "action": "blue", "reward": 1.0, "valid": true}],
     "final_observation": "Step=0 Action=blue Reward=1"}

`text` is what the player wrote, `action` what the environment was given (null: nothing, it was asked again). A turn
has `"reason"` if it was not valid, `"transition"` where the environment words its own line of history
(`info["transition"]`), `"cut_off": true` if the reply ran into its token budget, and `"action_ids"`, the sampled
tokens, where they are known. Needed are `turns` with `text`, and `return` or the turns' `reward`; the rest has
defaults.

Logs of other programs are read as they are: `{"messages": [...], "reward": 1.0}`, whose assistant messages are the
replies, and `{"prompt": ..., "completion": ..., "reward": 1.0}`, both texts or both lists of messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .contexts import Briefing, ChatContext, make_context
from .envs.make import make_env
from .evaluation import play_model
from .types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn


IGNORED = -100  # the label of a token that is not learnt


@dataclass(frozen=True, slots=True)
class LoggedEpisode:
    """
    An episode as the file has it: `trajectory` in an environment, else `messages`, of which the first `given` are not
    learnt, or the texts `prompt` and `completion`.
    """

    reward: float
    trajectory: Trajectory | None = None
    briefing: Briefing | None = None
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    given: int = 0
    prompt: str = ""
    completion: str = ""

    @property
    def group(self) -> str:
        """What it started from. Rewards are compared fairly among episodes of the same start."""
        if self.trajectory is not None:
            return json.dumps([self.env_id, dict(self.env_kwargs), self.trajectory.seed], sort_keys=True)
        if not self.messages:
            return self.prompt
        roles = [message["role"] for message in self.messages]
        return json.dumps(self.messages[: self.given or roles.index("assistant")], sort_keys=True)

    @property
    def content(self) -> str:
        """All that was read and written. Episodes that share it are the same to learn from."""
        if self.trajectory is not None:
            turns = [[turn.observation, turn.text, turn.executed] for turn in self.trajectory.turns]
            return json.dumps([self.trajectory.instructions, *turns])
        return json.dumps([self.messages, self.prompt, self.completion], sort_keys=True)

    @property
    def is_fault(self) -> bool:
        """Whether the environment failed."""
        return self.trajectory is not None and self.trajectory.stop.is_fault

    @property
    def has_invalid(self) -> bool:
        """Whether a turn held no legal action."""
        return self.trajectory is not None and not all(turn.parsed.is_valid for turn in self.trajectory.turns)


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


# -- the file ---------------------------------------------------------------------------------------------------------


def write_episodes(path: str | Path, episodes: Iterable[LoggedEpisode]) -> None:
    """Write `episodes` to `path`, an episode a line. The file is there when it is whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        for episode in episodes:
            file.write(json.dumps(_to_json(episode), ensure_ascii=False) + "\n")
    unfinished.replace(path)


def read_episodes(path: str | Path) -> list[LoggedEpisode]:
    """
    Read a file of episodes, in any of the forms that the module describes.

    Raises:
        `ValueError`: with the number of the line, for one that cannot be read.
    """
    episodes = []
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: this is no JSON ({error}).") from error
            try:
                episodes.append(_from_json(row))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not episodes:
        raise ValueError(f"{path} holds no episode.")
    return episodes


def _to_json(episode: LoggedEpisode) -> dict[str, Any]:
    trajectory, briefing = episode.trajectory, episode.briefing
    if trajectory is None:
        if not episode.messages:
            return {"prompt": episode.prompt, "completion": episode.completion, "reward": episode.reward}
        if not episode.given:
            return {"messages": list(episode.messages), "reward": episode.reward}
        prompt, completion = episode.messages[: episode.given], episode.messages[episode.given :]
        return {"prompt": list(prompt), "completion": list(completion), "reward": episode.reward}
    turns = []
    for turn in trajectory.turns:
        turns.append(
            {
                "observation": turn.observation,
                "text": turn.text,
                "action": turn.executed,
                "reward": turn.reward,
                "valid": turn.parsed.is_valid,
                **({} if turn.parsed.is_valid else {"reason": turn.parsed.reason.value}),
                **({"transition": turn.info["transition"]} if "transition" in turn.info else {}),
                **({"cut_off": True} if turn.cut_off else {}),
                **({"action_ids": list(turn.action_ids)} if turn.action_ids else {}),
            }
        )
    return {
        "env_id": episode.env_id,
        "env_kwargs": dict(episode.env_kwargs),
        "seed": trajectory.seed,
        "return": episode.reward,
        "stop": trajectory.stop.value,
        **({"error": trajectory.error} if trajectory.error else {}),
        "instructions": briefing.instructions,
        "history_header": briefing.history_header,
        "question": briefing.question,
        "turns": turns,
        "final_observation": trajectory.final_observation,
    }


def _from_json(row: Any) -> LoggedEpisode:
    if not isinstance(row, dict):
        raise ValueError(f"an episode is an object, and this is {type(row).__name__}.")
    if "turns" in row:
        return _played(row)
    if "messages" in row:
        messages = _messages(row, "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("`messages` has no message of the assistant, so nothing to learn.")
        if messages[0]["role"] == "assistant":
            raise ValueError("`messages` begins with the assistant: there is nothing it replies to.")
        return LoggedEpisode(_reward(row), messages=messages)
    if "prompt" not in row or "completion" not in row:
        raise ValueError(
            f"an episode has `turns`, `messages`, or `prompt` and `completion`, this {', '.join(row) or 'nothing'}."
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return LoggedEpisode(_reward(row), prompt=prompt, completion=completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("`prompt` and `completion` must be both texts or both lists of messages.")
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    if not any(message["role"] == "assistant" for message in completion):
        raise ValueError("`completion` has no message of the assistant, so nothing to learn.")
    return LoggedEpisode(_reward(row), messages=(*prompt, *completion), given=len(prompt))


def _played(row: Mapping[str, Any]) -> LoggedEpisode:
    rows = _typed(row, "turns", list, [])
    if not all(isinstance(turn, dict) for turn in rows):
        raise ValueError("`turns` must be a list of objects.")
    if not rows:
        raise ValueError("`turns` is empty, so there is nothing to learn.")
    turns = tuple(_turn(turn, number) for number, turn in enumerate(rows))
    reward = _reward(row) if {"return", "reward"} & set(row) else math.fsum(turn.reward for turn in turns)
    defaults = Briefing("")
    briefing = Briefing(
        _typed(row, "instructions", str, ""),
        _typed(row, "history_header", str, defaults.history_header),
        _typed(row, "question", str, defaults.question),
    )
    trajectory = Trajectory(
        seed=_typed(row, "seed", int, 0),
        turns=turns,
        stop=_one_of(StopReason, row.get("stop", "truncated"), "stop"),
        instructions=briefing.instructions,
        final_observation=_typed(row, "final_observation", str, ""),
        error=row.get("error"),
    )
    return LoggedEpisode(reward, trajectory, briefing, row.get("env_id"), _typed(row, "env_kwargs", dict, {}))


def _turn(row: Mapping[str, Any], number: int) -> Turn:
    try:
        if "text" not in row:
            raise ValueError(f"`text`, what the player wrote, is missing among {', '.join(row) or 'nothing'}.")
        valid = _typed(row, "valid", bool, True)
        action = row.get("action")
        if valid:
            parsed = ParsedAction(action if action is not None else row["text"])
        else:
            parsed = ParsedAction(None, _one_of(InvalidReason, row.get("reason", "no_match"), "reason"))
        return Turn(
            observation=_typed(row, "observation", str, ""),
            input_ids=(),
            action_ids=tuple(_typed(row, "action_ids", list, [])),
            text=_typed(row, "text", str, ""),
            parsed=parsed,
            executed=parsed.action if valid else action,
            reward=_number(row.get("reward", 0.0), "reward"),
            cut_off=_typed(row, "cut_off", bool, False),
            info={"transition": row["transition"]} if "transition" in row else {},
        )
    except ValueError as error:
        raise ValueError(f"turn {number}: {error}") from error


def _messages(row: Mapping[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    messages = row[name]
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not well_formed:
        raise ValueError(f"`{name}` must be a list of messages, each with the texts `role` and `content`.")
    return tuple(messages)


def _reward(row: Mapping[str, Any]) -> float:
    for name in ("return", "reward"):
        if name in row:
            return _number(row[name], name)
    raise ValueError("`reward` is missing.")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a number, and is {value!r}.")
    return float(value)


def _typed(row: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = row.get(name, default)
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be of type {kind.__name__}, and is {value!r}.")
    return value


def _one_of(kind: type, value: Any, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"`{name}` is {value!r}: use one of {', '.join(kind)}.") from None


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
