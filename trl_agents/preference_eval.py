# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What RLHF and DPO are judged by: rewards of sampled replies, and how far the policy has moved from the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .questions import answer_questions


@torch.no_grad()
def kl_per_reply(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    replies: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
) -> list[float]:
    """
    The KL divergence of a policy from a reference over each whole reply, in nats, at temperature 1:

        KL_i = sum_t sum_v pi(v | s_t) (log pi(v | s_t) - log pi_ref(v | s_t))

    over the states s_t of reply i, that before its end-of-sequence token included. Its mean over replies sampled from
    the policy estimates what the mean of log pi - log pi_ref does (the k1 that training logs), with less noise, and
    each is at least 0.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        reference ([`~transformers.PreTrainedModel`]):
            The model it started from, with the same tokenizer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Their tokenizer.
        prompts (`Sequence[str]`):
            Texts.
        replies (`Sequence[str]`):
            One to each, sampled from the policy.
        max_new_tokens (`int`, *optional*):
            Token budget the replies had: where it is used up, there was no room for an end-of-sequence token.
        batch_size (`int`, *optional*, defaults to `16`):
            Replies in one forward pass.
    """
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id][:max_new_tokens]
        rows.append((prompt_ids, ids))
    order = sorted(range(len(rows)), key=lambda number: sum(map(len, rows[number])))  # by length: little is padded
    divergences = [0.0] * len(rows)
    modes = [(network, network.training) for network in (model, reference)]
    for network, _ in modes:
        network.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer.pad(
                {"input_ids": [sum(rows[number], []) for number in batch]}, return_tensors="pt", padding_side="right"
            ).to(model.device)
            logits, ref_logits = (network(**inputs).logits for network in (model, reference))
            for row, number in enumerate(batch):
                n_prompt, n_reply = map(len, rows[number])
                states = slice(n_prompt - 1, n_prompt - 1 + n_reply)
                # A reply at a time: in float32 and over the whole vocabulary they are large
                logps, ref_logps = (own[row, states].float().log_softmax(-1) for own in (logits, ref_logits))
                divergences[number] = (logps.exp() * (logps - ref_logps)).sum().item()
    finally:
        for network, training in modes:
            network.train(training)
    return divergences


def evaluate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    rewards: Mapping[str, Callable[..., list[float]]],
    *,
    reference: PreTrainedModel | None = None,
    max_new_tokens: int = 256,
    samples: str | Path | None = None,
    **kwargs: Any,
) -> dict[str, list[float]]:
    """
    Let a policy reply to each prompt once, at temperature 1, and measure the replies.

    Every process of a distributed run must call this with the same prompts; all get the same figures.

    Args:
        model, tokenizer, max_new_tokens, kwargs:
            As for [`~questions.answer_questions`].
        prompts (`Sequence[str]`):
            Texts.
        rewards (`Mapping[str, Callable]`):
            Reward functions in TRL's form, by the name to report them under.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Model from which the KL is measured ([`kl_per_reply`]).
        samples (`str` or `Path`, *optional*):
            File for the first 20 replies with what they were given, to read.

    Returns:
        `dict[str, list[float]]`: measure -> one value a prompt: the rewards, `"kl"` with a `reference`, and `"words"`.
    """
    answers = answer_questions(
        model, tokenizer, prompts, **{"temperature": 1.0, "max_new_tokens": max_new_tokens, **kwargs}
    )
    replies = [reply for (reply,) in answers]
    measured = {name: reward(prompts=prompts, completions=replies) for name, reward in rewards.items()}
    if reference is not None:
        measured["kl"] = kl_per_reply(model, reference, tokenizer, prompts, replies, max_new_tokens=max_new_tokens)
    measured["words"] = [float(len(reply.split())) for reply in replies]
    if samples is not None and PartialState().is_main_process:
        blocks = []
        for number in range(min(20, len(replies))):
            given = ", ".join(f"{name} {values[number]:.2f}" for name, values in measured.items())
            blocks.append(f"{prompts[number].strip()}\n> {replies[number].strip()}\n[{given}]\n")
        Path(samples).write_text("\n".join(blocks), encoding="utf-8")
    return measured
