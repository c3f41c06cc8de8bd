# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`trl-agents view`: episodes as a page to read."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from ..viewer import read_records, write_page
from .named import close_to


HELP = "write a page to read episodes on"
DESCRIPTION = (
    "Write a static page (one HTML file that needs no network) on which episodes are read turn by turn, searched and\n"
    "filtered. PATH is an episodes file (.jsonl) or the folder of a run, all of whose episodes files are shown; a\n"
    "folder with diagnostics.json gets its report.html as well, unless it has one that is up to date."
)
EXAMPLES = """\
examples:
  trl-agents view outputs/eval --open
  trl-agents view logged.jsonl --output /tmp/logged.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="an episodes file, or the folder of a run")
    parser.add_argument("--output", metavar="FILE", help="page to write (default: .html beside the file)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path).expanduser()
    if not path.exists():
        siblings = [str(one) for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"There is no file or folder {args.path}.{close_to(str(path), siblings)}")
    pages = []
    if path.is_dir():
        records = read_folder(path)
        default = path / "episodes.html"
    else:
        records, default = read_records(path, player=path.stem), path.with_suffix(".html")
    if records:
        output = Path(args.output).expanduser() if args.output else default
        pages.append(_write(output, records, title=str(path)))
        print(f"{len(records)} episode{'' if len(records) == 1 else 's'}: {pages[-1]}")
    if path.is_dir() and (path / "diagnostics.json").exists():
        pages.append(_report(path))
        print(f"Report: {pages[-1]}")
    if not pages:
        raise ValueError(f"The folder {args.path} holds no episodes file (.jsonl): give one, or the folder of a run.")
    if args.open:
        webbrowser.open(pages[-1].resolve().as_uri())
    return 0


def _report(folder: Path) -> Path:
    """The report of a diagnosis. One that is up to date may compare with others, which the folder does not know."""
    report, figures = folder / "report.html", folder / "diagnostics.json"
    if report.exists() and report.stat().st_mtime_ns >= figures.stat().st_mtime_ns:
        return report
    from ..diagnostics.report import write_report

    return write_report([folder])


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """
    The episodes of all files of a run, which go by the name of their file where they do not say who played. Other
    `.jsonl` files are passed over, unless there are no others.
    """
    records: list[dict[str, Any]] = []
    problem = None
    for path in sorted(folder.rglob("*.jsonl")):
        try:
            records += read_records(path, player=str(path.relative_to(folder).with_suffix("")))
        except ValueError as error:
            problem = problem or error
    if not records and problem:
        raise problem
    return records


def _write(path: Path, records: list[dict[str, Any]], title: str) -> Path:
    try:
        return write_page(path, records, title=title)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another with --output.") from None
