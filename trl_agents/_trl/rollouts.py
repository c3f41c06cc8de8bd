# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rollouts: rows of our own in the place of TRL's completions, advantages of our own in the place of its."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from ..batch import NO_TURN, Row, pad_turn_index, sum_by_episode
from ..fsdp import sharded_modules, unsharded
from ..rollout.generation import BatchBackend, Reply
from .scoring import ScoringGRPOTrainer


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


class RolloutGRPOTrainer(ScoringGRPOTrainer):
    """
    `GRPOTrainer` whose completions come from [`roll_out`] and whose advantages come from [`assign_credit`].

    While `plays` is False completions are TRL's, and while `has_critic` is False too, it is `GRPOTrainer`.
    """

    _rollout_rows: RolloutRows | None = None  # of which TRL is making a batch

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
            self._correct_reward(rollout, own)
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

    def _tokens_to_score(self, width):
        if self._sampled is None and self._rollout_rows is not None:  # TRL's batch is being made of them
            return pad_turn_index(self._rollout_rows.rows, width) != NO_TURN
        return super()._tokens_to_score(width)

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

    def _prepare_inputs(self, generation_batch):
        per_epoch, played = self.args.steps_per_generation, self._buffered_inputs
        if self.has_critic and self.model.training and played is not None and "pixel_values" not in played[0]:
            if self._step % per_epoch == 0 and self._step % (per_epoch * self.num_iterations) != 0:
                self._buffered_inputs = _reshuffled(played)
        return super()._prepare_inputs(generation_batch)

    def _correct_reward(self, rollout: RolloutRows, own_rewards: torch.Tensor) -> None:
        """The mean over episodes in the place of TRL's own over rows, of which an episode may have one a turn."""
        weighted = (own_rewards * self.reward_weights.to(own_rewards.device)).nansum(dim=1)  # (B,)
        weighted = weighted.masked_fill(own_rewards.isnan().all(dim=1), torch.nan).tolist()
        scored = [row for row, value in zip(rollout.rows, weighted, strict=True) if value == value]
        totals = gather_object(sum_by_episode(scored, [value for value in weighted if value == value]))
        if totals:
            metrics, totals = self._metrics["train" if self.model.training else "eval"], torch.tensor(totals)
            metrics["reward"][-1] = totals.mean().item()
            metrics["reward_std"][-1] = totals.std().item() if len(totals) > 1 else 0.0

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

    # -- what trainers may use ---------------------------------------------------------------------------------------

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
        """How gradient checkpointing is switched on again after a rollout; trl 1.15 and older cannot be told."""
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
