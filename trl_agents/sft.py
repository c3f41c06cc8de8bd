# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Supervised fine-tuning as a step of a recipe: warm-ups, baselines, and rounds of expert iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from ._trl import SFTConfig, SFTTrainer
from .stages import let_another_trainer_follow


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
        **sft_kwargs:
            Arguments of [`~trl.SFTConfig`] in place of the defaults here.

    Returns:
        `str`: `output_dir`, for `from_pretrained`.
    """
    if len(dataset) == 0:
        raise ValueError(f"There is no row to fine-tune on for {str(output_dir)!r}.")
    n_steps = max(round(epochs * len(dataset) / batch_size), 1)
    defaults = {
        "max_steps": n_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": n_steps // 10,
        "per_device_train_batch_size": max(batch_size // PartialState().num_processes, 1),
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
    }
    columns = [name for name in ("prompt", "completion", "messages", "text") if name in dataset.column_names]
    trainer = SFTTrainer(
        str(model) if isinstance(model, Path) else model,
        SFTConfig(str(output_dir), **{**defaults, **sft_kwargs}),
        train_dataset=dataset.select_columns(columns),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output_dir))
    trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    let_another_trainer_follow()
    return str(output_dir)
