# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
THE SEAM: the only file that touches TRL, and TRL's private names.

[`RolloutGRPOTrainer`] turns private methods of `GRPOTrainer` and of its base into public hooks, and says when it is
imported, not in the middle of a run, that TRL is not the one it knows.
"""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import gather_object, is_peft_model, send_to_device
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .batch import NO_TURN, Row, pad_turn_index, sum_by_episode, used_columns
from .checkpoints import STATE_FILE, UNFINISHED, clear_unfinished, put_in_place, told_if_refused
from .fsdp import sharded_modules, unsharded
from .rollout.generation import BatchBackend, Reply


# The releases the tests pass on. `pyproject.toml` says the same to pip. On trl 1.15 they cannot: it trains on GPUs
# alone, its log-probabilities being a Triton kernel without a way round it.
SUPPORTED_TRL = SpecifierSet(">=1.14,!=1.15.*,<1.17")
INSTALL = f'Install it with `pip install "trl{SUPPORTED_TRL}"`.'


class UnsupportedTRL(ImportError, ValueError):
    """The installed TRL is not one this package was tested with."""


def check_trl_version(version: str) -> None:
    """Raises [`UnsupportedTRL`] unless `version` is one that this package was tested with."""
    if not SUPPORTED_TRL.contains(Version(version), prereleases=True):
        raise UnsupportedTRL(f"trl-agents works with trl{SUPPORTED_TRL}, but trl {version} is installed. {INSTALL}")


check_trl_version(trl.__version__)  # before anything is imported from TRL that another release may lack

from trl import (  # noqa: E402
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    RichProgressCallback,
    SFTConfig,
    SFTTrainer,
    TrlParser,
)
from trl.models import unwrap_model_for_generation  # noqa: E402
from trl.trainer.utils import disable_dropout_in_model, shuffle_sequence_dict, split_tensor_dict  # noqa: E402


try:
    from trl.trainer.utils import add_fused_lm_head
except ImportError:  # trl 1.14

    def add_fused_lm_head(model: Any, **kwargs: Any) -> None:
        """Nothing: this release makes whole logits."""


# Private members this file relies on, and the parameters they are called with.
SEAM = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate": ("self", "prompts"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_save": ("self", "output_dir", "state_dict"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_get_output_dir": ("self", "trial"),
    "_get_train_sampler": ("self", "dataset"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_best_model": ("self",),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_finish_current_push": ("self",),
}
# Likewise, of which only the first parameters are relied on, in any of these forms.
SEAM_PREFIXES = {
    "_get_per_token_logps_and_entropies": (
        ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
        ("self", "model", "args", "batch_size"),  # trl 1.14 hands the first three on as they come
    ),
}

__all__ = [
    "GRPOConfig",
    "ModelConfig",
    "RewardConfig",
    "RewardTrainer",
    "RichProgressCallback",
    "RolloutGRPOTrainer",
    "RolloutRows",
    "SFTConfig",
    "SFTTrainer",
    "TrlParser",
    "add_fused_lm_head",
    "check_trl",
    "disable_dropout_in_model",
]


def check_trl(trainer_class: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """Raises [`UnsupportedTRL`] if the installed TRL is not one this package was tested with."""
    check_trl_version(version)
    known = {name: (parameters,) for name, parameters in SEAM.items()} | SEAM_PREFIXES
    for name, forms in known.items():
        method = getattr(trainer_class, name, None)
        found = tuple(inspect.signature(method).parameters) if method is not None else ()
        starts = [found[: len(form)] if name in SEAM_PREFIXES else found for form in forms]
        if not any(start == form for start, form in zip(starts, forms, strict=True)):
            raise UnsupportedTRL(
                f"trl {version} has moved `{trainer_class.__name__}.{name}`, which trl-agents builds on (expected the "
                f"parameters {' or '.join(map(str, forms))}, found {found}). {INSTALL}"
            )


@dataclass(frozen=True)
class RolloutRows:
    """
    What a rollout hands to TRL: training rows in place of prompts, the same number on every process.

    Each field has one entry a row. `origins` says which of the batch's inputs a row comes from. A score of None keeps
    the row out of TRL's reward statistics.
    """

    rows: list[Row]
    prompts: list[Any]
    origins: list[int]
    scores: list[float | None]
    extras: dict[str, list[Any]]


class RolloutGRPOTrainer(GRPOTrainer):
    """
    `GRPOTrainer` whose completions come from [`roll_out`] and whose advantages come from [`assign_credit`].

    While `plays` is False completions are TRL's, and while `has_critic` is False too, it is `GRPOTrainer`.
    """

    plays = False
    has_critic = False
    writes_checkpoint = False  # now
    knows_whole_run = True  # also where this is its second part
    train_sampler: Any = None
    _rollout_rows: RolloutRows | None = None  # of which TRL is making a batch
    _sampled: torch.Tensor | None = None

    def roll_out(self, inputs: list[dict[str, Any]]) -> RolloutRows:
        """Play the episodes of `inputs` (this process's slice of the batch) and return the rows to train on."""
        raise NotImplementedError

    def assign_credit(
        self, rollout: RolloutRows | None, rewards: torch.Tensor, batch: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """
        What a scored batch lacks: `advantages` `(B, T)` of the completion tokens, and whatever else the loss reads,
        with one entry a row.

        Args:
            rollout ([`RolloutRows`], *optional*):
                What [`roll_out`] returned; None for TRL's own completions.
            rewards (`torch.Tensor` of shape `(B,)`):
                What the user's own reward functions gave each row, weighted and summed. NaN: none could say.
            batch (`dict`):
                TRL's batch: `completion_ids`, `completion_mask`, `old_per_token_logps` if computed, and so on.
        """
        raise NotImplementedError

    def reading(self, width: int) -> AbstractContextManager[Callable[[int, int], None] | None]:
        """
        Open during every forward pass that scores `width` completion tokens: a critic reads along. What it gives is
        called with the number of columns that were left out of the latest pass, on either side, for it to fill up.
        """
        return nullcontext()

    def forget_readings(self) -> None:
        """Called before a rollout: what was read before it belongs to other rows."""

    def state_dict_to_save(self, output_dir: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What of the model's weights belongs into its own file."""
        return state_dict

    def save_beside(self, folder: Path) -> None:
        """Write what a checkpoint holds beside what `Trainer` saves. Every process calls this."""

    def load_beside(self, folder: str) -> None:
        """Load what a checkpoint holds beside the model's weights."""

    def push_checkpoint(self, checkpoint_folder: str, push: Callable[[str], None]) -> None:
        """Push a checkpoint, if that is wanted, by `push(checkpoint_folder)`."""
        push(checkpoint_folder)

    def before_upload(self) -> None:
        """Called when no push is in progress any more: in [`push_to_hub`] all is saved by then, and pushed next."""

    def transcript_rows(self, rollout: RolloutRows) -> dict[str, list[Any]]:
        """TRL's completions table with a line an episode of all processes: prompt, completion, reward, advantage."""
        raise NotImplementedError

    # -- what TRL calls ----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if not self.plays and not self.has_critic:
            return super()._generate_and_score_completions(inputs)
        self.forget_readings()
        rollout = self.roll_out(inputs) if self.plays else None
        batch = self._score(rollout, inputs) if self.plays else super()._generate_and_score_completions(inputs)
        n_rows = len(batch["completion_ids"])
        start = self.accelerator.process_index * n_rows
        own = self._rewards_per_func[start : start + n_rows]
        first = int(self.plays)  # the first reward function is then the environment's own, credited turn by turn
        rewards = (own * self.reward_weights.to(own.device))[:, first:].nansum(dim=1)  # (B,)
        if not self.plays:
            rewards = rewards.masked_fill(own.isnan().all(dim=1), torch.nan)
        for name, values in self.assign_credit(rollout, rewards, batch).items():
            batch[name] = values.to(batch["completion_ids"].device)
        if self.has_critic or n_rows != len(inputs):
            # TRL compared rows that are neighbours, but these are no group
            self._metrics["train" if self.model.training else "eval"].pop("frac_reward_zero_std", None)
        if self.plays:
            self._write_table(rollout, own, self._row_logs)
        else:
            self._correct_advantages(batch)
        return batch

    def _score(self, rollout: RolloutRows, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of the rows, logged apart: its own tables have a line an episode."""
        self._rollout_rows = rollout
        kept_logs, self._logs = self._logs, _emptied(self._logs)
        try:
            return super()._generate_and_score_completions(
                [
                    {**inputs[origin], "prompt": prompt}
                    for origin, prompt in zip(rollout.origins, rollout.prompts, strict=True)
                ]
            )
        finally:
            self._row_logs, self._logs = self._logs, kept_logs
            self._rollout_rows = None

    def _generate(self, prompts):
        if self.plays:
            return super()._generate(prompts)  # the rows are there already
        # TRL lets FSDP2 gather in every forward pass, of which a process makes as many as its longest completion needs
        with self._whole():
            return super()._generate(prompts)

    def _whole(self) -> AbstractContextManager:
        return nullcontext() if self.use_vllm else unsharded(self.model)  # a serving engine has its own weights

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.plays:
            # A row that weighs nothing must not enter the statistics, nor an episode's score more than once. Marked
            # here and not by returning None, for which TRL would warn at every batch.
            rollout = self._rollout_rows
            scored = torch.tensor([score is not None for score in rollout.scores], device=rewards.device)
            weighs = torch.tensor([len(row.turns) > 0 for row in rollout.rows], device=rewards.device)
            rewards[~self.accelerator.gather(scored), 0] = torch.nan
            rewards[~self.accelerator.gather(weighs)] = torch.nan
        self._rewards_per_func = rewards
        return rewards

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._scoring_only(inputs.get("tool_mask")):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        ours = self.plays or self.has_critic
        with self.reading(logits_to_keep) as widen:
            forward = model  # a model of images has several axes of positions, and works them out from these
            if ours and not self._is_vlm and self._accepts_positions():
                forward = self._economical(model, widen, self._tokens_to_score(logits_to_keep))
            return super()._get_per_token_logps_and_entropies(
                forward, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    @contextmanager
    def _scoring_only(self, sampled: torch.Tensor | None) -> Iterator[None]:
        """While open, tokens that nothing sampled need no log-probability; `sampled` `(B, T)`, or None for all."""
        self._sampled, kept = sampled, self._sampled
        try:
            yield
        finally:
            self._sampled = kept

    def _tokens_to_score(self, width: int) -> torch.Tensor | None:
        if self._sampled is not None or self._rollout_rows is None:
            return self._sampled
        return pad_turn_index(self._rollout_rows.rows, width) != NO_TURN  # TRL's batch is being made of them

    def _economical(
        self, model: Any, widen: Callable[[int, int], None] | None, sampled: torch.Tensor | None
    ) -> Callable[..., Any]:
        """
        `model` for TRL to call with one part of a batch's rows after the other: with positions, without the columns in
        which no row of the part has a token (TRL pads all parts to the batch's longest row), and with labels for the
        tokens alone that were sampled (on GPUs TRL's head computes logits where there is a label).
        """
        n_seen = 0

        def forward(**inputs):
            nonlocal n_seen
            mask, labels = inputs["attention_mask"], inputs.get("labels")
            # Without positions a model counts the padding left of the prompt too, which those with absolute position
            # embeddings do not forgive, and the rollout saw none
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
            if labels is None:  # trl 1.14 cuts whole logits by their distance from the end
                return model(**inputs)
            if sampled is not None:
                part = sampled[n_seen : n_seen + len(labels)].to(labels.device)
                n_seen += len(labels)
                labels = labels.clone()
                labels[:, -part.shape[1] :].masked_fill_(part == 0, -100)
                inputs["labels"] = labels
            first, end = (0, mask.shape[1]) if self.pad_to_multiple_of else used_columns(mask)
            left, right = first, mask.shape[1] - end
            if left == right == 0:
                return model(**inputs)
            outputs = model(
                **{
                    name: value[:, first:end] if torch.is_tensor(value) and value.shape == mask.shape else value
                    for name, value in inputs.items()
                }
            )
            for name in ("log_probs", "entropy"):
                if getattr(outputs, name) is not None:
                    setattr(outputs, name, torch.nn.functional.pad(getattr(outputs, name), (left, right)))
            if widen is not None:
                widen(left, right)
            return outputs

        return forward

    def _accepts_positions(self) -> bool:
        return "position_ids" in inspect.signature(type(self.causal_lm).forward).parameters

    def _prepare_inputs(self, generation_batch):
        per_epoch, played = self.args.steps_per_generation, self._buffered_inputs
        if self.has_critic and self.model.training and played is not None and "pixel_values" not in played[0]:
            if self._step % per_epoch == 0 and self._step % (per_epoch * self.num_iterations) != 0:
                self._buffered_inputs = _reshuffled(played)
        return super()._prepare_inputs(generation_batch)

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is None and self.has_critic:
            state_dict = self.model.state_dict()
        if state_dict is not None:
            state_dict = self.state_dict_to_save(output_dir or self.args.output_dir, state_dict)
        super()._save(output_dir, state_dict)

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

    def _correct_advantages(self, batch: dict[str, Any]) -> None:
        """The mean of each row's advantages in the place of TRL's own in the table of completions."""
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        means = (batch["advantages"] * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        means = self.accelerator.gather(means).tolist()
        kept = list(self._logs["advantages"])[: -len(means)]
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(kept + means)

    def _write_table(self, rollout: RolloutRows, own_rewards: torch.Tensor, row_logs: dict[str, Any]) -> None:
        table, logs = self.transcript_rows(rollout), self._logs
        logs["prompt"].extend(table["prompt"])
        logs["completion"].extend(table["completion"])
        logs["advantages"].extend(table["advantage"])
        logs["rewards"][self.reward_func_names[0]].extend(table["reward"])
        for name, values in list(zip(self.reward_func_names, own_rewards.T.tolist(), strict=True))[1:]:
            logs["rewards"][name].extend(gather_object(sum_by_episode(rollout.rows, values)))
        for name, values in row_logs["extra"].items():
            if len(values) == len(table["prompt"]):  # what a reward function noted on rows fits only where these agree
                logs["extra"][name].extend(values)

    # -- what a checkpoint of TRL's does not hold ---------------------------------------------------------------------

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

    # -- what trainers may use ---------------------------------------------------------------------------------------

    @property
    def causal_lm(self) -> Any:
        """The causal language model itself, without wrappers and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def score_batch(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities `(B, T)` of a batch's completion tokens under the policy as it is, without gradients."""
        parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        extras = {name: batch[name] for name in parameters if name in batch}
        training = self.model.training
        with torch.no_grad(), self._scoring_only(batch.get("tool_mask")):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size,
                **extras,
            )
        return logps

    def rollout_output(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """The `rollout_func` given to TRL: the rows are played already, this hands them over."""
        rows = self._rollout_rows.rows
        logprobs = [row.logprobs for row in rows]
        if self.use_vllm:
            # Its correction reads them on every row, and takes NaN, here of rows that weigh nothing, as no correction
            unknown = float("nan")
            logprobs = [values or [unknown] * len(row.mask) for values, row in zip(logprobs, rows, strict=True)]
        return {
            "prompt_ids": [row.prompt_ids for row in rows],
            "completion_ids": [row.completion_ids for row in rows],
            "logprobs": logprobs if all(values is not None for values in logprobs) else None,
            "env_mask": [row.mask for row in rows],
            **self._rollout_rows.extras,
        }

    def record_metrics(self, metrics: dict[str, float]) -> None:
        """Log `metrics` beside TRL's own at the next logging step."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _checkpointing_kwargs(self) -> dict[str, Any]:
        """How gradient checkpointing is switched on again after a rollout; trl 1.14 cannot be told."""
        name = "gradient_checkpointing_kwargs"
        told = name in inspect.signature(unwrap_model_for_generation).parameters
        return {name: getattr(self.args, name)} if told else {}

    @contextmanager
    def weights_for_rollout(self) -> Iterator[Any]:
        """The unwrapped model with whole weights in evaluation mode: gathered once a rollout, not once a turn."""
        if not self.use_vllm:
            self._place_untrained()
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                **self._checkpointing_kwargs(),
            ) as model,
            torch.no_grad(),
            self._whole(),
        ):
            training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(training)

    def _place_untrained(self) -> None:
        """What DeepSpeed or FSDP will train is put on its device when training begins, too late to play before."""
        state, prepared = self.accelerator.state, self.model_wrapped is not self.model or sharded_modules(self.model)
        zero3 = self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3  # in pieces from the beginning
        if prepared or zero3 or not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return
        several = self.accelerator.num_processes > 1
        if self.is_fsdp_enabled and several and state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading: true leaves all processes but the first without weights until "
                "training begins, too late to play before. Set it to false."
            )
        if self.model.device != self.accelerator.device:
            self.model.to(self.accelerator.device)

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer, also where the processing class is a multimodal processor."""
        return self._tokenizer

    def vllm_backend(self, temperature: float) -> BatchBackend:
        """TRL's own vLLM connection as a generation backend."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

        def generate(prompts: list[list[int]], budgets: list[int]) -> list[Reply]:
            self.vllm_generation.temperature = temperature
            try:
                _, completions, logprobs, _ = self.vllm_generation.generate(
                    prompts=prompts, images=None, num_generations=1
                )
            finally:
                self.vllm_generation.temperature = self.temperature
            replies = []
            for ids, values, budget in zip(completions, logprobs, budgets, strict=True):
                ids, values = list(ids)[:budget], [value[0] for value in values][:budget]
                cut_off = not ids or ids[-1] not in self.eos_token_ids
                replies.append(Reply(tuple(ids), cut_off, tuple(float("nan") if v is None else v for v in values)))
            return replies

        keep_in_step = None
        if self.accelerator.num_processes > 1:  # both modes call collectives

            def keep_in_step(has_prompts: bool) -> bool:
                flag = torch.tensor(int(has_prompts), device=self.accelerator.device)
                return bool(self.accelerator.reduce(flag, reduction="sum").item())

        return BatchBackend(generate, keep_in_step)


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


def _emptied(logs: dict[str, Any]) -> dict[str, Any]:
    """Containers for any number of rows. TRL's own keep a generation batch's worth of episodes."""
    return {name: defaultdict(list) if isinstance(value, defaultdict) else [] for name, value in logs.items()}


def _reshuffled(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in another order and other batches: one more epoch over a rollout."""
    whole = {
        name: torch.cat([batch[name] for batch in batches]) if value.dim() > 0 else value
        for name, value in batches[0].items()
    }
    return split_tensor_dict(shuffle_sequence_dict(whole), len(batches))
