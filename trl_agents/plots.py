# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The pictures of a run: regret by step for all players, and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .evaluation import Interval, cumulative_regret
from .types import Trajectory


# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#999999", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_regret(played: Mapping[str, Sequence[Trajectory]], path: str | Path, title: str = "") -> None:
    """
    Cumulative regret by step, mean over episodes with a 95% band (normal approximation), a line a player.

    Args:
        played (`Mapping[str, Sequence[Trajectory]]`):
            Episodes of each player. Where lengths differ, a step's mean is over the episodes that reach it.
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            What was played.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (player, trajectories), colour in zip(played.items(), COLOURS * len(played), strict=False):
        curves = cumulative_regret([trajectory for trajectory in trajectories if not trajectory.stop.is_fault])
        if curves.size == 0:
            continue
        counts = (~np.isnan(curves)).sum(0)
        mean = np.nanmean(curves, axis=0)
        half = 1.96 * np.nanstd(curves, axis=0) / np.sqrt(counts)
        steps = np.arange(1, len(mean) + 1)
        axes.plot(steps, mean, label=f"{player} ({mean[-1]:.2f})", color=colour, linewidth=2)
        axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="cumulative regret", title=title, xlim=(1, None), ylim=(0, None))
    axes.legend(title="player (final regret)")
    _finish(figure, axes, path)


def plot_learning_curve(
    log_history: Sequence[Mapping[str, float]],
    path: str | Path,
    metric: str = "agents/regret_mean",
    label: str = "regret per episode",
    references: Mapping[str, Interval] | None = None,
) -> None:
    """
    A metric of the training episodes by update, with reference players as horizontal lines.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`.
        path (`str` or `Path`):
            PNG to write.
        metric (`str`, *optional*, defaults to `"agents/regret_mean"`):
            Which metric.
        label (`str`, *optional*):
            Its name on the axis.
        references (`Mapping[str, Interval]`, *optional*):
            Players to compare with.
    """
    points = [(entry["step"], entry[metric]) for entry in log_history if metric in entry and "step" in entry]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if points:
        steps, values = np.array(points, dtype=float).T
        axes.plot(steps, values, color=COLOURS[3], alpha=0.35, linewidth=1, label="training episodes")
        axes.plot(steps, _smooth(values), color=COLOURS[3], linewidth=2, label="running mean of 5 logs")
    for (player, reference), colour in zip((references or {}).items(), COLOURS * 9, strict=False):
        axes.axhline(reference.mean, color=colour, linestyle="--", linewidth=1.5, label=player)
        axes.axhspan(reference.low, reference.high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="update", ylabel=label, title="Learning curve")
    axes.legend()
    _finish(figure, axes, path)


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Mean of the last `width` values; shorter at the start."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _finish(figure: Figure, axes, path: str | Path) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
