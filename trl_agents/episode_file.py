# Licensed under the Apache License, Version 2.0 (see LICENSE).
r"""
Played episodes in a file, written and read back.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .contexts import Briefing
from .types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn


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
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # bytes that are no text, numbers longer than `int` reads
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
    env_id = None if row.get("env_id") is None else _typed(row, "env_id", str, "")
    return LoggedEpisode(reward, trajectory, briefing, env_id, _typed(row, "env_kwargs", dict, {}))


def _turn(row: Mapping[str, Any], number: int) -> Turn:
    try:
        if "text" not in row:
            raise ValueError(f"`text`, what the player wrote, is missing among {', '.join(row) or 'nothing'}.")
        valid = _typed(row, "valid", bool, True)
        action = row.get("action")
        if action is not None and not isinstance(action, str):
            raise ValueError(f"`action` must be a text or null, and is {action!r}.")
        if not all(type(token) is int for token in _typed(row, "action_ids", list, [])):
            raise ValueError("`action_ids` must be a list of whole numbers, a token each.")
        if valid:
            parsed = ParsedAction(action if action is not None else row["text"])
        else:
            parsed = ParsedAction(None, _one_of(InvalidReason, row.get("reason", "no_match"), "reason"))
        return Turn(
            observation=_typed(row, "observation", str, ""),
            input_ids=(),
            action_ids=tuple(row.get("action_ids", ())),
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
    if isinstance(value, int) and abs(value) > 2**1000:  # beyond all floats, or nearly
        raise ValueError(f"`{name}` must be a number, and has {len(str(value))} digits.")
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
