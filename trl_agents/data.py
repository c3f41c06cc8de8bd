# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Questions with one right answer, as ReFT (https://huggingface.co/papers/2401.08967) trains on them: GSM8K, SVAMP and
MathQA brought to one form, a generator of arithmetic word problems that needs no network, ReFT's texts for training.

Every row has `question`, `rationale` and `answer`, all text. A numeric answer is a plain number ("72", "-3", "0.5"),
that of a multiple choice question its lower-case letter. Some rows also have a `program` that computes the answer.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .arithmetic import arithmetic_problems, program_opening
from .envs.names import close_to
from .question_rows import from_common, from_gsm8k, from_math_qa, from_reft, from_svamp
from .question_rows import number_text as number_text
from .question_rows import option_number as option_number


if TYPE_CHECKING:
    from datasets import Dataset

ANSWER_TRIGGER = "\nTherefore, the answer is: "

# -- loading ----------------------------------------------------------------------------------------------------------

_HUB: dict[str, tuple[tuple[str, ...], Callable]] = {
    "gsm8k": (("openai/gsm8k", "main"), from_gsm8k),
    "svamp": (("ChilleD/SVAMP",), from_svamp),
    "math_qa": (("allenai/math_qa",), from_math_qa),
}
# For a dataset kept as a loading script, which `datasets` no longer runs: the same rows as parquet
# (compared in https://github.com/EleutherAI/lm-evaluation-harness/pull/3943)
_MIRRORS = {"allenai/math_qa": "regisss/math_qa"}

# The columns that tell a schema, most telling first
_SCHEMAS: list[tuple[str, set[str], Callable]] = [
    ("MathQA", {"Problem", "options", "correct"}, from_math_qa),
    ("SVAMP", {"Body", "Question", "Answer"}, from_svamp),
    ("SVAMP joined", {"question_concat", "Answer"}, from_svamp),
    ("ReFT", {"question", "answer_value"}, from_reft),
    ("GSM8K or plain", {"question", "answer"}, from_common),
]


def as_settings(value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Settings of a YAML, or the JSON that the command line has in their place."""
    try:
        settings = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{value!r} is no JSON ({error}): write settings as '{{\"n\": 100}}'.") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{value!r} names no settings: write them as '{{\"n\": 100}}'.")
    return dict(settings)


def load_questions(name: str | Path, split: str = "train", *, numeric: bool = False, **settings: Any) -> Dataset:
    """
    Load one of the datasets, or a file in the schema of one of them.

    Rows that cannot be used are dropped; one warning counts them by reason.

    Args:
        name (`str` or `Path`):
            "gsm8k", "svamp", "math_qa", "math_qa_numeric" (from the Hub), "arithmetic" ([`arithmetic_problems`]), or
            the path of a .json, .jsonl, .csv or .parquet file. A file's schema is told by its columns: those of the
            datasets, or `question` and `answer` with, optionally, `rationale` and `program`.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset. The splits of "arithmetic" ("train", "validation", "test") share no question. A file
            is one split, whatever this says.
        numeric (`bool`, *optional*, defaults to `False`):
            For MathQA, its file or "math_qa": as in [`from_math_qa`]. "math_qa_numeric" says the same.
        **settings:
            For "arithmetic": arguments of [`arithmetic_problems`]. `n` defaults to 1,000.

    Returns:
        `Dataset` with the columns `question`, `rationale`, `answer`, and `program` where there are programs.

    Raises:
        `ValueError`: for an unknown name, an unknown schema, or if no row is left.
    """
    if name == "arithmetic":
        known = inspect.signature(arithmetic_problems).parameters.keys() - {"split"}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(
                f'{", ".join(unknown)}: no setting of "arithmetic", choose from {", ".join(sorted(known))}.'
            )
        return arithmetic_problems(**{"n": 1000, **settings, "split": split})
    if settings:
        raise ValueError(f'{", ".join(settings)}: only "arithmetic" has such settings, not {str(name)!r}.')
    if name == "math_qa_numeric":
        name, numeric = "math_qa", True
    if name in _HUB:
        hub_arguments, convert = _HUB[name]
        rows = _load_from_hub(*hub_arguments, split=split)
    else:
        path = Path(name)
        if path.suffix not in _READERS:
            known, files = [*_HUB, "math_qa_numeric", "arithmetic"], ", ".join(_READERS)
            raise ValueError(
                f"{str(name)!r} is unknown: choose one of {', '.join(known)}, or a file ({files})."
                f"{close_to(str(name), known)}"
            )
        try:
            rows = _READERS[path.suffix](path)
        except (ValueError, csv.Error) as error:  # not text, or not what its name says
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not rows:
            raise ValueError(f"{path} has no row.")
        convert = _converter_of(rows, str(name))
    if numeric and convert is not from_math_qa:
        raise ValueError(f"`numeric=True` is for the options of MathQA, and {str(name)!r} has none.")
    return _convert_rows(rows, partial(convert, numeric=True) if numeric else convert, str(name))


def _load_from_hub(path: str, *config: str, split: str) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(path, *config, split=split)
    except RuntimeError as error:
        if path not in _MIRRORS or "script" not in str(error):
            raise
        return load_dataset(_MIRRORS[path], *config, split=split)


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        is_list = text.lstrip().startswith("[")
        # Not `splitlines`: JSON's texts may hold other ends of lines as they are, such as U+2028
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"neither a list of objects nor an object a line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds other things than objects.")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from datasets import Dataset

    with TemporaryDirectory() as cache:  # `datasets` writes a copy, which nothing reads again
        return Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()


_READERS = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _converter_of(rows: list[dict[str, Any]], source: str) -> Callable:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for _, needed, convert in _SCHEMAS:
        if needed <= set(columns):
            has_marks = convert is from_common and any("####" in str(row.get("answer")) for row in rows)
            return from_gsm8k if has_marks else convert
    known = "; ".join(f"{schema}: {', '.join(sorted(needed))}" for schema, needed, _ in _SCHEMAS)
    raise ValueError(f"{source} has the columns {columns}. Known schemas are {known}.")


def _convert_rows(rows: Iterable[Mapping[str, Any]], convert: Callable, source: str) -> Dataset:
    from datasets import Dataset

    converted, dropped = [], {}
    for index, row in enumerate(rows):
        try:
            question, reason = convert(row), "the right option is no plain number"
        except ValueError as error:
            question, reason = None, str(error)
        if question is None:
            dropped.setdefault(reason, []).append(index)
        else:
            converted.append(question)
    reasons = "; ".join(f"{len(found)}: {reason} (first: row {found[0]})" for reason, found in dropped.items())
    if not converted:
        raise ValueError(f"{source} has no usable row. {reasons}")
    if dropped:
        n_dropped = sum(map(len, dropped.values()))
        warnings.warn(f"{source}: dropped {n_dropped} of {len(converted) + n_dropped} rows. {reasons}", stacklevel=3)
    columns = list(dict.fromkeys(column for question in converted for column in question))
    return Dataset.from_dict({column: [question.get(column, "") for question in converted] for column in columns})


# -- texts for training -----------------------------------------------------------------------------------------------

_PROGRAM_OPENING = re.compile(
    r'\s*def solution\(\):[ \t]*\n(?:[ \t]*"""(?:\\.|(?!""").)*"""[ \t]*(?:\n|$))?', re.DOTALL
)


def prompt_completion(dataset: Dataset, style: str = "words") -> Dataset:
    r"""
    Add ReFT's texts as columns `prompt` and `completion`: what `SFTTrainer` warms up on, and what RL starts from.

    - `"words"`: the prompt is "Question:\n{question}\nAnswer reasoning:\n", the completion the rationale and the
      answer after `ANSWER_TRIGGER`. A row without rationale is completed by the answer alone.
    - `"program"`: the prompt goes on with the opening of a program whose docstring is the question, the completion is
      the rest of the column `program`. In the docstring (only there) blank lines are left out, since ReFT runs a
      program up to its first one, backslashes are doubled, and triple quotes become single ones, so that any question
      leaves the program valid.

    Args:
        dataset (`Dataset`):
            Columns `question` and `answer`, and `rationale` or `program`.
        style (`str`, *optional*, defaults to `"words"`):
            `"words"` or `"program"`.

    Returns:
        `Dataset` with all the columns of `dataset` and the two.

    Raises:
        `ValueError`: for an unknown style, missing columns, or a program that does not begin with `def solution():`.
    """
    if style not in ("words", "program"):
        raise ValueError(f'`style` must be "words" or "program", got {style!r}.')
    needed = ["question", "answer"] + (["program"] if style == "program" else [])
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f'style="{style}" needs the columns {needed}: {missing} are missing among {dataset.column_names}.'
        )
    prompts, completions = [], []
    for index, row in enumerate(dataset):
        prompt = f"Question:\n{row['question'].strip()}\nAnswer reasoning:\n"
        if style == "program":
            prompt += program_opening(row["question"])
            completion = _program_body(row["program"], index)
        else:
            completion = f"{row.get('rationale') or ''}{ANSWER_TRIGGER}{row['answer']}"
        prompts.append(prompt)
        completions.append(completion)
    return with_texts(dataset, prompts, completions)


def with_texts(dataset: Dataset, prompts: list[str], completions: list[str]) -> Dataset:
    """`dataset` with these texts in its columns `prompt` and `completion`, in place of any that it has."""
    kept = dataset.remove_columns([name for name in ("prompt", "completion") if name in dataset.column_names])
    return kept.add_column("prompt", prompts).add_column("completion", completions)


def _program_body(program: str | None, index: int) -> str:
    opening = _PROGRAM_OPENING.match(program or "")
    body = [line for line in program[opening.end() :].splitlines() if line.strip()] if opening else []
    if not body:
        raise ValueError(f"The program of row {index} must be `def solution():` and a body, got {program!r}.")
    return "\n".join(body)
