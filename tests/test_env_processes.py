# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Scripts whose environments get processes of their own: what these import, and what they must not begin again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import save_tiny_model


PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

POOL = """
open("begun", "a").write("x")
from trl_agents.rollout.workers import EnvPool

pool = EnvPool({factory}, 2, processes=True)
pool.reset(0, 1)
pool.reset(1, 2)
while replies := pool.collect(60, True):
    print([reply.fault or reply.observation for reply in replies], flush=True)
"""

OWN = """
from faulty_env import Nonce

class Own(Nonce):
    pass
"""

TRAINING = """
from faulty_env import Nonce
from trl_agents import AgentGRPOConfig, AgentGRPOTrainer

args = AgentGRPOConfig(
    "out", use_cpu=True, bf16=False, report_to="none", max_steps=1, max_completion_length=8, env_processes=True,
    per_device_train_batch_size=2, num_generations=2, advantage_estimator="turn", disable_tqdm=True,
)
trainer = AgentGRPOTrainer({model!r}, env=Nonce, args=args)
open("begun", "a").write("x")
trainer.train()
"""


def run(folder, *arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, str(folder)])}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def check_refused(done):
    """One error that names the guard, and nothing of the processes' own."""
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert 'put `if __name__ == "__main__":` above what starts the run' in done.stderr.splitlines()[-1]


def test_a_script_without_a_guard(tmp_path):
    (tmp_path / "script.py").write_text("from faulty_env import Nonce\n" + POOL.format(factory="Nonce"))
    done = run(tmp_path, "script.py")
    check_refused(done)
    assert done.stdout == ""


@pytest.mark.slow
def test_a_training_without_a_guard(tmp_path):
    """Its processes do not begin it again, and the trainer says so when it is made."""
    model = save_tiny_model(tmp_path / "model", ["say w"])
    (tmp_path / "script.py").write_text(TRAINING.format(model=model))
    check_refused(run(tmp_path, "script.py"))
    assert not (tmp_path / "begun").exists()


CHECKING = """
from faulty_env import Nonce
from trl_agents import AgentGRPOConfig, check_run

check_run(Nonce, AgentGRPOConfig("out", use_cpu=True, bf16=False, report_to="none", env_processes=True))
open("begun", "a").write("x")
"""


@pytest.mark.slow
def test_a_check_without_a_guard(tmp_path):
    (tmp_path / "script.py").write_text(CHECKING)
    check_refused(run(tmp_path, "script.py"))
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize("how", ["-c", "package"])
def test_a_class_that_no_process_can_import(tmp_path, how):
    script = OWN + POOL.format(factory="Own")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(script)
    done = run(tmp_path, *{"-c": ["-c", script], "package": ["-m", "package"]}[how])
    assert done.returncode == 1 and done.stderr.count("Traceback") <= 2, done.stderr
    assert "ValueError: An environment in a process of its own" in done.stderr.splitlines()[-1]
    assert "`Own` was written in a notebook, on standard input" in done.stderr.splitlines()[-1]
    assert done.stdout == "" and (tmp_path / "begun").read_text() == "x"


@pytest.mark.parametrize("script", [OWN + POOL.format(factory="Own"), OWN + POOL.format(factory="Nonce")])
def test_a_script_on_standard_input(tmp_path, script):
    """Depending on how Python was begun, no process finds it, or none can be started at all."""
    done = run(tmp_path, "-", input=script)
    assert done.returncode == 1 and "ValueError: An environment in a process" in done.stderr.splitlines()[-1]
    assert done.stdout == "" and (tmp_path / "begun").read_text() == "x"


@pytest.mark.parametrize("arguments", [["script.py"], ["-m", "script"]])
def test_a_class_of_a_script_with_a_guard(tmp_path, arguments):
    body = POOL.format(factory="Own").replace("\n", "\n    ")
    (tmp_path / "script.py").write_text(f'{OWN}\nif __name__ == "__main__":\n    {body}')
    done = run(tmp_path, *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("say w") == 2 and (tmp_path / "begun").read_text() == "x"
