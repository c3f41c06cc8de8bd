# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Whether the processes that a launcher has started know of each other."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def launched_processes() -> int:
    """How many processes the launcher says it has started; 1 without one."""
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if number.isdecimal() else 1


def only_cpus() -> bool:
    """Whether several processes were launched that have nothing but CPUs to train on."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("DEEPSPEED", "FSDP"))
    return launched_processes() > 1 and not torch.accelerator.is_available() and not sharded


def check_processes() -> None:
    """
    Raises `ValueError` where several processes were launched and each believes to be alone: accelerate looks for the
    others on accelerators only, unless it is told to use CPUs, and `accelerate launch` does not hand its `use_cpu` on.

    Call it when there are training arguments, which tell accelerate.
    """
    launched, counted = launched_processes(), PartialState().num_processes
    if counted < launched:
        raise ValueError(
            f"{launched} processes were launched (WORLD_SIZE), and accelerate counts {counted}: each would train "
            "alone, into the same folder. On CPUs, add `--use_cpu true` to the script's arguments, in a program "
            "`AgentGRPOConfig(use_cpu=True)`; on GPUs, start the script with `accelerate launch`; if there is one "
            "process, unset WORLD_SIZE."
        )
