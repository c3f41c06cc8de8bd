# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How an agent was trained to play, in a file beside its weights: `agent_config.json`.

A model that is let play otherwise than it was trained (a window in the place of a chat, another budget, another
pattern) writes replies that mean nothing, and looks as if it had learnt nothing. Trainers write the file, model cards
say the same, and the command line plays by it.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .actions import DEFAULT_PATTERN, ActionParser
from .envs.adapters import PREFIXES
from .envs.make import make_env
from .exploration import mechanism_names


AGENT_CONFIG_FILE = "agent_config.json"
VERSION = 1  # a file of a later one says what is not known here
# In the file only where they are not the default: files of models that have no use for them stay as they were
RULES = ("top_p", "top_k", "min_p", "max_turns", "max_episode_length", "invalid_action", "max_retries")


@dataclass(frozen=True)
class AgentConfig:
    """
    How an agent plays. The defaults are those of [`~evaluation.play_model`].

    Args:
        env_id (`str`, *optional*):
            Id of the environment, `"package.module:Class"` for a class or factory; None for one that cannot be
            imported by its name, say of a script.
        env_kwargs (`Mapping`, *optional*):
            Its arguments.
        context, window, max_completion_length, action_stop, exploration, chat_template_kwargs:
            As in [`AgentGRPOConfig`].
        top_p, top_k, min_p, max_turns, max_episode_length, invalid_action, max_retries:
            Likewise.
        temperature (`float`):
            At which it is evaluated.
        action_parser ([`ActionParser`]):
            Takes its actions out of text.
        parser_class (`str`, *optional*):
            Name of the parser's class, if that is one of the user's own: a file can tell its patterns only.
        left_out (`tuple[str, ...]`):
            Arguments of the environment that no file can hold, such as an opponent that is an object.
    """

    env_id: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    context: str = "chat"
    window: int | None = None
    max_completion_length: int = 256
    temperature: float = 1.0
    action_stop: bool = False
    exploration: tuple[str, ...] = ()
    chat_template_kwargs: Mapping[str, Any] | None = None
    action_parser: ActionParser = field(default_factory=ActionParser)
    parser_class: str | None = None
    left_out: tuple[str, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    max_turns: int | None = None
    max_episode_length: int | None = None
    invalid_action: str = "random"
    max_retries: int = 2

    @classmethod
    def of_training(cls, args: Any, env: str | Callable[..., Any], action_parser: ActionParser) -> AgentConfig:
        """What [`AgentGRPOConfig`] `args` train to play in `env`."""
        lengths = [length for length in (args.max_episode_length, args.vllm_max_model_length) if length is not None]
        config = cls(
            context=args.context,
            window=args.window if args.context == "window" else None,
            max_completion_length=args.max_completion_length,
            temperature=args.evaluation_temperature,
            action_stop=args.action_stop,
            exploration=tuple(mechanism_names(args.exploration)),
            chat_template_kwargs=args.chat_template_kwargs,
            top_p=args.top_p,
            top_k=max(args.top_k or 0, 0),  # None, and vLLM's -1, are off too
            min_p=args.min_p,
            max_turns=args.max_turns,
            max_episode_length=min(lengths, default=None),
            invalid_action=args.invalid_action,
            max_retries=args.max_retries,
        )
        return config.in_env(env, args.env_kwargs or {}).read_by(action_parser)

    def in_env(self, env: str | Callable[..., Any], env_kwargs: Mapping[str, Any]) -> AgentConfig:
        """The same in `env`; also `functools.partial(make_env, id, ...)` is known by its id."""
        if isinstance(env, functools.partial) and env.func is make_env and len(env.args) == 1:
            env, env_kwargs = env.args[0], {**env.keywords, **env_kwargs}
        held = {name: value for name, value in env_kwargs.items() if _is_json(value)}
        left_out = tuple(name for name in env_kwargs if name not in held)
        env_id = env if isinstance(env, str) else _name_of(env)
        return replace(self, env_id=env_id, env_kwargs=held, left_out=left_out)

    def read_by(self, parser: ActionParser) -> AgentConfig:
        """The same with `parser`."""
        own = type(parser)
        name = None if own is ActionParser else f"{own.__module__}.{own.__qualname__}"
        return replace(self, action_parser=parser, parser_class=name)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of [`~evaluation.play_model`] that let it play so."""
        return {
            "env_kwargs": dict(self.env_kwargs),
            "max_new_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "context": self.context,
            "window": self.window,
            "action_stop": self.action_stop,
            "exploration": list(self.exploration),
            "chat_template_kwargs": None if self.chat_template_kwargs is None else dict(self.chat_template_kwargs),
            "parser": self.action_parser,
            **{name: getattr(self, name) for name in RULES},
        }

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        values = asdict(replace(self, action_parser=None))
        for name in RULES:
            if values[name] == getattr(AgentConfig, name):
                del values[name]
        parser = self.action_parser
        patterns = None if parser.patterns == (DEFAULT_PATTERN,) else list(parser.patterns)
        values["action_parser"] = {"patterns": patterns, "template": parser.template, "timeout": parser.timeout}
        return {"version": VERSION, **values}

    def save(self, folder: str | Path) -> None:
        """Write [`AGENT_CONFIG_FILE`] into `folder`."""
        text = json.dumps(self.as_dict(), indent=2, default=str)
        Path(folder, AGENT_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_agent_config(model: str | Path) -> AgentConfig | None:
    """
    How the agent in a folder, or of a Hub id, was trained to play.

    Args:
        model (`str` or `Path`):
            What `from_pretrained` takes. Of a Hub id the file is downloaded, or taken from the cache.

    Returns:
        [`AgentConfig`]; None if there is no such file, or the Hub gives none.

    Raises:
        `ValueError`: that names the file, if it is broken or of a later kind.
    """
    folder = Path(model).expanduser()
    file = folder / AGENT_CONFIG_FILE if folder.is_dir() else _from_hub(str(model))
    if file is None or not file.is_file():
        return None
    try:
        return _read(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} does not tell how the agent plays: {error}") from error


def _from_hub(repo_id: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, AGENT_CONFIG_FILE))
    except (OSError, ValueError, EntryNotFoundError):  # no network, no such file, no such name: told with the weights
        return None


# What the file's values must be; whoever plays by them would otherwise fail late, or not at all.
_MUST_BE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "env_id": ("an id or null", lambda value: value is None or isinstance(value, str)),
    "env_kwargs": ("an object", lambda value: isinstance(value, dict)),
    "context": ("'chat' or 'window'", lambda value: value in ("chat", "window")),
    "window": ("a number of steps or null", lambda value: value is None or _is_count(value, 0)),
    "max_completion_length": ("a number of tokens", lambda value: _is_count(value, 1)),
    "temperature": ("a number of at least 0", lambda value: _is_number(value, math.inf)),
    "action_stop": ("true or false", lambda value: isinstance(value, bool)),
    "exploration": ("a list of names", lambda value: _are_texts(value)),
    "chat_template_kwargs": ("an object or null", lambda value: value is None or isinstance(value, dict)),
    "action_parser": ("an object", lambda value: isinstance(value, dict)),
    "parser_class": ("a name or null", lambda value: value is None or isinstance(value, str)),
    "left_out": ("a list of names", lambda value: _are_texts(value)),
    "top_p": ("a number from 0 to 1", lambda value: _is_number(value, 1)),
    "top_k": ("a number of tokens", lambda value: _is_count(value, 0)),
    "min_p": ("a number from 0 to 1, or null", lambda value: value is None or _is_number(value, 1)),
    "max_turns": ("a number of turns or null", lambda value: value is None or _is_count(value, 1)),
    "max_episode_length": ("a number of tokens or null", lambda value: value is None or _is_count(value, 1)),
    "invalid_action": ("'random', 'retry' or 'end'", lambda value: value in ("random", "retry", "end")),
    "max_retries": ("a number of at least 0", lambda value: _is_count(value, 0)),
}


def _read(values: Any) -> AgentConfig:
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object.")
    version = values.get("version")
    if not _is_count(version, 1):
        raise ValueError(f"its version is {version!r}, and should be a number from 1 on.")
    if version > VERSION:
        raise ValueError(f"its version is {version}, and this release of trl-agents knows {VERSION}: install a newer.")
    known = {name: values[name] for name in _MUST_BE if name in values}
    for name, value in known.items():
        what, holds = _MUST_BE[name]
        if not holds(value):
            raise ValueError(f"{name}={value!r}, which should be {what}.")
    for name in ("exploration", "left_out"):
        known[name] = tuple(known.get(name, ()))
    parser = known.pop("action_parser", {})
    given = {name: parser[name] for name in ("template", "timeout") if name in parser}
    return AgentConfig(**known, action_parser=ActionParser(parser.get("patterns"), **given))


def _name_of(factory: Callable[..., Any]) -> str | None:
    """`"package.module:Class"`, if another program finds the class or factory by that."""
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    if not module or not name or module == "__main__" or module in PREFIXES:
        return None
    return f"{module}:{name}" if getattr(sys.modules.get(module), name, None) is factory else None


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most and value < math.inf


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
