# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Greediness: does a player stop to explore too soon? Measured on episodes, whoever played them.

In place of an invalid reply the environment is given a random action, which adds exploration that the player did not
choose. So all of this is to be read beside the rate of invalid replies, and `chosen_coverage` leaves such actions out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..tables import MEASURES as OF_EPISODES
from ..tables import interval
from ..types import Trajectory, Turn


def _actions(trajectory: Trajectory) -> list[str] | None:
    """The legal actions, None where they change: what is a share of them would mean nothing."""
    legal = trajectory.reset_info.get("legal_actions")
    if not legal or any(turn.info.get("legal_actions", legal) != legal for turn in trajectory.turns):
        return None
    return list(legal)


def _steps(trajectory: Trajectory) -> list[Turn]:
    return [turn for turn in trajectory.turns if turn.executed is not None]


def coverage_by_step(trajectory: Trajectory) -> list[float] | None:
    r"""
    Share of the actions that were played at least once, after each step:

    $$ C_t = |\{a: N_t(a) > 0\}| / K $$

    from [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078), section 4.2.
    """
    legal = _actions(trajectory)
    if legal is None:
        return None
    seen: set[str] = set()
    curve = []
    for turn in _steps(trajectory):
        seen.add(turn.executed)
        curve.append(len(seen & set(legal)) / len(legal))
    return curve


def chosen_coverage(trajectory: Trajectory) -> float | None:
    """Share of the actions that the player itself stated at least once."""
    legal = _actions(trajectory)
    if legal is None:
        return None
    stated = {turn.parsed.action for turn in _steps(trajectory) if not turn.forced}
    return len(stated & set(legal)) / len(legal)


def min_fraction(trajectory: Trajectory) -> float | None:
    r"""
    How often the rarest action was played, \\( K \min_a N_T(a) / T \\): 1 if all alike, 0 if one never was. From
    [Can large language models explore in-context?](https://huggingface.co/papers/2403.15371).
    """
    legal, played = _actions(trajectory), [turn.executed for turn in _steps(trajectory)]
    if legal is None or not played:
        return None
    return len(legal) * min(played.count(action) for action in legal) / len(played)


def suffix_failure(trajectory: Trajectory) -> float | None:
    """Whether the best action is never played in the second half, from step T/2 on (the same paper's SuffFailFreq)."""
    optimal = [turn.info.get("optimal") for turn in _steps(trajectory)]
    if not optimal or None in optimal:
        return None
    return float(not any(optimal[len(optimal) // 2 :]))


def greedy_fraction(trajectory: Trajectory) -> float | None:
    """
    Share of the steps at which an action with the highest mean reward so far was played (the same paper's GreedyFrac).
    The first step is left out, and so are steps at which no legal action had been tried.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    choices = []
    legal = trajectory.reset_info.get("legal_actions", ())
    for turn in _steps(trajectory):
        tried = [action for action in counts if action in legal]
        if tried:
            choices.append(turn.executed in best_of({action: sums[action] / counts[action] for action in tried}))
        sums[turn.executed] = sums.get(turn.executed, 0.0) + turn.reward
        counts[turn.executed] = counts.get(turn.executed, 0) + 1
        legal = turn.info.get("legal_actions", legal)
    return float(np.mean(choices)) if choices else None


def optimal_share(trajectory: Trajectory) -> float | None:
    """Share of the steps at which the best action was played, where the environment tells."""
    optimal = [turn.info.get("optimal") for turn in _steps(trajectory)]
    return None if not optimal or None in optimal else float(np.mean(optimal))


def best_of(values: Mapping[str, float]) -> set[str]:
    """The keys of the highest value: all of them, where several share it. NaN is no value."""
    known = {key: value for key, value in values.items() if value == value}
    if not known:
        return set()
    top = max(known.values())
    # Means of the same rewards in another order may differ in the last digit
    return {key for key, value in known.items() if math.isclose(value, top, rel_tol=1e-12, abs_tol=1e-12)}


MEASURES: dict[str, Callable[[Trajectory], float | None]] = {
    "coverage": OF_EPISODES["coverage"],
    "chosen_coverage": chosen_coverage,
    "min_fraction": min_fraction,
    "greedy_fraction": greedy_fraction,
    "suffix_failure": suffix_failure,
    "optimal_share": optimal_share,
    **{name: OF_EPISODES[name] for name in ("regret", "return", "invalid_rate", "shortened")},
}


def greediness(played: Mapping[str, Sequence[Trajectory]]) -> dict[str, Any]:
    """
    How greedily each player played.

    Args:
        played (`Mapping[str, Sequence[Trajectory]]`):
            Episodes of each player, from the same seeds. Those whose environment failed are left out.

    Returns:
        `dict`: `measures`, measure -> player -> mean, low and high (a measure that the environment does not allow is
        missing); `coverage_by_step`, player -> lists of mean, low and high, over the episodes that reach the step; and
        `n_episodes`, of the first player.
    """
    healthy = {player: [t for t in episodes if not t.stop.is_fault] for player, episodes in played.items()}
    measures: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    for player, episodes in healthy.items():
        for name, of in MEASURES.items():
            values = [value for episode in episodes if (value := of(episode)) is not None]
            if values:
                measures.setdefault(name, {})[player] = asdict(interval(values))
        rows = [curve for episode in episodes if (curve := coverage_by_step(episode))]
        if rows:
            steps = range(max(map(len, rows)))
            curves[player] = intervals([[row[step] for row in rows if len(row) > step] for step in steps])
    in_order = {name: measures[name] for name in MEASURES if name in measures}
    return {"measures": in_order, "coverage_by_step": curves, "n_episodes": len(next(iter(healthy.values()), []))}


def intervals(columns: Sequence[Sequence[float]]) -> dict[str, list[float | None]]:
    """Mean, low and high of each column, as three lists; None where a column is empty."""
    found = [asdict(interval(column)) if len(column) else None for column in columns]
    return {key: [value and value[key] for value in found] for key in ("mean", "low", "high")}
