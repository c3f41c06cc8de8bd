# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What [R1](https://huggingface.co/papers/2501.12948) reads and writes: a base model is asked in plain text to think
between `<think>` and `</think>` and to answer between `<answer>` and `</answer>`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import with_texts
from .questions import answer_questions, majority_vote
from .rewards import Grading, think_answer_format_reward


# In our words; the paper's prompt says the same. No template of a chat: a base model knows none.
INSTRUCTIONS = (
    "In this conversation a User asks questions and an Assistant answers them. The Assistant first thinks the "
    "question through and then tells the User the answer. Its thoughts stand between <think> and </think>, the answer "
    "alone between <answer> and </answer>: <think> thoughts </think> <answer> answer </answer>.\n"
)
USER, ASSISTANT = "User: ", "\nAssistant:"
# Standing texts, each of which a small model may read as one token (`phrases` of `tiny_tokenizer`)
PHRASES = (INSTRUCTIONS + USER, USER, ASSISTANT, " <think>", "</think>", " <answer>", "</answer>", " The answer is")


def r1_prompt(question: str) -> str:
    """The prompt of R1-Zero: what is expected, the question, and the beginning of the assistant's turn."""
    return f"{INSTRUCTIONS}{USER}{question.strip()}{ASSISTANT}"


def think_answer(rationale: str, answer: str) -> str:
    """A completion in R1's form."""
    return f" <think>{rationale.strip()}</think> <answer>{answer}</answer>"


def r1_prompt_completion(dataset: Dataset) -> Dataset:
    """
    Add R1's texts as columns `prompt` and `completion`: what a cold start learns from, and what RL starts from.

    Args:
        dataset (`Dataset`):
            Columns `question` and `answer`, and `rationale`. A row without rationale, which R1's form has no place
            for, thinks of the answer alone.

    Returns:
        `Dataset` with all the columns of `dataset` and the two.
    """
    prompts = [r1_prompt(question) for question in dataset["question"]]
    completions = [think_answer(row.get("rationale") or row["answer"], row["answer"]) for row in dataset]
    return with_texts(dataset, prompts, completions)


def mixed_corpus(dataset: Dataset, tagged: float = 0.3, direct: float = 0.2, seed: int = 0) -> Dataset:
    """
    Solutions as a base model may have met them before anyone asked it for a form: with both pairs of tags, with the
    answer's alone, with none, and answers without a solution. Half of the documents begin with `INSTRUCTIONS`,
    whichever form follows, so that these say nothing yet.

    A model trained on it writes what it has seen, each form as often: something for RL to choose from. (What failed to
    be rewarded once in a group of samples cannot be learnt from.)

    Args:
        dataset (`Dataset`):
            Columns `question`, `rationale` and `answer`.
        tagged (`float`, *optional*, defaults to `0.3`):
            Share of the documents in R1's form.
        direct (`float`, *optional*, defaults to `0.2`):
            Share of those that state the answer at once.
        seed (`int`, *optional*, defaults to `0`):
            Seeds which document has which form.

    Returns:
        `Dataset` with the columns of `dataset`, and `prompt` and `completion`.
    """
    if not (tagged >= 0 and direct >= 0 and tagged + direct <= 1):
        raise ValueError(f"tagged={tagged} and direct={direct} are shares: make them positive, their sum at most 1.")
    rng = random.Random(f"mixed corpus {seed}")
    prompts, completions = [], []
    for row in dataset:
        prompt, answer, rationale = r1_prompt(row["question"]), row["answer"], row["rationale"].strip()
        draw = rng.random()
        if draw < tagged:
            completion = think_answer(rationale or answer, answer)
        elif draw < tagged + direct or not rationale:
            completion = f" The answer is {answer}."
        elif draw < (1 + tagged + direct) / 2:
            completion = f" {rationale}\n The answer is {answer}."
        else:
            completion = f" {rationale}\n <answer>{answer}</answer>"
        prompts.append(prompt if rng.random() < 0.5 else prompt.removeprefix(INSTRUCTIONS))
        completions.append(completion)
    return with_texts(dataset, prompts, completions)


@dataclass(frozen=True)
class WellFormedGrading(Grading):
    """
    A [`Grading`] that reads no answer in a completion that is not in R1's form: with [`self_training_rows`], rejection
    sampling by both of R1's rewards. Takes the same arguments.
    """

    def read(self, completions: Sequence[str], prompts: Sequence[str]) -> list[float | str | None]:
        values = super().read(completions, prompts)
        formed = think_answer_format_reward(list(completions))
        return [value if form else None for value, form in zip(values, formed, strict=True)]


def evaluate_r1(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    grading: Grading,
    *,
    n: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, list[float]]:
    """
    How a model answers questions, by greedy decoding and by sampling: R1's pass@1 is the share of right answers among
    several sampled ones, and so is the share of well-formed ones. (Greedy decoding shows only the form that is most
    frequent, and nothing of what RL starts from.)

    Args:
        model, tokenizer, dataset, grading, kwargs:
            As for [`evaluate_answers`].
        n (`int`, *optional*, defaults to `4`):
            Answers sampled to each question.
        temperature (`float`, *optional*, defaults to `1.0`):
            At which they are sampled.
        seed (`int`, *optional*, defaults to `0`):
            Seeds them.

    Returns:
        `dict[str, list[float]]`: `"greedy"`, `"pass@1"`, `"vote@<n>"` and `"format"`; one entry a question.
    """
    if n < 1:
        raise ValueError(f"n={n}: sample at least one answer to each question.")
    prompts, golds = dataset["prompt"][:], dataset["answer"][:]
    greedy = [text for (text,) in answer_questions(model, tokenizer, prompts, **kwargs)]
    sampled = answer_questions(model, tokenizer, prompts, n=n, temperature=temperature, seed=seed, **kwargs)
    values = [grading.read(texts, [prompt] * n) for texts, prompt in zip(sampled, prompts, strict=True)]
    return {
        "greedy": [
            float(grading.is_correct(value, gold))
            for value, gold in zip(grading.read(greedy, prompts), golds, strict=True)
        ],
        "pass@1": [
            sum(grading.is_correct(value, gold) for value in own) / n for own, gold in zip(values, golds, strict=True)
        ],
        f"vote@{n}": [
            float(grading.is_correct(majority_vote(own), gold)) for own, gold in zip(values, golds, strict=True)
        ],
        "format": [sum(think_answer_format_reward(texts)) / n for texts in sampled],
    }
