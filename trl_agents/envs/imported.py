# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Classes and factories by name, `"package.module:Class"`, and errors that say where one was looked for."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .names import close_to


def look_here() -> None:
    """Let the modules of the current folder be found by name, as `python -m` does."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def is_path(name: str) -> bool:
    """Whether `name` may be that of a class, or of one in a class: no id with a version or a namespace is."""
    return all(part.isidentifier() for part in name.split("."))


def import_named(module: str) -> ModuleType:
    """Imports a module that a user named. What keeps it from being imported becomes a `ValueError`."""
    try:
        return import_module(module)
    except Exception as error:  # also what its code raises
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing and f"{module}.".startswith(f"{missing}."):
            raise ValueError(
                f"{error}. Looked in {_folders()} and among the installed packages: go to the folder of the module, "
                "or name that folder in PYTHONPATH."
            ) from error
        raise ValueError(f"The module {module!r} could not be imported: {type(error).__name__}: {error}") from error


def import_object(path: str) -> Callable[..., Any]:
    """The class or factory that `"package.module:Class"` names; raises `ValueError` if there is none."""
    module, _, name = path.partition(":")
    if not is_path(name):
        raise ValueError(f"{path!r} is not `package.module:Class`.")
    found: Any = import_named(module)
    where = f"{module!r} ({getattr(found, '__file__', None) or 'built in'})"
    for part in name.split("."):
        if not hasattr(found, part):
            hint = close_to(part, [one for one in dir(found) if not one.startswith("_")])
            raise ValueError(f"{path!r} is not `package.module:Class`: the module {where} has no {name!r}.{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"{path!r} is a `{type(found).__name__}`: name the class or a factory, with which an environment is made "
            "for each of the episodes that are played side by side."
        )
    return found


def _folders() -> str:
    """Where Python looks for modules, but for what is installed."""
    installed = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders = [Path(entry or ".").absolute() for entry in sys.path if not entry.endswith(".zip")]
    own = [each for each in folders if each.is_dir() and not any(each.is_relative_to(one) for one in installed)]
    return ", ".join(map(str, dict.fromkeys(own))) or "no folder"
