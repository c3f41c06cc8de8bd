# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The pictures of a diagnosis, each drawn from its part of `diagnostics.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..plots import COLOURS
from .frequency_bias import CATEGORIES
from .knowing_doing import DOING, KNOWING


# Of each category of an action, wherever it is drawn
CATEGORY_COLOURS = dict(zip(CATEGORIES, (COLOURS[3], COLOURS[1], COLOURS[0]), strict=True))


def plot_coverage(part: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """
    Share of the actions that were tried, by step, with its interval: a line a player.

    Args:
        part (`Mapping`):
            `parts["greediness"]`.
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            What was played.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = part["coverage_by_step"]
    # The player itself first and in the colour that stands out, the references after it
    colours = (COLOURS[3], COLOURS[0], *COLOURS[1:3], *COLOURS[4:])
    for number, (player, curve) in enumerate(curves.items()):
        steps, colour = np.arange(1, len(curve["mean"]) + 1), colours[number % len(colours)]
        label = f"{player} ({curve['mean'][-1]:.0%})"
        style = {"linestyle": "-" if number == 0 else "--", "marker": "o" if len(steps) == 1 else None}
        axes.plot(steps, curve["mean"], color=colour, linewidth=2, label=label, **style)
        axes.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="actions tried", title=title, ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    if curves:
        axes.legend(title="player (at the end)", loc="lower right")
    _finish(figure, [axes], path)


def plot_frequency_bias(part: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """
    What repetition does: entropy against the number of repetitions, and how often each category is chosen.

    Args:
        part (`Mapping`):
            `parts["frequency_bias"]`.
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            Who was asked what.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    entropy = {key: np.array(values, dtype=float) for key, values in part["entropy"].items()}
    left.plot(part["repetitions"], entropy["mean"], color=COLOURS[1], linewidth=2, label="mean over histories")
    left.fill_between(part["repetitions"], entropy["low"], entropy["high"], color=COLOURS[1], alpha=0.2, linewidth=0)
    left.axhline(part["max_entropy"], color=COLOURS[0], linestyle="--", label="all actions alike")
    correlation = part["correlation"]
    told = "entropy is constant" if correlation is None else f"correlation {correlation:+.2f}"
    left.set(xlabel="repetitions of the last step", ylabel="entropy of the next action (nats)", title=told)
    left.set_ylim(-0.03 * part["max_entropy"], 1.08 * part["max_entropy"])
    left.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    left.legend(loc="best")
    _stacked(right, list(part["windows"]), list(part["windows"].values()), CATEGORIES, CATEGORY_COLOURS)
    right.set(xlabel="repetitions", ylabel="most probable action is ...", title="What is chosen", ylim=(0, 1))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    _finish(figure, [left, right], path)


def _stacked(
    axes: Any, places: Sequence[str], rows: Sequence[Mapping[str, float]], names: Sequence[str], colours: Mapping
) -> None:
    bottom = np.zeros(len(places))
    for name in names:
        values = np.array([row[name] for row in rows])
        bars = axes.bar(places, values, 0.7, bottom=bottom, color=colours[name], label=name)
        told = [f"{value:.0%}" if value >= 0.05 else "" for value in values]
        on = "black" if colours[name] == COLOURS[0] else "white"  # white on grey is hard to read
        axes.bar_label(bars, told, label_type="center", color=on, fontsize=10)
        bottom += values


def plot_knowing_doing(part: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """
    The matrix of knowing and doing, in percent of all steps; in brackets, of the steps of the same row.

    Args:
        part (`Mapping`):
            `parts["knowing_doing"]`.
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            Who played what.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    joint = np.array([[part["joint"][knowing][doing] for doing in DOING] for knowing in KNOWING])
    axes.imshow(joint, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, knowing in enumerate(KNOWING):
        for column, doing in enumerate(DOING):
            interval = part["joint_intervals"][knowing][doing]
            conditional = part["conditional"][knowing][doing]
            lines = [f"{joint[row, column]:.1f} %", f"[{interval['low']:.1f}, {interval['high']:.1f}]"]
            lines += [] if conditional is None else [f"({conditional:.1f} % of the row)"]
            colour = "white" if joint[row, column] > 55 else "black"
            axes.text(column, row, "\n".join(lines), ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(range(len(DOING)), DOING)
    axes.set_yticks(range(len(KNOWING)), [f"{knowing} values" for knowing in KNOWING], rotation=90, va="center")
    axes.set(xlabel="what is done", ylabel="what is known", title=title)
    axes.tick_params(length=0)
    figure.savefig(path, dpi=150)


def _finish(figure: Figure, panels: Sequence[Any], path: str | Path) -> None:
    for panel in panels:
        panel.grid(alpha=0.25, axis="y")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
