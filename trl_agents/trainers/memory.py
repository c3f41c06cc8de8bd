# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a checkpoint keeps of a trainer beside weights, optimizer and random states."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


if TYPE_CHECKING:
    from .agent_grpo_trainer import AgentGRPOTrainer


# Beside a checkpoint's weights.
MEMORY_FILE = "agent_state.json"
WORK_FILE = "agent_work_{}.pt"  # of each process
REFERENCE_FILE = "reference_model.safetensors"  # where it follows the policy


class Memorize(TrainerCallback):
    """Takes up what a checkpoint has kept, and lets what lies beside its weights go to the Hub too."""

    def __init__(self, trainer: AgentGRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, folder = self.trainer, self.trainer.resumed_from
        if folder is None or state.global_step == 0:
            return
        trainer.take_up_work(work_in(trainer, folder))
        if args.sync_ref_model:
            load_reference(trainer, folder)

    def on_push_begin(self, args, state, control, **kwargs):
        # Of a checkpoint's files, only those that `Trainer` knows are pushed
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for name in self.trainer.files_beside:
            if state.is_world_process_zero and (folder / name).is_file():
                shutil.copy(folder / name, Path(args.output_dir) / name)


def write_memory(trainer: AgentGRPOTrainer, folder: Path) -> None:
    """Write what a checkpoint keeps of `trainer`. Every process calls this."""
    folder.mkdir(parents=True, exist_ok=True)  # on a machine whose processes save nothing else
    if trainer.args.should_save:
        (folder / MEMORY_FILE).write_text(json.dumps(trainer.memory(), indent=2), encoding="utf-8")
    torch.save(trainer.work_in_progress(), folder / WORK_FILE.format(trainer.accelerator.process_index))
    if trainer.args.sync_ref_model:
        save_reference(trainer, folder)


def recall_from(trainer: AgentGRPOTrainer, folder: str) -> None:
    """Let `trainer` take up the memory in the checkpoint `folder`."""
    file = Path(folder) / MEMORY_FILE
    if file.exists():
        trainer.recall(json.loads(file.read_text(encoding="utf-8")))
    elif trainer.plays:
        warnings.warn(
            f"{folder} has no {MEMORY_FILE}: reward statistics and coefficients that adapt start anew.",
            stacklevel=3,
        )


def agreed_on(checkpoint: str | None) -> str | None:
    """The checkpoint that all processes have found. Processes that went on from different ones would never meet."""
    found = gather_object([checkpoint])
    if len(set(found)) > 1:
        raise ValueError(
            f"The processes found different checkpoints to resume from, by rank: {found}. Give all machines the same "
            "files (an output_dir on a disk that they share), or name one that all of them have."
        )
    return checkpoint


def work_in(trainer: AgentGRPOTrainer, folder: str) -> dict[str, Any] | None:
    """
    This process's work in progress in the checkpoint `folder`; None, with a warning, if it is of no use, or another
    process's is not: those that went on with a rollout would wait for ever for those that play a new one.
    """
    file = Path(folder) / WORK_FILE.format(trainer.accelerator.process_index)
    work, problem = None, None
    if not file.exists():
        problem = f"it has no {file.name}"
    else:
        try:
            work = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            problem = f"{file.name} cannot be read ({str(error).splitlines()[0]})"
        else:
            if work["shape"] != trainer.batch_shape:
                problem = f"it was written with {work['shape']}, and this run has {trainer.batch_shape}"
    problems = [found for found in gather_object([problem]) if found]
    if not problems:
        return work
    warnings.warn(
        f"A rollout that was begun is not gone on with from {folder}: {problem or problems[0]}. The next one is "
        "played at once.",
        stacklevel=2,
    )
    return None


def save_reference(trainer: AgentGRPOTrainer, folder: Path) -> None:
    """Write the reference model's weights as they are now."""
    weights = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters():
        with _gathered(parameter):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if trainer.args.should_save:
                weights[name] = whole.detach().to("cpu", copy=True).contiguous()
    if trainer.args.should_save:
        save_file(weights, folder / REFERENCE_FILE, metadata={"format": "pt"})


def load_reference(trainer: AgentGRPOTrainer, folder: str) -> None:
    """Give the reference model the weights it had in the checkpoint `folder`."""
    file = Path(folder) / REFERENCE_FILE
    if not file.exists():
        warnings.warn(f"{folder} has no {REFERENCE_FILE}: the reference is the first model again.", stacklevel=2)
        return
    with safe_open(file, "pt") as weights, torch.no_grad():
        for name, parameter in trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters():
            whole = weights.get_tensor(name).to(parameter.device)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            with _gathered(parameter):
                parameter.copy_(whole)


def _gathered(parameter: nn.Parameter) -> AbstractContextManager:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed  # sharded by its stage 3

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
