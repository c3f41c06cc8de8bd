# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Seconds and peak memory of an optimisation step: what the benchmarks of training share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from trl_agents.estimate.dry_run import LiveBytes


def now(device: str) -> float:
    """The process's own time on a CPU, which others that use it do not lengthen; the clock once a GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(act: Callable[[], Any], device: str) -> float:
    """How long `act()` takes."""
    started = now(device)
    act()
    return now(device) - started


def peak_bytes_of(act: Callable[[], Any], device: str) -> int:
    """
    The most memory that `act()` holds at once beside what was there before.

    On a CPU it is counted, as the process's size says little at this scale: every storage that an operator returns
    counts from then until it is freed. What operators use within themselves and give back is not seen. On a GPU it is
    the allocator's own peak.
    """
    if device == "cpu":
        with LiveBytes() as counter:
            act()
        return counter.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    return torch.cuda.max_memory_allocated() - before


def update(trainer: Any) -> None:
    """What an optimisation step does once the gradients are there."""
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
