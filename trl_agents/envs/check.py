# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The environment contract as a check that anyone can run on their own environment."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from .make import make_env, show_through


# Far beyond what any model reads at once, and little enough to be tokenised in passing.
MAX_CHARACTERS = 500_000

# Far beyond what any task pays, and little enough for sums of squares in single precision.
MAX_REWARD = 1e15


class _Step(NamedTuple):
    """What the same seed and actions must give again. The first of an episode is what reset() gave."""

    observation: str
    legal_actions: list[str] | None
    action: str | None = None
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False


def check_env(env: str | Callable[[], Any] | Any, *, seed: int = 0, max_steps: int = 1000) -> None:
    """
    Checks that an environment keeps the contract that players and trainers rely on.

    An environment has Gymnasium's API with text: `reset(*, seed=None, options=None)` returns an observation and
    `info`, `step(action)` returns an observation, reward, `terminated`, `truncated` and `info`, observations and
    actions are `str`, and `close()` may be called twice. `instructions` tells the player the task.
    `info["legal_actions"]` lists what may be played next, when that is known. The same seed and actions give the same
    episode, in another instance too.

    The check plays random legal actions. What it plays in an environment without `legal_actions` is a sample of its
    `action_space`, or else `"0"`.

    Args:
        env (`str`, `Callable` or environment):
            An id that is registered with Gymnasium, a class or factory, or an instance, which is closed afterwards.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the episode that is played.
        max_steps (`int`, *optional*, defaults to `1000`):
            Steps after which an episode that has not ended is given up, with a warning.

    Raises:
        `ValueError`: If the contract is broken; the message tells how to mend it.

    Warns:
        `UserWarning`: On what is allowed but doubtful: no `legal_actions`, an episode that does not end.

    Example:

    ```python
    >>> from trl_agents import check_env

    >>> check_env("trl_agents/Bandit-v0")
    ```
    """
    can_make = isinstance(env, str) or inspect.isclass(env) or (callable(env) and not hasattr(env, "reset"))
    first = _make(env) if can_make else show_through(env)
    _check_signatures(first)
    _check_kind(first, _call("reset() without a seed", first.reset))

    episode = list(_play(first, seed, max_steps))
    _check_instructions(first)
    _check_doubtful(episode, max_steps)

    actions = [step.action for step in episode[1:]]
    _check_same(episode, _play(first, seed, max_steps, actions), f"seed {seed}, played again")
    instances = [first]
    if can_make:
        # Trainers play the episodes of one seed side by side, so here two instances take turns: one that draws from a
        # global generator repeats its episode when it is played alone.
        instances.append(_make(env))
        _require(
            innermost(instances[1]) is not innermost(first),
            "The factory gave the same environment twice. Let it make a new one at each call, as a class does: "
            "episodes are played side by side.",
        )
        rows = zip(*(_play(instance, seed, max_steps, actions) for instance in instances), strict=False)
        for replay in zip(*rows, strict=False):
            _check_same(episode, replay, f"seed {seed}, played in two instances side by side")

    for instance in instances:
        _call("close()", instance.close)
        _call("close(), called a second time,", instance.close)


def _make(env: str | Callable[[], Any]) -> Any:
    try:
        return make_env(env)
    except ValueError:  # which `make_env` explains itself
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"The environment could not be made: {type(error).__name__}: {error}. If it needs arguments, pass "
            "`functools.partial(Class, argument=...)` here, and them as `env_kwargs` to the trainer; else let its "
            "constructor not fail."
        ) from error


def innermost(env: Any) -> Any:
    """What wrappers and adapters play in."""
    while isinstance(inner := getattr(env, "env", None), gymnasium.Env):
        env = inner
    return env


def _check_kind(env: Any, result: Any) -> None:
    """An environment of Gymnasium's that is no text wants describing, not another `reset`."""
    if isinstance(env, gymnasium.Env) and isinstance(result, tuple) and not isinstance(result[0], str):
        name = env.spec.id if env.spec else "..."
        raise ValueError(
            f"reset() returned the observation {brief(result[0])}, which is no text. Play the environment as "
            f"'gymnasium:{name}', or wrap it: trl_agents.envs.adapters.GymnasiumEnvironment(env, describe=...)."
        )


def _check_signatures(env: Any) -> None:
    if callable(getattr(env, "reset", None)) and not hasattr(env, "step"):
        raise ValueError(
            f"{type(env).__name__} has `reset` and no `step`. If it is an environment as TRL's `environment_factory` "
            "takes it, whose methods are tools, pass trl_agents.envs.adapters.ToolEnvironment(...); else define `def "
            "step(self, action)`."
        )
    forms = {
        "reset": ("reset(self, *, seed=None, options=None)", (), {"seed": 0, "options": None}),
        "step": ("step(self, action)", ("action",), {}),
        "close": ("close(self)", (), {}),
    }
    for name, (form, args, kwargs) in forms.items():
        method = getattr(env, name, None)
        _require(callable(method), f"{type(env).__name__} has no method `{name}`. Define `def {form}`.")
        try:
            inspect.signature(method).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"`{name}` cannot be called as `{form}`: {error}. Change its signature.") from error


def _check_instructions(env: Any) -> None:
    instructions = getattr(env, "instructions", None)
    _require(
        isinstance(instructions, str) and instructions.strip(),
        f"`instructions` is {instructions!r}. Set it to the text that tells the player the task and how to answer.",
    )
    _check_length("`instructions` is a text", instructions)
    for name in ("question", "history_header"):
        text = getattr(env, name, "")
        _require(isinstance(text, str), f"`{name}` is {text!r}. Make it a str, or leave it out.")


def _play(env: Any, seed: int, max_steps: int, actions: list[str] | None = None) -> Iterator[_Step]:
    """Plays an episode and checks every value. Repeats `actions` if given, else chooses at random."""
    rng = random.Random(seed)
    if actions is None and isinstance(getattr(env, "action_space", None), gymnasium.Space):
        env.action_space.seed(seed)

    result = _call(f"reset(seed={seed})", env.reset, seed=seed)
    _require(
        isinstance(result, tuple) and len(result) == 2,
        f"reset() returned {brief(result)}. Return the tuple `(observation, info)`.",
    )
    observation, info = result
    legal_actions = _check_text("reset()", observation, info, ended=False)
    yield _Step(observation, legal_actions)

    for step in range(max_steps if actions is None else len(actions)):
        if actions is not None:
            action = actions[step]
        else:
            action = _free_action(env) if legal_actions is None else rng.choice(legal_actions)
        call = f"step({action!r})"
        handed_out = info.get("legal_actions")
        result = _call(call, env.step, action)
        _require(
            isinstance(result, tuple) and len(result) == 5,
            f"{call} returned {brief(result)}. Return `(observation, reward, terminated, truncated, info)`.",
        )
        _require(
            handed_out == legal_actions,
            f"{call} changed the list that the call before it gave as `info['legal_actions']`. Give a new list each "
            "time: players keep the old ones.",
        )
        observation, reward, terminated, truncated, info = result
        _require(
            isinstance(reward, Real) and not isinstance(reward, bool) and abs(reward) <= MAX_REWARD,
            f"{call} returned the reward {brief(reward)}. Return a finite float, up to {MAX_REWARD:g}.",
        )
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            _require(isinstance(flag, (bool, np.bool_)), f"{call} returned {name}={brief(flag)}. Return a bool.")
        ended = bool(terminated or truncated)
        legal_actions = _check_text(call, observation, info, ended)
        yield _Step(observation, legal_actions, action, float(reward), bool(terminated), bool(truncated))
        if ended:
            return


def _check_text(call: str, observation: Any, info: Any, ended: bool) -> list[str] | None:
    """Returns a copy of the legal actions, or None when the environment does not tell them."""
    _require(
        isinstance(observation, str),
        f"{call} returned the observation {brief(observation)}. Return a str; what is not text goes into `info`.",
    )
    _check_length(f"{call} returned an observation", observation)
    _require(isinstance(info, dict), f"{call} returned {brief(info)} as `info`. Return a dict.")
    for name in ("state", "transition", "instructions"):
        _require(
            isinstance(info.get(name, ""), str),
            f"{call} gave `info[{name!r}]` as {brief(info.get(name))}. It goes into what a model reads: give a str, "
            "or leave the key out.",
        )
        _check_length(f"{call} gave `info[{name!r}]`", info.get(name, ""))
    if "legal_actions" not in info:
        return None
    legal_actions = info["legal_actions"]
    _require(
        isinstance(legal_actions, list) and all(isinstance(action, str) for action in legal_actions),
        f"{call} gave `info['legal_actions']` as {brief(legal_actions)}. Give a list of str, or leave "
        "the key out if they are not known.",
    )
    _require(
        legal_actions or ended,
        f"{call} gave no legal action in an episode that goes on. End the episode there, or leave the key out if they "
        "are not known.",
    )
    for action in legal_actions:
        _require(
            action and action == action.strip(),
            f"{call} gave the legal action {action!r}. Give it a name without spaces at its ends: these are stripped "
            "from what a model writes.",
        )
    _require(
        len({action.casefold() for action in legal_actions}) == len(legal_actions),
        f"{call} gave legal actions that are the same but for case: {brief(legal_actions)}. Give each its own name: "
        "what a model writes is compared without regard to case.",
    )
    return list(legal_actions)


def _check_length(what: str, text: str) -> None:
    _require(
        len(text) <= MAX_CHARACTERS,
        f"{what} of {len(text):,} characters, where {MAX_CHARACTERS:,} are the most. Show what matters of it.",
    )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} that cannot be encoded ({error.reason}), as tokenizers must. Decode bytes with "
            "`errors='replace'`."
        ) from None


def _check_doubtful(episode: list[_Step], max_steps: int) -> None:
    last = episode[-1]
    if not (last.terminated or last.truncated):
        warnings.warn(
            f"The episode did not end within {max_steps} random steps. Make sure that it can end, or limit the turns "
            "of its players.",
            stacklevel=3,
        )
    unknown = sum(step.legal_actions is None for step in episode[:-1])
    if unknown:
        warnings.warn(
            f"`info['legal_actions']` is missing in {unknown} of {len(episode) - 1} steps. Without it no random "
            "action can stand in for an invalid answer, and scripted players cannot play.",
            stacklevel=3,
        )


def _check_same(episode: Iterable[_Step], replay: Iterable[_Step], how: str) -> None:
    for number, (before, now) in enumerate(zip(episode, replay, strict=False)):
        for name, old, new in zip(_Step._fields, before, now, strict=True):
            _require(
                old == new,
                f"With {how}, the same actions gave another {name} after {number} steps: {brief(new)} instead of "
                f"{brief(old)}. Draw all randomness from a generator of the instance that reset(seed=...) seeds, "
                "such as `self.np_random` after `super().reset(seed=seed)`, and let reset() clear what the last "
                "episode left.",
            )


def _free_action(env: Any) -> str:
    space = getattr(env, "action_space", None)
    action = space.sample() if isinstance(space, gymnasium.Space) else "0"
    _require(isinstance(action, str), f"`action_space` samples {brief(action)}. Actions are str: use a Text space.")
    return action


def _call(call: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:
        try:
            told = f": {error}"
        except Exception:
            told = ", which cannot be shown"
        raise ValueError(f"{call} raised {type(error).__name__}{told}. It must not fail.") from error


def _require(holds: Any, message: str) -> None:
    if not holds:
        raise ValueError(message)


def brief(value: Any) -> str:
    """A value of an environment's in an error."""
    try:
        text = repr(value)
    except Exception:  # even this is the environment's own code
        text = "something that cannot be shown"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
