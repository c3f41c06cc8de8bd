# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a recipe of several stages ends with: a table, a picture, `metrics.json`, results in the model cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .evaluation import Interval, markdown_table
from .plots import plot_accuracy, plot_measures


RESULTS = "\n## Results\n"


def report_stages(
    output_dir: str | Path,
    table: Mapping[str, Mapping[str, Interval]],
    title: str,
    *,
    folders: Iterable[str | Path] = (),
    label: str = "accuracy",
    shares: bool = True,
    more: Mapping[str, Any] | None = None,
) -> None:
    """
    Write `metrics.json` and a picture, print the table, and add it and the picture to the stages' model cards. The
    main process does, for all.

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
        shares (`bool`, *optional*, defaults to `True`):
            Whether all measures are shares, drawn side by side in `accuracy.png`; else `measures.png` has a panel for
            each.
        more (`Mapping[str, Any]`, *optional*):
            What else `metrics.json` shall hold, beside the table.
    """
    if not PartialState().is_main_process:
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = {measure: {stage: asdict(value) for stage, value in row.items()} for measure, row in table.items()}
    (output_dir / "metrics.json").write_text(json.dumps({**metrics, **(more or {})}, indent=2))
    picture = output_dir / ("accuracy.png" if shares else "measures.png")
    (plot_accuracy if shares else plot_measures)(table, picture, title, label)
    text = markdown_table(table, "model")
    add_to_cards(folders, f"{title}, mean [95% interval]:\n\n{text}", picture)
    print(text)


def add_to_cards(folders: Iterable[str | Path], results: str, picture: Path) -> None:
    """Make `results`, Markdown, and `picture` the last section of the folders' model cards, if they have one."""
    for folder in map(Path, folders):
        if (folder / "README.md").exists():
            shutil.copyfile(picture, folder / picture.name)  # a card is read where its folder is pushed to
            add_results(folder, f"{results}\n\n![Results]({picture.name})")


def add_results(folder: str | Path, results: str) -> None:
    """Make `results`, Markdown, the last section of the model card in `folder`, in place of an earlier one."""
    card = Path(folder) / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8").split(RESULTS)[0].rstrip("\n")
        card.write_text(f"{text}\n{RESULTS}\n{results}\n", encoding="utf-8")
