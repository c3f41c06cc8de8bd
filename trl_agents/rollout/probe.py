# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How an environment begins, found out as a rollout would: within its time, and in a process if it gets one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from ..contexts import Briefing
from .faults import Fault, checked_reset, describe
from .workers import EnvPool, EnvReply


TEXTS = tuple(field.name for field in dataclasses.fields(Briefing))
BEGUN, RAISED = "begun", "raised"  # in `info`, on the way here


@dataclasses.dataclass(frozen=True, slots=True)
class Begun:
    """How an episode begins, and what is read of the environment (`texts`, by attribute, unchecked)."""

    name: str  # of the environment's class
    texts: dict[str, Any]
    observation: str
    info: dict[str, Any]

    @property
    def briefing(self) -> Briefing:
        """The texts; raises `ValueError` if they are none."""
        if not isinstance(self.texts.get("instructions"), str):
            raise ValueError(
                f"The environment {self.name} has no text `instructions`, with which an episode's prompt begins. Give "
                "it that attribute."
            )
        for name, text in self.texts.items():
            if not isinstance(text, str):
                raise ValueError(f"{self.name}.{name} is {text!r}: make it a text, or leave it out.")
        return Briefing(**self.texts)


class Probe:
    """
    One environment, to be looked at before a run. Whatever it does, this process goes on.

    Args:
        factory (`Callable[[], Any]`):
            Makes the environment.
        timeout, reset_timeout, processes:
            As for [`EnvPool`].
        resets (`bool`, *optional*, defaults to `True`):
            Whether an episode is begun, and not only the environment made.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        timeout: float | None = None,
        reset_timeout: float | None = None,
        processes: bool = False,
        resets: bool = True,
    ):
        self.pool = EnvPool(functools.partial(_Probed, factory, resets), 1, timeout, reset_timeout, processes)

    def begin(self, seed: int, options: dict[str, Any] | None = None) -> Begun:
        """
        Begin an episode.

        Raises:
            What the environment raises, or `ValueError` if it does not answer or takes its process down: twice, for as
            in a rollout, once is no time.
        """
        for last in (False, True):
            self.pool.reset(0, seed, copy.deepcopy(options))
            (reply,) = self.pool.collect(0.0, block=True)
            if reply.fault is None and BEGUN in reply.info:
                return reply.info[BEGUN]
            self.pool.renew(0)
            if last:
                raise _error_of(reply)

    def step(self, action: str) -> EnvReply:
        self.pool.step(0, action)
        (reply,) = self.pool.collect(0.0, block=True)
        return reply

    def close(self) -> None:
        self.pool.close()


def _error_of(reply: EnvReply) -> Exception:
    if reply.fault is None:
        error = reply.info[RAISED].error
    elif reply.fault is Fault.TIMEOUT:
        error = ValueError(
            f"The environment could not be begun, at a second attempt either ({reply.error}). Give it more time "
            "(env_reset_timeout, in which it is made too, and its process started if it gets one), or find out what "
            "it waits for."
        )
    else:
        error = ValueError(f"The environment could not be begun, at a second attempt either ({reply.error}).")
    error.add_note("trl_agents.check_env explains what is wrong with an environment.")
    return error


class _Probed:
    """
    The environment as [`Probe`] has it. It tells along with the first observation what else is read of it, or what it
    raised, of which a fault would be but a line.
    """

    def __init__(self, factory: Callable[[], Any], resets: bool):
        self.factory, self.resets, self.env = factory, resets, None

    def reset(self, *, seed: int, options: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
        observation, info = "", {}
        try:
            self.env = self.factory()
            if self.resets:
                observation, *_, info = checked_reset(self.env.reset(seed=seed, options=options))
            texts = {name: getattr(self.env, name) for name in TEXTS if hasattr(self.env, name)}
        except Exception as error:
            return "", {RAISED: _Raised(error)}
        return "", {BEGUN: Begun(type(self.env).__name__, texts, observation, info)}

    def step(self, action: str) -> Any:
        return self.env.step(action)

    def close(self) -> None:
        if self.env is not None:
            self.env.close()


class _Raised:
    """An exception, which from a process brings its traceback along in words."""

    def __init__(self, error: Exception):
        self.error = error

    def __reduce__(self) -> tuple:
        try:
            told = pickle.loads(pickle.dumps(self.error))
        except Exception:  # many with arguments of their own cannot be made anew
            told = ValueError(describe(self.error))
        told.add_note("In the environment's process:\n" + "".join(traceback.format_exception(self.error)))
        return _Raised, (told,)
