# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments that are served by OpenEnv, played through a client."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from .suites import how_to_answer, import_suite


_NOT_SHOWN = ("done", "reward", "metadata", "truncated")


class OpenEnvEnvironment:
    """
    An environment behind an OpenEnv client: `"openenv:http://localhost:8000"`, or
    `OpenEnvEnvironment(functools.partial(EchoEnv, base_url=...))` with the client class of an environment.

    Each environment has a client of its own, and with it a session on the server: the server must allow as many as
    there are episodes side by side (`max_concurrent_envs`). A client that timed out is thrown away with its
    connection, so that a late answer cannot be taken for the next.

    Args:
        client (`str` or `Callable`):
            The server's address, for OpenEnv's generic client, or what makes a client.
        action (`str` or `Callable`, *optional*, defaults to `"message"`):
            What the client's `step` is given: the name of the only field of the action, or `action(text)` that makes
            it.
        describe (`Callable`, *optional*):
            `describe(observation) -> str`. By default the observation's fields, but for `done`, `reward`, `metadata`
            and the legal actions.
        legal_actions (`str` or `Callable`, *optional*, defaults to `"legal_actions"`):
            The name of the observation's field that lists them, where it has it, or `legal_actions(observation)`. A
            single action that is no text (a number) is given to the server as it is there.
        instructions (`str`, *optional*):
            The text that tells the player the task and how to answer.
        **kwargs:
            Arguments of the client (`message_timeout_s`, `headers`, ...).
    """

    def __init__(
        self,
        client: str | Callable[..., Any],
        *,
        action: str | Callable[[str], Any] = "message",
        describe: Callable[[Any], str] | None = None,
        legal_actions: str | Callable[[Any], list | None] = "legal_actions",
        instructions: str | None = None,
        **kwargs: Any,
    ):
        if isinstance(client, str):
            if not client.startswith(("http://", "https://", "ws://", "wss://")):
                raise ValueError(f"{client!r} is no address of a server: write openenv:http://host:port.")
            kwargs, client = {"base_url": client, **kwargs}, import_suite("openenv.core").GenericEnvClient
        made = client(**kwargs)
        # Newer clients are asynchronous, with a synchronous side; older ones are synchronous
        self.client = made.sync() if callable(getattr(made, "sync", None)) else made
        self._action, self._describe, self._legal = action, describe, legal_actions
        self._values: dict[str, Any] = {}
        self.instructions = instructions or (
            f"You act in an environment that answers what you do.\n{how_to_answer('your action')}"
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        row = {**({} if seed is None else {"seed": seed}), **(options or {})}
        try:
            result = self.client.reset(**row)
        except (ConnectionError, OSError) as error:
            raise ConnectionError(f"The OpenEnv server did not answer: {error}. Is it running?") from error
        text, _, _, info = self._read(result)
        return text, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        value = self._values.get(action, action)
        result = self.client.step({self._action: value} if isinstance(self._action, str) else self._action(action))
        text, terminated, truncated, info = self._read(result)
        reward = getattr(result, "reward", None)
        return text, 0.0 if reward is None else float(reward), terminated, truncated, info

    def close(self) -> None:
        self.client.close()

    def _read(self, result: Any) -> tuple[str, bool, bool, dict[str, Any]]:
        observation = getattr(result, "observation", result)
        fields = _fields(observation)
        metadata = getattr(result, "metadata", None) or fields.get("metadata") or {}
        done = bool(getattr(result, "done", False))
        truncated = done and bool(metadata.get("truncated") or fields.get("truncated"))
        info: dict[str, Any] = {"metadata": metadata} if metadata else {}
        legal = self._legal(observation) if callable(self._legal) else fields.get(self._legal)
        if done:
            info["legal_actions"] = []
        elif legal is not None:
            self._values = {str(value): value for value in legal}
            info["legal_actions"] = list(self._values)
        text = self._describe(observation) if self._describe else _show(observation, fields, self._legal)
        return text, done and not truncated, truncated, info


def _fields(observation: Any) -> Mapping[str, Any]:
    if isinstance(observation, Mapping):
        return observation
    if hasattr(observation, "model_dump"):
        return observation.model_dump()
    return dataclasses.asdict(observation) if dataclasses.is_dataclass(observation) else {}


def _show(observation: Any, fields: Mapping[str, Any], legal: Any) -> str:
    if isinstance(observation, str):
        return observation
    shown = {k: v for k, v in fields.items() if k not in (*_NOT_SHOWN, legal) and v is not None}
    if len(shown) == 1 and isinstance(only := next(iter(shown.values())), str):
        return only
    lines = [f"{k}: {v if isinstance(v, str) else json.dumps(v, default=str)}" for k, v in shown.items()]
    return "\n".join(lines) if shown or fields else str(observation)
