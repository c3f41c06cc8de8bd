# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What episodes and answers measure, in tables: means with their intervals, games by opponent and seat."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import bootstrap

from .rollout.metrics import coverage, regret
from .types import StopReason, Trajectory


# What is measured of an episode, by the name it has in tables and `metrics.json`.
MEASURES: dict[str, Callable[[Trajectory], float | None]] = {
    "return": lambda trajectory: trajectory.return_,
    "regret": regret,
    "coverage": coverage,
    "invalid_rate": lambda trajectory: _share(not turn.parsed.is_valid for turn in trajectory.turns),
    "shortened": lambda trajectory: float(trajectory.stop in SHORTENED),
}

# Ends that neither the environment's rules nor its time limit brought about: steps of the episode were not played.
SHORTENED = (StopReason.MAX_TURNS, StopReason.CONTEXT_FULL, StopReason.INVALID_ACTION)


@dataclass(frozen=True)
class Interval:
    """A mean over episodes and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    __repr__ = __str__  # tables are dictionaries, which print their values by it


@dataclass(frozen=True)
class Score(Interval):
    """The mean return of games with its interval, and the shares of games that were won, drawn and lost."""

    win: float
    draw: float
    loss: float


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean with its percentile-bootstrap interval (9,999 resamples, always the same ones)."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("No episode to take a mean of.")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    result = bootstrap((values,), np.mean, confidence_level=confidence, method="percentile", rng=0)
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def summarize(
    played: Mapping[str, Sequence[Trajectory]],
    more: Mapping[str, Callable[[Trajectory], float | None]] | None = None,
) -> dict[str, dict[str, Interval]]:
    """
    Table of measures: measure -> player -> [`Interval`]. Episodes whose environment failed are left out, measures that
    no episode has too.

    An episode that was cut short (`max_turns`, a full context, an end by invalid actions) counts with the steps it
    had: its regret is smaller than a whole one's, which flatters a player that fails early. To leave it out would
    flatter too, as the episodes that went wrong would be gone. So `shortened` is the share of such episodes, and a
    warning says it aloud: compare regrets, returns and coverage only of players for whom it is 0, or all of whose
    episodes ended at the same `max_turns`.

    Args:
        played (`Mapping[str, Sequence[Trajectory]]`):
            Episodes of each player.
        more (`Mapping[str, Callable]`, *optional*):
            Measures of an episode beside [`MEASURES`], by name; None of an episode that has no such measure.
    """
    table: dict[str, dict[str, Interval]] = {}
    for measure, of in {**MEASURES, **(more or {})}.items():
        for player, trajectories in played.items():
            values = [of(trajectory) for trajectory in trajectories if not trajectory.stop.is_fault]
            values = [value for value in values if value is not None]
            if values:
                table.setdefault(measure, {})[player] = interval(values)
    shares = {player: value.mean for player, value in table.get("shortened", {}).items() if value.mean > 0}
    # `max_turns` that ends every episode of everybody is the horizon
    stops = {each.stop for episodes in played.values() for each in episodes if not each.stop.is_fault}
    if shares and stops != {StopReason.MAX_TURNS}:
        warnings.warn(
            f"Episodes were cut short: {', '.join(f'{share:.1%} of {player!r}' for player, share in shares.items())}. "
            "Their regret and return lack the steps that were not played, so these players are not comparable with "
            "others. Give more room (a model with more positions, max_episode_length, max_turns), or use "
            "invalid_action='random'.",
            stacklevel=2,
        )
    return table


def summarize_games(
    played: Mapping[str, Mapping[str, Sequence[Trajectory]]],
) -> dict[str, dict[str, dict[str, Score]]]:
    """
    Table of games: player -> opponent -> seat -> [`Score`], with the seat that `reset` told in each game.

    Games whose environment failed are left out. One that was not played to its end counts as none of win, draw and
    loss, and its return is what it had brought so far.
    """
    table: dict[str, dict[str, dict[str, Score]]] = {}
    for player, opponents in played.items():
        for opponent, games in opponents.items():
            games = [game for game in games if not game.stop.is_fault]
            for seat in sorted({game.reset_info["seat"] for game in games}):
                own = [game for game in games if game.reset_info["seat"] == seat]
                outcomes = [game.turns[-1].info.get("outcome") if game.turns else None for game in own]
                mean = interval([game.return_ for game in own])
                shares = {outcome: outcomes.count(outcome) / len(own) for outcome in ("win", "draw", "loss")}
                score = Score(mean.mean, mean.low, mean.high, **shares)
                table.setdefault(player, {}).setdefault(opponent, {})[seat] = score
    return table


def cumulative_regret(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Sum of `max_a mu_a - mu_{a_t}` up to each step, `(n_episodes, n_steps)`; NaN after an episode's end."""
    regrets = [
        [turn.info["regret"] for turn in trajectory.turns if "regret" in turn.info] for trajectory in trajectories
    ]
    curves = np.full((len(regrets), max(map(len, regrets), default=0)), np.nan)
    for curve, row in zip(curves, regrets, strict=True):
        curve[: len(row)] = np.cumsum(row)
    return curves


def markdown_table(table: Mapping[str, Mapping[str, Interval]], corner: str = "player") -> str:
    """
    The summary for a model card or a terminal, means with intervals: a column a measure, a row a player. Of other
    tables, a column a key, and a row a key of the values; `corner` says what the rows are.
    """
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    lines = [f"| {corner} | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for name in names:
        cells = [str(column[name]) if name in column else "" for column in table.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Interval]]:
    """model -> measure -> one value a question -> the table that reports take: measure -> model -> [`Interval`]."""
    measures = dict.fromkeys(measure for own in measured.values() for measure in own)
    return {
        measure: {model: interval(own[measure]) for model, own in measured.items() if measure in own}
        for measure in measures
    }


def plain_table(table: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, dict[str, float]]]:
    """The summary as JSON can hold it, for `metrics.json`: measure -> player -> `mean`, `low` and `high`."""
    return {measure: {name: asdict(value) for name, value in row.items()} for measure, row in table.items()}


def markdown_games(table: Mapping[str, Mapping[str, Mapping[str, Score]]]) -> str:
    """The table of games likewise: a row an opponent and seat, a column a player, mean returns with intervals."""
    rows = {
        player: {f"{opponent}, {seat}": score for opponent, scores in row.items() for seat, score in scores.items()}
        for player, row in table.items()
    }
    return markdown_table(rows, corner="opponent, our seat")


def _share(flags) -> float | None:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None
