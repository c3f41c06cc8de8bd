# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A regular expression -> a text that it matches: how a reply states an action for a parser to read it back."""

from __future__ import annotations

import re
import string

import regex


HOLE = "{action}"  # where the action stands

# How a pattern is taken apart, to write a text that it matches.
_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(?:,\d*)?\}")
_TOKEN = re.compile(
    r"\\(?:[pP]\{[^}]*\}|x[0-9a-fA-F]{2}|.)|\[\^?\]?(?:\\.|[^\]\\])*\]"  # an escape, a set
    r"|\(\?P?<\w+>|\(\?[a-zA-Z-]*[:)]|\(\?(?:[>=!|]|<[=!])|\("  # how a group opens
    r"|\{\d+(?:,\d*)?\}|\{,\d+\}|.",
    re.DOTALL,
)


def _holds(token: str, char: str) -> bool:
    try:
        return regex.fullmatch(token, char) is not None
    except regex.error:  # a back-reference
        return False


def skeleton(pattern: str, target: int) -> str:
    """
    Returns a text that `pattern` should match, with [`HOLE`] in the place of its group number `target`.

    A guess that the caller verifies by parsing: optional parts are left out, of several branches the one with the
    group is taken, else the first.
    """
    tokens = _TOKEN.findall(pattern)
    at = groups = 0

    def branches() -> str:
        nonlocal at
        options = [""]
        while at < len(tokens) and tokens[at] != ")":
            if tokens[at] == "|":
                options.append("")
                at += 1
            else:
                options[-1] += piece()
        at += 1  # the closing bracket
        return next((option for option in options if HOLE in option), options[0])

    def piece() -> str:
        nonlocal at, groups
        token = tokens[at]
        at += 1
        if token.startswith("(?") and token.endswith(")"):  # inline flags
            return ""
        if token.startswith("("):
            captures = token == "(" or token.endswith(">") and token != "(?>"
            groups += captures
            number = groups
            text = branches()
            if captures and number == target:
                text = HOLE
            elif token in ("(?!", "(?<!"):
                text = ""
        elif token in ("^", "$"):
            text = ""
        elif token == "." or len(token) > 1:  # a set of characters: the first familiar one it holds
            text = next((char for char in " =:-a_0A" + token + string.printable if _holds(token, char)), "")
        else:
            text = token
        least = 1
        if at < len(tokens) and (quantifier := _QUANTIFIER.fullmatch(tokens[at])):
            least = 1 if quantifier[0] == "+" else int(quantifier[1] or 0)
            at += 1
            if at < len(tokens) and tokens[at] in ("?", "+"):  # lazy or possessive
                at += 1
        return text if HOLE in text else text * least

    return branches()
