# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rewards for answers that are programs (ReFT's P-CoT, https://huggingface.co/papers/2401.08967): the completion defines
`def solution(): ... return result`, it is run, and what it returns is compared with the correct answer.

What differs from ReFT's code: programs run behind walls (`sandbox.py`) and not with full rights; a blank line does not
end a program; nan, infinities and bools are no answers; in multiple choice there is no reward for a wrong one.
"""

from __future__ import annotations

import ast
import re
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .answers import find_number, numbers_equal
from .choice import gold_choice
from .completions import answer_column, completion_texts, variant_name
from .numeric import gold_number
from .program_check import MAX_SOURCE, check_program, parse_quietly
from .sandbox import ProgramResult, ProgramRunner


__all__ = [
    "ProgramResult",
    "ProgramRunner",
    "check_program",
    "get_program_reward",
    "program_of",
    "program_reward",
]

# The kinds of failure; a reason is one of them, or one and ": " and more.
FAILURES = (
    *("too long", "too deep", "syntax", "forbidden", "timeout", "memory"),
    *("error", "no result", "not a number", "crash"),
)

_FENCE = re.compile(r"^[ \t]*```[^\n]*(?:\n|\Z)", re.MULTILINE)
_DEF = re.compile(r"^def\s+(\w+)\s*\(", re.MULTILINE)
_BEGINS = re.compile(r"(?:def\s+\w+\s*\(|@\w|import\s+\w|from\s+[\w.]+\s+import\b|[A-Za-z_]\w*\s*=[^=])")
_GOES_ON = re.compile(r"(?:def\s+\w+\s*\(|@\w|import\s+\w|from\s+[\w.]+\s+import\b|#|[)\]}])")
_BODY = re.compile(r"\n([ \t]+)\S")
_QUOTES = re.compile(r'"""|\'\'\'')


def program_of(completion: Any, prompt: Any = None) -> str:
    '''
    The program in a completion. Never raises on a text.

    - If `prompt` ends in the beginning of a function (ReFT's `def solution():` and its docstring; what follows the
      last `def` at the start of a line must be a function that has not returned yet), the program begins there and
      the completion goes on, its first line indented if need be. A completion that begins with a `def`, or defines
      that function itself, stands alone.
    - Otherwise the program begins at the completion's first line that is a `def`, an `import`, a decorator or an
      assignment; text before it is dropped.
    - Code fences: the first fenced block is the program, closed or not. But a completion that begins with an indented
      line goes on with the prompt's function until the first fence.
    - After the first `def`, the first line at column 0 ends the program, unless it is another `def`, an `import`, a
      decorator, a comment or a closing bracket, or stands in a triple-quoted text.

    Args:
        completion (`str` or `list[dict]`):
            What the model wrote; of a conversation, the last message.
        prompt (`str` or `list[dict]`, *optional*):
            What it was to continue; of a conversation, the last message if it is the assistant's.

    Example:
    ```python
    >>> from trl_agents.rewards.programs import program_of

    >>> program_of("    return 6 * 7\\nThat is all.", prompt='Answer:\\ndef solution():\\n    """6 times 7?"""\\n')
    'def solution():\\n    """6 times 7?"""\\n    return 6 * 7'
    ```
    '''
    text = _text(completion)
    head, indent = _begun_function(prompt)
    fences = list(_FENCE.finditer(text))
    if fences and head and _first_line(text[: fences[0].start()]).startswith((" ", "\t")):
        text = text[: fences[0].start()]
    elif fences:
        end = fences[1].start() if len(fences) > 1 else len(text)
        text = textwrap.dedent(text[fences[0].end() : end])
    first = _first_line(text)
    if head and not _DEF.match(first) and _DEF.match(head)[1] not in [found[1] for found in _DEF.finditer(text)]:
        goes_on = first.startswith((" ", "\t")) or head.endswith((" ", "\t"))
        text = head + text if goes_on else head + indent + text.lstrip()
    return _cut(text)


def _text(completion: Any) -> str:
    return completion_texts([completion])[0].replace("\r\n", "\n")


def _first_line(text: str) -> str:
    return next((line for line in text.split("\n") if line.strip()), "")


def _begun_function(prompt: Any) -> tuple[str, str]:
    """The end of `prompt`, from its last `def` on, if that is a function that goes on, and its indentation."""
    if isinstance(prompt, (list, tuple)):
        last = prompt[-1] if prompt else None
        prompt = prompt[-1:] if isinstance(last, dict) and last.get("role") == "assistant" else None
    text = _text(prompt) if prompt else ""
    # Not only the last: a docstring may hold a line that begins with "def".
    for start in [found.start() for found in _DEF.finditer(text)][:-4:-1]:
        head = text[start:]
        if len(head) > MAX_SOURCE:
            break
        body = _BODY.search(head)
        indent = body[1] if body else "    "
        try:
            functions = parse_quietly(f"{head.rstrip()}\n{indent}pass\n").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if len(functions) == 1 and not isinstance(functions[0].body[-2:][0], (ast.Return, ast.Raise)):
            return head if head.endswith(("\n", " ", "\t")) else head + "\n", indent
    return "", ""


def _cut(text: str) -> str:
    """`text` from its first line of code to the first line after the function that is none."""
    lines: list[str] = []
    quote, in_function = None, False  # the triple quote that is open
    for line in text.split("\n"):
        if quote is None and line[:1].strip():
            if not (_GOES_ON if in_function else _BEGINS).match(line):
                if in_function:
                    break
                if not lines:
                    continue
            in_function = in_function or line.startswith("def")
        if lines or line.strip():
            lines.append(line)
        for found in _QUOTES.finditer(line):
            if quote is None:
                quote = found[0]
            elif quote == found[0]:
                quote = None
    return "\n".join(lines).rstrip()


def program_reward(
    completions: list[str] | list[list[dict[str, Any]]],
    answer: list[str | float] | None = None,
    prompts: list[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """
    Reward function of ReFT's program answers: 1 if the program's function `solution` returns the correct number, 0.1
    if it returns another one, 0 if it fails in any way.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            What the model wrote: see [`program_of`] for where the program is.
        answer (`list[str]` or `list[float]`):
            The dataset's column of correct answers, read as in [`numeric_reward`].
        prompts (`list[str]` or `list[list[dict[str, Any]]]`, *optional*):
            Provided by the trainer: the function that a completion goes on with may begin there.
        log_metric (`callable`, *optional*):
            Provided by the trainer: logs `agents/program_<kind>_share` for each kind of failure (see
            [`ProgramResult`]), the share of completions that failed so.
        log_extra (`callable`, *optional*):
            Provided by the trainer: shows in the table of completions what each program returned, or its failure.
        **kwargs:
            The dataset's other columns, which this function does not use.

    Returns:
        `list[float | None]`: one reward a completion; `None`, which TRL skips, where `answer` holds no number.

    Example:
    ```python
    >>> from trl_agents.rewards import program_reward

    >>> right, wrong, failing = (f"def solution():\\n    return {value}" for value in ("6 * 7", "41", "1 / 0"))
    >>> program_reward([right, wrong, failing], answer=["42"] * 3)
    [1.0, 0.1, 0.0]
    ```
    """
    return _ProgramReward()(completions, answer, prompts, log_metric, log_extra, **kwargs)


def get_program_reward(
    partial: float = 0.1,
    runner: ProgramRunner | None = None,
    multiple_choice: bool = False,
    tolerance: float = 1e-2,
    entry: str = "solution",
) -> Callable:
    """
    Returns a variant of [`program_reward`].

    Args:
        partial (`float`, *optional*, defaults to `0.1`):
            Reward of a wrong number, from 0 (off) to less than 1.
        runner (`ProgramRunner`, *optional*):
            Runs the programs. By default one with default settings, made at first use and shared by all rewards.
        multiple_choice (`bool`, *optional*, defaults to `False`):
            Whether the answer is a letter, read as in [`choice_reward`]: then the returned text, without quotes and in
            any case, must be it, and there is no reward for a wrong one.
        tolerance (`float`, *optional*, defaults to `1e-2`):
            How far apart equal numbers may be, see [`numbers_equal`].
        entry (`str`, *optional*, defaults to `"solution"`):
            Name of the function that is called.
    """
    if not 0 <= partial < 1:
        raise ValueError(
            f"`partial` must lie between 0 and less than 1, the reward of a correct answer, got {partial}: pass for "
            "example 0.1, or 0 to reward correct answers only."
        )
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"`tolerance` must be finite and not negative, got {tolerance}: pass for example 1e-2.")
    if not entry.isidentifier():
        raise ValueError(f"`entry` is the name of a function, got {entry!r}: pass for example 'solution'.")
    return _ProgramReward(float(partial), runner, multiple_choice, float(tolerance), entry)


@dataclass(frozen=True)
class _ProgramReward:
    # A class: a closure could not be pickled
    partial: float = 0.1
    runner: ProgramRunner | None = None
    multiple_choice: bool = False
    tolerance: float = 1e-2
    entry: str = "solution"

    @property
    def __name__(self) -> str:
        names = ("partial", "multiple_choice", "tolerance", "entry")
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(type(self), name)}
        return variant_name("program_reward", **changed)

    def __call__(
        self, completions, answer=None, prompts=None, log_metric=None, log_extra=None, **kwargs
    ) -> list[float | None]:
        texts = completion_texts(completions)
        golds = answer_column(self.__name__, texts, answer)
        if prompts is None:
            prompts = [None] * len(texts)
        programs = [program_of(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        results = (self.runner or shared_runner()).run(programs, self.entry)
        golds = [(gold_choice if self.multiple_choice else gold_number)(gold) for gold in golds]
        if not self.multiple_choice:
            results = [_as_number(result) for result in results]
        if log_metric is not None and results:
            kinds = Counter(result.reason.partition(":")[0] for result in results if result.reason)
            for kind in FAILURES:  # also those at 0: TRL averages over what was logged
                log_metric(f"agents/program_{kind.replace(' ', '_')}_share", kinds[kind] / len(results))
        if log_extra is not None:
            log_extra(f"{self.__name__}_read", [result.reason or str(result.value) for result in results])
        return [self._score(result, gold) for result, gold in zip(results, golds, strict=True)]

    def _score(self, result: ProgramResult, gold: Any) -> float | None:
        if gold is None:
            return None
        if result.reason is not None:
            return 0.0
        if self.multiple_choice:
            return float(_letter(result.value) == gold.lower())
        return 1.0 if numbers_equal(result.value, gold, self.tolerance) else self.partial


def _as_number(result: ProgramResult) -> ProgramResult:
    """A text that spells a number counts as that number; another text is a failure."""
    if not isinstance(result.value, str):
        return result
    number = find_number(result.value)
    if number is None:
        return ProgramResult(reason="not a number", seconds=result.seconds)
    return ProgramResult(number, seconds=result.seconds)


def _letter(value: Any) -> str:
    return str(value).replace('"', "").replace("'", "").strip().lower()


_SHARED: ProgramRunner | None = None
_SHARED_LOCK = threading.Lock()


def shared_runner() -> ProgramRunner:
    global _SHARED
    with _SHARED_LOCK:
        if _SHARED is None:
            _SHARED = ProgramRunner()
        return _SHARED
