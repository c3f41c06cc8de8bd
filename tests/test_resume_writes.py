# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A checkpoint is whole or not there, the last one stays until the next is whole, and refusals say what to do."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import resumed
import torch
from resumed import make
from safetensors.torch import save_file
from scripted import save_tiny_model
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from trl_agents.checkpoints import (
    STATE_FILE,
    UNFINISHED,
    NotWritten,
    clear_unfinished,
    find_checkpoint,
    is_whole,
    last_checkpoint,
    put_in_place,
    told_if_refused,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


# -- which one to go on from ------------------------------------------------------------------------------------------


def write(folder, state="{}"):
    folder.mkdir(parents=True)
    if state is not None:
        (folder / STATE_FILE).write_text(state)


@pytest.fixture
def run(tmp_path):
    """A run whose process was killed while it wrote the state of its third checkpoint, and then the files of a 4th."""
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"epoch": 0.'), (14, None)):
        write(tmp_path / f"checkpoint-{step}", state)
    write(tmp_path / "checkpoint-best")
    return tmp_path


def test_the_latest_whole_one_is_found(run):
    latest = str(run / "checkpoint-10")
    assert last_checkpoint(run) == latest
    for asked in (True, "true", "True", "auto", latest):
        assert find_checkpoint(asked, run) == latest
    for asked in (None, False, "false", "None", ""):
        assert find_checkpoint(asked, run) is None
    assert find_checkpoint(str(run / "checkpoint-best"), run) == str(run / "checkpoint-best")


def test_what_there_is_not_is_told(run, tmp_path):
    with pytest.raises(ValueError, match="checkpoint-12' is no whole checkpoint.*The latest .* '.*checkpoint-10'"):
        find_checkpoint(str(run / "checkpoint-12"), run)
    nothing = tmp_path / "nothing"
    with pytest.raises(ValueError, match="nothing' holds no whole checkpoint: leave it out to begin anew"):
        find_checkpoint(True, nothing)
    with pytest.raises(ValueError, match="output_dir has no whole one either"):
        find_checkpoint("checkpoint-3", nothing)
    assert find_checkpoint("auto", nothing) is None and last_checkpoint(nothing) is None


CUT_OFF = ["agent_state.json", "agent_work_0.pt", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]


def test_a_file_that_was_cut_off(model_dir, tmp_path):
    """By a copy that was interrupted, say: that checkpoint is passed over, and refused by its file's name."""
    make("ppo-chat", tmp_path, model_dir, save_steps=1, max_steps=2).train()
    first, second = (tmp_path / f"checkpoint-{step}" for step in (1, 2))
    for name in [*CUT_OFF, "value_head.safetensors", "trainer_state.json"]:
        content = (second / name).read_bytes()
        for size in (0, len(content) // 2, len(content) - 2):
            (second / name).write_bytes(content[:size])
            assert find_checkpoint("auto", tmp_path) == str(first), (name, size)
            with pytest.raises(ValueError, match=f"it has no {name} that can be read. The latest .*checkpoint-1'"):
                find_checkpoint(str(second), tmp_path)
        (second / name).write_bytes(content)
    assert last_checkpoint(tmp_path) == str(second)


def test_a_checkpoint_takes_an_earlier_runs_place(tmp_path):
    write(tmp_path / "checkpoint-2", "1")
    write(tmp_path / UNFINISHED / "checkpoint-2", "2")
    put_in_place(tmp_path, "checkpoint-2")
    put_in_place(tmp_path, "checkpoint-2")  # another machine, which shares the disk
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / STATE_FILE).read_text() == "2"


# -- writing it -------------------------------------------------------------------------------------------------------


def test_it_appears_when_it_is_whole(model_dir, tmp_path, monkeypatch):
    """Whenever the process is killed, one whole checkpoint is there, the latest that transformers finds."""
    write(tmp_path / UNFINISHED / "checkpoint-7")  # left by a process that was killed
    moments, save = [], torch.save

    def look(*args, **kwargs):
        latest = get_last_checkpoint(tmp_path)
        assert latest is None or is_whole(latest)
        moments.append(latest and Path(latest).name)
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", look)
    trainer = make("ppo-window", tmp_path, model_dir, save_steps=1, max_steps=2, save_total_limit=1)
    trainer.train()
    files = len(moments) // 2
    assert files >= 4 and moments == [None] * files + ["checkpoint-1"] * files  # the old one goes after that
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"checkpoint-2"}


def test_the_best_one_is_named_by_its_place(model_dir, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "num_eval_seeds": 2, "per_device_eval_batch_size": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "agents/turns_mean"}  # always the same
    settings |= {"save_steps": 1, "save_total_limit": 1}
    here, there = tmp_path / "here", tmp_path / "there"
    trainer = make("grpo-window", here, model_dir, max_steps=3, **settings)
    trainer.train()
    kept = {path.name for path in here.glob("checkpoint-*")}
    assert kept == {"checkpoint-1"} and trainer.state.best_model_checkpoint == str(here / "checkpoint-1")
    state = json.loads((here / "checkpoint-1" / STATE_FILE).read_text())
    assert state["best_model_checkpoint"] == str(here / "checkpoint-1")
    here.rename(there)  # it stays the best where the run goes on in another place
    trainer = make("grpo-window", there, model_dir, max_steps=3, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(there / "checkpoint-1")
    assert {path.name for path in there.glob("checkpoint-*")} == {"checkpoint-1"}


@contextmanager
def files_of_at_most(size):
    """As on a disk that has this much space left: longer files are refused by the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class At(TrainerCallback):
    """Does something when a step ends, before it is saved."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def run_refused(trainer):
    with pytest.raises(NotWritten) as caught:
        trainer.train()
    return str(caught.value)


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt"])
def test_a_disk_that_is_full(model_dir, tmp_path, what):
    trainer = make("ppo-chat", tmp_path, model_dir, save_steps=1, save_total_limit=1)
    # torch's writer and the one of safetensors each fail in their own way
    sizes = {"model.safetensors": lambda first: 20_000, "optimizer.pt": lambda first: first.stat().st_size + 100}
    with files_of_at_most(resource.RLIM_INFINITY):

        def fill():
            size = sizes[what](tmp_path / "checkpoint-1" / "model.safetensors")
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        trainer.add_callback(At(2, fill))
        told = run_refused(trainer)
    latest = str(tmp_path / "checkpoint-1")
    assert f"checkpoint-2 could not be written to {str(tmp_path)!r}: " in told
    assert "Free some space" in told and f"The last whole checkpoint is {latest!r}." in told
    assert get_last_checkpoint(tmp_path) == latest and not (tmp_path / UNFINISHED).exists()
    resumed = make("ppo-chat", tmp_path, model_dir, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


FULL = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 3
"$3" "$4" ppo-chat "$2" "$5" '{"save_steps": 1, "save_total_limit": 1, "disable_tqdm": true}'
ls "$2"
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(model_dir, tmp_path):
    """A file system that holds two checkpoints and not three, seen by one process only."""
    tmp_path = tmp_path / "disk"
    tmp_path.mkdir()
    size = str(int(8.5 * Path(model_dir, "model.safetensors").stat().st_size))  # weights, and twice that of Adam's
    arguments = [size, str(tmp_path), sys.executable, resumed.__file__, model_dir]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", *arguments]
    if shutil.which("unshare") is None or (process := subprocess.run(command, capture_output=True, text=True)) is None:
        pytest.skip("needs unshare")
    if process.returncode == 3 or "unshare failed" in process.stderr:
        pytest.skip("needs the right to mount a file system of its own")
    told = process.stderr
    assert "NotWritten: checkpoint-" in told and f"could not be written to {str(tmp_path)!r}: " in told
    left = process.stdout.splitlines()
    (checkpoint,) = [name for name in left if name.startswith("checkpoint-")]
    assert UNFINISHED not in left and f"The last whole checkpoint is '{tmp_path / checkpoint}'." in told


def test_a_folder_that_may_not_be_written_to(model_dir, tmp_path):
    trainer = make("grpo-dataset", tmp_path, model_dir, save_steps=1, log_completions=False)
    trainer.add_callback(At(1, lambda: (tmp_path / UNFINISHED).write_text("in the way")))  # for root may do all else
    told = run_refused(trainer)
    assert "checkpoint-1 could not be written" in told and "No whole checkpoint is there." in told
    assert last_checkpoint(tmp_path) is None


def test_a_model_that_cannot_be_saved(model_dir, tmp_path):
    trainer = make("grpo-window", tmp_path, model_dir, save_strategy="no")
    (tmp_path / "model").mkdir()
    with files_of_at_most(20_000), pytest.raises(NotWritten, match="The model could not be written to '.*/model': "):
        trainer.save_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "save",
    [
        lambda path: Path(path).write_text("x"),
        lambda path: torch.save(torch.zeros(10), path),
        lambda path: save_file({"x": torch.zeros(10_000)}, f"{path}/x"),
    ],
)
def test_every_writers_error_is_told(save):
    with pytest.raises(NotWritten, match="It could not be written to '/dev': .* MiB are free"):
        with told_if_refused("It", "/dev", "/dev"):
            save("/dev/full")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ConnectionError(111, "refused"), OSError("no model")]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, told_if_refused("It", "/", "/"):
        raise error
    assert caught.value is error


def test_a_kill_between_the_two_moves_loses_nothing(tmp_path):
    """A checkpoint that takes the place of another: killed when the earlier one has left, and the new one not come."""
    unfinished = tmp_path / UNFINISHED
    for name in ("checkpoint-2", "checkpoint-2.replaced"):
        (unfinished / name).mkdir(parents=True)
        (unfinished / name / "trainer_state.json").write_text(json.dumps({"from": name}))
    clear_unfinished(tmp_path)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2") and not unfinished.exists()
    assert "replaced" in (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
