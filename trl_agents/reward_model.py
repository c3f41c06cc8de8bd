# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Reward models: trained on pairs of answers by TRL's `RewardTrainer`, then read as scores or as a reward function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ._trl import RewardConfig, RewardTrainer
from .lora import StageAdapters
from .stages import stage_config, train_and_save


def fit_reward_model(
    model: str | Path,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    adapters: StageAdapters | None = None,
    **reward_kwargs: Any,
) -> str:
    """
    Train a reward model on pairs (Bradley-Terry, https://huggingface.co/papers/2203.02155, equation 1) with TRL's
    `RewardTrainer` and save it with its tokenizer.

    Every process of a distributed run must call this; they train together.

    Args:
        model (`str` or `Path`):
            Language model whose trunk it starts from, as a rule the supervised one; its head starts anew.
        dataset ([`~datasets.Dataset`]):
            With the columns `prompt`, `chosen` and `rejected`.
        output_dir (`str` or `Path`):
            Where the result is saved.
        epochs (`float`):
            Times through the pairs.
        learning_rate (`float`):
            Peak of the learning rate; its schedule is linear after a warm-up of a tenth of the steps.
        batch_size (`int`):
            Pairs a step, over all processes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the model's.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the head and the order of the pairs.
        adapters ([`StageAdapters`], *optional*):
            What is trained beside the head in place of all weights, and merged at the end.
        **reward_kwargs:
            Arguments of [`~trl.RewardConfig`] in place of the defaults here.

    Returns:
        `str`: `output_dir`, for `AutoModelForSequenceClassification.from_pretrained`.
    """
    if len(dataset) == 0:
        raise ValueError(f"There is no pair to learn {str(output_dir)!r} from.")
    pace = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    adapters = (adapters or StageAdapters()).of_reward_model()
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    trainer = RewardTrainer(
        str(model),
        stage_config(RewardConfig, output_dir, len(dataset), **pace, **adapters.config, **reward_kwargs),
        train_dataset=dataset.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
        **adapters.trainer,
    )
    train_and_save(trainer, output_dir)
    adapters.merge(model, output_dir, AutoModelForSequenceClassification)
    return str(output_dir)


@torch.no_grad()
def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[float]]:
    """
    What a reward model thinks of each answer, read as it was trained: with the end-of-sequence token after it. So an
    answer that ran out of tokens is scored as if it had ended there; `missing_eos_reward` and `missing_eos_penalty` of
    [`AgentPPOConfig`] tell the two apart.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Sequence classifier with one label (its logit is the score, as TRL's `RewardTrainer` trains it) or two (the
            log-odds of the second, "correct", are).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]`):
            The questions.
        answers (`Sequence[Sequence[str]]`):
            Any number of answers to each.
        batch_size (`int`, *optional*, defaults to `64`):
            Answers in one forward pass.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[list[float]]`, shaped as `answers`.
    """
    if model.config.num_labels not in (1, 2):
        raise ValueError(f"A reward model has one or two labels, and this one has {model.config.num_labels}.")
    texts = [prompt + answer for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    # By length, so that little is padded
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    scores = [0.0] * len(texts)
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(texts), batch_size), desc="Scores", leave=False, disable=not progress):
            batch = order[start : start + batch_size]
            ids = [tokenizer(texts[number])["input_ids"] + [tokenizer.eos_token_id] for number in batch]
            inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right").to(model.device)
            logits = model(**inputs).logits.float()  # (b, 1) or (b, 2)
            values = logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0.0)
            for number, value in zip(batch, values.tolist(), strict=True):
                scores[number] = value
    finally:
        model.train(training)
    remaining = iter(scores)
    return [[next(remaining) for _ in own] for own in answers]


def get_model_reward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64
) -> Callable[..., list[float]]:
    """
    A reward model as a reward function in TRL's form, for any trainer.

    It reads what the model was trained on, the end-of-sequence token included, also after a completion that was cut
    off (see [`score_answers`]), where TRL's own way (the model itself in `reward_funcs`) leaves it out.

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer, batch_size:
            As for [`score_answers`]. Prompts and completions are texts.
    """

    def model_reward(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
        scored = score_answers(model, tokenizer, prompts, [[text] for text in completions], batch_size=batch_size)
        return [score for (score,) in scored]

    return model_reward
