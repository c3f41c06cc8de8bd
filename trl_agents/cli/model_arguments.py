# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How models read and write: what the command line says, else what a model's own `agent_config.json` says, else the
defaults.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..actions import ActionParser
from ..agent_config import AGENT_CONFIG_FILE, AgentConfig, read_agent_config
from ..envs.adapters import PREFIXES
from ..exploration import make_exploration
from ..rollout.rules import INVALID_ACTION_CHOICES
from .named import (
    DEFAULT_ENV,
    as_mechanism,
    as_object,
    as_seconds,
    as_share,
    as_temperature,
    not_negative,
    positive,
)


if TYPE_CHECKING:
    from .players import NamedPlayer


# Settings that are each model's own: what the command line calls them, and the field of [`AgentConfig`].
OWN = {
    "context": "context",
    "window": "window",
    "max_new_tokens": "max_completion_length",
    "action_stop": "action_stop",
    "temperature": "temperature",
    "action_pattern": "action_parser",
    "chat_template_kwargs": "chat_template_kwargs",
    "exploration": "exploration",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_episode_length": "max_episode_length",
    "invalid_action": "invalid_action",
    "max_retries": "max_retries",
}
# A diagnosis has its own: whole replies, room for the values, greedy decoding, random actions for invalid ones
NOT_OF_A_DIAGNOSIS = ("temperature", "action_stop", "top_p", "top_k", "min_p")
NOT_OF_A_DIAGNOSIS += ("invalid_action", "max_retries", "max_episode_length")


def add_model_arguments(
    parser: argparse.ArgumentParser, context: str = "chat", temperature: float = 1.0, diagnosis: bool = False
) -> None:
    """
    How models read and write, with these defaults; scripted players have no use for it. `diagnosis`: without what
    is the measurement's, not the model's ([`NOT_OF_A_DIAGNOSIS`]).
    """
    group = parser.add_argument_group(
        "how models read and write",
        f"What is not given is as the model's {AGENT_CONFIG_FILE} says, which trainers save beside it; without that "
        "file, the default.",
    )
    group.add_argument(
        "--context",
        choices=("chat", "window"),
        help=f"conversation that grows, or the last steps anew (default: {context})",
    )
    group.add_argument(
        "--window", type=not_negative, metavar="C", help="steps kept with --context window (default: all)"
    )
    group.add_argument("--max_new_tokens", type=positive, metavar="N", help="of a reply (default: 256)")
    if not diagnosis:
        group.add_argument(
            "--action_stop",
            action=argparse.BooleanOptionalAction,
            help="whether a reply is over when it has stated an action (default: no)",
        )
    always = ", also of a model whose file has another" if diagnosis else ""
    group.add_argument(
        "--temperature",
        type=as_temperature,
        metavar="X",
        help=f"0 is greedy (default: {temperature:g}{always})",
    )
    if not diagnosis:
        group.add_argument(
            "--top_p", type=as_share, metavar="X", help="sample from the most probable tokens (default: 1, all)"
        )
        group.add_argument("--top_k", type=not_negative, metavar="N", help="likewise, so many (default: 0, all)")
        group.add_argument(
            "--min_p", type=as_share, metavar="X", help="likewise, by the best one's share (default: 0)"
        )
        group.add_argument(
            "--invalid_action",
            choices=INVALID_ACTION_CHOICES,
            help="after a reply without a legal action: a random one, asked again, or the end (default: random)",
        )
        group.add_argument(
            "--max_retries", type=not_negative, metavar="N", help="with --invalid_action retry (default: 2)"
        )
        group.add_argument(
            "--max_episode_length",
            type=positive,
            metavar="N",
            help="tokens of an episode (default: the model's positions)",
        )
    group.add_argument(
        "--action_pattern", metavar="REGEX", help="finds the action, in its one group (default: ACTION=X)"
    )
    group.add_argument(
        "--chat_template_kwargs", type=as_object, metavar="JSON", help="such as '{\"enable_thinking\": false}'"
    )
    group.add_argument(
        "--exploration",
        nargs="*",
        type=as_mechanism,
        metavar="MECHANISM",
        help="what makes them explore, such as try_all epsilon_greedy=0.1; alone, nothing",
    )
    group.add_argument(
        "--ignore_agent_config", action="store_true", help=f"as if no model had its {AGENT_CONFIG_FILE}"
    )
    group.add_argument("--n_slots", type=positive, default=32, metavar="N", help="episodes side by side (default: 32)")
    group.add_argument(
        "--env_timeout",
        type=as_seconds,
        default=120.0,
        metavar="SECONDS",
        help="for a step or reset of the environment, which is a fault if it takes longer (default: 120)",
    )
    group.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--dtype", default="auto", help="of the weights, such as bfloat16 (default: as they were saved)"
    )
    untold = AgentConfig(context=context, temperature=temperature)
    parser.set_defaults(untold=untold, not_taken=NOT_OF_A_DIAGNOSIS if diagnosis else ())


@dataclass(frozen=True)
class Settings:
    """An environment and its limit for all players, and how each of the models plays in it, by its label."""

    env_id: str
    env_kwargs: dict[str, Any]
    of: Mapping[str, AgentConfig]
    max_turns: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `metrics.json`: what was played with, wherever it came from."""
        own = {label: config.as_dict() for label, config in self.of.items()}
        shown = {
            label: {name: values[name] for name in OWN.values() if name in values} for label, values in own.items()
        }
        limit = {} if self.max_turns is None else {"max_turns": self.max_turns}
        return {"env": self.env_id, "env_kwargs": self.env_kwargs, **limit, "models": shown}


def settle(args: argparse.Namespace, players: Sequence[NamedPlayer]) -> Settings:
    """
    What is played, and how each model plays: what `args` say, else what it was trained with, else the defaults. A note
    tells what was taken from each file.

    Raises:
        `ValueError`: if a file cannot be used, if files disagree on what all players share, or if an argument would
            change nothing, which nobody would notice.
    """
    models = [player for player in players if not player.is_scripted]
    if args.exploration and not models:
        raise ValueError(
            f"--exploration {' '.join(args.exploration)} is for models, and "
            f"{' and '.join(player.label for player in players)} writes no replies: name a model, or leave it out."
        )
    found = {} if args.ignore_agent_config else _read_files(models)
    taken: dict[str, dict[str, Any]] = {label: {} for label in found}
    env_id = args.env or _common_env(found)
    env_kwargs, max_turns = args.env_kwargs, args.max_turns
    of_env = {label: file for label, file in found.items() if file.env_id == env_id}
    if env_kwargs is None:
        env_kwargs = _common_env_kwargs(of_env)
    if max_turns is None:
        max_turns = _common_max_turns(of_env)
    for label, file in found.items():
        if args.env is None:
            taken[label]["env"] = env_id
        if args.env_kwargs is None and file.env_id == env_id:
            taken[label]["env_kwargs"] = env_kwargs
            if file.left_out:
                warnings.warn(
                    f"{label} was trained with {', '.join(file.left_out)} among env_kwargs, which a file cannot hold: "
                    "give --env_kwargs, or it meets the environment's default.",
                    stacklevel=2,
                )
        if args.max_turns is None and max_turns is not None and label in of_env:
            taken[label]["max_turns"] = max_turns
    of = {player.label: _own(args, player.label, found.get(player.label), taken) for player in models}
    # Without a model, for `--window` alone
    contexts = [config.context for config in of.values()] or [args.context or args.untold.context]
    if args.window is not None and "window" not in contexts:
        raise ValueError(f"--window {args.window} keeps steps of --context window: add that, or leave --window out.")
    for label, values in taken.items():
        if values:
            told = ", ".join(
                f"{name} {value if isinstance(value, str) else _shown(value)}" for name, value in values.items()
            )
            warnings.warn(f"{label} plays as its {AGENT_CONFIG_FILE} says: {told}.", stacklevel=2)
    return Settings(env_id, env_kwargs, of, max_turns)


def _read_files(models: Sequence[NamedPlayer]) -> dict[str, AgentConfig]:
    found = {}
    for player in models:
        try:
            found[player.label] = read_agent_config(player.source)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. --ignore_agent_config does without it.") from error
    return {label: file for label, file in found.items() if file is not None}


def _common_env(found: Mapping[str, AgentConfig]) -> str:
    """The environment that the files agree on."""
    ids = {label: file.env_id for label, file in found.items()}
    _check_agreement("environment", "--env", ids)
    for label, env_id in ids.items():
        if env_id is None:
            raise ValueError(f"{label} was trained in an environment without an id: say with --env what to play.")
        if _runs_what_it_names(env_id):
            raise ValueError(
                f"{label}'s {AGENT_CONFIG_FILE} names the environment {env_id!r}, which would import or call what the "
                f"file says. If you trust it, add --env {env_id}."
            )
    return next(iter(ids.values()), DEFAULT_ENV)


def _common_env_kwargs(found: Mapping[str, AgentConfig]) -> dict[str, Any]:
    kwargs = {label: dict(file.env_kwargs) for label, file in found.items()}
    _check_agreement("env_kwargs", "--env_kwargs", kwargs)
    return next(iter(kwargs.values()), {})


def _common_max_turns(found: Mapping[str, AgentConfig]) -> int | None:
    limits = {label: file.max_turns for label, file in found.items()}
    _check_agreement("max_turns", "--max_turns", limits, none="no limit")
    return next(iter(limits.values()), None)


def _check_agreement(what: str, flag: str, values: Mapping[str, Any], none: str = "without an id") -> None:
    (first, value), *others = values.items() if values else [("", None)]
    for label, other in others:
        if other != value:
            raise ValueError(
                f"{first} was trained with the {what} {_shown(value, none)}, {label} with {_shown(other, none)}: say "
                f"with {flag} what all are to play."
            )


def _shown(value: Any, none: str = "without an id") -> str:
    return none if value is None else json.dumps(value)


def _runs_what_it_names(env_id: str) -> bool:
    """Whether making it imports a module, calls a class, or asks a server of that name: not on a file's word."""
    prefix, colon, name = env_id.partition(":")
    if prefix == "gymnasium":
        return ":" in name
    return bool(colon) and (prefix not in PREFIXES or prefix in ("tools", "openenv"))


def _own(
    args: argparse.Namespace, label: str, file: AgentConfig | None, taken: dict[str, dict[str, Any]]
) -> AgentConfig:
    """How a model plays, with what comes from its file added to `taken`."""
    given = {field: getattr(args, name, None) for name, field in OWN.items()}
    given = {field: value for field, value in given.items() if value is not None}
    if "exploration" in given:
        given["exploration"] = tuple(given["exploration"])
    if "action_parser" in given:
        given["action_parser"] = ActionParser(given["action_parser"])
    config = args.untold
    if file is not None:
        used = {name: field for name, field in OWN.items() if field not in given and name not in args.not_taken}
        if given.get("context", file.context) != file.context:
            used.pop("window", None)  # of the other context
        config = replace(config, **{field: getattr(file, field) for field in used.values()})
        usual, values = AgentConfig().as_dict(), file.as_dict()  # of the usual rules neither says anything
        for name, field in used.items():
            if field in ("context", "max_completion_length") or values.get(field) != usual.get(field):
                taken[label][name] = values[field] if field != "action_parser" else values[field]["patterns"]
        if "action_pattern" in used:
            _check_parser(label, file)
        if "exploration" in used:
            _check_exploration(label, file)
    config = replace(config, **given)
    return config if config.context == "window" else replace(config, window=None)


def _check_parser(label: str, file: AgentConfig) -> None:
    if file.parser_class is not None:
        warnings.warn(
            f"{label} was trained with a parser of its own, {file.parser_class}: of it only the patterns are used.",
            stacklevel=2,
        )


def _check_exploration(label: str, file: AgentConfig) -> None:
    try:
        make_exploration(list(file.exploration))
    except ValueError as error:
        raise ValueError(
            f"{label}'s {AGENT_CONFIG_FILE} cannot be played by ({error}) Add --exploration, with other mechanisms or "
            "alone."
        ) from error
