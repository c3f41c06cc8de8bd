# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a checkpoint keeps of a trainer beside weights, optimizer and random states."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint


if TYPE_CHECKING:
    from .agent_grpo_trainer import AgentGRPOTrainer


# Beside a checkpoint's weights.
MEMORY_FILE = "agent_state.json"


class Memorize(TrainerCallback):
    """Writes the trainer's memory into each checkpoint, and lets what lies beside the weights go to the Hub too."""

    def __init__(self, trainer: AgentGRPOTrainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / MEMORY_FILE).write_text(json.dumps(self.trainer.memory(), indent=2), encoding="utf-8")

    def on_push_begin(self, args, state, control, **kwargs):
        # A checkpoint is pushed before it counts as saved, and of its files only those that `Trainer` knows
        self.on_save(args, state, control)
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for name in self.trainer.files_beside:
            if state.is_world_process_zero and (folder / name).is_file():
                shutil.copy(folder / name, Path(args.output_dir) / name)


def recall_from(trainer: AgentGRPOTrainer, checkpoint: str | bool) -> None:
    """Let `trainer` take up the memory in `checkpoint`, a folder, or True for the latest of its output folder."""
    folder = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
    file = None if folder is None else Path(folder) / MEMORY_FILE
    if file is not None and file.exists():
        trainer.recall(json.loads(file.read_text(encoding="utf-8")))
    elif folder is not None and trainer.plays:
        warnings.warn(
            f"{folder} has no {MEMORY_FILE}: reward statistics and coefficients that adapt start anew.",
            stacklevel=3,
        )
