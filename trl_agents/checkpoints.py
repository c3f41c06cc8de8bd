# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Checkpoints that are whole or not there: written beside their place and moved into it, found again, and errors that
say what to do where the disk is full or refuses.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Of a checkpoint, `transformers.Trainer` writes this last.
STATE_FILE = "trainer_state.json"
# Where a checkpoint is until it is whole. Pushes to the Hub leave out what begins with `_`.
UNFINISHED = "_unfinished"
# What the RuntimeErrors of torch's own writer have in them.
TORCH_SIGNS = ("inline_container", "PytorchStreamWriter", "iostream")


class NotWritten(OSError):
    """What had to be saved could not be written: the disk is full, or refuses."""


def is_whole(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint that was written, and copied, to its end."""
    return unreadable_file(folder) is None


def unreadable_file(folder: str | Path) -> str | None:
    """
    The first file of a checkpoint that is not there to its end, with which resuming would fail much later and without
    a name; None if all are. Of tensors no more is read than where their file says that it ends.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for path in (Path(folder) / STATE_FILE, *files):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                return path.name
        except (OSError, ValueError, SafetensorError):
            return path.name
    return None


def last_checkpoint(folder: str | Path) -> str | None:
    """
    The latest of a folder's checkpoints, for `train(resume_from_checkpoint=...)`; None if there is none yet. One whose
    writing was interrupted is none.
    """
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()
    }
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if is_whole(steps[step])), None)


def find_checkpoint(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """
    The checkpoint to resume from.

    Args:
        asked (`str` or `bool`, *optional*):
            A checkpoint; or True for the latest whole one in `output_dir`, or `"auto"` for that if there is one. As a
            command line gives them, `"true"` and `"false"` are taken for what they say.
        output_dir (`str` or `Path`):
            The run's folder.

    Returns:
        `str`: its folder; None to begin anew.

    Raises:
        `ValueError`: if there is no such checkpoint, or it is not whole.
    """
    word = str(asked).lower()
    if word in ("none", "false", ""):
        return None
    found = last_checkpoint(output_dir)
    if word == "auto":
        return found
    if word == "true":
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint={asked!r}, but {str(output_dir)!r} holds no whole checkpoint: leave it out "
                "to begin anew, or use 'auto', which begins anew where there is none."
            )
        return found
    if missing := unreadable_file(asked):
        latest = f"The latest whole one in output_dir is {found!r}" if found else "output_dir has no whole one either"
        raise ValueError(
            f"resume_from_checkpoint={asked!r} is no whole checkpoint: it has no {missing} that can be read. {latest}."
        )
    return str(asked)


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def told_if_refused(what: str, folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """Raises [`NotWritten`] in the place of the many errors that a full disk gives; it says what is not lost."""
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        if not _of_writing(error):
            raise
        latest = last_checkpoint(output_dir)
        raise NotWritten(
            f"{what} could not be written to {str(Path(folder).absolute())!r}: {error}. There, {_free(folder)} are "
            "free. Free some space, let this user write there, or choose another output_dir. "
            + ("No whole checkpoint is there." if latest is None else f"The last whole checkpoint is {latest!r}.")
        ) from error


def _of_writing(error: Exception) -> bool:
    # Those of a network are OSErrors too
    by_system = isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError))
    by_torch = isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_SIGNS)
    return bool(by_system or by_torch or isinstance(error, SafetensorError))


def _free(folder: str | Path) -> str:
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.1f} MiB"


def clear_unfinished(run_dir: str | Path) -> None:
    """Remove what a process that was killed left behind, but for a whole checkpoint that it was about to replace."""
    for earlier in (Path(run_dir) / UNFINISHED).glob("*.replaced"):
        place = Path(run_dir) / earlier.name.removesuffix(".replaced")
        if not place.exists():
            earlier.rename(place)
    shutil.rmtree(Path(run_dir) / UNFINISHED, ignore_errors=True)


def put_in_place(run_dir: str | Path, name: str) -> None:
    """
    Move a checkpoint that is whole now from [`UNFINISHED`] to its place in `run_dir`. Does nothing where it is not:
    on machines that share a disk, another one has moved it.
    """
    unfinished, place = Path(run_dir) / UNFINISHED / name, Path(run_dir) / name
    if not unfinished.is_dir():
        return
    for path in (*unfinished.rglob("*"), unfinished):
        _flush(path)
    earlier = unfinished.with_name(f"{name}.replaced")
    if place.exists():  # of an earlier run, or of this one before it was resumed
        place.rename(earlier)
    try:
        unfinished.rename(place)
    except BaseException:
        if earlier.exists() and not place.exists():
            earlier.rename(place)
        raise
    _flush(place.parent)
    clear_unfinished(run_dir)


def _flush(path: Path) -> None:
    """Onto the disk itself: without it the move may outlive the contents when the machine goes down, and some file
    systems say only here that they are full."""
    if os.name == "nt":  # opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # not all file systems can do it with folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
