# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Tokens in, tokens out: the small interface between the rollout loop and whatever generates.

A backend knows nothing of environments. The loop submits whole prompts (token ids) to slots and collects replies;
what a slot has in common with its previous prompt is the backend's to exploit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .slots import SlotModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """
    How replies are sampled.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits. 0 is greedy decoding.
        top_p, top_k, min_p (*optional*):
            Truncations of the distribution, as in [`~transformers.GenerationConfig`]; off by default.
        eos_token_ids (`tuple[int, ...]`):
            Tokens that end a reply. The one sampled is part of the reply.
    """

    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None

    def warpers(self) -> LogitsProcessorList:
        """transformers' own warpers, in the order `generate` applies them."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


@dataclass(frozen=True, slots=True)
class Reply:
    """What was sampled for a slot: `ids` with the end-of-turn token if it came, `cut_off` if the budget ran out."""

    ids: tuple[int, ...]
    cut_off: bool
    logprobs: tuple[float, ...] | None = None


class Backend(Protocol):
    """What the rollout loop needs of a generator."""

    def submit(self, slot: int, prompt_ids: list[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        """
        Ask for one reply in `slot`. The slot must be idle. `rng` is the episode's own stream of luck.

        A backend that can end a reply at any token takes `is_over` besides: given the ids of the reply so far, whether
        that is all of it.
        """

    def step(self) -> list[tuple[int, Reply]]:
        """Advance all busy slots, at least by a token; return the replies that are complete."""

    @property
    def busy(self) -> bool:
        """Whether a submitted reply is still missing."""

    def drain(self) -> None:
        """Called once this process has no more prompts: take part in collectives until no process has any."""


@dataclass(slots=True)
class _Slot:
    ids: list[int] = field(default_factory=list)  # prompt + sampled
    n_cached: int = 0  # how many of them the cache holds
    stretched: bool = False  # see [`SlotModel.stretches`]
    n_prompt: int = 0
    limit: int = 0  # length of `ids` at which the reply is cut off
    is_over: Callable[[list[int]], bool] | None = None
    rng: np.random.Generator | None = None
    active: bool = False


class SlotBackend:
    """
    Decodes with a transformers model, keeping every episode's key-value cache across its turns.

    A submitted prompt is compared with what its slot holds; only what differs is computed (an appended observation
    for [`ChatContext`], what follows the instructions for [`WindowContext`]). Prompts that start alike in the same
    batch, as a group's do, are computed once and copied. Slots are independent: each advances as soon as it has
    something to sample, none waits for the others' turn to end.

    Luck is drawn from each episode's own generator, one uniform number a token, so what an episode samples does not
    depend on which other episodes share the batch.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model whose layers are all attention, with `sdpa` or `eager` attention.
        n_slots (`int`):
            Number of episodes side by side.
        sampling ([`Sampling`]):
            How to sample.
    """

    def __init__(self, model: PreTrainedModel, n_slots: int, sampling: Sampling):
        problem = self.unsupported(model)
        if problem:
            raise ValueError(
                f"SlotBackend cannot decode with {type(model).__name__}: {problem}. Use `replay` instead."
            )
        self.decoder = SlotModel(model, n_slots)
        self.sampling = sampling
        self.warpers = sampling.warpers()
        self.slots = [_Slot() for _ in range(n_slots)]
        self.eos = torch.tensor(sampling.eos_token_ids, dtype=torch.long, device=self.decoder.device)

    @staticmethod
    def unsupported(model: PreTrainedModel) -> str | None:
        """Why this model needs [`replay`], or None."""
        return SlotModel.unsupported(model)

    @property
    def busy(self) -> bool:
        return any(slot.active for slot in self.slots)

    def drain(self) -> None:
        """Nothing to take part in: the weights were gathered before the rollout."""

    def submit(
        self,
        slot: int,
        prompt_ids: list[int],
        max_new_tokens: int,
        rng: np.random.Generator,
        is_over: Callable[[list[int]], bool] | None = None,
    ) -> None:
        state = self.slots[slot]
        if state.active:
            raise ValueError(f"slot {slot} is still busy")
        if not prompt_ids:
            raise ValueError("the prompt is empty: there is nothing to answer to")
        cached = state.ids[: state.n_cached]
        if prompt_ids[: len(cached)] != cached:
            cached = cached[: common_prefix_length(cached, prompt_ids)]
        # The last token is always fed by `step`, whose logits sample the reply
        state.n_cached = min(len(cached), len(prompt_ids) - 1)
        state.ids, state.n_prompt = list(prompt_ids), len(prompt_ids)
        state.limit, state.rng, state.active = len(prompt_ids) + max_new_tokens, rng, True
        state.is_over = is_over

    def step(self) -> list[tuple[int, Reply]]:
        active = [index for index, slot in enumerate(self.slots) if slot.active]
        if not active:
            return []
        slots = [self.slots[index] for index in active]
        for slot in slots:
            stretched = self.decoder.stretches(len(slot.ids))
            if stretched != slot.stretched:
                slot.n_cached, slot.stretched = 0, stretched
        self._read_shared(active)
        logits = self.decoder.read(
            active, [slot.ids[slot.n_cached :] for slot in slots], [slot.n_cached for slot in slots]
        )  # (b, V)
        finished = []
        for index, token, ended in self._sample(logits, active):
            slot = self.slots[index]
            slot.n_cached = len(slot.ids)
            slot.ids.append(token)
            if not ended and slot.is_over is not None:
                ended = slot.is_over(slot.ids[slot.n_prompt :])
            if ended or len(slot.ids) >= slot.limit:
                slot.active = False
                finished.append((index, Reply(tuple(slot.ids[slot.n_prompt :]), cut_off=not ended)))
        return finished

    def _read_shared(self, active: list[int]) -> None:
        """Fresh slots that start alike (a group's prompt) are computed once."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for index in active:
            slot = self.slots[index]
            same_positions = self.decoder.stretches(len(slot.ids) - 1) == slot.stretched
            if slot.n_cached == 0 and len(slot.ids) > 1 and same_positions:
                alike.setdefault(tuple(slot.ids[:-1]), []).append(index)
        shared = {ids: members for ids, members in alike.items() if len(members) > 1}
        if not shared:
            return
        firsts = [members[0] for members in shared.values()]
        self.decoder.read(firsts, list(shared), [0] * len(firsts))
        for ids, members in shared.items():
            self.decoder.copy(members[0], members[1:], len(ids))
            for index in members:
                self.slots[index].n_cached = len(ids)

    def _sample(self, logits: torch.Tensor, active: list[int]) -> list[tuple[int, int, bool]]:
        """`logits` of shape `(len(active), V)` -> (slot, token, whether it ends the reply)."""
        if self.sampling.temperature == 0.0:
            total, tokens = logits.max(-1)  # (b,)
        else:
            # Inverse of the cumulative distribution: one number of the episode's own luck per token
            uniform = [self.slots[index].rng.random() for index in active]
            probs = self.warpers(None, logits.float()).softmax(-1)
            cumulative = probs.cumsum(-1, dtype=torch.float64)  # (b, V)
            total = cumulative[:, -1]  # (b,)
            threshold = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * total[:, None]
            tokens = (cumulative <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
        if total.isnan().any():
            raise FloatingPointError("the model's logits are not numbers: its weights have diverged")
        ended = torch.isin(tokens, self.eos)
        return list(zip(active, tokens.tolist(), ended.tolist(), strict=True))


class BatchBackend:
    """
    Adapts a function that answers a batch of whole prompts, such as a serving engine's.

    Args:
        generate (`Callable[[list[list[int]], list[int]], list[Reply]]`):
            Takes the prompts and the most new tokens each may get, returns a reply each, in order.
        keep_in_step (`Callable[[bool], bool]`, *optional*):
            Given whether this process has prompts, says whether any process has: engines whose call is a collective
            over the processes need the same number of calls from each, with no prompts if need be.
    """

    def __init__(
        self,
        generate: Callable[[list[list[int]], list[int]], list[Reply]],
        keep_in_step: Callable[[bool], bool] | None = None,
    ):
        self.generate = generate
        self.keep_in_step = keep_in_step
        self.pending: dict[int, tuple[list[int], int]] = {}

    @property
    def busy(self) -> bool:
        return bool(self.pending)

    def submit(self, slot: int, prompt_ids: list[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        if slot in self.pending:
            raise ValueError(f"slot {slot} is still busy")
        self.pending[slot] = (list(prompt_ids), max_new_tokens)

    def step(self) -> list[tuple[int, Reply]]:
        pending, self.pending = self.pending, {}
        if not pending:
            return []
        if self.keep_in_step is not None:
            self.keep_in_step(True)
        prompts, budgets = [ids for ids, _ in pending.values()], [budget for _, budget in pending.values()]
        replies = self.generate(prompts, budgets)
        if len(replies) != len(prompts):
            raise RuntimeError(f"the generator answered {len(replies)} of {len(prompts)} prompts")
        return list(zip(pending, replies, strict=True))

    def drain(self) -> None:
        while self.keep_in_step is not None and self.keep_in_step(False):
            self.generate([], [])


def replay(model: PreTrainedModel, sampling: Sampling, pad_token_id: int) -> BatchBackend:
    """
    A backend for models [`SlotBackend`] cannot decode with (recurrent layers, other attention): plain `generate`,
    which reads the whole history again at each turn. Slower, and sampled from torch's global generator.
    """

    how = {"do_sample": False}
    if sampling.temperature != 0.0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        how |= {"top_k": sampling.top_k, "min_p": sampling.min_p}

    @torch.no_grad()
    def generate(prompts: list[list[int]], budgets: list[int]) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(prompts)
        # One budget a call: a row that went on beyond its own would run past the model's positions
        for budget in sorted(set(budgets)):
            members = [number for number, value in enumerate(budgets) if value == budget]
            rows = answer([prompts[number] for number in members], budget)
            for number, ids in zip(members, rows, strict=True):
                end = next((i for i, token in enumerate(ids) if token in sampling.eos_token_ids), None)
                replies[number] = Reply(tuple(ids if end is None else ids[: end + 1]), cut_off=end is None)
        return replies

    def answer(prompts: list[list[int]], budget: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            **how,
            max_new_tokens=budget,
            eos_token_id=list(sampling.eos_token_ids),
            pad_token_id=pad_token_id,
            disable_compile=True,
        )
        # What a configuration leaves open, `generate` takes from the model's own, a repetition penalty for example
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        own, inner.generation_config = inner.generation_config, config
        try:
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
        finally:
            inner.generation_config = own
        return output[:, width:].tolist()

    return BatchBackend(generate)


def make_backend(model: PreTrainedModel, tokenizer: Any, n_slots: int, sampling: Sampling) -> Backend:
    """The backend for a transformers model: [`SlotBackend`] where that can decode with it, else [`replay`]."""
    if SlotBackend.unsupported(model) is None:
        return SlotBackend(model, n_slots, sampling)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return replay(model, sampling, pad_token_id)


def end_of_reply_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: the tokenizer's own, and those that the model's generation config names."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read; None where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(left), len(right))
    differ = np.asarray(left[:size]) != np.asarray(right[:size])
    return int(differ.argmax()) if differ.any() else size
