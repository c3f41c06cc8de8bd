# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tables of a report, and what stands in their cells: a figure that is missing, or is none, is left empty."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]], kind: str = "stacks") -> str:
    """A table of cells that are markup already. On a narrow screen each row of a "stacks" is a block of its own."""
    top = "".join(f'<th scope="col">{breakable(name)}</th>' for name in head)
    body = []
    for name, cells in rows.items():
        shown = "".join(
            f'<td data-of="{escape(column)}">{value and f"<span>{value}</span>"}</td>'
            for column, value in zip(head[1:], cells, strict=True)
        )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>')
    table = f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{table}</table></div>'


def breakable(name: str) -> str:
    """A name whose line breaks between the parts of a path, and within one only where it has no room for that."""
    parts = [part.replace("_", "_<wbr>") for part in escape(name).split("/")]
    return "/".join(f"<span>{part}</span>" for part in parts) if len(parts) > 1 else parts[0]


def interval(value: Any, form: str = "{:.2f}") -> str:
    """A mean with its interval, given as a mapping of `mean`, `low` and `high`."""
    if not isinstance(value, Mapping) or not is_number(value.get("mean")):
        return ""
    mean, low, high = value["mean"], value.get("low"), value.get("high")
    span = f"[{form.format(low)}, {form.format(high)}]" if is_number(low) and is_number(high) else ""
    return form.format(mean) + (f' <span class="range">{span}</span>' if span else "")


def plain(value: Any, form: str = "{:.2f}") -> str:
    """A number by itself."""
    return form.format(value) if is_number(value) else ""


def pair(value: Any, naive: Any) -> str:
    """A count, and in brackets what it would be in the naive way."""
    if not is_number(value):
        return ""
    return f"{value:,}" + (f' <span class="range">({naive:,})</span>' if is_number(naive) else "")


def of(title: str, label: str, parts: Mapping[str, Any]) -> str:
    """A title that names its diagnosis `label`, where there are several `parts` to tell apart."""
    return escape(f"{title}: {label}" if len(parts) > 1 else title)


def inner(value: Any, name: str) -> Mapping[str, Any]:
    """A mapping in a mapping; an empty one, if either is something else."""
    return dict(pairs(dict(pairs(value)).get(name)))


def pairs(value: Any) -> list[tuple[str, Any]]:
    """Keys and values of a mapping; none, if it is something else."""
    return list(value.items()) if isinstance(value, Mapping) else []


def shares(row: Any) -> dict[str, float]:
    """Shares, also where a row has intervals or percent."""
    values = {name: value.get("mean") if isinstance(value, Mapping) else value for name, value in pairs(row)}
    return {name: value for name, value in values.items() if is_number(value)}


def setting(value: Any) -> str:
    """A setting as text: what is text already, or JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def is_number(value: Any) -> bool:
    """Whether it is a finite number (and not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
