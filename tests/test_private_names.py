# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The seam: TRL's private names, read from the sources of the installed release, appear in `trl_agents/_trl/` only.

The check is a function from source text to a list of faults, so that it is also shown to find planted ones.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parents[1]
SEAM = "trl_agents._trl"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of(node: ast.ClassDef) -> set[str]:
    """A class's private methods, and the private attributes it gives itself."""
    methods = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
    attributes = {
        item.attr
        for item in ast.walk(node)
        if isinstance(item, ast.Attribute)
        and isinstance(item.ctx, ast.Store)
        and getattr(item.value, "id", "") in ("self", "cls")
    }
    return {name for name in methods | attributes if is_private(name)}


def trl_private_names() -> tuple[set[str], set[str]]:
    """The private names of `GRPOTrainer` and all it inherits, and the names of these classes."""
    from trl import GRPOTrainer

    classes = [class_ for class_ in GRPOTrainer.__mro__ if class_ is not object]
    names: set[str] = set()
    for class_ in classes:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(class_))).body
        names |= private_names_of(node)
    return names, {class_.__name__ for class_ in classes}


# Functions that take an attribute by its name, and which of their arguments that name is.
NAMED_AT = {"getattr": 1, "setattr": 1, "hasattr": 1, "delattr": 1, "attrgetter": 0, "methodcaller": 0}


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", "") or getattr(node.func, "attr", "")


class _Own(NamedTuple):
    """A class of this repository."""

    module: str
    bases: list[str]
    names: set[str]  # its private methods, attributes and class variables


def _own_classes(trees: Mapping[str, ast.Module]) -> dict[str, _Own]:
    own: dict[str, _Own] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            names = private_names_of(node)
            for item in node.body:
                targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                names |= {target.id for target in targets if isinstance(target, ast.Name) and is_private(target.id)}
            bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
            bases = [getattr(base, "id", "") or getattr(base, "attr", "") for base in bases]
            namesake = own.get(node.name, _Own(module, [], set()))  # taken together: what one may not, neither may
            own[node.name] = _Own(module, bases + namesake.bases, names | namesake.names)
    return own


def seam_faults(sources: Mapping[str, str], private: set[str], trl_classes: set[str]) -> list[str]:
    """
    Uses of TRL's private names outside the seam, as an attribute or by `getattr` and its like.

    A class that does not descend from TRL's may have a `_step` of its own; one that does may not even define it.
    """
    trees = {module: ast.parse(source) for module, source in sources.items()}
    own = _own_classes(trees)

    def lineage(class_name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [class_name]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(own[name].bases if name in own else ())
        return seen

    from_trl = {name for name in own if lineage(name) & trl_classes}

    def is_own_name(name: str, receiver: ast.expr, module: str, class_name: str | None) -> bool:
        called = _called(receiver) if isinstance(receiver, ast.Call) else ""
        if class_name is not None and (getattr(receiver, "id", "") in ("self", "cls") or called == "super"):
            return class_name not in from_trl and any(name in own[c].names for c in lineage(class_name) if c in own)
        return any(c.module == module and name in c.names for n, c in own.items() if n not in from_trl)

    def walk(node: ast.AST, module: str, class_name: str | None) -> Iterator[str]:
        if isinstance(node, ast.ClassDef):
            class_name = node.name
            if class_name in from_trl:
                for item in node.body:
                    if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name in private:
                        yield f"{module}:{item.lineno} {class_name} overrides TRL's private `{item.name}`"
        used: tuple[str, ast.expr] | None = None
        if isinstance(node, ast.Attribute):
            used = node.attr, node.value
        elif isinstance(node, ast.Call) and _called(node) in NAMED_AT and len(node.args) > NAMED_AT[_called(node)]:
            named = node.args[NAMED_AT[_called(node)]]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                used = named.value, node.args[0]
        if used and used[0] in private and not is_own_name(*used, module, class_name):
            yield f"{module}:{node.lineno} uses TRL's private `{used[0]}`: give it a public name in {SEAM}"
        for child in ast.iter_child_nodes(node):
            yield from walk(child, module, class_name)

    outside = {module: tree for module, tree in trees.items() if not f"{module}.".startswith(f"{SEAM}.")}
    return [fault for module, tree in outside.items() for fault in walk(tree, module, None)]


def test_trl_private_names_are_read_from_its_sources():
    names, classes = trl_private_names()
    # A method of GRPOTrainer, an attribute of it, one of the Trainer below it; and no dunder, nothing public.
    assert {"_generate_and_score_completions", "_metrics", "_buffered_inputs", "_wrap_model"} <= names
    assert {"GRPOTrainer", "Trainer"} <= classes
    assert not any(name.startswith("__") or not name.startswith("_") for name in names)


def test_private_names_stay_behind_the_seam():
    files = [path for folder in ("trl_agents", "recipes") for path in (ROOT / folder).rglob("*.py")]
    sources = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}
    assert f"{SEAM}.rollouts" in sources
    assert not seam_faults(sources, *trl_private_names())


SEAM_SOURCE = (
    "from trl import GRPOTrainer\nclass Base(GRPOTrainer):\n    def _metrics_of(self):\n        return self._metrics"
)
TRAINER = "from .._trl import Base\nclass Mine(Base):\n    def f(self, other):\n        {line}"
ENV = "class Env:\n    def __init__(self):\n        self._step = 0\n    def go(self, other):\n        {line}"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (TRAINER.format(line="self._metrics.clear()"), "uses TRL's private `_metrics`"),
        (TRAINER.format(line="self._step = 1"), "uses TRL's private `_step`"),
        (TRAINER.format(line="return super()._save_checkpoint()"), "uses TRL's private `_save_checkpoint`"),
        (TRAINER.format(line="return getattr(self, '_metrics')"), "uses TRL's private `_metrics`"),
        (TRAINER.format(line="setattr(other, '_step', 1)"), "uses TRL's private `_step`"),
        (TRAINER.format(line="import operator\n        operator.attrgetter('_metrics')(other)"), "private `_metrics`"),
        (
            "class Mine(Base):\n    def _save_checkpoint(self):\n        pass",
            "overrides TRL's private `_save_checkpoint`",
        ),
        (
            "import trl\nclass Mine(trl.GRPOTrainer):\n    def _step(self):\n        pass",
            "overrides TRL's private `_step`",
        ),
        ("def f(trainer):\n    return trainer._metrics", "uses TRL's private `_metrics`"),
        (ENV.format(line="other._metrics"), "uses TRL's private `_metrics`"),
        (ENV.format(line="self._metrics"), "uses TRL's private `_metrics`"),
    ],
)
def test_seam_finds_planted(source, fault):
    private = {"_metrics", "_step", "_save_checkpoint"}
    faults = seam_faults({SEAM: SEAM_SOURCE, "trl_agents.trainers.mine": source}, private, {"GRPOTrainer", "Trainer"})
    assert len(faults) == 1 and fault in faults[0], faults


@pytest.mark.parametrize(
    "source",
    [
        ENV.format(line="self._step += other._step"),  # its own name, which TRL's happens to be too
        ENV.format(line="pass") + "\nclass Sub(Env):\n    def f(self):\n        return super()._step",
        TRAINER.format(line="self._own = self.metrics"),
        "def _step():\n    pass\n_step()",  # a function is not an attribute
    ],
)
def test_seam_allows(source):
    sources = {SEAM: SEAM_SOURCE, "trl_agents.mine": source}
    assert seam_faults(sources, {"_metrics", "_step", "_save_checkpoint"}, {"GRPOTrainer"}) == []
