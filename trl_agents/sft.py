# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Supervised fine-tuning as a step of a recipe: warm-ups, baselines, and rounds of expert iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from ._trl import SFTConfig, SFTTrainer
from .lora import StageAdapters
from .stages import stage_config, train_and_save


def fine_tune(
    model: Any,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    tokenizer: Any = None,
    seed: int = 0,
    adapters: StageAdapters | None = None,
    **sft_kwargs: Any,
) -> str:
    """
    Train `model` on `dataset` with TRL's `SFTTrainer` and save it with its tokenizer.

    Every process of a distributed run must call this; they train together.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            Where to start from.
        dataset ([`~datasets.Dataset`]):
            In one of TRL's forms: `prompt` and `completion` (only completions are learnt), `messages`, or `text`.
        output_dir (`str` or `Path`):
            Where the result is saved.
        epochs (`float`):
            Times through the dataset.
        learning_rate (`float`):
            Peak of the learning rate. Its schedule is linear after a warm-up of a tenth of the steps (ReFT's).
        batch_size (`int`):
            Rows a step, over all processes.
        tokenizer (*optional*):
            Defaults to the model's.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the order of the rows.
        adapters ([`StageAdapters`], *optional*):
            What is trained in place of all weights and merged at the end, if `model` is a folder or name.
        **sft_kwargs:
            Arguments of [`~trl.SFTConfig`] in place of the defaults here.

    Returns:
        `str`: `output_dir`, for `from_pretrained`.
    """
    if len(dataset) == 0:
        raise ValueError(f"There is no row to fine-tune on for {str(output_dir)!r}.")
    pace = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    adapters = adapters or StageAdapters()
    columns = [name for name in ("prompt", "completion", "messages", "text") if name in dataset.column_names]
    trainer = SFTTrainer(
        str(model) if isinstance(model, Path) else model,
        stage_config(SFTConfig, output_dir, len(dataset), **pace, **adapters.config, **sft_kwargs),
        train_dataset=dataset.select_columns(columns),
        processing_class=tokenizer,
        **adapters.trainer,
    )
    return train_and_save(trainer, output_dir, start=model, adapters=adapters)
