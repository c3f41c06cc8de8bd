# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Runs that are killed, three times and anywhere, and go on: in the end all is as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import resumed
from safetensors.torch import load_file
from scripted import save_tiny_model
from transformers.trainer_utils import get_last_checkpoint

from trl_agents.checkpoints import is_whole


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL"),
]

N_KILLS = 3
SETTINGS = {"max_steps": 12, "save_steps": 2, "save_total_limit": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def start(case, folder, model_dir):
    command = [sys.executable, resumed.__file__, case, str(folder), model_dir, json.dumps(SETTINGS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(case, folder, model_dir):
    process = start(case, folder, model_dir)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output


def run_until(moment, case, folder, model_dir):
    """Kills it at a moment, in steps, and returns the step it had reached."""
    process, output, done, times = start(case, folder, model_dir), "", 0, [time.monotonic()]
    for line in process.stdout:
        output += line
        if line.startswith("step "):
            done = int(line.split()[1])
            times.append(time.monotonic())
        if done >= int(moment):
            time.sleep((moment % 1) * np.diff(times[1:] or times).mean() if len(times) > 2 else moment % 1)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, output
    return done


def log_of(folder):
    """What was logged, and nothing twice but the same."""
    entries = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        kind = (entry["step"], "train_loss" in entry)
        assert json.dumps(entries.setdefault(kind, entry)) == json.dumps(entry)
    return json.dumps([entries[kind] for kind in sorted(entries)])


@pytest.mark.parametrize("case", ["grpo-chat", "ppo-window", "self-play"])
def test_killed_three_times(model_dir, tmp_path, case):
    run(case, tmp_path / "whole", model_dir)
    rng = np.random.default_rng(list(case.encode()))
    killed = tmp_path / "killed"
    moments = np.sort(rng.uniform(1, SETTINGS["max_steps"] - 0.5, size=N_KILLS))
    for moment in moments:
        run_until(moment, case, killed, model_dir)
        latest = get_last_checkpoint(killed)
        assert latest is None or is_whole(latest)
    run(case, killed, model_dir)
    assert log_of(killed) == log_of(tmp_path / "whole")
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert files
    for name in files:
        one, two = load_file(killed / name), load_file(tmp_path / "whole" / name)
        assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    history = [
        [resumed.lasting(log) for log in json.loads(Path(path, "trainer_state.json").read_text())["log_history"]]
        for path in map(get_last_checkpoint, (killed, tmp_path / "whole"))
    ]
    assert json.dumps(history[0]) == json.dumps(history[1]) and len(history[0]) > 3  # sorted in the file


def test_killed_while_it_writes(model_dir, tmp_path):
    """The folder that is half written is no checkpoint, for transformers neither."""
    code = (
        "import os, signal, resumed, sys\n"
        "trainer = resumed.make('grpo-window', sys.argv[1], sys.argv[2], save_steps=1, save_total_limit=1)\n"
        "save_beside = trainer.save_beside\n"
        "def kill(folder):\n"
        "    if folder.name == 'checkpoint-2':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save_beside(folder)\n"
        "trainer.save_beside = kill\n"
        "trainer.train()\n"
    )
    folder = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder), model_dir], cwd=Path(resumed.__file__).parent, capture_output=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    half = folder / "_unfinished" / "checkpoint-2"
    assert (half / "model.safetensors").exists() and is_whole(half)  # all that transformers writes is there
    assert get_last_checkpoint(folder) == str(folder / "checkpoint-1")
    resumed.make("grpo-window", folder, model_dir, save_steps=1, max_steps=2).train(resume_from_checkpoint=True)
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-1", "checkpoint-2"}
    assert not half.parent.exists()
