# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
THE SEAM: the only file that touches TRL, and TRL's private names.

[`RolloutGRPOTrainer`] turns the two private methods of `GRPOTrainer` that kept their form through every release since
0.17 into three public hooks, and says at construction, not in the middle of a run, when TRL is not the one it knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from .batch import Row
from .rollout.generation import BatchBackend, Reply


# The releases the contract test passes on. `pyproject.toml` says the same to pip.
SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")

# Private members this file relies on, and the parameters they are called with.
SEAM = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
}

__all__ = ["GRPOConfig", "RolloutGRPOTrainer", "RolloutRows", "check_trl"]


def check_trl(trainer_class: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """Raises `ImportError` if the installed TRL is not one this package was tested with."""
    install = f'Install it with `pip install "trl{SUPPORTED_TRL}"`.'
    if not SUPPORTED_TRL.contains(Version(version), prereleases=True):
        raise ImportError(f"trl-agents works with trl{SUPPORTED_TRL}, but trl {version} is installed. {install}")
    for name, expected in SEAM.items():
        method = getattr(trainer_class, name, None)
        found = tuple(inspect.signature(method).parameters) if method is not None else None
        if found != expected:
            raise ImportError(
                f"trl {version} has moved `{trainer_class.__name__}.{name}`, which trl-agents builds on (expected the "
                f"parameters {expected}, found {found}). {install}"
            )


@dataclass(frozen=True)
class RolloutRows:
    """
    What a rollout hands to TRL: training rows in place of prompts, the same number on every process.

    `prompts`, `scores` and `extras` have one entry a row. A score of None keeps the row out of TRL's reward
    statistics.
    """

    rows: list[Row]
    prompts: list[Any]
    scores: list[float | None]
    extras: dict[str, list[Any]]


class RolloutGRPOTrainer(GRPOTrainer):
    """
    `GRPOTrainer` whose completions come from [`roll_out`] and whose advantages come from [`assign_credit`].

    While `plays` is False it is `GRPOTrainer`, untouched.
    """

    plays = False

    def roll_out(self, inputs: list[dict[str, Any]]) -> RolloutRows:
        """Play the episodes of `inputs` (this process's slice of the batch) and return the rows to train on."""
        raise NotImplementedError

    def assign_credit(self, rollout: RolloutRows, extra_rewards: torch.Tensor, width: int) -> torch.Tensor:
        """
        Advantages `(B, T)` of the rows' completion tokens, padded to `width`. `extra_rewards` `(B,)` is what the user's
        own reward functions gave each row, weighted and summed.
        """
        raise NotImplementedError

    def transcript_rows(self, rollout: RolloutRows) -> dict[str, list[Any]] | None:
        """Replaces TRL's completions table (`prompt`, `completion`, `reward`, `advantage`); None keeps it."""
        return None

    # -- what TRL calls ----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if not self.plays:
            return super()._generate_and_score_completions(inputs)
        rollout = self.roll_out(inputs)
        self._rollout_rows = rollout
        kept_logs, self._logs = self._logs, _emptied(self._logs)
        try:
            batch = super()._generate_and_score_completions([{"prompt": prompt} for prompt in rollout.prompts])
        finally:
            table_logs, self._logs = self._logs, kept_logs
            self._rollout_rows = None
        start = self.accelerator.process_index * len(rollout.rows)
        own = self._rewards_per_func[start : start + len(rollout.rows)]
        weights = self.reward_weights.to(own.device)
        extra_rewards = (own[:, 1:] * weights[1:]).nansum(dim=1)  # (B,)
        width = batch["completion_ids"].shape[1]
        batch["advantages"] = self.assign_credit(rollout, extra_rewards, width).to(batch["completion_ids"].device)
        self._write_table(self.transcript_rows(rollout), table_logs)
        return batch

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.plays:
            # An episode that weighs nothing, or that has its score on another row, must not enter the statistics.
            # Marked here and not by returning None, for which TRL would warn at every batch.
            scored = torch.tensor([score is not None for score in self._rollout_rows.scores], device=rewards.device)
            rewards[~self.accelerator.gather(scored), 0] = torch.nan
            self._rewards_per_func = rewards
        return rewards

    def _write_table(self, table: dict[str, list[Any]] | None, table_logs: dict[str, Any]) -> None:
        logs = self._logs
        if table is None:
            logs["prompt"].extend(table_logs["prompt"])
            logs["completion"].extend(table_logs["completion"])
            logs["advantages"].extend(table_logs["advantages"])
            for kind in ("rewards", "extra"):
                for name, values in table_logs[kind].items():
                    logs[kind][name].extend(values)
            return
        logs["prompt"].extend(table["prompt"])
        logs["completion"].extend(table["completion"])
        logs["rewards"][self.reward_func_names[0]].extend(table["reward"])
        logs["advantages"].extend(table["advantage"])

    # -- what trainers may use ---------------------------------------------------------------------------------------

    def rollout_output(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """The `rollout_func` given to TRL: the rows are played already, this hands them over."""
        rows = self._rollout_rows.rows
        with_logprobs = all(row.logprobs is not None for row in rows) and bool(rows)
        return {
            "prompt_ids": [row.prompt_ids for row in rows],
            "completion_ids": [row.completion_ids for row in rows],
            "logprobs": [row.logprobs for row in rows] if with_logprobs else None,
            "env_mask": [row.mask for row in rows],
            **self._rollout_rows.extras,
        }

    def record_metrics(self, metrics: dict[str, float]) -> None:
        """Log `metrics` beside TRL's own at the next logging step."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    @contextmanager
    def weights_for_rollout(self) -> Iterator[Any]:
        """The unwrapped model with whole weights in evaluation mode: gathered once a rollout, not once a turn."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(training)

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer, also where the processing class is a multimodal processor."""
        return self._tokenizer

    def vllm_backend(self) -> BatchBackend:
        """TRL's own vLLM connection as a generation backend."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

        def generate(prompts: list[list[int]], budgets: list[int]) -> list[Reply]:
            _, completions, logprobs, _ = self.vllm_generation.generate(prompts=prompts, images=None, num_generations=1)
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
    """Containers of the same kind and length, with nothing in them."""
    return {
        name: type(value)(value.default_factory) if hasattr(value, "default_factory") else type(value)(maxlen=None)
        for name, value in logs.items()
    }
