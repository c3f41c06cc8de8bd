# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Text -> [`ParsedAction`]. What a model wrote is data: no text raises, and none takes longer than it may.

The paper ("LLMs are Greedy Agents", https://huggingface.co/papers/2504.16078) takes the last `ACTION=X` by "a stack of
regexes". Here the stack finds where an action is stated; the legal actions then tell where its name ends.
"""

from __future__ import annotations

import math
import re
import time
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import regex  # a dependency of transformers; unlike `re`, it can be interrupted

from .patterns import HOLE, skeleton
from .types import InvalidReason, ParsedAction


# "ACTION=" may be glued to what precedes it; the laxer forms may not, or "Reaction: ..." would state an action.
_HEAD = r"""(?:ACTION=|(?<![^\W_])ACTION[\s*_`"'“”]{0,8}[=:＝：])"""

# The statement runs to the end of its line or to the next head, so that the last of two on one line is found. The
# possessive quantifiers keep it linear. A bold header may stand on a line of its own.
DEFAULT_PATTERN = rf"(?i){_HEAD}(?:[*_]{{2}}[^\S\n]*\n)?\s*+(?P<action>(?:[^\nA]++|A(?!CTION)|(?!{_HEAD})A)++)"

DEFAULT_TEMPLATE = "ACTION={action}"

_QUOTES = "\"'`´“”„‘’‚«»‹›"
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">", "（": "）", "【": "】", "「": "」", "《": "》"}
_WRAPPERS = frozenset(_QUOTES + "*_~=: " + "".join(_BRACKETS) + "".join(_BRACKETS.values()))
_MAX_WRAPPERS = 16
_PUNCTUATION = ".,;:!?…。，！？"
_TYPOGRAPHY = str.maketrans("‘’“”‐‑", "''\"\"--")
# A name ends neither inside a word nor before a joiner that leads on: "green-ish", "10.5" and "green's" are others.
_NAME_ENDS = regex.compile(r"(?![^\W_]|_+[^\W_]|\+|[-'.,:/&@⁄][^\W_])")


def _spell(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()).translate(_TYPOGRAPHY))


class _Names:
    """The legal actions by their folded spelling. Which of them does a captured text begin with?"""

    def __init__(self, legal_actions: Sequence[str]):
        self.by_key: dict[str, list[str]] = {}
        for name in dict.fromkeys(legal_actions):
            if not isinstance(name, str):
                raise ValueError(f"Legal actions are strings, got {name!r}: pass `str({name!r})` if that is its name.")
            if key := _spell(name).casefold():
                self.by_key.setdefault(key, []).append(name)
        self.lengths = sorted({len(key) for key in self.by_key}, reverse=True)

    def goes_on(self, action: str) -> bool:
        """Whether the name of another action begins with that of `action`."""
        own = _spell(action).casefold()
        return any(key.startswith(own) and key != own for key in self.by_key)

    def read(self, captured: str, unfinished: bool) -> str | None:
        """Returns the legal action stated by `captured`, which is `unfinished` if the text was cut off there."""
        longest = self.lengths[0] if self.lengths else 0
        # Clipped before it is normalised: NFC is quadratic in runs of combining marks.
        spelled = _spell(" ".join(captured.split())[: 4 * longest + 64])
        folded = spelled.casefold()
        for start in range(min(len(folded), _MAX_WRAPPERS + 1)):
            for length in self.lengths:
                end = start + length
                if end > len(folded) or not (names := self.by_key.get(folded[start:end])):
                    continue
                if not _NAME_ENDS.match(folded, end):
                    continue
                rest = folded[start:]
                if unfinished and end < len(folded) and any(key.startswith(rest) for key in self.by_key):
                    return None  # "green app", cut off, is not "green"
                if len(names) > 1:
                    names = [name for name in names if spelled.startswith(_spell(name), start)]
                return names[0] if len(names) == 1 else None
            if folded[start] not in _WRAPPERS:
                return None
        return None


_cached_names = lru_cache(maxsize=32)(_Names)


def _names(legal_actions: Sequence[str]) -> _Names:
    if isinstance(legal_actions, str):
        raise ValueError(f"`legal_actions` is a list of strings, got {legal_actions!r}: pass [{legal_actions!r}].")
    try:
        return _cached_names(tuple(legal_actions))
    except TypeError as error:
        raise ValueError(f"`legal_actions` is a list of strings, got {legal_actions!r} ({error}).") from error


def _trim(captured: str) -> str:
    """Takes quotes, brackets, emphasis, trailing punctuation and end-of-text tags off an action."""
    text = captured
    for _ in range(8):
        before = text
        text = re.sub(r"(?:</\w{1,32}>|<[|｜][^<>]{1,64}[|｜]>)\Z", "", text.strip()).rstrip(_PUNCTUATION)
        text = text.strip(_QUOTES + "*~")
        for opener, closer in _BRACKETS.items():
            surplus = text.count(opener) - text.count(closer)
            if text.startswith(opener) and surplus > 0:
                text = text[1:]
            elif text.endswith(closer) and surplus < 0:
                text = text[:-1]
            elif text.startswith(opener) and text.find(closer) == len(text) - 1:
                text = text[1:-1]
        if text == before:
            break
    return text or captured


class ActionParser:
    r"""
    Takes the action out of what a model wrote, by a stack of regular expressions.

    Where the action is stated:

    1. The first pattern of the stack that matches anything decides; later ones are for texts without it.
    2. Of its matches the last in the text decides, also one that starts inside another's capture ("ACTION=red ...
       ACTION=blue" on one line, whatever the pattern captures). A match with an empty or blank capture does not count.
    3. There is no way back: if the last statement is not legal, the reply is not, whatever it mentions before.

    Which action that is, when the legal actions are known: the longest legal name that the capture begins with, and
    that ends there. Compared without case, with runs of whitespace as one, curly quotes as straight ones, and accents
    in either Unicode form. Wrappers (quotes, brackets, `*`, `_`, `~`, `=`, `:`) before the name are skipped, at most
    16, unless a name begins with them. A name does not end inside a word, nor before a `+`, nor before one of
    `-'.,:/&@_` with a letter or digit right after it; what else follows is ignored.

    | Text | Legal | Action |
    |---|---|---|
    | `ACTION = green`, `Action: [green]`, `**ACTION="Green".**`, `ACTION=green because ...` | green | green |
    | `ACTION=green apple pie` | green, green apple | green apple |
    | `ACTION=greenish`, `ACTION=green-ish`, `ACTION=the green one` | green | None: `illegal` |
    | `ACTION=10`, `ACTION=1.5` | 1 | None: `illegal` |
    | `ACTION=a`, legal names that differ by case only | a, A | a: the exact spelling |
    | `ACTION=GO`, no exact spelling | go, Go | None: `illegal`, because ambiguous |
    | `ACTION=red, no: ACTION=mauve` | red | None: `illegal` |
    | `ACTION=gre`, cut off | green | None: `cut_off` |
    | `ACTION=green app`, cut off | green, green apple | None: `cut_off` |
    | `ACTION=1`, cut off: complete as it stands | 1, 10 | 1 |

    Without legal actions the capture itself is the action, less the wrappers and punctuation around it.

    Args:
        patterns (`str` or `list[str]`, *optional*):
            Regular expressions, used as written: `(?i)` makes one ignore case. The group named `action`, else the
            first one, captures the action. By default the paper's `ACTION=X` in any case, with `:` for `=`, and with
            spaces, quotes or emphasis around it.
        template (`str`, *optional*):
            How to state an action, such as `"ACTION={action}"`: what [`~ActionParser.format`] renders. By default
            worked out from the patterns.
        timeout (`float`, *optional*, defaults to `1.0`):
            Seconds of this process's computing time that one text may take, all patterns together. Only a pattern that
            backtracks without end comes near it; the text then counts as one without a match.
    """

    def __init__(
        self, patterns: str | Sequence[str] | None = None, *, template: str | None = None, timeout: float = 1.0
    ):
        if patterns is None:
            patterns = [DEFAULT_PATTERN]
        elif isinstance(patterns, str):
            patterns = [patterns]
        if not isinstance(patterns, (list, tuple)) or not patterns:
            raise ValueError(
                f"`patterns` is a regular expression or a list of at least one, got {patterns!r}: pass for example "
                r"['ACTION=(\w+)'], or None for the default."
            )
        self.patterns = tuple(patterns)
        self._compiled = tuple(self._compile(pattern) for pattern in patterns)

        if template is not None and (not isinstance(template, str) or template.count(HOLE) != 1):
            raise ValueError(
                f"`template` is a text with '{HOLE}' in it once, got {template!r}: pass for example "
                f"{DEFAULT_TEMPLATE!r}."
            )
        self.template = template
        if template is not None:
            self._templates = (template,)
        elif self.patterns == (DEFAULT_PATTERN,):
            self._templates = (DEFAULT_TEMPLATE,)
        else:
            skeletons = [skeleton(pattern.pattern, group) for pattern, group in self._compiled]
            candidates = dict.fromkeys([*skeletons, DEFAULT_TEMPLATE, HOLE])
            self._templates = tuple(text for text in candidates if text.count(HOLE) == 1)

        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise ValueError(f"`timeout` is a positive number of seconds, got {timeout!r}: pass for example 1.0.")
        self.timeout = timeout

    @staticmethod
    def _compile(pattern: str) -> tuple[regex.Pattern, int]:
        if not isinstance(pattern, str):
            raise ValueError(f"A pattern is a string, got {pattern!r}: of a compiled one, pass its `.pattern`.")
        try:
            compiled = regex.compile(pattern)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"The pattern {pattern!r} is not a regular expression ({error}): mend it.") from error
        if compiled.groups == 0:
            raise ValueError(
                f"The pattern {pattern!r} has no group, so it captures no action: put the action's part in brackets, "
                r"as in 'ACTION=(\w+)'."
            )
        return compiled, compiled.groupindex.get("action", 1)

    def parse(self, text: str, legal_actions: Sequence[str] | None = None, *, cut_off: bool = False) -> ParsedAction:
        """
        Returns the action that `text` states, as the environment spells it, or the reason why there is none.

        Args:
            text (`str`):
                What the model wrote. Any string will do.
            legal_actions (`list[str]`, *optional*):
                The actions to choose from. If `None`, any action is legal.
            cut_off (`bool`, *optional*, defaults to `False`):
                Whether the text ran into its token budget. If it then holds no legal action, that is the reason.
        """
        if not isinstance(text, str):
            raise TypeError(f"The text to parse is a string, got {type(text).__name__}: decode it first.")
        return self._parse(text, None if legal_actions is None else _names(legal_actions), cut_off)

    def is_complete(self, text: str, legal_actions: Sequence[str] | None = None) -> bool:
        """
        Whether `text`, which is still being written, states an action that its next characters cannot change: a
        legal one, and its name is over. (Another statement after it could: the last one counts.)

        | Text so far | Legal | Complete |
        |---|---|---|
        | `ACTION=green`, and `ACTION=green-` | green | no: greenish, green-ish |
        | `ACTION=green because`, `ACTION=green.` and a new line | green | yes |
        | `ACTION=green ` | green, green apple | no |
        | `<answer>12</answer>`, read by `<answer>(.*?)</answer>` | any | yes |

        Args:
            text (`str`):
                What the model wrote so far.
            legal_actions (`list[str]`, *optional*):
                The actions to choose from. If `None`, any action is legal.
        """
        names = None if legal_actions is None else _names(legal_actions)
        span = self._span(text)
        action = self._read(text, span, names, True).action
        if action is None:
            return False
        if span[1] < len(text):
            return True  # the pattern went past the end of the action
        if names is None or names.goes_on(action):
            return False
        return all(self._parse(text + more, names, True).action == action for more in "a0")

    def format(self, action: str) -> str:
        """
        Returns a text that states `action` and is parsed back to it, by default `"ACTION=<action>"`.

        Raises a `ValueError` if there is none: no pattern can produce the action.
        """
        names = _Names([action])
        for template in self._templates:
            text = template.replace(HOLE, " ".join(action.split()))
            if self._parse(text, names, False).action == action:
                return text
        raise ValueError(
            f"No pattern can produce the legal action {action!r}: none of {list(self.patterns)} reads it back from "
            f"{[template.replace(HOLE, action) for template in self._templates]}. Widen what the group captures, "
            f"rename the action, or pass `template=` (a text with '{HOLE}' in it) to show how a reply states one."
        )

    def check_legal_actions(self, legal_actions: Sequence[str]) -> None:
        """
        Raises a `ValueError` if some legal action can never be played, so that a misfit shows before training.

        Args:
            legal_actions (`list[str]`):
                The environment's actions.
        """
        names = _names(legal_actions)
        for action in legal_actions:
            text = self.format(action)
            parsed = self._parse(text, names, False)
            if parsed.action != action:
                raise ValueError(
                    f"The legal action {action!r} can never be played: among the legal actions {text!r} reads as "
                    f"{parsed.action!r} with the patterns {list(self.patterns)}. Rename the action, or widen what the "
                    "group captures."
                )

    def _parse(self, text: str, names: _Names | None, cut_off: bool) -> ParsedAction:
        return self._read(text, self._span(text), names, cut_off)

    def _span(self, text: str) -> tuple[int, int] | None:
        try:
            return self._find(text)
        except (TimeoutError, MemoryError, RuntimeError):  # a pattern that backtracks without end
            return None

    @staticmethod
    def _read(text: str, span: tuple[int, int] | None, names: _Names | None, cut_off: bool) -> ParsedAction:
        if span is None:
            return ParsedAction(None, InvalidReason.CUT_OFF if cut_off else InvalidReason.NO_MATCH)
        start, end = span
        matched = text[start:end].strip()
        action = _trim(matched) if names is None else names.read(matched, unfinished=cut_off and end == len(text))
        if action is None:
            return ParsedAction(None, InvalidReason.CUT_OFF if cut_off else InvalidReason.ILLEGAL, matched)
        return ParsedAction(action, None, matched)

    def _find(self, text: str) -> tuple[int, int] | None:
        # regex's timeout, too, counts the process's computing time: a busy machine does not change what is found.
        deadline = time.process_time() + self.timeout
        for pattern, group in self._compiled:
            found = None
            match = self._last(pattern, group, text, 0, deadline)
            while match:
                found = match
                # A greedy group swallows later statements on its line. Only a match with something before its group is
                # a statement of its own: "reen" is not one within "green".
                match = None
                if found.start() < found.start(group):
                    inner = self._last(pattern, group, text, found.start(group), deadline)
                    if inner and inner.start() < inner.start(group):
                        match = inner
            if found:
                return found.span(group)
        return None

    @staticmethod
    def _last(pattern: regex.Pattern, group: int, text: str, start: int, deadline: float) -> regex.Match | None:
        seconds = deadline - time.process_time()
        if seconds <= 0:
            raise TimeoutError
        last = None
        for match in pattern.finditer(text, start, timeout=seconds):
            captured = match[group]
            if captured and not captured.isspace():
                last = match
        return last

    def _key(self) -> tuple:
        return self.patterns, self.template, self.timeout

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, ActionParser) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        shown = {
            "patterns": None if self.patterns == (DEFAULT_PATTERN,) else list(self.patterns),
            "template": self.template,
            "timeout": None if self.timeout == 1.0 else self.timeout,
        }
        arguments = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"{type(self).__name__}({arguments})"
