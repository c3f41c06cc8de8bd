# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoints: written whole or not at all, with all that an interrupted run needs to go on as if it had not been."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer

from ..checkpoints import STATE_FILE, UNFINISHED, clear_unfinished, put_in_place, told_if_refused


class CheckpointedGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose checkpoints hold more than TRL's, and are there whole or not at all."""

    has_critic = False
    writes_checkpoint = False  # now
    knows_whole_run = True  # also where this is its second part
    train_sampler: Any = None

    def state_dict_to_save(self, output_dir: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What of the model's weights belongs into its own file."""
        return state_dict

    def save_with_model(self, folder: Path) -> None:
        """Write what belongs beside the model's weights wherever they are saved. Who saves them calls this."""

    def save_beside(self, folder: Path) -> None:
        """Write what a checkpoint holds beside what `Trainer` saves. Every process calls this."""

    def load_beside(self, folder: str) -> None:
        """Load what a checkpoint holds beside the model's weights."""

    def push_checkpoint(self, checkpoint_folder: str, push: Callable[[str], None]) -> None:
        """Push a checkpoint, if that is wanted, by `push(checkpoint_folder)`."""
        push(checkpoint_folder)

    def before_upload(self) -> None:
        """Called when no push is in progress any more: in [`push_to_hub`] all is saved by then, and pushed next."""

    # -- what TRL calls ----------------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is None and self.has_critic:
            state_dict = self.model.state_dict()
        if state_dict is not None:
            state_dict = self.state_dict_to_save(output_dir or self.args.output_dir, state_dict)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.save_with_model(Path(output_dir or self.args.output_dir))

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self.writes_checkpoint else run_dir

    def _save_checkpoint(self, model, trial):
        """In a folder beside, which is moved to its place when it is whole; only then older checkpoints go."""
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with told_if_refused(name, run_dir, run_dir):
            self._on_one_process_a_machine(clear_unfinished, run_dir)
            try:
                self.writes_checkpoint = True
                super()._save_checkpoint(model, trial)
                self.save_beside(Path(run_dir, UNFINISHED, name))
                best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                # `Trainer` has looked for it beside this one, and its path in an earlier run may be another
                if best == name or os.path.isdir(os.path.join(run_dir, best)):
                    self.state.best_model_checkpoint = os.path.join(run_dir, best)
                    if self.args.should_save:
                        self.state.save_to_json(os.path.join(run_dir, UNFINISHED, name, STATE_FILE))
                self._on_one_process_a_machine(put_in_place, run_dir, name)
            except BaseException:
                clear_unfinished(run_dir)  # the space may be needed for what can still be saved
                raise
            finally:
                self.writes_checkpoint = False
        if self.args.push_to_hub:
            self.push_checkpoint(os.path.join(run_dir, name), super()._push_from_checkpoint)
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _on_one_process_a_machine(self, act: Callable[..., None], *args: Any) -> None:
        """The main process first: it may be that all machines share its disk, and there is nothing left to do."""
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            act(*args)
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process and not accelerator.is_main_process:
            act(*args)
        accelerator.wait_for_everyone()

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed behind the last step: it would make one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        self.train_sampler = super()._get_train_sampler(dataset)
        return self.train_sampler

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _keeping_dtypes(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_beside(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result):
        """Of weights that are tied a file holds one: the others, loaded with it, are not missing."""
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(weight) for name, weight in weights.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(weights.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_best_model(self):
        with _keeping_dtypes(self.model):
            super()._load_best_model()
        self.load_beside(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.writes_checkpoint:  # else it is pushed from its place
            self.push_checkpoint(checkpoint_folder, super()._push_from_checkpoint)

    def _finish_current_push(self):
        super()._finish_current_push()
        self.before_upload()

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call:  # of a checkpoint
            return super().save_model(output_dir, _internal_call)
        with told_if_refused("The model", output_dir or self.args.output_dir, self.args.output_dir):
            return super().save_model(output_dir, _internal_call)

    def log(self, logs, start_time=None):
        if "train_loss" in logs:
            first = 0 if self.knows_whole_run else self._initial_global_step
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - first, 0.001)
        super().log(logs, start_time)

    # -- what a checkpoint of TRL's does not hold --------------------------------------------------------------------

    @property
    def batch_shape(self) -> dict[str, int]:
        """What the place within a rollout is counted in, and what its batches hold."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "use_vllm")
        shape = {name: getattr(self.args, name) for name in names}
        shape |= {"with_critic": self.has_critic, "with_reference": self.beta != 0.0}
        return {**shape, "num_iterations": self.num_iterations, "num_processes": self.accelerator.num_processes}

    def work_in_progress(self) -> dict[str, Any]:
        """This process's rollout as far as it is still to be trained on, and what is still to be logged."""
        mid_rollout = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        tables = {
            name: {column: list(rows) for column, rows in table.items()} if isinstance(table, dict) else list(table)
            for name, table in self._logs.items()
        }
        return {
            "shape": self.batch_shape,
            "step": self._step,
            "rollout": send_to_device(self._buffered_inputs, "cpu") if mid_rollout else None,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "tables": {} if self._logs["images"] else _plain(tables),
            "loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def take_up_work(self, work: dict[str, Any] | None) -> None:
        """
        Go on with what [`work_in_progress`] returned in the interrupted run, when training begins. None: that is not
        known, and the next rollout is played at once.
        """
        for _ in range(int(self.state.epoch + 1e-6)):
            next(iter(self.train_sampler or ()), None)  # draws the order of an epoch that is over
        self.knows_whole_run = work is not None
        if work is None:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            return
        self._step = work["step"]
        if work["rollout"] is not None:
            self._buffered_inputs = send_to_device(work["rollout"], self.accelerator.device)
        self._metrics["train"].update(work["metrics"])
        for name, values in work["tables"].items():
            if isinstance(values, dict):
                for column in values:
                    self._logs[name][column].extend(values[column])
            else:
                self._logs[name].extend(values)
        self._tr_loss += work["loss"].to(self._tr_loss.device)
        self._total_loss_scalar, self._globalstep_last_logged = work["total_loss"], work["last_logged"]


@contextmanager
def _keeping_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """PEFT loads adapters in float32, also where TRL trains them in bfloat16: a resumed run would be another run."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])


def _plain(value: Any) -> Any:
    """`value` with what a checkpoint does not take, such as NumPy's numbers, as Python's own or as text."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (str, int, float, torch.Tensor)) else str(value)
