# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Frequency bias: does a player repeat what it reads often, whatever it was worth? After [LLMs are Greedy
Agents](https://huggingface.co/papers/2504.16078), section 4.2 and appendix C.1.2.

A random player's history of 2 to 10 steps is continued by its own last step, 0 to 100 times more, and the player is
asked for its next action each time. The actions fall into three categories by what it reads:

- greedy: the highest mean reward among the actions that were tried,
- frequent: played most often. An action that is both counts as greedy, so a frequent one is always a worse one,
- other: the rest.

What differs from the paper: an answer is scored directly after the assistant's opening, without a reasoning before
it (the paper does not say how it had models with reasoning scored), and `invalid_rate` tells how much probability is
not on any such answer; a choice between equally probable actions counts as a part of each.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import pearsonr
from tqdm.auto import tqdm

from ..contexts import last
from ..tables import interval
from .greediness import best_of, intervals
from .histories import History, NotMeasurable, random_histories


CATEGORIES = ("frequent", "greedy", "other")


def categories(actions: Sequence[str], rewards: Sequence[float], legal_actions: Sequence[str]) -> dict[str, str]:
    """Which category each of `legal_actions` is in, for what was played and what it brought."""
    counts, sums = Counter(actions), Counter()
    for action, reward in zip(actions, rewards, strict=True):
        sums[action] += reward
    greedy = best_of({action: sums[action] / counts[action] for action in legal_actions if counts[action]})
    frequent = best_of({action: float(counts[action]) for action in legal_actions if counts[action]})
    return {
        action: "greedy" if action in greedy else "frequent" if action in frequent else "other"
        for action in legal_actions
    }


def entropy(probabilities: np.ndarray) -> np.ndarray:
    r"""\\( H = -\sum_a \pi_a \ln \pi_a \\) in nats, over the last axis."""
    probabilities = np.asarray(probabilities, dtype=float)
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -(probabilities * logs).sum(-1) + 0.0


def choices(probabilities: np.ndarray) -> np.ndarray:
    """The most probable action, as weights that sum to 1: where several are equally probable, a part of each."""
    top = probabilities.max(-1, keepdims=True)
    chosen = (probabilities >= top * (1 - 1e-9)).astype(float)
    return np.where(np.isnan(top), np.nan, chosen / chosen.sum(-1, keepdims=True).clip(min=1.0))


def windows(n_repetitions: int) -> dict[str, slice]:
    """The first, the middle and the last tenth of the repetitions: 0-10, 45-55 and 90-100 of a hundred."""
    ends = [(start * n_repetitions // 100, -(-end * n_repetitions // 100)) for start, end in _TENTHS]
    return {f"{first}-{final}": slice(first, final + 1) for first, final in ends}


_TENTHS = ((0, 10), (45, 55), (90, 100))


def frequency_bias(
    player: Any,
    factory: Callable[[], Any],
    seeds: Sequence[int],
    *,
    n_targets: int = 5,
    n_repetitions: int = 100,
    lengths: tuple[int, int] = (2, 10),
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, float]]:
    """
    Ask a player again and again while one step repeats itself.

    Args:
        player ([`ModelPlayer`], [`AgentPlayer`] or [`TextPlayer`]):
            Who is asked.
        factory (`Callable`):
            Makes the environment.
        seeds (`Sequence[int]`):
            What it is reset with, a history each: 25 for 5 of each of 5 target actions.
        n_targets, lengths, seed:
            As for [`random_histories`].
        n_repetitions (`int`, *optional*, defaults to `100`):
            Most repetitions; fewer, with a warning, where the model has no positions for so many.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `tuple[dict, dict]`: what was measured (entropies and categories by repetition and window, each a mean over
        histories with its interval) and the interval of the probability that was on no action.

    Raises:
        `NotMeasurable`: if the environment or the model cannot be asked so.
    """
    if n_repetitions < 1:
        raise ValueError(f"n_repetitions={n_repetitions!r}: give 1 or more.")
    started, cost = time.perf_counter(), player.cost
    histories = random_histories(factory, seeds, n_targets=n_targets, lengths=lengths, seed=seed)
    rows = [
        player.probabilities(history, n_repetitions)
        for history in tqdm(histories, desc="Frequency bias", unit="history", leave=False, disable=not progress)
    ]
    fitting = min(len(stated) for _, stated in rows) - 1
    if fitting < 1:
        raise NotMeasurable("the model has no positions for the instructions and a history: use one with more")
    if fitting < n_repetitions:
        warnings.warn(
            f"Only {fitting} of {n_repetitions} repetitions fit the model's positions: frequency bias is measured up "
            "to there. Use a model with more positions.",
            stacklevel=2,
        )
    probabilities = np.stack([row[: fitting + 1] for row, _ in rows])  # (H, R + 1, K)
    stated = np.stack([row[: fitting + 1] for _, row in rows])  # (H, R + 1)
    if np.isnan(probabilities).all():
        raise NotMeasurable("no reply stated an action")
    window = player.context.window if hasattr(player, "context") and not player.context.appends else None
    members = np.stack([_membership(history, fitting, window) for history in histories])  # (H, R + 1, K, 3)
    measured = summarize_bias(probabilities, members)
    before = asdict(cost)
    taken = {key: after - before[key] for key, after in asdict(player.cost).items()}
    taken = taken if any(taken.values()) else {}  # nothing to tell of a player without a model
    measured |= {"n_histories": len(histories), **taken, "seconds": time.perf_counter() - started}
    return measured, asdict(interval((1 - stated.mean(1)).clip(0.0, 1.0)))


def summarize_bias(probabilities: np.ndarray, members: np.ndarray) -> dict[str, Any]:
    """
    The figures of the protocol.

    Args:
        probabilities (`np.ndarray`):
            `(n_histories, n_repetitions + 1, n_actions)`; NaN where the player stated none.
        members (`np.ndarray`):
            `(..., 3)`: whether each action is frequent, greedy or other.
    """
    n_repetitions = probabilities.shape[1] - 1
    entropies = entropy(probabilities)  # (H, R + 1)
    chosen = np.einsum("hrk,hrkc->hrc", choices(probabilities), members)
    mass = np.einsum("hrk,hrkc->hrc", probabilities, members)
    repetitions = np.broadcast_to(np.arange(n_repetitions + 1), entropies.shape)
    known = ~np.isnan(entropies)
    constant = np.ptp(entropies[known]) < 1e-9 or np.ptp(repetitions[known]) == 0
    shares, ranges = {}, {}
    for name, place in windows(n_repetitions).items():
        own = chosen[:, place].reshape(len(chosen), -1, len(CATEGORIES))
        if not np.isnan(own).all():
            shares[name] = dict(zip(CATEGORIES, np.nanmean(own, axis=(0, 1)).tolist(), strict=True))
            by_history = [history[~np.isnan(history[:, 0])].mean(0) for history in own if not np.isnan(history).all()]
            ranges[name] = {
                category: asdict(interval(values))
                for category, values in zip(CATEGORIES, np.array(by_history).T, strict=True)
            }
    return {
        "repetitions": list(range(n_repetitions + 1)),
        "entropy": intervals([column[~np.isnan(column)] for column in entropies.T]),
        "max_entropy": float(np.log(probabilities.shape[-1])),
        "correlation": None if constant else float(pearsonr(repetitions[known], entropies[known]).statistic),
        "windows": shares,
        "window_intervals": ranges,
        "mean_probability": {
            category: [_mean(mass[:, place, number]) for place in range(n_repetitions + 1)]
            for number, category in enumerate(CATEGORIES)
        },
    }


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _membership(history: History, n_repetitions: int, window: int | None) -> np.ndarray:
    """Which category each action is in after each number of repetitions, by what is read then: `(R + 1, K, 3)`."""
    legal, rows = history.legal_actions, []
    steps = history.repeated(n_repetitions).transitions
    for end in range(len(history.transitions), len(steps) + 1):
        read = last(steps[:end], window)
        of = categories([step.action for step in read], [step.reward for step in read], legal)
        rows.append([[of[action] == category for category in CATEGORIES] for action in legal])
    return np.array(rows, dtype=float)
