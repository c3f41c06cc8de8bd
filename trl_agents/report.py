# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a recipe of several stages ends with: a table, a picture, `metrics.json`, results in the model cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

from .evaluation import Interval, markdown_table
from .plots import plot_accuracy


PICTURE = "accuracy.png"
RESULTS = "\n## Results\n"


def report_stages(
    output_dir: str | Path,
    table: Mapping[str, Mapping[str, Interval]],
    title: str,
    *,
    folders: Iterable[str | Path] = (),
    label: str = "accuracy",
) -> None:
    """
    Write `metrics.json` and `accuracy.png`, print the table, and add both to the stages' model cards. The main process
    does, for all.

    Args:
        output_dir (`str` or `Path`):
            Where they are written.
        table (`Mapping[str, Mapping[str, Interval]]`):
            Measure -> stage -> [`Interval`].
        title (`str`):
            What was measured, for the picture and the cards: "500 test questions".
        folders (`Iterable[str | Path]`, *optional*):
            Of the stages' models. Those without a card (`README.md`) are passed over.
        label (`str`, *optional*, defaults to `"accuracy"`):
            Name of the picture's axis.
    """
    if not PartialState().is_main_process:
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = {measure: {stage: asdict(value) for stage, value in row.items()} for measure, row in table.items()}
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    plot_accuracy(table, output_dir / PICTURE, title, label)
    text = markdown_table(table, "model")
    for folder in map(Path, folders):
        add_results(folder, f"{title}, mean [95% interval]:\n\n{text}\n\n![{label}]({PICTURE})")
        if (folder / "README.md").exists():
            shutil.copyfile(output_dir / PICTURE, folder / PICTURE)
    print(text)


def add_results(folder: str | Path, results: str) -> None:
    """Make `results`, Markdown, the last section of the model card in `folder`, in place of an earlier one."""
    card = Path(folder) / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8").split(RESULTS)[0].rstrip("\n")
        card.write_text(f"{text}\n{RESULTS}\n{results}\n", encoding="utf-8")
