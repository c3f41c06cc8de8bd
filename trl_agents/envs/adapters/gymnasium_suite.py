# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Gymnasium's environments as text: observations described in words, discrete actions named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete, Text

from ..spaces import Labels
from .suites import how_to_answer, unknown_id


# Names of actions, in the order of their numbers, and the rules, by the id without its version.
ACTIONS = {
    "FrozenLake": ("left", "down", "right", "up"),
    "FrozenLake8x8": ("left", "down", "right", "up"),
    "Taxi": ("south", "north", "east", "west", "pickup", "dropoff"),
    "CliffWalking": ("up", "right", "down", "left"),
    "Blackjack": ("stick", "hit"),
    "CartPole": ("left", "right"),
    "MountainCar": ("left", "none", "right"),
    "Acrobot": ("negative", "none", "positive"),
    "LunarLander": ("none", "left", "main", "right"),
}
_LAKE = (
    "You cross a frozen lake from S to the goal G. F is ice, H is a hole, and [ ] marks where you are. Reaching G "
    "gives reward 1; a hole ends the walk. The ice may be slippery: a step may go to the left or right of where you "
    "aimed."
)
RULES = {
    "FrozenLake": _LAKE,
    "FrozenLake8x8": _LAKE,
    "Taxi": (
        "You drive a taxi on a 5x5 grid with walls. Go to the passenger, pick them up, go to their destination, and "
        "drop them off there. Each step costs 1, a wrong pickup or dropoff 10; a right dropoff gives 20."
    ),
    "CliffWalking": (
        "You walk on a grid. x is where you are, C is the cliff, T is the goal, o is safe ground. Each step costs 1; "
        "the cliff costs 100 and takes you back to the start."
    ),
    "Blackjack": (
        "You play blackjack. Hit to draw a card, stick to end your turn. Whoever is closer to 21 wins, above 21 "
        "loses. A win gives 1, a draw 0, a loss -1. An ace counts 11 where that does not go above 21 (usable), else 1."
    ),
}

_HIGHLIGHT = re.compile(r"\x1b\[(?:\d+;)*4[0-7](?:;\d+)*m(.*?)\x1b\[0?m", re.DOTALL)
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]+[0-~]|[@-Z\\-_])")


def strip_ansi(text: str) -> str:
    """Terminal text without its control codes. What had a coloured background is put into brackets: `[F]`."""
    return _ANSI.sub("", _HIGHLIGHT.sub(r"[\1]", text))


class GymnasiumEnvironment:
    """
    An environment of Gymnasium's as text: `"gymnasium:FrozenLake-v1"`.

    What is observed becomes text by `describe`; by default FrozenLake, Taxi, CliffWalking and Blackjack are put into
    words, others are shown as they draw themselves in a terminal (colours taken off) and by the numbers of their
    observation. Discrete actions get names, and an `info["action_mask"]` says which of them are legal.

    Args:
        env (`str` or [`~gymnasium.Env`]):
            An id that is registered with Gymnasium, or an environment.
        describe (`Callable`, *optional*):
            `describe(observation, env) -> str`, given Gymnasium's observation and its innermost environment.
        actions (`list[str]` or `dict[str, Any]`, *optional*):
            Names of the actions: a list in the order of their numbers, or a dictionary from names to the actions
            themselves, which any action space can have. Defaults to names for the known ones, else to the numbers.
        instructions (`str`, *optional*):
            The text that tells the player the task and how to answer.
        **kwargs:
            Arguments of [`gymnasium.make`].
    """

    def __init__(
        self,
        env: str | gymnasium.Env,
        *,
        describe: Callable[[Any, Any], str] | None = None,
        actions: Sequence[str] | Mapping[str, Any] | None = None,
        instructions: str | None = None,
        **kwargs: Any,
    ):
        self.env = _make(env, kwargs) if isinstance(env, str) else env
        spec = self.env.spec
        self.name = spec.name if spec else type(self.env.unwrapped).__name__
        known = self.name if _is_gymnasiums(self.env.unwrapped) else ""
        self._free_text = actions is None and isinstance(self.env.action_space, Text)
        usual = ACTIONS.get(known, ())
        self.actions = {} if self._free_text else _named(self.env.action_space, actions, self.name, usual)
        self.action_space = self.env.action_space if self._free_text else Labels(list(self.actions))
        self._describe = describe or _DESCRIPTIONS.get(known, show)
        own = getattr(self.env.unwrapped, "instructions", None)
        self.instructions = instructions or (own if isinstance(own, str) else self._write_instructions(known))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._text(observation), self._info(info)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._free_text and action not in self.actions:
            raise ValueError(f"Action {action!r} is unknown. The actions are: {', '.join(self.actions)}.")
        played = action if self._free_text else self.actions[action]
        observation, reward, terminated, truncated, info = self.env.step(played)
        return self._text(observation), float(reward), bool(terminated), bool(truncated), self._info(info)

    def close(self) -> None:
        self.env.close()

    def _text(self, observation: Any) -> str:
        text = observation if isinstance(observation, str) else self._describe(observation, self.env.unwrapped)
        if not isinstance(text, str):
            raise TypeError(f"`describe` returned {text!r} ({type(text).__name__}), not a str")
        return strip_ansi(text)

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        info = dict(info)
        if self._free_text or "legal_actions" in info:
            return info
        return {**info, "legal_actions": self._allowed(info.get("action_mask")) or list(self.actions)}

    def _allowed(self, mask: Any) -> list[str]:
        """The actions that a mask allows: one over the numbers of a discrete space, whatever they are called."""
        space, mask = self.env.action_space, np.ravel(mask)
        places = {name: place for place, name in enumerate(self.actions)}
        if isinstance(space, Discrete):
            places = {name: number - space.start for name, number in self.actions.items() if number in space}
        if len(mask) != (space.n if isinstance(space, Discrete) else len(places)):
            return []
        return [name for name, place in places.items() if mask[place]]

    def _write_instructions(self, known: str) -> str:
        if self._free_text:
            return f"You play {self.name}.\n{how_to_answer('your action')}"
        rules = RULES.get(known, f"You play {self.name}. Your goal is a high sum of rewards.")
        return f"{rules}\nThe actions are: {', '.join(self.actions)}.\n{how_to_answer('one of the actions')}"


def _make(name: str, kwargs: dict[str, Any]) -> gymnasium.Env:
    try:
        env = gymnasium.make(name, **kwargs)
        if env.render_mode is None and "ansi" in env.metadata.get("render_modes", ()):
            env.close()
            env = gymnasium.make(name, **{**kwargs, "render_mode": "ansi"})
        return env
    except (gymnasium.error.NameNotFound, gymnasium.error.NamespaceNotFound) as error:
        raise unknown_id("Gymnasium", name, gymnasium.registry) from error
    except (gymnasium.error.Error, ImportError) as error:
        known = [id_ for id_ in gymnasium.registry if id_.startswith(name.rpartition("-v")[0])]
        others = f" Registered: {', '.join(known)}." if known else ""
        raise ValueError(f"Gymnasium did not make {name!r}: {error}{others}") from error


def _is_gymnasiums(env: gymnasium.Env) -> bool:
    """Whether it is one of those that we know by name, and not somebody's own that is called so too."""
    suites = ("gymnasium.envs.toy_text.", "gymnasium.envs.classic_control.", "gymnasium.envs.box2d.")
    return any(base.__module__.startswith(suites) for base in type(env).__mro__)


def _named(
    space: gymnasium.Space, actions: Sequence[str] | Mapping[str, Any] | None, name: str, usual: Sequence[str]
) -> dict[str, Any]:
    """The actions by their names."""
    if actions is not None:
        _check_names(actions)
    if isinstance(actions, Mapping):
        return dict(actions)
    if not isinstance(space, Discrete):
        raise ValueError(
            f"{name} has the action space {space}, which has no words. Name the actions that the player may choose "
            "from: actions={'left': ..., 'right': ...}, each with what the environment is given."
        )
    numbers = [int(space.start) + number for number in range(int(space.n))]
    names = list(actions or usual)
    if actions is not None and len(names) != len(numbers):
        raise ValueError(f"actions={actions!r} names {len(names)} actions, but {name} has {len(numbers)}.")
    if len(names) != len(numbers):
        names = [str(number) for number in numbers]
    return dict(zip(names, numbers, strict=True))


def _check_names(actions: Any) -> None:
    """What a player could not tell apart would be played as one."""
    names = actions if isinstance(actions, (Mapping, list, tuple)) else [actions]
    if isinstance(actions, str) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"actions={actions!r}: give a list of names, or a dictionary from names to actions.")
    if len({name.casefold() for name in names}) != len(names):
        raise ValueError(f"actions={actions!r} gives two actions one name: case does not tell them apart.")


def show(observation: Any, env: Any) -> str:
    """The environment as it draws itself in a terminal, where it does, and the numbers of the observation."""
    drawn = env.render() if getattr(env, "render_mode", None) == "ansi" else None
    lines = [strip_ansi(drawn).strip("\n")] if isinstance(drawn, str) else []
    return "\n".join([*lines, f"Observation: {_numbers(observation)}"])


def _numbers(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_numbers(part)}" for key, part in value.items())
    if isinstance(value, tuple):
        return f"({', '.join(_numbers(part) for part in value)})"
    if isinstance(value, (np.ndarray, np.generic)):
        return np.array2string(np.asarray(value), precision=3, separator=", ", suppress_small=True, threshold=100)
    return str(value)


def _describe_lake(observation: Any, env: Any) -> str:
    if env.render_mode != "ansi":
        return show(observation, env)
    return strip_ansi(env.render()).partition("\n")[2].strip("\n")  # the first line repeats the last action


def _describe_cliff(observation: Any, env: Any) -> str:
    return strip_ansi(env.render()).strip("\n") if env.render_mode == "ansi" else show(observation, env)


def _describe_taxi(observation: Any, env: Any) -> str:
    row, column, passenger, destination = (int(part) for part in env.decode(int(observation)))
    places = [f"{name} (row {place[0]}, column {place[1]})" for name, place in zip("RGYB", env.locs, strict=True)]
    grid = "\n".join(b"".join(line).decode() for line in env.desc)
    where = "in the taxi" if passenger == len(places) else f"at {places[passenger]}"
    return (
        f"{grid}\nTaxi: row {row}, column {column}. Passenger: {where}. Destination: {places[destination]}. "
        "Walls are |, a : can be passed."
    )


def _describe_cards(observation: Any, env: Any) -> str:
    own, dealer, usable = observation
    return f"Your sum: {int(own)}{', with a usable ace' if usable else ''}. The dealer shows {int(dealer)}."


_DESCRIPTIONS: dict[str, Callable[[Any, Any], str]] = {
    "FrozenLake": _describe_lake,
    "FrozenLake8x8": _describe_lake,
    "CliffWalking": _describe_cliff,
    "Taxi": _describe_taxi,
    "Blackjack": _describe_cards,
}
