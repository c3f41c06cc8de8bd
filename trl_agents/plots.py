# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The pictures of a run: regret by step, returns and outcomes of games for all players, and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .envs.tictactoe import render_board
from .tables import Interval, Score, cumulative_regret
from .types import Trajectory


# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#999999", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_players(
    played: Mapping[str, Sequence[Trajectory]],
    table: Mapping[str, Mapping[str, Interval]],
    folder: str | Path,
    title: str = "",
) -> Path:
    """
    The picture of how well everybody played: `regret.png`, or where the environment tells no regret `returns.png`.

    Args:
        played (`Mapping[str, Sequence[Trajectory]]`):
            Episodes of each player.
        table (`Mapping[str, Mapping[str, Interval]]`):
            What [`summarize`] says of them.
        folder (`str` or `Path`):
            Where it is written.
        title (`str`, *optional*):
            What was played.

    Returns:
        `Path`: the PNG.
    """
    if "regret" in table:
        picture = Path(folder, "regret.png")
        plot_regret(played, picture, title)
    else:
        picture = Path(folder, "returns.png")
        plot_measures({"return": table.get("return", {})}, picture, title)
    return picture


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


def plot_returns(games: Mapping[str, Mapping[str, Mapping[str, Score]]], path: str | Path, title: str = "") -> None:
    """
    Mean return with its interval: a panel an opponent, a place a seat, a colour a player.

    Args:
        games (`Mapping`):
            Player -> opponent -> seat -> [`Score`], as [`summarize_games`] gives it.
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            What was played.
    """
    figure, panels, seats = _panels(games, title)
    width = 0.8 / len(games)
    for panel, opponent in panels:
        for number, (player, colour) in enumerate(zip(games, COLOURS * len(games), strict=False)):
            for place, seat in enumerate(seats):
                score = games[player].get(opponent, {}).get(seat)
                if score is None:
                    continue
                x = place + (number - (len(games) - 1) / 2) * width
                error = [[score.mean - score.low], [score.high - score.mean]]
                panel.bar(x, score.mean, 0.9 * width, color=colour, label=player if place == 0 else None)
                panel.errorbar(x, score.mean, yerr=error, color="black", linewidth=1, capsize=2)
                panel.annotate(
                    f"{score.mean:.2f}",
                    (x, score.high if score.mean >= 0 else score.low),
                    (0, 3 if score.mean >= 0 else -3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if score.mean >= 0 else "top",
                    fontsize=7,
                )
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=f"against {opponent}", ylim=(-1.19, 1.19), xticks=range(len(seats)))
        panel.set_xticklabels([f"moving {seat}" for seat in seats])
    panels[0][0].set_ylabel("mean return")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(games))
    figure.savefig(path, dpi=150)


def plot_outcomes(games: Mapping[str, Mapping[str, Mapping[str, Score]]], path: str | Path, title: str = "") -> None:
    """
    Shares of games won, drawn and lost: a panel an opponent, a bar a player and seat.

    Args:
        games (`Mapping`):
            Player -> opponent -> seat -> [`Score`], as [`summarize_games`] gives it.
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            What was played.
    """
    figure, panels, seats = _panels(games, title)
    labels = [f"{player}, {seat}" for seat in seats for player in games]
    places = [place + (place // len(games)) * 0.6 for place in range(len(labels))]  # a gap between the seats
    for panel, opponent in panels:
        scores = [games[player].get(opponent, {}).get(seat) for seat in seats for player in games]
        left = np.zeros(len(scores))
        for outcome, colour in (("win", COLOURS[2]), ("draw", "#DDDDDD"), ("loss", COLOURS[3])):
            shares = np.array([0.0 if score is None else getattr(score, outcome) for score in scores])
            panel.barh(places, shares, 0.85, left=left, color=colour, label=outcome)
            for place, start, share in zip(places, left, shares, strict=True):
                if share >= 0.08:  # narrower ones have no room for their number
                    panel.text(start + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8)
            left += shares
        panel.set(title=f"against {opponent}", xlim=(0, 1), xticks=(0, 0.5, 1), yticks=places)
        panel.set_xticklabels(["0%", "50%", "100%"])
        panel.set_yticklabels(labels)
    panels[0][0].invert_yaxis()  # shared: the first seat on top
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def _panels(games: Mapping[str, Mapping[str, Mapping[str, Score]]], title: str):
    """A figure with a panel for each opponent, and the seats that were played."""
    opponents = list(dict.fromkeys(opponent for row in games.values() for opponent in row))
    seats = sorted({seat for row in games.values() for scores in row.values() for seat in scores})
    figure = Figure(figsize=(3.7 * len(opponents) + 0.6, 4), layout="constrained")
    if title:
        figure.suptitle(title)
    panels = figure.subplots(1, len(opponents), sharey=True, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(panels, opponents, strict=True)), seats


def draw_game(game: Trajectory) -> str:
    """
    A game of tic-tac-toe as text: its boards side by side, each as the player found it and the last one as it ended,
    and below them what the player wrote to each.
    """
    boards = [info["board"] for info in (game.reset_info, *(turn.info for turn in game.turns)) if "board" in info]
    drawn = [render_board(board).splitlines() for board in boards]
    lines = ["    ".join(f"{line:10}" for line in row).rstrip() for row in zip(*drawn, strict=True)]
    for number, turn in enumerate(game.turns, start=1):
        lines.append(f"{number}. {turn.text}")
        if not turn.parsed.is_valid:
            played = f"; {turn.executed} was played" if turn.executed is not None else ""
            lines.append(f"   (invalid, {turn.parsed.reason.value}{played})")
    end = game.turns[-1].info.get("outcome", game.stop.value) if game.turns else game.stop.value
    return "\n".join([*lines, f"[{end}, moving {game.reset_info['seat']}]"])


def plot_accuracy(
    accuracy: Mapping[str, Mapping[str, Interval]], path: str | Path, title: str = "", label: str = "accuracy"
) -> None:
    """
    Shares of right answers with their intervals: a place a model, a colour a measure.

    Args:
        accuracy (`Mapping[str, Mapping[str, Interval]]`):
            Measure -> model -> [`Interval`].
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            What was answered.
        label (`str`, *optional*, defaults to `"accuracy"`):
            What is measured.
    """
    models = list(dict.fromkeys(name for values in accuracy.values() for name in values))
    figure = Figure(figsize=(max(1.4 * len(models) + 1.5, 5), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(accuracy)
    for number, (measure, values) in enumerate(accuracy.items()):
        places = np.array([models.index(name) for name in values]) + (number + 0.5) * width - 0.4
        means = np.array([value.mean for value in values.values()])
        ends = np.array([[value.mean - value.low, value.high - value.mean] for value in values.values()]).T
        bars = axes.bar(places, means, 0.92 * width, yerr=ends, color=COLOURS[number + 1], capsize=3, label=measure)
        axes.bar_label(bars, [f"{mean:.0%}" for mean in means], padding=2, fontsize=9)
    axes.set(ylabel=label, title=title)
    _from_zero(axes, [value for values in accuracy.values() for value in values.values()])
    axes.set_xticks(range(len(models)), models)
    axes.legend()
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_measures(
    table: Mapping[str, Mapping[str, Interval]], path: str | Path, title: str = "", label: str = "mean"
) -> None:
    """
    Means of measures of different sizes and units with their intervals: a panel a measure, a bar a model.

    Args:
        table (`Mapping[str, Mapping[str, Interval]]`):
            Measure -> model -> [`Interval`].
        path (`str` or `Path`):
            PNG to write.
        title (`str`, *optional*):
            Of what.
        label (`str`, *optional*, defaults to `"mean"`):
            Name of the axis.
    """
    models = list(dict.fromkeys(name for values in table.values() for name in values))
    figure = Figure(figsize=(max(2.6 * len(table), 4, 1.2 * len(models)), 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(table), squeeze=False)[0]
    for panel, (measure, values) in zip(panels, table.items(), strict=True):
        means = np.array([value.mean for value in values.values()])
        ends = np.array([[value.mean - value.low, value.high - value.mean] for value in values.values()]).T
        colours = [COLOURS[(models.index(name) + 1) % len(COLOURS)] for name in values]
        bars = panel.bar(range(len(values)), means, 0.8, yerr=ends, color=colours, capsize=3)
        panel.bar_label(bars, [f"{mean:.2f}" for mean in means], padding=2, fontsize=8)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(measure, fontsize=10)
        panel.set_xticks(range(len(values)), list(values), rotation=30, ha="right", fontsize=8)
        panel.margins(y=0.12)
        _from_zero(panel, list(values.values()))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    figure.savefig(path, dpi=150)


def _from_zero(axes: Any, values: Sequence[Interval]) -> None:
    """Lets the axis begin at 0 where nothing is below, and end at 1 where all is 0: left to itself it says ±0.06."""
    if all(min(value.mean, value.low) >= 0 for value in values):
        axes.set_ylim(0, None if any(max(value.mean, value.high) > 0 for value in values) else 1)


def plot_learning_curve(
    log_history: Sequence[Mapping[str, float]],
    path: str | Path,
    metric: str | None = None,
    label: str | None = None,
    references: Mapping[str, Interval] | None = None,
) -> None:
    """
    A metric of the training episodes by update, with reference players as horizontal lines.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`.
        path (`str` or `Path`):
            PNG to write.
        metric (`str`, *optional*):
            Which metric. Defaults to `agents/regret_mean`, or where no regret was logged `agents/return_mean`.
        label (`str`, *optional*):
            Its name on the axis.
        references (`Mapping[str, Interval]`, *optional*):
            Players to compare with.
    """
    if metric is None:
        measure = "regret" if any("agents/regret_mean" in entry for entry in log_history) else "return"
        metric, label = f"agents/{measure}_mean", label or f"{measure} per episode"
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
    axes.set(xlabel="update", ylabel=label or metric, title="Learning curve")
    if axes.get_legend_handles_labels()[0]:  # nothing was logged yet: an empty picture
        axes.legend()
    _finish(figure, axes, path)


def plot_overoptimization(
    curves: Mapping[str, Mapping[str, Sequence[float]]], start: Mapping[str, float], path: str | Path
) -> None:
    """
    What a policy gained by a reward model's measure, and what that was worth, against how far it went from where it
    started (https://huggingface.co/papers/2210.10760, figure 1): a panel a run, a line a measure.

    Args:
        curves (`Mapping[str, Mapping[str, Sequence[float]]]`):
            Run -> measure -> values along training. `"kl"` is the distance, and what `start` has not is not drawn.
        start (`Mapping[str, float]`):
            Measure -> its mean for the model at a KL of 0, which gains are counted from.
        path (`str` or `Path`):
            PNG to write.
    """
    figure = Figure(figsize=(max(4.8 * len(curves), 5), 4.5), layout="constrained")
    panels = figure.subplots(1, max(len(curves), 1), sharey=True, squeeze=False)[0]
    for panel, (run, curve) in zip(panels, curves.items(), strict=False):
        # An estimate from samples, which can fall below 0 where the policy is still the first one
        distances = np.sqrt(np.maximum(np.array(curve["kl"], dtype=float), 0.0))
        for (name, before), colour in zip(start.items(), (COLOURS[3], *COLOURS[1:3], *COLOURS[4:]), strict=False):
            gains = np.array(curve[name], dtype=float) - before
            panel.plot(distances, gains, ".", color=colour, alpha=0.3, markersize=5)
            if len(gains):
                panel.plot(_smooth(distances), _smooth(gains), color=colour, linewidth=2, label=name)
        panel.axhline(0, color=COLOURS[0], linewidth=1)
        farthest = max(distances, default=0)
        ticks = [kl for kl in (0, 1, 4, 10, 20, 40, 80, 160, 320) if kl**0.5 <= 1.05 * farthest]
        panel.set_xticks(np.sqrt(ticks), [f"{kl:g}" for kl in ticks])
        panel.set(xlabel="KL from the first model, nats a reply (root scale)", title=run)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gain over the first model, training replies")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend()
    figure.savefig(path, dpi=150)


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Mean of the last `width` values; shorter at the start."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _finish(figure: Figure, axes, path: str | Path) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
