# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Language models answer questions: once by greedy decoding, or many times for a vote or a reward model's choice
(the three evaluations of [ReFT](https://huggingface.co/papers/2401.08967), sections 4.4 and 4.5), and to learn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .rewards.grading import Grading
from .rollout.answers import answer_prompts
from .rollout.generation import Sampling, end_of_reply_ids, make_backend, positions_of


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", model_class: type = AutoModelForCausalLM, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A trained model and its tokenizer, to answer or to judge with, whole on each process: also where ZeRO-3, which the
    trainers of the same run use, would have the weights in pieces.

    Args:
        folder (`str` or `Path`):
            Where the model was saved, or its name on the Hub.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where to put it.
        model_class (`type`, *optional*, defaults to `AutoModelForCausalLM`):
            `AutoModelForSequenceClassification` for a reward model.
        **kwargs:
            Arguments of `from_pretrained`, such as `dtype`.
    """
    unset_hf_deepspeed_config()  # every trainer sets its own again
    model = model_class.from_pretrained(folder, **kwargs).to(device)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    n_slots: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> list[list[str]]:
    """
    Let a language model answer each prompt `n` times.

    Every process of a distributed run must call this with the same prompts: they are shared out, and every process
    gets all answers. What is sampled depends on `seed` and the prompt's number alone.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model with whole weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            Texts as they are, or conversations that the chat template renders.
        n (`int`, *optional*, defaults to `1`):
            Answers to each prompt.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; 0 is greedy decoding, whose `n` answers are all the same.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Token budget of an answer.
        n_slots (`int`, *optional*, defaults to `64`):
            Answers side by side.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the sampling.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar on the main process.

    Returns:
        `list[list[str]]`: `n` answers to each prompt, without special tokens.

    Raises:
        `ValueError`: if a prompt and its answer do not fit the model's positions.
    """
    # Of all prompts: or one process would raise, and the others wait
    all_ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    positions = positions_of(model)
    longest = max(map(len, all_ids), default=0)
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"A prompt of {longest} tokens with max_new_tokens={max_new_tokens} is longer than the model's "
            f"{positions} positions. Shorten one of them."
        )
    sampling = Sampling(tuple(end_of_reply_ids(model, tokenizer)), temperature)

    def answer(own: list[tuple[int, list[int]]]) -> list[list[str]]:
        slots = max(min(n_slots, n * len(own)), 1)
        replies = answer_prompts(
            make_backend(model, tokenizer, slots, sampling),
            [ids for _, ids in own for _ in range(n)],
            max_new_tokens,
            n_slots=slots,
            luck=[(seed, number, draw) for number, _ in own for draw in range(n)],
            progress=progress and PartialState().is_main_process,
        )
        texts = tokenizer.batch_decode([reply.ids for reply in replies], skip_special_tokens=True)
        return [texts[start : start + n] for start in range(0, len(texts), n)]

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _shared_out(answer, list(enumerate(all_ids)))
    finally:
        model.train(training)


def evaluate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    grading: Grading,
    *,
    n_votes: int = 0,
    scorer: Callable[[Sequence[str], Sequence[Sequence[str]]], list[list[float]]] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, list[bool]]:
    """
    Which questions a model answers right: by greedy decoding, by the vote of several sampled answers, and by a reward
    model's choice among them.

    Args:
        model, tokenizer:
            As for [`answer_questions`], whose other arguments `kwargs` may hold.
        dataset ([`~datasets.Dataset`]):
            With the columns `prompt` and `answer`, as [`~data.prompt_completion`] makes them.
        grading ([`~rewards.Grading`]):
            Reads and judges the answers.
        n_votes (`int`, *optional*, defaults to `0`):
            Answers that are sampled besides; 0 for none.
        scorer (`Callable`, *optional*):
            From prompts and several answers to each, a score of each answer: [`~reward_model.score_answers`] with its
            model and tokenizer.
        temperature (`float`, *optional*, defaults to `1.0`):
            At which answers are sampled.
        seed (`int`, *optional*, defaults to `0`):
            Seeds them.

    Returns:
        `dict[str, list[bool]]`: `"greedy"` and, with `n_votes`, `"vote@<n_votes>"` and, with `scorer`,
        `"rerank@<n_votes>"`; one entry a question.
    """
    if scorer is not None and not n_votes:
        raise ValueError("`scorer` chooses among sampled answers, and n_votes=0 samples none: give their number.")
    prompts, golds = dataset["prompt"][:], dataset["answer"][:]

    def judge(values: Sequence[Any]) -> list[bool]:
        return [grading.is_correct(value, gold) for value, gold in zip(values, golds, strict=True)]

    greedy = [answer for (answer,) in answer_questions(model, tokenizer, prompts, **kwargs)]
    correct = {"greedy": judge(_read(grading, greedy, prompts))}
    if n_votes:
        sampled = answer_questions(model, tokenizer, prompts, n=n_votes, temperature=temperature, seed=seed, **kwargs)
        read = _read_all(grading, sampled, prompts)
        correct[f"vote@{n_votes}"] = judge([majority_vote(values) for values in read])
        if scorer is not None:
            scores = _shared_out(lambda own: scorer(*zip(*own, strict=True)), list(zip(prompts, sampled, strict=True)))
            best = [values[int(np.argmax(own))] for values, own in zip(read, scores, strict=True)]
            correct[f"rerank@{n_votes}"] = judge(best)
    return correct


def self_training_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    grading: Grading,
    *,
    n: int,
    most: int,
    temperature: float = 1.0,
    seed: int = 0,
    **kwargs: Any,
) -> Dataset:
    """
    What a model can teach itself: its own answers to `dataset`'s questions, as far as they are right (rejection
    sampling; the data of STaR, ReST and of ReFT's self-training baselines).

    Args:
        model, tokenizer, dataset, grading, temperature, seed, kwargs:
            As for [`evaluate_answers`].
        n (`int`):
            Answers sampled to each question.
        most (`int`):
            Most right ones kept of a question; equal ones count once.

    Returns:
        [`~datasets.Dataset`] with the columns of `dataset`, the right answers as `completion`.
    """
    judged = _judged_answers(model, tokenizer, dataset, grading, n=n, temperature=temperature, seed=seed, **kwargs)
    rows = [
        {**row, "completion": text} for row, (right, _) in zip(dataset, judged, strict=True) for text in right[:most]
    ]
    return Dataset.from_list(rows, features=dataset.features) if rows else dataset.select([])


def answer_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    grading: Grading,
    *,
    n: int,
    most: int,
    temperature: float = 1.0,
    seed: int = 0,
    **kwargs: Any,
) -> Dataset:
    """
    What a reward model learns to choose from: a model's right answers to `dataset`'s questions, each beside a wrong
    one to the same question.

    Args:
        model, tokenizer, dataset, grading, n, temperature, seed, kwargs:
            As for [`self_training_rows`].
        most (`int`):
            Most pairs of a question, no answer twice.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt`, `chosen` and `rejected`.
    """
    judged = _judged_answers(model, tokenizer, dataset, grading, n=n, temperature=temperature, seed=seed, **kwargs)
    rows = [
        {"prompt": prompt, "chosen": good, "rejected": bad}
        for prompt, (right, wrong) in zip(dataset["prompt"], judged, strict=True)
        for good, bad in list(zip(right, wrong, strict=False))[:most]
    ]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")})


def _judged_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, grading: Grading, **kwargs: Any
) -> list[tuple[list[str], list[str]]]:
    """The right and the wrong ones of the sampled answers to each question, equal ones once."""
    prompts = dataset["prompt"][:]
    sampled = answer_questions(model, tokenizer, prompts, **kwargs)
    judged = []
    for gold, texts, values in zip(dataset["answer"], sampled, _read_all(grading, sampled, prompts), strict=True):
        right = {text: grading.is_correct(value, gold) for text, value in zip(texts, values, strict=True)}
        judged.append(([text for text in right if right[text]], [text for text in right if not right[text]]))
    return judged


def _shared_out(compute: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
    """Each process computes its share, and all get all: a program may hit its time limit in one and not in another."""
    state = PartialState()
    own = items[state.process_index :: state.num_processes]
    computed = list(compute(own)) if own else []
    if state.num_processes == 1:
        return computed
    parts, world = gather_object([computed]), state.num_processes
    return [parts[number % world][number // world] for number in range(len(items))]


def _read(grading: Grading, texts: list[str], prompts: list[str]) -> list[Any]:
    return _shared_out(lambda own: grading.read(*zip(*own, strict=True)), list(zip(texts, prompts, strict=True)))


def _read_all(grading: Grading, sampled: list[list[str]], prompts: list[str]) -> list[list[Any]]:
    """All at once: programs run side by side."""
    texts = [text for own in sampled for text in own]
    asked = [prompt for prompt, own in zip(prompts, sampled, strict=True) for _ in own]
    values = iter(_read(grading, texts, asked))
    return [[next(values) for _ in own] for own in sampled]


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent answer that is not None, the first of equally frequent ones; None if there is none."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
