# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments by the name of their class, `"module:Class"`, wherever an id does, and ids that look alike."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import pytest
from scripted import save_tiny_model

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, check_env, check_run
from trl_agents.cli import main
from trl_agents.envs import make_env
from trl_agents.evaluation import play_agents
from trl_agents.recipe import parse_arguments


MODULE = """
import functools

import gymnasium
import numpy as np


class Guess:
    instructions = "Guess a number from 1 to 8. Answer with ACTION=X."

    def __init__(self, tries=3):
        self.tries = tries

    def reset(self, *, seed=None, options=None):
        self.number, self.left = int(np.random.default_rng(seed).integers(1, 9)), self.tries
        return "Your guess?", {"legal_actions": list("12345678")}

    def step(self, action):
        self.left -= 1
        right = int(action) == self.number
        text = "Right!" if right else "Wrong."
        return text, float(right), right, self.left == 0, {"legal_actions": list("12345678")}

    def close(self):
        pass


class Plain(Guess):
    def __init__(self):
        super().__init__(2)


class Proper(Guess, gymnasium.Env):
    pass


class Group:
    Inner = Guess


class Tool:
    def look(self):
        "Looks."

    def reset(self):
        return "Dark."


short = functools.partial(Guess, tries=1)
instance = Guess()
gymnasium.register("own_env/Guess-v0", entry_point=Guess, kwargs={"tries": 4})
gymnasium.register("own_env/ByName-v0", entry_point="own_env:Guess")
gymnasium.register("own_env/Limited-v0", entry_point=Guess, max_episode_steps=2)
gymnasium.register("own_env/Made-v0", entry_point=lambda: Guess())
gymnasium.register("own_env/Proper-v0", entry_point=Proper, max_episode_steps=1)
gymnasium.register("Unversioned-v3", entry_point=Proper)
gymnasium.register("Bare", entry_point=Proper)
"""


@pytest.fixture
def own_env(tmp_path, monkeypatch):
    """A module `own_env` in a folder where Python looks."""
    (tmp_path / "own_env.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    registered = dict(gymnasium.registry)
    yield tmp_path
    sys.modules.pop("own_env", None)
    gymnasium.registry.clear()
    gymnasium.registry.update(registered)


@pytest.mark.parametrize(
    ("name", "tries"),
    [
        ("own_env:Guess", 3),
        ("own_env:Group.Inner", 3),
        ("own_env:short", 1),
        ("own_env:own_env/Guess-v0", 4),
        ("own_env:own_env/ByName-v0", 3),
        ("own_env:own_env/Proper-v0", 3),
        ("own_env:Unversioned", 3),
        ("own_env:Unversioned-v3", 3),
        ("own_env:Bare", 3),
    ],
)
@pytest.mark.filterwarnings("ignore:.*latest versioned environment")
def test_made_by_name(own_env, name, tries):
    env = make_env(name)
    assert env.instructions.startswith("Guess a number") and env.tries == tries
    assert env.reset(seed=1)[0] == "Your guess?"
    limited = isinstance(env, gymnasium.Wrapper)
    assert limited == any(part in name for part in ("Proper", "Unversioned", "Bare"))  # of Gymnasium's own making


def test_env_kwargs(own_env):
    assert make_env("own_env:Guess", tries=7).tries == make_env("own_env:own_env/Guess-v0", tries=7).tries == 7
    for name, message in (
        ("own_env:Guess", "Did you mean tries"),
        ("own_env:Plain", "no argument|unexpected keyword"),
    ):
        with pytest.raises(ValueError, match=f"does not take env_kwargs={{'tires': 7}}.*{message}"):
            make_env(name, tires=7)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("own_env:Gues", ["the module 'own_env' (", "own_env.py) has no 'Gues'", "Did you mean Guess"]),
        ("own_env:Group.Iner", ["has no 'Group.Iner'", "Did you mean Inner?"]),
        ("own_env:instance", ["is a `Guess`", "class or a factory"]),
        ("own_env:own_env/Gess-v0", ["own_env/Gess"]),
        ("own_evn:Guess", ["No module named 'own_evn'", "Looked in", "{folder}", "PYTHONPATH"]),
        ("own_env.sub:Guess", ["No module named 'own_env.sub'", "Looked in"]),
        ("own_evn:own_env/Guess-v0", ["No module named 'own_evn'", "Looked in"]),
        ("own_broken:Guess", ["'own_broken' could not be imported", "No module named 'no_such_package'"]),
        ("textarea:Nim-v0", ["No module named 'textarea'", "textarena:"]),
        ("rg:game:Nim", ["'rg:game:Nim' is no id", "gem:"]),
        (":Guess", ["Empty module name"]),
        ("own_env:", ["own_env:"]),
        ("own_env:own_env/Limited-v0", ["max_episode_steps", "let Guess inherit"]),
        ("own_env:own_env/Made-v0", ["makes no gymnasium.Env", "'package.module:factory'"]),
        ("tools:own_evn:Guess", ["No module named 'own_evn'", "Looked in"]),
    ],
)
def test_mistakes(own_env, name, told):
    with pytest.raises(ValueError) as error:
        make_env(name)
    assert all(part.format(folder=own_env) in str(error.value) for part in told), error.value


def test_wherever_an_id_does(own_env, capsys, monkeypatch):
    check_env("own_env:Guess")
    folder = save_tiny_model(own_env / "model", [MODULE])
    args = AgentGRPOConfig(
        str(own_env / "out"), use_cpu=True, bf16=False, report_to="none", max_steps=1, max_completion_length=16
    )
    args.advantage_estimator = "turn"
    check_run("own_env:Guess", args)
    trainer = AgentGRPOTrainer(folder, env="own_env:Guess", args=args)
    assert trainer.env_id == "own_env:Guess"
    assert len(trainer.play([1, 2])) == len(trainer.play([1, 2], env="own_env:short")) == 2
    assert len(play_agents("own_env:Guess", ["random"], [1, 2])["random"]) == 2

    monkeypatch.chdir(own_env)
    assert main(["play", "own_env:Guess", "--player", "random", "--env_kwargs", '{"tries": 2}']) == 0
    assert main(["play", "own_env:own_env/Guess-v0", "--player", "random"]) == 0
    assert main(["eval", "random", "--env", "own_env:Guess", "--num_episodes", "4", "--output_dir", "eval"]) == 0
    capsys.readouterr()
    assert main(["play", "own_env:Guess", "--env_kwargs", '{"tires": 2}']) == 2
    assert "it has no argument 'tires'. Did you mean tries?" in capsys.readouterr().err
    assert main(["play", "own_env:Gues"]) == 2
    assert "Did you mean Guess?" in capsys.readouterr().err


@pytest.mark.parametrize("environment", ["own_env:Guess", "own_env:own_env/Guess-v0", "tools:own_env:Tool"])
def test_the_command_finds_modules_of_the_current_folder(tmp_path, environment):
    """As installed, it is a script in another folder, and Python looks for modules there."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own_env.py").write_text(MODULE)
    (tmp_path / "script.py").write_text("import sys\nfrom trl_agents.cli import main\nsys.exit(main())\n")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), "play", environment],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        input="quit\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "Return 0.00 so far" in done.stdout, done.stderr


def test_recipes_find_modules_of_the_current_folder(own_env, monkeypatch):
    @dataclass
    class Arguments:
        env_id: str = ""

    (own_env / "config.yaml").write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--env_id", "own_env:Guess"])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(own_env))])
    monkeypatch.chdir(own_env)
    (arguments,) = parse_arguments("config.yaml", Arguments)
    assert make_env(arguments.env_id).tries == 3


def test_a_factory_is_still_what_it_was(own_env):
    """Errors of the user's own code are his."""

    def fails():
        raise ImportError("mine")

    with pytest.raises(ImportError, match="mine"):
        make_env(fails)
    assert make_env(functools.partial(make_env, "own_env:Guess", tries=2)).tries == 2
