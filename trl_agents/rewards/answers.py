# Licensed under the Apache License, Version 2.0 (see LICENSE).
r"""
Takes the answer out of what a model wrote: where it is stated ([`find_answer`]), and which number it is
([`find_number`]). No text raises, and time grows linearly with its length.

Where an answer is stated: after the last of these, in any case of letters.

| Trigger | The answer is |
|---|---|
| `the answer is` (so ReFT's `Therefore, the answer is:`), with `my`, `final` or `correct` too | the rest of the line |
| `####` (GSM8K) | the rest of the line |
| `\boxed{...}` | what the braces hold |
| `<answer>...</answer>` | what the tags hold |

- The last trigger wins and there is no way back: if nothing can be read there, nothing was answered.
- The rest of a line begins at the first character that is neither space nor `:`, `=`, `*`, `_`: also a line further.
- Braces or tags that never close hold no answer: the text was cut off inside them.
- Of a text with `</think>`, only what follows the last one is read; what follows a later `<think>` is not. Reasoning
  answers nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache


_TRIGGERS = (
    r"\b(?:the|my|final|correct)\s++(?:final\s++|correct\s++)?answer\s++is\b|(?<!#)#{4}(?!#)"
    r"|\\boxed\s*+\{|<answer>"
)
# What stands between an open trigger and its answer: "is:", "is **", "is:\n\n"
_LEAD = re.compile(r"[\s:=*_`]*+")
_CLOSING_TAG = re.compile(r"</answer>", re.IGNORECASE)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

# Full-width forms and typographic signs as ASCII. Not NFKC, which would turn 10² into 102.
_ASCII = str.maketrans(
    {0xFF01 + i: 0x21 + i for i in range(94)}
    | dict.fromkeys(map(ord, "−–‐‑﹣"), "-")
    | dict.fromkeys(map(ord, "⁄∕"), "/")
    | {"⋅": "·"}
)
_SEPARATOR = r"(?:,(?:\\!)?|\{,\}|\\,)"  # of thousands, LaTeX's ways among them
_NUMBER = rf"(?:\d++(?:{_SEPARATOR}\d++)*+(?:\.\d++)?+|\.\d++)(?:[eE][-+]?\d++)?+"
_GAP = r"[^\S\n]{0,4}"
_CURRENCY = r"(?:US|A|C)?(?:\\?[$£€¥₹]){1,2}[^\S\n]?"
_VALUE = rf"""
    (?P<prefix>(?:[-+](?:{_CURRENCY})?|{_CURRENCY}[-+]?)?)
    (?:
        (?:(?P<frac_whole>\d++){_GAP})?\\[dt]?frac\s*+
            (?:\{{\s*+(?P<frac_top>-?{_NUMBER})\s*+\}}\s*+\{{\s*+(?P<frac_bottom>-?{_NUMBER})\s*+\}}
            |(?P<digit_top>\d)(?P<digit_bottom>\d))
        |(?P<mixed_whole>\d++)[^\S\n]{{1,4}}(?P<mixed_top>\d++)/(?P<mixed_bottom>\d++)
        |(?P<top>{_NUMBER}){_GAP}/{_GAP}(?P<bottom>{_NUMBER})
        |(?P<number>{_NUMBER})
    )
    (?:{_GAP}(?:\\?%|(?:percent|per[ ]cent|dollars?|euros?|pounds?|cents?|USD|EUR|GBP)\b))?+
"""
WRAPPERS = r"""(?:[\s*_`"'“”‘’:=<(\[{~≈]|\\[(\[{]|\\(?:text|textbf|mathrm|mathbf)\{)*+"""
_STATED = re.compile(rf"{WRAPPERS}{_VALUE}", re.VERBOSE | re.IGNORECASE)
_WHOLE = re.compile(rf"""{WRAPPERS}{_VALUE}(?:[\s*_`"'“”‘’.)\]}}>$£€]|\\[)\]}}])*+""", re.VERBOSE | re.IGNORECASE)
_ANYWHERE = re.compile(rf"(?<![\w.,/^]){_VALUE}", re.VERBOSE | re.IGNORECASE)
# What makes a number part of something else: an expression, a range, a list, a code, algebra, a scaling word
_CONTINUES = re.compile(
    rf"""
    [.:]\d | _\d | \(\d | [^\W\d_]{{1,32}}\d | [xyzn](?![^\W\d_])
    | {_GAP}[-+*/×÷·&|;,]{{1,2}}{_GAP}[-+($£€]?\d | {_GAP}\^(?!\{{?\\circ) | {_GAP}[√π] | [^\S\n]++\d
    | {_GAP}(?:or|and|to|by|x)[^\S\n]{{1,4}}[-+($£€]?\d
    | {_GAP}\\(?:times|cdot|div|pm|pi|sqrt|over|[dt]?frac)(?![a-zA-Z])
    | {_GAP}(?:hundred|thousand|million|billion|trillion|dozen)s?\b
    """,
    re.VERBOSE | re.IGNORECASE,
)


@lru_cache(maxsize=32)
def _trigger_pattern(trigger: str | tuple[str, ...] | None) -> re.Pattern:
    if trigger is None:
        return re.compile(_TRIGGERS, re.IGNORECASE)
    triggers = (trigger,) if isinstance(trigger, str) else trigger
    if not triggers or not all(isinstance(one, str) and one.strip() for one in triggers):
        raise ValueError(
            f"`trigger` is a text that announces the answer, or a list of them, got {trigger!r}: pass for example "
            "'The answer is:', or None for the default ones."
        )
    # The longest first: of two that start together, what one has more is no part of the answer
    literals = sorted((one.split() for one in triggers), key=lambda words: -sum(map(len, words)))
    return re.compile("|".join(r"\s++".join(map(re.escape, words)) for words in literals), re.IGNORECASE)


def check_trigger(trigger: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Returns `trigger` in a hashable form, or raises a `ValueError` if it is no text."""
    if trigger is not None and not isinstance(trigger, str):
        try:
            trigger = tuple(trigger)
        except TypeError:
            trigger = (trigger,)
    _trigger_pattern(trigger)
    return trigger


def spoken_text(text: str) -> str:
    """Returns `text` without its reasoning: what follows the last `</think>`, up to a `<think>` that stays open."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def find_answer(text: str, trigger: str | Sequence[str] | None = None) -> str | None:
    r"""
    Returns what `text` states as its answer, by the table above; `""` if it announces one and gives none, `None` if it
    announces none.

    Args:
        text (`str`):
            What the model wrote. Any string will do.
        trigger (`str` or `list[str]`, *optional*):
            What announces the answer in place of the default triggers: literal text, compared without case and with
            runs of whitespace as one. The answer is then the rest of the line, unless a trigger is `<answer>` or
            `\boxed{`.
    """
    text = spoken_text(text)
    found = None
    for found in _trigger_pattern(check_trigger(trigger)).finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    rest, head = text[found.end() :], found[0].casefold()
    if head == "<answer>":
        closing = _CLOSING_TAG.search(rest)
        return rest[: closing.start()].strip() if closing else ""
    if head.startswith("\\boxed") and head.endswith("{"):
        return _braced(rest)
    line = rest[_LEAD.match(rest).end() :].partition("\n")[0]
    return _CLOSING_TAG.split(line, maxsplit=1)[0].rstrip()


def _braced(rest: str) -> str:
    depth = 1
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[: brace.start()].strip()
    return ""


def find_number(
    text: str,
    trigger: str | Sequence[str] | None = None,
    *,
    require_trigger: bool = False,
    last_number: bool = False,
) -> float | None:
    r"""
    Returns the number that `text` states as its answer, or `None`.

    After a trigger (see [`find_answer`]) the number must come first, but for wrappers (quotes, brackets, emphasis,
    `=`, currency); words after it are its unit and are not read. Without a trigger the whole text must be the number.
    The differences from ReFT's code (https://huggingface.co/papers/2401.08967), which reads with Python's `float`
    what follows "\nTherefore, the answer is: ", are marked:

    | Answer | Read as | In ReFT |
    |---|---|---|
    | `10`, also as the whole text | 10 | same |
    | `10.` | 10 | same |
    | `1e1` | 10 | same |
    | two triggers | the last one's | same |
    | `ten`, nothing at all | None | same |
    | `1_0` | None: Python's spelling | 10 |
    | `1,234`, `1,234,567.5`, `1{,}234` | 1234, 1234567.5, 1234 | None |
    | `1,23`, `1.234,56`, `1 234` | None: not clear which number | None |
    | `$10`, `£10`, `€10`, `-$10`, `$-10`, `10 dollars`, `$10$` | 10 or -10 | None |
    | `25%`, `25 percent` | 25, as written | None |
    | `3/4`, `2 1/2`, `-\frac{3}{4}`, `\frac34` | 0.75, 2.5, -0.75, 0.75 | None |
    | `3/0`, `3/4/2020` | None | None |
    | `nan`, `inf`, `1e999` | None | a number, so 0.1 |
    | `−10` (Unicode minus), `＋１０` (full width) | -10, 10 | None, None |
    | `- 10` | None: a list item or a minus | None |
    | `١٠` (any script's decimal digits) | 10 | same |
    | `10²`, `½`, `10万` | None: numerals, but no digits | None |
    | `10 apples`, `10. It is right.`, `10km` | 10 | None |
    | `10 or 12`, `10, 12`, `10-12`, `10:30` | None: more than one | None |
    | `5 + 5`, `10^2`, `5x`, `2\sqrt{3}`, `2 million`, `0x10` | None: no plain number | None |
    | `x = 10`, `about 10` | None: the number must come first | None |
    | `**10**`, `<10>`, `\(10\)`, `"10"` | 10 | None |
    | no trigger, `10 apples` or `It is 10` | None, unless `last_number` | None |

    Args:
        text (`str`):
            What the model wrote. Any string will do.
        trigger (`str` or `list[str]`, *optional*):
            What announces the answer, see [`find_answer`].
        require_trigger (`bool`, *optional*, defaults to `False`):
            Whether a text without a trigger answers nothing, even if it is just a number.
        last_number (`bool`, *optional*, defaults to `False`):
            Whether the last number of a text without a trigger is its answer.
    """
    stated = find_answer(text, trigger)
    if stated is not None:
        return _read(_STATED.match(stated := stated.translate(_ASCII)), stated)
    if require_trigger:
        return None
    reply = spoken_text(text).strip().translate(_ASCII)
    if last_number:
        found = None
        for found in _ANYWHERE.finditer(reply):  # noqa: B007
            pass
        return _read(found, reply)
    return _read(_WHOLE.fullmatch(reply), "")


def _read(found: re.Match | None, text: str) -> float | None:
    """The number of a match of `_VALUE` in `text`, if nothing after it makes it another one."""
    if found is None or _CONTINUES.match(text, found.end()) or text[found.end() : found.end() + 1].isnumeric():
        return None
    group = found.groupdict()
    whole = _plain(group["frac_whole"] or group["mixed_whole"] or "0")
    top = _plain(group["number"] or group["frac_top"] or group["digit_top"] or group["mixed_top"] or group["top"])
    below = group["frac_bottom"] or group["digit_bottom"] or group["mixed_bottom"] or group["bottom"]
    bottom = _plain(below or "1")
    if whole is None or top is None or not bottom:
        return None
    number = whole + top / bottom
    if not math.isfinite(number):
        return None
    return -number if "-" in group["prefix"] else number


def _plain(digits: str) -> float | None:
    """What `_NUMBER` matched, unless its commas do not part thousands. Not `int`, which refuses long texts."""
    first, *thousands = re.split(_SEPARATOR, re.split(r"[.eE]", digits.lstrip("-"), maxsplit=1)[0])
    if thousands and (len(first) > 3 or any(len(group) != 3 for group in thousands)):
        return None
    number = float(re.sub(_SEPARATOR, "", digits))
    return number if math.isfinite(number) else None


def numbers_equal(a: float, b: float, tolerance: float = 1e-2) -> bool:
    """
    Returns whether two numbers are the same answer:

        |a - b| <= tolerance + 1e-12 * max(|a|, |b|)

    The absolute 1e-2 is ReFT's. The relative term only covers rounding: it makes the bound inclusive for decimals (1
    and 1.01), and from about 1e10 on it exceeds the tolerance, where floats no longer hold the decimals that were
    written. Integers below 1e11 are told apart. Nothing equals nan or an infinity.
    """
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    return abs(a - b) <= tolerance + 1e-12 * max(abs(a), abs(b))
