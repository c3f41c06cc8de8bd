# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Log-probabilities of what was sampled: which tokens and columns of a batch they are computed for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from trl import GRPOTrainer

from ..batch import used_columns
from .checkpoints import CheckpointedGRPOTrainer


class ScoringGRPOTrainer(CheckpointedGRPOTrainer):
    """`GRPOTrainer` that computes no more log-probabilities than it needs, and lets a critic read along."""

    plays = False
    _sampled: torch.Tensor | None = None

    def reading(self, width: int) -> AbstractContextManager[Callable[[int, int], None] | None]:
        """
        Open during every forward pass that scores `width` completion tokens: a critic reads along. What it gives is
        called with the number of columns that were left out of the latest pass, on either side, for it to fill up.
        """
        return nullcontext()

    def forget_readings(self) -> None:
        """Called before a rollout: what was read before it belongs to other rows."""

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

    # -- what TRL calls ----------------------------------------------------------------------------------------------

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
        """Which of a batch's `width` completion tokens, `(B, T)`; None for all."""
        return self._sampled

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
