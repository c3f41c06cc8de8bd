# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a terminal shows of a training: told apart from one that nobody looks at, and left in order by failures."""

import io
import logging
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas
import pytest
from rich.console import Console
from scripted import Pay, ScriptedTrainer, acts, make_config, save_tiny_model
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from trl_agents._trl import RichProgressCallback
from trl_agents.trainers.display import BLOCKS, MEASURES, TrainingDisplay, course, show_training


SCRIPT = acts("abc", "bb?", "cba", "aaa")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path, model_dir):
    def make(script=SCRIPT, callbacks=None, **kwargs):
        config = make_config(tmp_path / "out", **{"max_steps": 3, "disable_tqdm": False, **kwargs})
        trainer = ScriptedTrainer(model_dir, args=config, env=Pay, callbacks=callbacks)
        trainer.script = script
        return trainer

    return make


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=40)


def kinds(trainer):
    return [type(callback) for callback in trainer.callback_handler.callbacks]


def test_progress_and_measures_are_shown(make):
    trainer, console = make(), terminal()
    trainer.display = show_training(trainer, console)
    assert ProgressCallback not in kinds(trainer) and TrainingDisplay in kinds(trainer)
    bars = []
    open_bar = trainer.display.bar
    trainer.display.bar = lambda total, description: bars.append(open_bar(total, description)) or bars[-1]
    trainer.train()
    shown = console.file.getvalue()
    last = shown[shown.rindex("Training") :]
    assert "3/3" in last and "Rollout" not in last and not trainer.display.is_open
    mean = trainer.state.log_history[0]["agents/return_mean"]
    assert f"{mean:.4g}" in last and "invalid replies" in last and "8.3%" in last  # one of twelve replies
    assert [(bar.turns, bar.valid) for bar in bars] == [(12, 11)] * 3
    assert bars[0].progress.task_ids == [trainer.display.training]  # a rollout's bar goes with it


def test_a_failure_leaves_the_terminal_in_order(make):
    trainer, console = make(script=[["ACTION=a"]]), terminal()  # it has no more to say, and raises
    trainer.display = show_training(trainer, console)
    with pytest.raises(Exception):  # noqa: B017 - whatever it is
        trainer.train()
    assert not trainer.display.is_open
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_where_nobody_looks_everything_stays_as_it_was(make):
    trainer = make()
    assert trainer.display is None and ProgressCallback in kinds(trainer)
    quiet = make(disable_tqdm=True)
    assert show_training(quiet, terminal()) is None and PrinterCallback in kinds(quiet)
    other = make(callbacks=[RichProgressCallback()])
    assert show_training(other, terminal()) is None


def test_colours_that_are_forced_make_no_terminal(make, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in many CIs
    assert Console(stderr=True).is_terminal
    assert make().display is None


def test_a_terminal_that_moves_no_cursor(make, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert make().display is None


def test_lines_of_others_go_above_and_their_streams_come_back(make, monkeypatch):
    trainer, console = make(), terminal()
    trainer.display = show_training(trainer, console)
    handler = logging.StreamHandler()  # keeps standard error as it is now
    log = logging.getLogger("somebody.else")
    log.addHandler(handler)
    stream, seen = handler.stream, []

    class Speak(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((handler.stream is stream, trainer.display.is_open))
            log.error("the push failed at %d", state.global_step)

        def on_log(self, args, state, control, **kwargs):
            seen.append((handler.stream is stream, trainer.display.is_open))

    trainer.add_callback(Speak())
    trainer.train()
    log.removeHandler(handler)
    assert seen == [(False, True), (True, False)] * 3 + [(True, False)]  # aside while TRL logs
    assert handler.stream is stream and "the push failed at 2" in console.file.getvalue()


def test_standard_output_in_a_file_stays_there(make, monkeypatch):
    trainer, kept = make(), []
    trainer.display = show_training(trainer, terminal())

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(sys.stdout)

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    trainer.add_callback(Look())
    trainer.train()
    assert kept == [out] * 3


def test_slow_updates_have_an_end(make):
    display = TrainingDisplay(terminal())
    display.on_train_begin(None, TrainerState(max_steps=10), None)
    clock = iter(range(0, 10**6, 40))
    display.progress.get_time = lambda: next(clock)  # 40 seconds from look to look
    for step in (1, 2, 3):
        display.on_step_end(None, TrainerState(global_step=step), None)
    remaining = display.progress.tasks[0].time_remaining
    display.close()
    assert remaining is not None and remaining > 100


def test_other_processes_are_quiet(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    assert show_training(trainer, terminal()) is None


def test_playing_without_training_has_a_bar_of_its_own(make, capsys):
    trainer = make()
    trainer.display = show_training(trainer, terminal())
    assert len(trainer.play(range(4))) == 4
    assert "Evaluation" in capsys.readouterr().err


def test_trackers_get_all_metrics_and_a_table_of_episodes(make, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(report_to=["tensorboard"], disable_tqdm=True, log_completions=True)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("agents/return_mean", "agents/invalid_share", "reward", "loss"):
        logged = [float(logs[name]) for logs in trainer.state.log_history if name in logs]
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(logged), name
        assert len(logged) == 3
    table = pandas.read_parquet(tmp_path / "out" / "completions" / "completions_00003.parquet")
    assert len(table) == 4 and "ACTION=a" in table["completion"].iloc[0]
    assert {"prompt", "completion", "advantage", "environment_reward"} <= set(table.columns)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([math.nan, math.inf], ""),
        ([1.0], "▁"),
        ([0, 7], "▁█"),
        ([7, math.nan, 0], "█▁"),
        (list(range(8)), BLOCKS),
        ([3.0] * 5, "▁▁▁▁▁"),
    ],
)
def test_course(values, shown):
    assert course(values) == shown


def test_a_long_course_fits():
    assert 20 <= len(course(list(range(1000)))) <= 24 and course(list(range(1000)))[-1] == "█"


def test_every_measure_that_is_shown_is_explained():
    readme = (HERE.parent / "README.md").read_text()
    for name in MEASURES:
        if name.startswith("agents/"):
            assert f"`{name}`" in readme or f"`{name.rsplit('_', 1)[0]}" in readme, name


@pytest.mark.slow
def test_at_a_real_terminal(tmp_path, model_dir):
    """The trainer finds the terminal by itself."""
    code = f"""
    import sys; sys.path.insert(0, {str(HERE)!r})
    from scripted import *
    trainer = ScriptedTrainer({model_dir!r}, args=make_config({str(tmp_path)!r}, disable_tqdm=False), env=Pay)
    trainer.script = acts("abc", "bb?", "cba", "aaa")
    trainer.train()
    """
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(code))
    pty = "import pty, sys; sys.exit(pty.spawn([sys.executable, sys.argv[1]]) >> 8)"
    done = subprocess.run([sys.executable, "-c", pty, script], capture_output=True, timeout=300)
    shown = done.stdout.decode(errors="replace")
    assert done.returncode == 0, shown[-2000:]
    assert "2/2" in shown and "return" in shown and "{'loss'" not in shown and "\x1b[?25h" in shown
