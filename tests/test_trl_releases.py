# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The trainers' tests with the older releases of TRL that `pyproject.toml` lets in, each beside the installed one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl


# What stands on the seam: both trainers, what is asked before them, reward models, and SFT inside recipes
TESTS = ["test_agent_grpo_trainer.py", "test_installed_trl.py", "ppo", "test_checks.py", "test_reward_model.py"]
RECIPES = ["test_r1.py", "test_expert_iteration.py"]

# trl 1.15 computes log-probabilities by a Triton kernel alone. CPU builds of PyTorch come without Triton, whose
# interpreter runs the kernel where there is no GPU, too slowly for recipes.
RELEASES = {"1.14": ([], TESTS + RECIPES), "1.15": (["triton"], TESTS)}


def installed(folder, *requirements):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("no package index to be reached")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("release", ["1.14", pytest.param("1.15", marks=pytest.mark.long)])
def test_the_trainers_pass_on_older_releases(tmp_path, release):
    assert not trl.__version__.startswith(release)
    beside, names = RELEASES[release]
    installed(tmp_path / "trl", f"trl=={release}.*", *beside)
    here = Path(__file__).parent
    code = "import trl, sys, pytest; print('trl', trl.__version__); sys.exit(pytest.main(sys.argv[1:]))"
    tests = [str(here / name) for name in names]
    path = [str(tmp_path / "trl"), *filter(None, [os.environ.get("PYTHONPATH")])]
    options = ["-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, *tests],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"trl {release}" in done.stdout
