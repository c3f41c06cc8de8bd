# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""TRL's environment classes (`reset`, methods that are tools, `get_reward`) as ours."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..imported import import_object
from .luck import episode_luck, own_luck
from .suites import joined
from .tool_calls import as_text, describe_tools, read_call


FINISH = "finish"


class ToolEnvironment:
    """
    An environment class as TRL's `environment_factory` takes it, played by text: `ToolEnvironment(MyEnvironment)`, or
    `"tools:package.module:MyEnvironment"` as an id.

    Its public methods but for `reset` and `get_reward` are tools. The instructions list them with their docstrings,
    and an action is a call: `ACTION=guess(word="crane")`, or JSON as tool-calling templates write it (with
    `ActionParser(r"(?s)<tool_call>(.*?)</tool_call>")`). What a tool returns is observed; what goes wrong in a call or
    a tool is told the model, as in TRL.

    Unlike in TRL an episode can end: with the action `finish`, when the environment's attribute `done` is true, or
    after `max_calls` calls. Then `get_reward` is asked, once. (`max_turns` of a trainer would end it unpaid: set
    `max_calls`.) Any text may be an action, so nothing can be played in place of a missing one: a
    reply without one ends the episode (or `invalid_action="retry"`).

    Args:
        environment (`str` or `Callable`):
            The class or a factory, or `"package.module:Class"`.
        instructions (`str`, *optional*):
            The task. Defaults to the attribute `instructions` of the environment; what `reset` returns follows.
        max_calls (`int`, *optional*, defaults to `10`):
            Calls after which the episode is truncated.
        tools_draw (`bool`, *optional*, defaults to `False`):
            Whether the tools draw from Python's or NumPy's global generators, as `reset` may. They are then seeded,
            and those of environments side by side called one at a time.
        **kwargs:
            Arguments of the class or factory.
    """

    def __init__(
        self,
        environment: str | Callable[..., Any],
        *,
        instructions: str | None = None,
        max_calls: int = 10,
        tools_draw: bool = False,
        **kwargs: Any,
    ):
        if max_calls < 1:
            raise ValueError(f"max_calls={max_calls!r} leaves no call to make: give a positive number.")
        with own_luck(0):
            self.env = (import_object(environment) if isinstance(environment, str) else environment)(**kwargs)
        self.max_calls, self.tools_draw = max_calls, tools_draw
        if not callable(getattr(self.env, "reset", None)):
            raise ValueError(f"{type(self.env).__name__} has no method `reset`: define one, which may return a text.")
        names = [name for name, _ in inspect.getmembers(type(self.env), inspect.isfunction)]
        names = [name for name in names if name not in ("reset", "get_reward", "close") and not name.startswith("_")]
        self.tools = {name: getattr(self.env, name) for name in names}
        if not self.tools:
            raise ValueError(f"{type(self.env).__name__} has no public methods: define one for each tool.")
        if FINISH in self.tools:
            raise ValueError(
                f"The tool `{FINISH}` ends the episode, and {type(self.env).__name__} has one: rename it."
            )
        task = instructions or getattr(self.env, "instructions", "")
        self.instructions = joined(
            task,
            f"You act by calling tools, one at a time:\n{describe_tools(self.tools)}\n{FINISH}()\n    Ends the task.",
            "Think step by step, keep it SHORT, and always end with one call in the form ACTION=tool(name=value), on "
            f"one line, or with ACTION={FINISH}() when you are done.",
        )
        self._calls: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self._luck, self._calls = episode_luck(seed), 0
        row = dict(options or {})
        if _takes(self.env.reset, "seed"):
            row.setdefault("seed", seed)
        with own_luck(self._luck, 0):
            text = _result(self.env.reset(**row))
        return as_text(text), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._calls is None:
            raise ValueError("No episode is on. Call reset() before the first step() and after an episode has ended.")
        self._calls += 1
        text, finished, info = self._call(action)
        done = getattr(self.env, "done", False)
        finished = finished or (isinstance(done, (bool, np.bool_)) and bool(done))  # it may be a tool
        truncated = not finished and self._calls >= self.max_calls
        reward = 0.0
        if finished or truncated:
            self._calls = None
            if hasattr(self.env, "get_reward"):
                reward = _result(self.env.get_reward())
        return text, 0.0 if reward is None else float(reward), finished, truncated, info

    def close(self) -> None:
        self._calls = None
        close = getattr(self.env, "close", None)
        if callable(close):
            _result(close())

    def _call(self, action: str) -> tuple[str, bool, dict[str, Any]]:
        """What is observed, whether the task is finished, and info about the call."""
        try:
            call = read_call(action)
        except ValueError as error:
            return f"Error: {error}", False, {"tool_error": str(error)}
        if call.name == FINISH:
            return "", True, {"tool": FINISH}
        info: dict[str, Any] = {"tool": call.name}
        tool = self.tools.get(call.name)
        if tool is None:
            problem = f"there is no tool {call.name}. The tools are: {', '.join([*self.tools, FINISH])}."
            return f"Error: {problem}", False, {**info, "tool_error": problem}
        try:
            with own_luck(self._luck, self._calls) if self.tools_draw else nullcontext():
                return as_text(_result(tool(*call.args, **call.kwargs))), False, info
        except Exception as error:  # the arguments are a model's: what a tool makes of them is data
            problem = f"{type(error).__name__}: {error}"
            return f"Error: {problem}", False, {**info, "tool_error": problem}


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _result(value: Any) -> Any:
    """What an asynchronous method comes to; environments are called from threads without an event loop."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())
