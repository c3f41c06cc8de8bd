# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The values that a player writes down for each action, taken out of its text. Like all that a model writes this is data:
no text raises, and none takes long.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache


TAG = "ucb_values"

# Longer replies and blocks are clipped: more than a hundred actions with a line each fit
_MAX_BLOCK = 20_000

_OPEN = re.compile(rf"<\s{{0,3}}{TAG}\s{{0,3}}>", re.IGNORECASE)
_CLOSE = re.compile(rf"<\s{{0,3}}/\s{{0,3}}{TAG}\s{{0,3}}>", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:,\d{3})*(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,3})?")
_INFINITE = re.compile(r"([+-]?)\s{0,3}\\?(?:∞|infty|infinite|infinity|inf)(?![^\W_])", re.IGNORECASE)
_NAN = re.compile(r"nan(?![^\W_])", re.IGNORECASE)
_SKIPPED = " \t\"'`*_~$\\({["  # what may stand before a value
_LEAD = re.compile(
    r"(?:^|[,;|{\[•#]|^\s{0,8}[-*+]{1,3}|(?<![^\W\d_])(?!(?:ln|log|sqrt)\b|(?:ln|log|sqrt)_)[^\W\d_]{2,20}[\s(_\[]{0,3})"
    r"[\s\"'`*_]{0,8}$",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(r"\s{0,3}(?:[+*/^×·]|-\s{0,3}\d|√|sqrt)")  # an arithmetic whose result is not written


def parse_ucb_values(text: str, actions: Sequence[str]) -> dict[str, float] | None:
    """
    The values in the last complete `<ucb_values>` block of a text.

    A value is what follows the name of an action and a `:` or `=` (also `->` and `|`), on the same line and before the
    next name: a number, an infinity (`inf`, `infinity`, `∞`), or `nan`. Where the line calculates
    (`blue: 0.49 + 1.10 = 1.59`), it is what comes out; where it explains (`blue: 1.59 (mean = 0.49)`), what is
    explained. Names are compared without case; of several values of an action the last counts.

    Args:
        text (`str`):
            What the player wrote. Any string will do.
        actions (`Sequence[str]`):
            The names to look for.

    Returns:
        `dict[str, float]`: action -> value, without those that the block does not tell; None if there is no complete
        block or nothing can be read from it.
    """
    closing = None
    for closing in _CLOSE.finditer(text):  # noqa: B007 - the last one
        pass
    if closing is None:
        return None
    opening = None
    for opening in _OPEN.finditer(text, 0, closing.start()):  # noqa: B007
        pass
    if opening is None:
        return None
    values: dict[str, float] = {}
    stated, names = _statements(tuple(actions))
    for line in text[opening.end() : closing.start()][:_MAX_BLOCK].splitlines():
        found = [match for match in stated.finditer(line) if not match[1].isdecimal() or _leads(line[: match.start()])]
        ends = [*(match.start() for match in found[1:]), len(line)]
        for match, end in zip(found, ends, strict=False):
            value = _value(line[match.end() : end])
            name = names.get(" ".join(match[1].split()).casefold())
            if value is not None and name is not None:
                values[name] = value
    return values or None


@lru_cache(maxsize=32)
def _statements(actions: tuple[str, ...]) -> tuple[re.Pattern, dict[str, str]]:
    """A pattern that finds a name whose value follows, and the names by how they are compared."""
    names = {" ".join(action.split()).casefold(): action for action in actions}
    # The longest first: "green apple" is not "green". Spaces may be several.
    either = "|".join(r"\s{1,4}".join(map(re.escape, name.split())) for name in sorted(names, key=len, reverse=True))
    # A whole name, and a sign that its value follows, perhaps behind closing quotes, brackets, emphasis
    pattern = rf"(?<![^\W_])(?<!\d\.)(?<!\w-)({either})(?![^\W_]|[.,-]\w)[\s\"'`*_~)\]}}]{{0,8}}(?:[:=|→]|->)"
    return re.compile(pattern, re.IGNORECASE), names


def _leads(before: str) -> bool:
    """Whether a number after this names an arm ("arm 3 = ...", "UCB(3) = ...") and is no part of a calculation."""
    return _LEAD.search(before[-40:]) is not None


def _value(text: str) -> float | None:
    """The value that a piece of a line states, None if it states none."""
    first = _leading(text)
    if first is not None:
        value, rest = first
        if not _UNFINISHED.match(rest) and not rest.lstrip().startswith(("=", "≈")):
            return value  # what follows explains it
    results = re.split(r"[=≈:]", text)
    if len(results) > 1 and (final := _leading(results[-1])) is not None and not _UNFINISHED.match(final[1]):
        return final[0]
    return None


def _leading(text: str) -> tuple[float, str] | None:
    """The value that a text begins with, and what follows it."""
    text = text.lstrip(_SKIPPED)
    if match := _INFINITE.match(text):
        return (-math.inf if match[1] == "-" else math.inf), text[match.end() :]
    if match := _NAN.match(text):
        return math.nan, text[match.end() :]
    if match := _NUMBER.match(text):
        return float(match[0].replace(",", "")), text[match.end() :]
    return None
