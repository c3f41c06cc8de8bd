# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The shape of the code: who may import whom, what the top holds, what `import trl_agents` costs.

`test_private_names.py` holds the other half of the seam. Every check is a function from source text to a list of
faults, so that each is also shown to find a planted one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parents[1]
SEAM = "trl_agents._trl"
LICENSE_LINE = "# Licensed under the Apache License, Version 2.0 (see LICENSE)."

# Lowest level first. A module imports lower levels, and its neighbours of the same line.
LAYERS = [
    (0, ["types", "seeds"]),
    (1, ["envs", "agents", "actions", "patterns", "contexts", "exploration", "experts", "rewards"]),  # text: no torch
    (1, ["returns", "advantages", "losses"]),  # tensors: torch only
    (2, ["rollout"]),
    (2, ["batch"]),
    (2, ["value_head"]),
    (2, ["fsdp"]),
    (2, ["data", "question_rows", "arithmetic", "preferences"]),
    (2, ["transcripts", "episode_file"]),
    (2, ["page", "viewer", "charts"]),
    (2, ["agent_config"]),
    (2, ["hub", "cards"]),
    (2, ["checkpoints"]),
    (2, ["launch"]),
    (3, ["_trl"]),
    (3, ["tables", "evaluation", "episodes", "expert_data", "plots"]),
    (3, ["questions", "preference_eval", "r1"]),
    (3, ["model_opponent", "self_play"]),
    (4, ["trainers"]),
    (4, ["tiny", "stages", "sft", "reward_model", "script", "recipe", "rlhf", "expert_iteration", "lora", "report"]),
    (4, ["diagnostics"]),
    (4, ["estimate"]),
    (5, ["cli", "__main__"]),
]
PLACES = {unit: (level, line) for line, (level, units) in enumerate(LAYERS) for unit in units}
TEXT, TENSORS = LAYERS[1][1], LAYERS[2][1]
# What brings torch along. The subprocess test below holds the rest.
TORCH_BOUND = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "safetensors",
    "bitsandbytes",
    "deepspeed",
    "vllm",
}
HEAVY = ["torch", "transformers", "trl", "accelerate", "datasets", "peft"]


def in_seam(module: str) -> bool:
    return f"{module}.".startswith(f"{SEAM}.")


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGE_FILES = python_files("trl_agents")
RECIPE_FILES = python_files("recipes")


def of_file(files: list[Path]):
    """Runs a test once per file, named by its path."""
    return pytest.mark.parametrize("path", files, ids=[str(path.relative_to(ROOT)) for path in files])


# -- imports ----------------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    name: str  # absolute: `from .rollout import play` in `trl_agents.cli` is `trl_agents.rollout.play`
    line: int
    typing_only: bool  # under `if TYPE_CHECKING:`

    @property
    def root(self) -> str:
        return self.name.split(".")[0]


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a module, wherever it stands, `import_module("...")` and `__import__("...")` among them."""

    def absolute(name: str | None, level: int) -> str:
        if level == 0:
            return name or ""
        parts = module.split(".")
        anchor = parts[: len(parts) - level + (1 if is_package else 0)]
        return ".".join(anchor + ([name] if name else []))

    def walk(node: ast.AST, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node.module, node.level)
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", node.lineno, typing_only)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                name = node.args[0].value
                level = len(name) - len(name.lstrip("."))
                yield Import(absolute(name.lstrip("."), level), node.lineno, typing_only)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", ""),
            getattr(node.test, "attr", ""),
        ):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, typing_only)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, typing_only)

    return list(walk(ast.parse(source), False))


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", "") or getattr(node.func, "attr", "")


def layer_faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports that DESIGN's levels forbid."""
    if module in ("trl_agents", "trl_agents._version"):
        return []
    unit = module.split(".")[1]
    if unit not in PLACES:
        return [f"{module} has no level: place `{unit}` in LAYERS of tests/test_house.py"]
    level, line = PLACES[unit]
    faults = []
    for found in imports_of(source, module, is_package):
        where = f"{module}:{found.line} imports {found.name}"
        if found.root == "trl":
            if found.name.startswith("trl.experimental"):
                faults.append(f"{where}: nothing from trl.experimental")
            elif not in_seam(module):
                faults.append(f"{where}: TRL is imported in {SEAM} only")
        elif found.typing_only:
            continue
        elif found.root == "trl_agents":
            other = (found.name.split(".") + [""])[1]
            if other in (unit, "__version__", "_version"):
                continue
            if other not in PLACES:
                faults.append(f"{where}: import a name from the module that defines it, not from the package's top")
                continue
            other_level, other_line = PLACES[other]
            if other_level > level:
                faults.append(f"{where}: level {level} must not know level {other_level}")
            elif other_level == level and other_line != line:
                faults.append(f"{where}: both are of level {level}, and not neighbours")
        elif found.root in sys.stdlib_module_names:
            continue
        elif level == 0:
            faults.append(f"{where}: {unit} knows the standard library only")
        elif unit in TEXT and found.root in TORCH_BOUND:
            faults.append(f"{where}: text modules know no torch")
        elif unit in TENSORS and found.root != "torch":
            faults.append(f"{where}: tensor modules know torch only")
    return faults


@of_file(PACKAGE_FILES)
def test_layers(path):
    assert not layer_faults(path.read_text(), module_name(path), path.name == "__init__.py")


def test_contributing_shows_the_same_levels():
    """A line of the table is a level, and what stands between semicolons are neighbours."""
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    shown = [(int(level), re.findall(r"`(\w+)`", units)) for level, row in rows for units in row.split(";")]
    assert shown == LAYERS


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("trl_agents.types", "import numpy", "standard library only"),
        ("trl_agents.types", "from .returns import discounted_returns", "level 0 must not know level 1"),
        ("trl_agents.envs.bandit", "from torch import nn", "text modules know no torch"),
        ("trl_agents.contexts", "def f():\n    import transformers", "text modules know no torch"),
        ("trl_agents.actions", "from .rollout.play import play", "level 1 must not know level 2"),
        ("trl_agents.actions", "from . import returns", "both are of level 1"),
        ("trl_agents.returns", "import numpy as np", "tensor modules know torch only"),
        (
            "trl_agents.rollout.play",
            "from ..trainers.agent_grpo_config import AgentGRPOConfig",
            "must not know level 4",
        ),
        ("trl_agents.rollout.play", "from importlib import import_module\nimport_module('trl_agents.cli')", "level 5"),
        ("trl_agents.rollout.play", "import importlib\nimportlib.import_module('..cli', __package__)", "level 5"),
        ("trl_agents.batch", "from .value_head import attach", "both are of level 2"),
        (
            "trl_agents.trainers.agent_grpo_trainer",
            "from trl_agents import ActionParser",
            "the module that defines it",
        ),
        ("trl_agents.trainers.agent_grpo_trainer", "import trl_agents", "the module that defines it"),
        ("trl_agents.trainers.agent_grpo_trainer", "from trl import GRPOTrainer", "TRL is imported in"),
        ("trl_agents.trainers.agent_grpo_trainer", "import trl.trainer.utils as u", "TRL is imported in"),
        ("trl_agents.trainers.agent_grpo_trainer", "__import__('trl')", "TRL is imported in"),
        (
            "trl_agents.tiny",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trl",
            "TRL is imported in",
        ),
        ("trl_agents._trl", "from trl.experimental.ppo import PPOTrainer", "nothing from trl.experimental"),
        ("trl_agents._trl.release", "from trl import experimental", "nothing from trl.experimental"),
        ("trl_agents.fsdp", "from trl import GRPOTrainer", "TRL is imported in"),
        ("trl_agents.helpers", "x = 1", "place `helpers` in LAYERS"),
    ],
)
def test_layers_finds_planted(module, source, fault):
    faults = layer_faults(source, module)
    assert len(faults) == 1 and fault in faults[0], faults


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "trl_agents.rollout.play",
            "from ..types import Turn\nfrom .workers import EnvPool\nimport numpy, torch, tqdm",
        ),
        ("trl_agents.agents", "from .actions import ActionParser\nimport numpy"),
        ("trl_agents.losses", "import math, torch\nfrom .advantages import whiten"),
        ("trl_agents.contexts", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import X"),
        ("trl_agents._trl.rollouts", "from trl import GRPOTrainer\nfrom ..batch import Row"),
        ("trl_agents.cli", "from . import __version__\nfrom .trainers.agent_grpo_config import AgentGRPOConfig"),
    ],
)
def test_layers_allows(module, source):
    assert layer_faults(source, module) == []


def test_layers_resolves_a_package_s_own_dots():
    source = "from .play import play\nfrom ..types import Turn"
    names = [found.name for found in imports_of(source, "trl_agents.rollout", is_package=True)]
    assert names == ["trl_agents.rollout.play.play", "trl_agents.types.Turn"]


def cycles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules of `graph` that import themselves in the end."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(graph.get(module, ()))
        return seen

    return [module for module in graph if module in reached(module)]


def import_graph(sources: Mapping[str, str], packages: Iterable[str] = ()) -> dict[str, set[str]]:
    """Who imports whom among the modules of `sources`."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, source in sources.items():
        for found in imports_of(source, module, module in packages):
            # `from a import b` means the module `a.b` where there is one, and else the name `b` of the module `a`.
            target = next((name for name in (found.name, found.name.rpartition(".")[0]) if name in sources), None)
            if target and not found.typing_only:
                graph[module].add(target)
    return graph


def test_no_import_cycles():
    sources = {module_name(path): path.read_text() for path in PACKAGE_FILES}
    packages = {module_name(path) for path in PACKAGE_FILES if path.name == "__init__.py"}
    assert cycles(import_graph(sources, packages)) == []


def test_no_import_cycles_finds_planted():
    sources = {"a.x": "from .y import f", "a.y": "from a import z", "a.z": "import a.x", "a.w": "from . import x"}
    assert cycles(import_graph(sources)) == ["a.x", "a.y", "a.z"]
    sources["a.z"] = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.x"
    assert cycles(import_graph(sources)) == []


def experimental_faults(source: str, module: str) -> list[str]:
    """What a recipe must not import: TRL's experiments, and anybody's private modules."""
    return [
        f"{module}:{found.line} imports {found.name}"
        for found in imports_of(source, module)
        if found.name.startswith("trl.experimental")
        or (found.root in ("trl", "trl_agents") and re.search(r"\._(?!_)", found.name))
    ]


@of_file(RECIPE_FILES)
def test_recipes_import_public_names(path):
    assert not experimental_faults(path.read_text(), module_name(path))


@pytest.mark.parametrize(
    "source", ["from trl.experimental import ppo", "from trl_agents import _trl", "from trl_agents._trl import X"]
)
def test_recipes_import_public_names_finds_planted(source):
    assert len(experimental_faults(source, "recipes.planted")) == 1
    assert experimental_faults("from trl_agents import __version__\nfrom trl import GRPOTrainer", "recipes.fine") == []


def undeclared(source: str, module: str, declared: set[str], is_package: bool = False) -> list[str]:
    """Imports of distributions that pyproject.toml does not name. (Here a distribution is called as its import is.)"""
    known = declared | set(sys.stdlib_module_names) | {"trl_agents", module.split(".")[0]}
    return [
        f"{module}:{found.line} imports {found.name}, which pyproject.toml does not name"
        for found in imports_of(source, module, is_package)
        if found.root not in known
    ]


def declared_distributions() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"] + extras}
    return {"yaml" if name == "pyyaml" else name.replace("-", "_") for name in names}


@of_file(PACKAGE_FILES + RECIPE_FILES)
def test_imports_are_declared(path):
    siblings = {other.stem for other in RECIPE_FILES}  # a recipe may import its neighbour
    declared = declared_distributions() | (siblings if path in RECIPE_FILES else set())
    assert not undeclared(path.read_text(), module_name(path), declared, path.name == "__init__.py")


def test_imports_are_declared_finds_planted():
    assert len(undeclared("import scipy.stats\nimport os\nimport trl", "trl_agents.x", {"trl"})) == 1


# -- ruff keeps the same rule in the editor ---------------------------------------------------------------------------


def ruff_codes(source: str, path: str) -> set[str]:
    """The rules that `source` breaks if it stood at `path`."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    done = subprocess.run(
        [*command, "--stdin-filename", path, "-"], input=source, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, 1), done.stderr
    return set(re.findall(r"^\S+: ([A-Z]+\d+)", done.stdout, flags=re.MULTILINE))


@pytest.mark.parametrize("line", ["import trl", "from trl import GRPOTrainer", "from trl.trainer import utils"])
def test_ruff_bans_trl(line):
    source = f"{LICENSE_LINE}\n{line}\n"
    for path in ("trl_agents/planted.py", "trl_agents/trainers/planted.py"):
        assert "TID251" in ruff_codes(source, path)
    for path in ("trl_agents/_trl/planted.py", "recipes/planted.py", "tests/test_planted.py"):
        codes = ruff_codes(source, path)
        assert "F401" in codes and "TID251" not in codes  # F401: ruff did look


# -- headers, public names, what an import costs ----------------------------------------------------------------------


def has_license_line(source: str) -> bool:
    """An empty file has nothing to license; elsewhere the line stands among the comments at the top."""
    if not source.strip():
        return True
    for line in source.splitlines():
        if line == LICENSE_LINE:
            return True
        if line.strip() and not line.startswith("#"):
            return False
    return False


@of_file(python_files("trl_agents", "recipes", "tests"))
def test_license_line(path):
    assert has_license_line(path.read_text()), f"put `{LICENSE_LINE}` at the top"


def test_license_line_finds_planted():
    assert has_license_line(f"#!/usr/bin/env python\n{LICENSE_LINE}\n")
    assert not has_license_line("import os\n")
    assert not has_license_line(f"import os\n{LICENSE_LINE}\n")
    assert not has_license_line("# Licensed under the MIT License.\n")


def logic_faults(source: str, module: str) -> list[str]:
    """What a file of names may not hold: classes, branches, loops, functions but the two that load names late."""
    faults = []
    for node in ast.parse(source).body:
        plain = isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr))
        typing_only = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        hook = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        if not (plain or typing_only or hook):
            faults.append(f"{module}:{node.lineno} holds logic ({type(node).__name__})")
    return faults


@pytest.mark.parametrize("name", ["__init__.py", "_version.py"])
def test_top_holds_no_logic(name):
    assert not logic_faults((ROOT / "trl_agents" / name).read_text(), name)


@pytest.mark.parametrize("source", ["class A: pass", "for x in []: pass", "def f(): pass", "if True: pass"])
def test_top_holds_no_logic_finds_planted(source):
    assert len(logic_faults(source, "planted")) == 1


def test_public_names_resolve():
    import trl_agents

    assert len(set(trl_agents.__all__)) == len(trl_agents.__all__)
    for name in trl_agents.__all__:
        assert getattr(trl_agents, name) is not None, name
    with pytest.raises(AttributeError):
        trl_agents.no_such_name  # noqa: B018


def loaded_by(modules: Iterable[str], watched: list[str]) -> list[str]:
    """Which of `watched` a fresh interpreter has loaded after it imported `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_is_light():
    assert loaded_by(["trl_agents"], HEAVY) == []
    assert loaded_by(["trl_agents.returns"], ["torch", "transformers"]) == ["torch"]  # the check does look


def test_text_modules_load_no_torch():
    modules = [module_name(path) for path in PACKAGE_FILES]
    text = [module for module in modules if module.count(".") and module.split(".")[1] in [*TEXT, "types"]]
    assert "trl_agents.types" in text
    assert loaded_by(text, ["torch", "transformers", "trl"]) == []


@of_file(PACKAGE_FILES)
def test_module_imports(path):
    import_module(module_name(path))
