# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Charts as SVG inside a page.

A page's own charts rather than matplotlib's pictures, because they follow the reader's colour scheme, stay sharp and
small, and have no `style` attributes, which matplotlib's SVG needs and the policy of [`~page.html_page`] forbids.
Players differ by the dash of the line too, not by colour alone. The stylesheet is `charts.css`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np


WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 42
N_COLOURS = 6  # as many as the stylesheet has

Curve = Mapping[str, Sequence[float | None]]  # "mean", and if there is a band "low" and "high"


def line_chart(
    curves: Mapping[str, Curve],
    x: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    y_max: float,
    lines: Mapping[str, float] | None = None,
) -> str:
    """
    Lines with bands, and a legend below.

    Args:
        curves (`Mapping[str, Curve]`):
            By name: a mean for each of `x` (fewer where it ends early; None where there is none), and the band.
        x (`Sequence[float]`):
            Where they are.
        x_label, y_label (`str`):
            Names of the axes.
        y_max (`float`):
            The upper end of the axis that begins at 0.
        lines (`Mapping[str, float]`, *optional*):
            Heights to mark, by their names.
    """
    x_low, x_high = min(x, default=0), max(x, default=1)

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - x_low) / ((x_high - x_low) or 1)

    def up(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / (y_max or 1))

    parts = []
    for tick in _ticks(0, y_max):
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(f"{tick:g}", LEFT - 6, up(tick) + 4, "end", "tick"))
    for tick in _ticks(x_low, x_high):
        parts.append(_text(f"{tick:g}", across(tick), HEIGHT - BOTTOM + 17, "middle", "tick"))
    for height in (lines or {}).values():
        parts.append(f'<path class="reference" d="M{LEFT} {up(height):.1f}H{WIDTH - RIGHT}"/>')
    for number, curve in enumerate(curves.values()):
        colour = f"c{number % N_COLOURS}"
        mean = _points(x, curve["mean"], across, up)
        high, low = (_points(x, curve.get(end) or (), across, up) for end in ("high", "low"))
        if len(high) > 1 and len(high) == len(low):
            parts.append(f'<path class="band {colour}" d="M{" L".join([*high, *reversed(low)])}Z"/>')
        if len(mean) > 1:
            parts.append(f'<path class="line {colour}" d="M{" L".join(mean)}"/>')
        elif mean:  # one step is a point
            parts.append(f'<path class="line dot {colour}" d="M{mean[0]}h0"/>')
    for name, height in (lines or {}).items():  # above its line, which curves mostly stay below
        parts.append(_text(name, WIDTH - RIGHT - 4, up(height) - 5, "end", "tick mark"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(_text(x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", "label"))
    turned = f'transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="label" {turned}>{escape(y_label)}</text>')
    said = "; ".join(f"{name} ends at {end}" for name, curve in curves.items() if (end := _last(curve["mean"])))
    return _figure(parts, f"{y_label} by {x_label}: {said}", legend(curves), HEIGHT)


def stacked_bars(bars: Mapping[str, Mapping[str, float]], parts_of: Sequence[str]) -> str:
    """
    Shares as horizontal bars, one below the other, each with its numbers.

    Args:
        bars (`Mapping[str, Mapping[str, float]]`):
            By name: the share of each part.
        parts_of (`Sequence[str]`):
            The parts, in the order in which they are drawn.
    """
    step, left = 40, 64
    room = WIDTH - left - RIGHT
    drawn = []
    for row, (name, shares) in enumerate(bars.items()):
        top, start = row * step + 6, 0.0
        drawn.append(_text(name, left - 8, top + 19, "end", "label"))
        for number, part in enumerate(parts_of):
            share = shares.get(part)
            share = share if isinstance(share, (int, float)) and math.isfinite(share) else 0.0
            place = f'x="{left + room * start:.1f}" y="{top}" width="{room * share:.1f}" height="28"'
            drawn.append(f'<rect class="bar c{number}" {place}/>')
            if share >= 0.1:  # a narrower one has no room for its number
                middle = left + room * (start + share / 2)
                drawn.append(_text(f"{share:.0%}", middle, top + 19, "middle", "inside"))
            start += share
    said = "; ".join(
        f"{name}: {', '.join(f'{part} {shares.get(part) or 0:.0%}' for part in parts_of)}"
        for name, shares in bars.items()
    )
    return _figure(drawn, said, legend(parts_of, bars=True), step * len(bars) + 4)


def legend(names: Sequence[str] | Mapping[str, Curve], bars: bool = False) -> str:
    """What the colours of lines, or of bars, mean."""
    items = []
    for number, name in enumerate(names):
        colour = f"c{number % N_COLOURS}"
        sample = (
            f'<rect class="bar {colour}" width="26" height="12"/>'
            if bars
            else f'<path class="line {colour}" d="M0 6H26"/>'
        )
        items.append(
            f'<li><svg class="sample" viewBox="0 0 26 12" aria-hidden="true">{sample}</svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _figure(parts: Sequence[str], said: str, below: str, height: int) -> str:
    frame = f'class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(said)}"'
    return f"<figure><svg {frame}>{''.join(parts)}</svg>{below}</figure>"


def _text(text: str, x: float, y: float, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _points(x: Sequence[float], values: Sequence[float | None], across, up) -> list[str]:
    pairs = [(at, value) for at, value in zip(x, values, strict=False) if _is_number(value)]
    return [f"{across(at):.1f} {up(value):.1f}" for at, value in pairs]


def _last(values: Sequence[float | None]) -> str:
    known = [value for value in values if _is_number(value)]
    return f"{known[-1]:.2f}" if known else ""


def _is_number(value: float | None) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _ticks(low: float, high: float) -> list[float]:
    """Four to six round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [float(np.round(step * number, 10)) for number in range(first, math.floor(high / step + 1e-9) + 1)]
