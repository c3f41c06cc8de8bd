# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the adapters share: importing a suite, naming what is not there, saying how to answer."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Any


# The names of the packages to install, where they differ from what is imported.
PACKAGES = {"gem": "gem-llm", "reasoning_gym": "reasoning-gym"}


def import_suite(module: str) -> ModuleType:
    """Imports a suite, or says how to install it. What it does to the root logger is undone."""
    suite, logger = module.split(".")[0], logging.getLogger()
    before = logger.level, list(logger.handlers)
    try:
        return import_module(module)
    except ImportError as error:
        package = PACKAGES.get(suite, suite)
        raise ValueError(
            f"{suite} could not be imported ({error}). Install it with `pip install {package}`, or all suites with "
            "`pip install trl-agents[envs]`."
        ) from error
    finally:
        logger.setLevel(before[0])
        logger.handlers[:] = before[1]


def unknown_id(suite: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that a suite does not have, with those that come close."""
    known = sorted(known)
    lower = {one.lower(): one for one in known}
    close = [lower[one] for one in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    mend = f"Did you mean {', '.join(map(repr, close))}?" if close else f"It has {len(known)}, such as {known[:5]}."
    return ValueError(f"{suite} has no environment {name!r}. {mend}")


class NotMade(ValueError):
    """A suite has the environment, but something that it needs is not there."""

    def __init__(self, suite: str, name: str, error: BaseException):
        found = re.search(r"nltk\.download\('([^']+)'\)", str(error))  # LookupErrors of NLTK are pages long
        reason = f"it needs NLTK's data {found[1]!r}. Run `python -m nltk.downloader {found[1]}`." if found else error
        super().__init__(f"{suite} did not make {name!r}: {reason}")


def check_lists_moves(legal_actions: Any) -> None:
    """A list does not do: moves change as a game goes on."""
    if legal_actions is not None and not callable(legal_actions):
        raise ValueError(
            f"legal_actions={legal_actions!r}: give a function that lists the moves, called with the suite's "
            "environment before each of them."
        )


def how_to_answer(what: str) -> str:
    """The last line of instructions, in the form that [`ActionParser`] reads by default."""
    return f"Think step by step, keep it SHORT, and always end with ACTION=X, where X is {what}."


def joined(*parts: Any) -> str:
    """The parts that say something, a paragraph each."""
    return "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
