# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a terminal shows while an agent trains: how far it is, what it plays, how its measures have gone."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import ProgressCallback, TrainerCallback

from .._trl import RichProgressCallback
from ..types import ParsedAction


if TYPE_CHECKING:
    from .agent_grpo_trainer import AgentGRPOTrainer


# What is told of all that is logged, in this order, where it is logged
MEASURES = {
    "agents/return_mean": "return",
    "reward": "reward",
    "agents/regret_mean": "regret",
    "agents/coverage_mean": "coverage",
    "agents/turns_mean": "turns an episode",
    "agents/invalid_share": "invalid replies",
    "agents/lost_share": "episodes lost to faults",
    "agents/tokens_per_turn": "tokens a reply",
    "completions/mean_length": "tokens a completion",
    "kl": "KL to the reference",
    "agents/kl_mean": "KL an episode",
    "entropy": "entropy",
    "agents/value_explained_variance": "explained variance",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "agents/rollout_seconds": "seconds of a rollout",
    "eval_agents/return_mean": "return, evaluation",
    "eval_reward": "reward, evaluation",
    "eval_agents/regret_mean": "regret, evaluation",
}
SHARES = ("agents/coverage_mean", "agents/invalid_share", "agents/lost_share")
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # characters of a course


class TrainingDisplay(TrainerCallback):
    """
    Progress of the training and of the rollout in progress, and a line for each measure: its latest value, and its
    course from the first log to the latest. The main process shows it, where there is a terminal; it takes the place
    of [`~transformers.ProgressCallback`].

    Args:
        console (`rich.console.Console`, *optional*):
            Where to show it. Defaults to standard error.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.live: Live | None = None
        self.progress: Progress | None = None  # of the training that is going on
        self.logged: dict[str, list[float]] = {}
        self.handlers: list[tuple[logging.StreamHandler, Any]] = []  # whose lines go above it, and where they went

    @property
    def is_open(self) -> bool:
        return self.live is not None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or self.is_open:
            return
        self.logged.clear()
        self.progress = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=3600,  # an update may take longer than rich's half minute
        )
        self.training = self.progress.add_task("Training", total=state.max_steps, note="updates")
        self._open()

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_open:
            self.progress.update(self.training, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress is None:
            return
        for name in MEASURES:
            value = _number(logs, name)
            if value is not None:
                self.logged.setdefault(name, []).append(value)
        if self.is_open:
            self.live.update(self._picture())

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, with the last picture in it; also after a failure."""
        self._shut(leave=True)
        self.progress = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While open, the terminal is left to others: TRL prints its table of completions past all redirection."""
        was_open = self.is_open
        self._shut(leave=False)
        try:
            yield
        finally:
            if was_open:
                self._open()

    def _open(self) -> None:
        # Standard output may go to a file, where it belongs then
        to_terminal = sys.stdout.isatty()
        streams = {id(sys.stderr): "stderr"} | ({id(sys.stdout): "stdout"} if to_terminal else {})
        self.live = Live(
            self._picture(), console=self.console, refresh_per_second=4, redirect_stdout=to_terminal, transient=True
        )
        self.live.start()
        for handler in _stream_handlers():
            if name := streams.get(id(handler.stream)):
                self.handlers.append((handler, handler.setStream(getattr(sys, name))))

    def _shut(self, leave: bool) -> None:
        """Stop showing it; `leave` the last picture where it is."""
        for handler, stream in self.handlers:
            handler.setStream(stream)
        self.handlers.clear()
        if self.live is not None:
            self.live.transient = not leave
            self.live.stop()
            self.live = None

    def bar(self, total: int, description: str) -> RolloutBar:
        """Progress of a rollout of `total` episodes."""
        return RolloutBar(self.progress, total, description)

    def _picture(self) -> Group:
        if not self.logged:
            return Group(self.progress)
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        table.add_column(no_wrap=True)
        for name, label in MEASURES.items():
            if values := self.logged.get(name):
                latest = f"{values[-1]:.1%}" if name in SHARES else f"{values[-1]:.4g}"
                table.add_row(label, latest, course(values))
        return Group(self.progress, table)


class RolloutBar:
    """A rollout in a [`TrainingDisplay`]: episodes done, turns played, share of valid actions."""

    def __init__(self, progress: Progress, total: int, description: str):
        self.progress = progress
        self.task = progress.add_task(description, total=total, note="episodes")
        self.turns = self.valid = 0

    def turn(self, parsed: ParsedAction) -> None:
        self.turns += 1
        self.valid += parsed.is_valid
        note = f"episodes, {self.turns} turns, {self.valid / self.turns:.0%} valid"
        self.progress.update(self.task, note=note)

    def episode(self) -> None:
        self.progress.advance(self.task)

    def __enter__(self) -> RolloutBar:
        return self

    def __exit__(self, *exception) -> None:
        self.progress.remove_task(self.task)


def show_training(trainer: AgentGRPOTrainer, console: Console | None = None) -> TrainingDisplay | None:
    """
    Show a trainer's progress by a [`TrainingDisplay`], if it is this process's to show and somebody looks: on the main
    process, at a terminal, unless `disable_tqdm`, a notebook's own display or TRL's `RichProgressCallback` says
    otherwise. Else None, and everything stays as it was.

    Args:
        trainer ([`AgentGRPOTrainer`]):
            The trainer.
        console (`rich.console.Console`, *optional*):
            Where to show it, whoever looks. Defaults to standard error, if that is a terminal.
    """
    if console is None:
        console = Console(stderr=True)
        # rich's own `is_terminal` holds for a file too where FORCE_COLOR is set
        if not sys.stderr.isatty() or console.is_dumb_terminal:
            return None
    own = [callback for callback in trainer.callback_handler.callbacks if type(callback) is ProgressCallback]
    others = [each for each in trainer.callback_handler.callbacks if isinstance(each, RichProgressCallback)]
    if not own or others or not trainer.is_world_process_zero():
        return None
    trainer.remove_callback(own[0])
    display = TrainingDisplay(console)
    trainer.add_callback(display)
    return display


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):  # some are placeholders
            if type(handler) is logging.StreamHandler:
                yield handler


def course(values: list[float], width: int = WIDTH) -> str:
    """How `values` have gone, in `width` characters at most; a character stands for the mean of as many."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = math.ceil(len(finite) / width)
    means = [sum(part) / len(part) for part in (finite[at : at + size] for at in range(0, len(finite), size))]
    low, high = min(means), max(means)
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return "".join(BLOCKS[round((mean - low) / step)] for mean in means)


def _number(logs: Mapping[str, Any], name: str) -> float | None:
    try:
        return float(logs[name])
    except (KeyError, TypeError, ValueError):
        return None
