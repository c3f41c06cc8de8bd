# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Ways to make a player explore: the mechanisms of [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078),
section 4.4 and appendix B.4. Each is a small piece that the rollout asks at fixed points, in training and in
evaluation alike, and several can be used together:

    make_exploration(["try_all", "context_summary"])
    make_exploration("epsilon_greedy=0.1")

What differs from the paper: its self-correction message and its templates are not given, so the words here are our
own; an exploration bonus is paid for actions that the model stated, not for those that were played in place of an
invalid one, which would pay it for being invalid.
"""

from __future__ import annotations

import inspect
import random
from abc import ABC
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .contexts import format_reward
from .envs.names import close_to
from .types import ParsedAction


@dataclass(frozen=True, slots=True)
class Past:
    """What an episode has seen so far: the actions that are legal now, those that were played, what each brought."""

    legal_actions: tuple[str, ...]
    actions: tuple[str, ...] = ()
    rewards: tuple[float, ...] = ()

    @property
    def untried(self) -> list[str]:
        """Legal actions that were not played yet, in the environment's order."""
        return [action for action in self.legal_actions if action not in self.actions]


class Mechanism(ABC):  # noqa: B024 - every hook has a default
    """One way to explore. A hook that is not overridden changes nothing."""

    env_kwargs: Mapping[str, Any] = {}  # arguments of the environment it needs
    max_new_tokens: int | None = None  # most tokens of a reply, if fewer than allowed otherwise
    n_samples: int = 1  # replies that vote on each action
    correction: str | None = None  # said after a first reply, before the one that counts
    needs_window = False  # whether what was read must be rendered anew each turn
    needs_actions = False  # whether the environment must list the legal actions
    needs_same_actions = False  # whether it must, and they stay the same all episode long

    def force(self, past: Past, rng: random.Random) -> tuple[str, str] | None:
        """
        An action that is played without asking the model, and the thought that is written down before it, in which
        `{action}` stands for what the action is called.
        """
        return None

    def note(self, past: Past) -> str:
        """What is shown behind the history."""
        return ""

    def relabel(self, past: Past, rng: random.Random) -> dict[str, str] | None:
        """What each action is called at this turn: by its own or another's name."""
        return None

    def bonus(self, past: Past, action: str) -> float:
        """Added in training to the reward of `action`, after normalisation."""
        return 0.0

    def __str__(self) -> str:
        """As a configuration names it; one of your own by its class."""
        name = next((name for name, known in MECHANISMS.items() if known is type(self)), type(self).__name__)
        given = {name: parameter.default for name, parameter in inspect.signature(type(self)).parameters.items()}
        values = [str(value) for value in vars(self).values() if value not in given.values()]
        return "=".join([name, *values])


class TryAll(Mechanism):
    """Plays each action once, in order, before the model may choose: UCB's infinite bonus."""

    needs_same_actions = True

    def force(self, past: Past, rng: random.Random) -> tuple[str, str] | None:
        if not past.untried:
            return None
        action = past.untried[0]
        return action, "Action {action} has not been tried yet, so let us explore it."


class EpsilonGreedy(Mechanism):
    """
    Plays a random legal action now and then.

    Args:
        epsilon (`float`, *optional*, defaults to `0.1`):
            Probability of doing so at a turn; the paper's best.
    """

    needs_actions = True

    def __init__(self, epsilon: float = 0.1):
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"epsilon={epsilon} is a probability: give a number between 0 and 1.")
        self.epsilon = epsilon

    def force(self, past: Past, rng: random.Random) -> tuple[str, str] | None:
        if rng.random() >= self.epsilon:
            return None
        action = rng.choice(past.legal_actions)
        return action, "Let us explore by playing {action}, whatever its rewards were."


class ContextRandomization(Mechanism):
    """
    Calls the actions by each other's names, drawn anew at every turn: a liking for a name cannot become one for an
    action. The history's `Action=X` are renamed, the reply's action is named back. Needs a windowed context, and
    actions that stay the same all episode. Episodes that were played so are nothing for `episodes.training_rows`: it
    would have the replies learnt under the actions' own names.
    """

    needs_window = needs_same_actions = True

    def relabel(self, past: Past, rng: random.Random) -> dict[str, str] | None:
        actions = list(dict.fromkeys(past.legal_actions))
        return dict(zip(actions, rng.sample(actions, len(actions)), strict=True))


class ContextSummary(Mechanism):
    """Shows behind the history how often each action was played and what it brought on average."""

    needs_actions = True

    def note(self, past: Past) -> str:
        lines = []
        if not past.legal_actions:  # a truncated episode's last words need no list
            return ""
        for action in past.legal_actions:
            rewards = [reward for played, reward in zip(past.actions, past.rewards, strict=True) if played == action]
            mean = format_reward(sum(rewards) / len(rewards)) if rewards else "unknown"
            lines.append(f"Action={action} Count={len(rewards)} Mean={mean}")
        return "\n".join(["In summary:", *lines])


class SelfCorrection(Mechanism):
    """
    Lets the model look at its reply and answer again; only the second reply is played and trained on.

    Args:
        message (`str`, *optional*):
            What is said between the two.
    """

    MESSAGE = (
        "Look at your answer again: check its reasoning for mistakes, and whether there are actions that are worth "
        "trying. Then give your final answer in the same form."
    )

    def __init__(self, message: str = MESSAGE):
        if not message:
            raise ValueError("message='' would ask nothing between the two replies: give a text.")
        self.correction = message


class SelfConsistency(Mechanism):
    """
    Samples several replies and plays the action that most of them state, by the first that states it.

    Args:
        n_samples (`int`, *optional*, defaults to `16`):
            Number of replies at each turn.
    """

    def __init__(self, n_samples: int = 16):
        n_samples = _whole("n_samples", n_samples, at_least=2)
        self.n_samples = n_samples


class ExplorationBonus(Mechanism):
    """
    Pays, in training, for an action that the model states and the episode has not tried yet.

    Args:
        size (`float`, *optional*, defaults to `1.0`):
            Added to the turn's normalised reward.
    """

    needs_same_actions = True

    def __init__(self, size: float = 1.0):
        if not 0 < size < float("inf"):
            raise ValueError(f"size={size!r}: give a positive number.")
        self.size = size

    def bonus(self, past: Past, action: str) -> float:
        return self.size if action in past.untried else 0.0


class ThinkingBudget(Mechanism):
    """
    Limits the tokens of a reply.

    Args:
        max_new_tokens (`int`):
            G in the paper: 16 and 64 were found to be poor, 512 the best.
    """

    def __init__(self, max_new_tokens: int):
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens, at_least=1)


class NoReasoning(Mechanism):
    """
    Asks for the action alone, in environments with the argument `reasoning`.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Limit of a reply; the paper's.
    """

    env_kwargs = {"reasoning": False}

    def __init__(self, max_new_tokens: int = 16):
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens, at_least=1)


MECHANISMS: dict[str, Callable[..., Mechanism]] = {
    "try_all": TryAll,
    "epsilon_greedy": EpsilonGreedy,
    "context_randomization": ContextRandomization,
    "context_summary": ContextSummary,
    "self_correction": SelfCorrection,
    "self_consistency": SelfConsistency,
    "exploration_bonus": ExplorationBonus,
    "thinking_budget": ThinkingBudget,
    "no_reasoning": NoReasoning,
}


class Exploration:
    """
    Mechanisms that are used together; where two would do the same, the first that has something to say does.

    Args:
        mechanisms (`Sequence[Mechanism]`, *optional*):
            None of them leaves the player as it is.
    """

    def __init__(self, mechanisms: Sequence[Mechanism] = ()):
        self.mechanisms = tuple(mechanisms)
        budgets = [mechanism.max_new_tokens for mechanism in mechanisms if mechanism.max_new_tokens]
        self.max_new_tokens = min(budgets, default=None)
        self.n_samples = max((mechanism.n_samples for mechanism in mechanisms), default=1)
        self.correction = next((mechanism.correction for mechanism in mechanisms if mechanism.correction), None)
        self.needs_same_actions = ", ".join(str(each) for each in mechanisms if each.needs_same_actions)
        choosing = (each for each in mechanisms if each.needs_actions or each.needs_same_actions)
        self.needs_actions = ", ".join(map(str, choosing))
        self.env_kwargs = {name: value for each in mechanisms for name, value in each.env_kwargs.items()}
        self.names = [str(mechanism) for mechanism in mechanisms]
        if self.n_samples > 1 and self.correction:
            raise ValueError("self_consistency and self_correction both decide which reply counts: use one of them.")

    def __bool__(self) -> bool:
        return bool(self.mechanisms)

    def check_context(self, context: str) -> None:
        """Raises if a mechanism cannot work with what the model reads (`"chat"` or `"window"`)."""
        stuck = [str(mechanism) for mechanism in self.mechanisms if mechanism.needs_window]
        if stuck and context != "window":
            raise ValueError(
                f"{stuck[0]} renders the history anew at every turn, and context={context!r} keeps it as it was "
                "read: use context='window'."
            )

    def check_actions(self, at_reset: Sequence[str] | None, now: Sequence[str] | None) -> None:
        """
        Raises if a mechanism cannot work with the legal actions of a turn: there are none, or others than when the
        episode began.
        """
        if self.needs_actions and not now:
            raise ValueError(
                f"exploration={self.needs_actions} works with the legal actions, and this environment lists none: "
                "leave it out, or let the environment list them in info['legal_actions'], at `reset` and at every "
                "`step`."
            )
        if self.needs_same_actions and now != at_reset:
            raise ValueError(
                f"exploration={self.needs_same_actions} needs legal actions that stay the same all episode long, and "
                "this environment's change from turn to turn: leave it out, or let the environment list all actions "
                "at every turn."
            )

    def force(self, past: Past, rng: random.Random) -> tuple[str, str] | None:
        return next((forced for each in self.mechanisms if (forced := each.force(past, rng))), None)

    def note(self, past: Past) -> str:
        return "\n".join(note for mechanism in self.mechanisms if (note := mechanism.note(past)))

    def relabel(self, past: Past, rng: random.Random) -> dict[str, str] | None:
        return next((names for each in self.mechanisms if (names := each.relabel(past, rng))), None)

    def bonus(self, past: Past, action: str) -> float:
        return sum(mechanism.bonus(past, action) for mechanism in self.mechanisms)


def make_exploration(names: str | Sequence[str | Mechanism] | Exploration | None) -> Exploration:
    """
    The mechanisms that a configuration names: `"try_all"`, or with its argument `"epsilon_greedy=0.1"`; several of
    them as a list.
    """
    if isinstance(names, Exploration):
        return names
    if names is not None and not isinstance(names, (str, Mechanism, list, tuple)):
        raise ValueError(f"exploration={names!r}: give the names of mechanisms, {', '.join(MECHANISMS)}.")
    names = [names] if isinstance(names, (str, Mechanism)) else list(names or [])
    for name in names:
        if not isinstance(name, (str, Mechanism)):
            raise ValueError(f"exploration={name!r} is no mechanism: choose of {', '.join(MECHANISMS)}.")
    return Exploration([name if isinstance(name, Mechanism) else _make(name) for name in names])


def mechanism_names(names: str | Sequence[str | Mechanism] | Exploration | None) -> list[str]:
    """What [`make_exploration`] takes, as a file can hold it: names as they were given, objects by their own."""
    given = names.mechanisms if isinstance(names, Exploration) else names
    return [str(one) for one in ([given] if isinstance(given, (str, Mechanism)) else given or ())]


def _make(spec: str) -> Mechanism:
    name, given, value = spec.partition("=")
    if name not in MECHANISMS:
        hint = close_to(name, MECHANISMS)
        raise ValueError(f"exploration={spec!r} is unknown: choose of {', '.join(MECHANISMS)}.{hint}")
    try:
        if not given:
            return MECHANISMS[name]()
        return MECHANISMS[name](value if name == "self_correction" else float(value))
    except TypeError:
        raise ValueError(
            f"exploration={spec!r}: {name} takes no value."
            if given
            else f"exploration={spec!r} needs a value, for example {name}=64."
        ) from None
    except ValueError as error:
        raise ValueError(f"exploration={spec!r}: {error}") from None


def name_back(parsed: ParsedAction, names: Mapping[str, str]) -> ParsedAction:
    """The action that a reply means, given what the actions were called."""
    if parsed.action is None:
        return parsed
    meant = {name: action for action, name in names.items()}
    return ParsedAction(meant[parsed.action], parsed.reason, parsed.matched)


def vote(replies: Sequence[ParsedAction]) -> int:
    """The number of the reply that counts: the first that states the action stated most, or 0 if none states one."""
    counts = Counter(reply.action for reply in replies if reply.is_valid)
    if not counts:
        return 0
    (winner, _), *_ = counts.most_common(1)
    return next(number for number, reply in enumerate(replies) if reply.action == winner)


def _whole(name: str, value: float, at_least: int) -> int:
    if not float(value).is_integer() or value < at_least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {at_least}.")
    return int(value)
