# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What counts as a fault of an environment, and how many there were."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from ..envs.check import MAX_CHARACTERS, MAX_REWARD, brief
from ..types import StopReason


# How many faults are told word by word, and how long each may be.
TOLD = 3
ERROR_CHARACTERS = 500


class Fault(StrEnum):
    """How an environment failed. The values name the metrics `agents/fault_<kind>`."""

    MAKE = "make"  # the factory raised
    CRASH = "crash"  # `reset` or `step` raised, or its process ended
    MALFORMED = "malformed"  # what it returned is not as agreed
    TIMEOUT = "timeout"  # no answer in time

    @property
    def stop(self) -> StopReason:
        """What it makes of an episode that cannot be begun again."""
        return StopReason.ENV_TIMEOUT if self is Fault.TIMEOUT else StopReason.ENV_ERROR


class RemoteFault(Exception):
    """A fault in another process, described there."""

    def __init__(self, fault: Fault, error: str):
        super().__init__(error)
        self.fault = fault


@dataclass(slots=True)
class FaultCounts:
    """The faults of a rollout: `kinds` of `calls`, the episodes begun again and replaced, the first in words."""

    calls: int = 0  # of `reset` and `step`
    kinds: Counter = field(default_factory=Counter)
    retried: int = 0  # episodes that were begun again at least once
    replaced: int = 0  # episodes in whose place others were played
    first: list[str] = field(default_factory=list)

    def add(self, fault: Fault, error: str) -> None:
        self.kinds[fault] += 1
        if len(self.first) < TOLD:
            self.first.append(error)


def describe(exception: BaseException) -> str:
    """An environment's exception in a line: what was raised, and where."""
    if isinstance(exception, RemoteFault):
        return str(exception)
    try:
        text = "".join(traceback.format_exception_only(exception)).strip()
    except Exception:  # an environment fills its exceptions itself
        text = f"{type(exception).__name__}, which cannot be shown"
    text = text.encode(errors="backslashreplace").decode()  # it is logged and written to files
    if len(text) > ERROR_CHARACTERS:
        text = f"{text[:ERROR_CHARACTERS]}..."
    *_, (frame, line) = traceback.walk_tb(exception.__traceback__)
    path = Path(frame.f_code.co_filename)
    if path.parent == Path(__file__).parent:  # it is we who complain
        return text
    return f"{text} ({path.name}, line {line}, in {frame.f_code.co_name})"


def checked_reset(answer: Any) -> tuple:
    """What `reset` returned, as the arguments of an [`EnvReply`]; raises if it is not as agreed."""
    observation, info = _unpacked("reset", answer, "(observation, info)")
    return _checked_text(observation), 0.0, False, False, _checked_info(info, ended=False)


def checked_step(answer: Any) -> tuple:
    """What `step` returned, as the arguments of an [`EnvReply`]; raises if it is not as agreed."""
    names = "(observation, reward, terminated, truncated, info)"
    observation, reward, terminated, truncated, info = _unpacked("step", answer, names)
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"`step` returned {name}={brief(flag)}, not a bool")
    info = _checked_info(info, ended=bool(terminated or truncated))
    return _checked_text(observation), _checked_reward(reward), bool(terminated), bool(truncated), info


def _unpacked(call: str, answer: Any, names: str) -> tuple:
    if not isinstance(answer, (tuple, list)) or len(answer) != names.count(",") + 1:
        raise TypeError(f"`{call}` returned {brief(answer)}, not {names}")
    return tuple(answer)


def _checked_reward(reward: Any) -> float:
    try:
        if isinstance(reward, (str, bytes)):
            raise TypeError
        reward = float(reward)
    except Exception as error:
        raise TypeError(f"`step` returned the reward {brief(reward)}, not a number") from error
    if not abs(reward) <= MAX_REWARD:
        raise ValueError(f"`step` returned the reward {reward}: finite ones up to {MAX_REWARD:g} can be learnt from")
    return reward


def _checked_text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise TypeError(f"the observation {brief(observation)} is no str")
    return _readable("observation", observation)


def _checked_info(info: Any, ended: bool) -> dict[str, Any]:
    """A copy, so that what an environment changes later does not change the past. What we read must be as agreed."""
    if not isinstance(info, dict):
        raise TypeError(f"the info {brief(info)} is no dict")
    info = dict(info)
    if (actions := info.get("legal_actions")) is not None:
        if not isinstance(actions, (list, tuple)) or not all(isinstance(action, str) for action in actions):
            raise TypeError(f"info['legal_actions'] is {brief(actions)}, no list of str")
        if not actions and not ended:  # whatever a model says would be its mistake
            raise ValueError("info['legal_actions'] is empty, and the episode goes on: leave out what is not known")
        info["legal_actions"] = list(actions)
        for action in actions:
            _encodable("legal action", action)
    for name in ("instructions", "transition"):
        if not isinstance(info.get(name, ""), str):
            raise TypeError(f"info[{name!r}] is {brief(info[name])}, no str")
        _readable(name, info.get(name, ""))
    return info


def _readable(name: str, text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the {name} has {len(text):,} characters: {MAX_CHARACTERS:,} are the most")
    return _encodable(name, text)


def _encodable(name: str, text: str) -> str:
    """Tokenizers raise on half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is no text that can be encoded ({error.reason})") from None
    return text
