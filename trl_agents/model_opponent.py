# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A language model as the other side of a game: a player as [`envs.tictactoe.TicTacToe`] takes it,
`(board, legal_actions, rng) -> action`. Environments call it from threads of their own, many at a time; it answers
those calls together.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .actions import ActionParser
from .contexts import Briefing, make_context
from .envs.make import make_env
from .rollout.generation import Backend, Reply, Sampling, end_of_reply_ids, make_backend, positions_of


# How long an idle opponent waits for further questions, in seconds: environments that were asked for a step at the
# same time ask their opponents within it.
GATHER_SECONDS = 0.005


@dataclass(slots=True, eq=False)
class _Question:
    """What one thread waits for."""

    prompt_ids: list[int]
    rng: np.random.Generator
    answer: Reply | BaseException | None = None


class ModelOpponent:
    """
    A language model that plays the other side of a game.

    It reads what the agent reads at the start of an episode: the environment's briefing with the position, described
    as the environment describes it to the player to move, in the place of the first observation. A position tells all
    there is to know of a game, so nothing is remembered from move to move. (The briefing is the agent's, its seat
    included: with `seat="random"` it is true of both sides.) A reply without a legal action is replaced by a random
    one and counted.

    It may be called by any number of threads. Their questions are decoded side by side, at most `n_slots` at a time,
    by whichever of the threads leads; a question that comes meanwhile joins at the next token. All luck is taken from
    the caller's `rng`, so a move does not depend on which questions shared a batch, up to the rounding of matrix
    products. (Models that [`SlotBackend`] cannot decode sample from torch's global generator instead.)

    The keys and values of `n_slots` prompts are kept from question to question, which all begin alike.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, put into evaluation mode. It must be a module of its own: the policy may decode or
            train in another thread at the same time.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. A copy is used.
        env (`str` or `Callable` or environment):
            The game, as id, factory or instance, with the board and instructions that the agent sees. It needs a
            method `describe(board) -> str`; it is only read, never played.
        action_parser ([`ActionParser`], *optional*):
            Takes actions out of replies. Defaults to `ACTION=X`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, 0 for greedy decoding.
        top_p, top_k, min_p (*optional*):
            Truncations of the distribution, as in [`~transformers.GenerationConfig`]; off by default.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Token budget of one reply.
        context (`str`, *optional*, defaults to `"chat"`):
            `"chat"` or `"window"`, as in [`AgentGRPOConfig`].
        chat_template_kwargs (`dict`, *optional*):
            Passed on to the chat template.
        n_slots (`int`, *optional*, defaults to `32`):
            Most questions in one batch.
        autocast (`Callable`, *optional*):
            Makes the context the model computes in, such as [`~accelerate.Accelerator.autocast`].

    Attributes:
        n_replies, n_invalid (`int`):
            Replies so far, and those of them without a legal action.

    Raises:
        `ValueError`: in the constructor if the environment cannot describe a position or no token may be sampled.
        `RuntimeError`: in every call whose generation failed, with the first error as its cause.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        env: str | Callable[..., Any] | Any,
        *,
        action_parser: ActionParser | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        max_new_tokens: int = 256,
        context: str = "chat",
        chat_template_kwargs: dict[str, Any] | None = None,
        n_slots: int = 32,
        autocast: Callable[[], Any] = nullcontext,
    ):
        for name, value in (("max_new_tokens", max_new_tokens), ("n_slots", n_slots)):
            if value < 1:
                raise ValueError(f"{name}={value!r} leaves an opponent no room to answer: give a positive number.")
        is_instance = not isinstance(env, (str, type)) and hasattr(env, "describe")
        self.env = env if is_instance else make_env(env)
        if not callable(getattr(self.env, "describe", None)):
            raise ValueError(
                f"The environment {type(getattr(self.env, 'unwrapped', self.env)).__name__} has no method "
                "`describe(board)` to show a position to an opponent. Give it one, as `TicTacToe` has."
            )
        self.model = model.eval()
        self.action_parser = action_parser or ActionParser()
        self.max_new_tokens, self.n_slots = max_new_tokens, n_slots
        self.n_replies = self.n_invalid = 0
        self._autocast = autocast

        eos_token_ids = end_of_reply_ids(model, tokenizer)
        self._sampling = Sampling(tuple(eos_token_ids), temperature, top_p, top_k or 0, min_p)
        # Tokenizers change their own settings while they encode, so no two threads may use one at the same time
        self._tokenizer = copy.deepcopy(tokenizer)
        self._context = make_context(context, self._tokenizer, eos_token_ids, chat_template_kwargs)
        self._reading = threading.Lock()
        self._read = functools.lru_cache(maxsize=1024)(self._render)  # games share their openings

        # All below is guarded by the condition's lock, which nobody holds while the model computes, but for a change
        # of its weights
        self._change = threading.Condition(threading.Lock())
        self._waiting: deque[_Question] = deque()
        self._asked: dict[int, _Question] = {}  # slot -> question
        self._has_leader = False
        self._backend: Backend = self._make_backend()

    def __call__(self, board: str, legal_actions: list[str], rng: np.random.Generator) -> str:
        with self._reading:
            prompt_ids = self._read(board)
        reply = self._ask(_Question(prompt_ids, rng))
        with self._reading:
            text = self._context.decode(reply.ids)
        action = self.action_parser.parse(text, legal_actions, cut_off=reply.cut_off).action
        with self._change:
            self.n_replies += 1
            self.n_invalid += action is None
        return legal_actions[rng.integers(len(legal_actions))] if action is None else action

    def __deepcopy__(self, memo: dict) -> ModelOpponent:
        return self  # Gymnasium copies the arguments of an environment, and a model is not to be copied with them

    @property
    def invalid_rate(self) -> float:
        """Share of replies without a legal action; NaN before the first reply."""
        return self.n_invalid / self.n_replies if self.n_replies else float("nan")

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """
        Hold questions back while the model's weights change. Waits for those that are being answered; afterwards what
        was read with the old weights is forgotten, and replies are counted anew.
        """
        with self._change:
            self._change.wait_for(lambda: not (self._waiting or self._asked or self._has_leader))
            yield
            self._backend = self._make_backend()
            self.n_replies = self.n_invalid = 0

    def _render(self, board: str) -> list[int]:
        reader = self._context.begin(Briefing.of(self.env), self.env.describe(board), {})
        if self._budget(reader.prompt_ids) < 1:
            raise ValueError(
                f"The instructions and the position take {len(reader.prompt_ids)} tokens, as many as the opponent's "
                "model has positions. Use a model with more positions, or shorter instructions."
            )
        return reader.prompt_ids

    def _budget(self, prompt_ids: list[int]) -> int:
        positions = positions_of(self.model)
        return self.max_new_tokens if positions is None else min(self.max_new_tokens, positions - len(prompt_ids))

    def _make_backend(self) -> Backend:
        with self._autocast():
            return make_backend(self.model, self._tokenizer, self.n_slots, self._sampling)

    # -- many threads, one model -------------------------------------------------------------------------------------

    def _ask(self, question: _Question) -> Reply:
        """Wait for the answer to `question`, and lead the batch as long as nobody else does."""
        with self._change:
            self._waiting.append(question)
            self._change.notify_all()
            while question.answer is None:
                if self._has_leader:
                    self._change.wait()
                    continue
                self._has_leader = True
                try:
                    self._lead(question)
                finally:  # those who wait must find a new leader among themselves
                    self._has_leader = False
                    self._change.notify_all()
        if isinstance(question.answer, BaseException):
            error = question.answer
            raise RuntimeError(f"The opponent's model did not answer: {type(error).__name__}: {error}") from error
        return question.answer

    def _lead(self, own: _Question) -> None:
        """Decode for everybody until `own` is answered. Holds the lock, but not while the model computes."""
        if not self._asked:
            self._change.wait_for(lambda: len(self._waiting) >= self.n_slots, GATHER_SECONDS)
        try:
            while own.answer is None:
                free = (slot for slot in range(self.n_slots) if slot not in self._asked)
                for slot, question in list(zip(free, self._waiting, strict=False)):
                    self._asked[slot] = self._waiting.popleft()
                    budget = self._budget(question.prompt_ids)
                    self._backend.submit(slot, question.prompt_ids, budget, question.rng)
                self._change.release()
                try:
                    replies = self._step()
                finally:
                    self._change.acquire()
                for slot, reply in replies:
                    self._asked.pop(slot).answer = reply
                if replies:
                    self._change.notify_all()
        except BaseException as error:  # nobody may be left waiting for an answer that never comes
            for question in (*self._asked.values(), *self._waiting):
                question.answer = error
            self._asked.clear()
            self._waiting.clear()
            self._backend = self._make_backend()
            if not isinstance(error, Exception):
                raise

    def _step(self) -> list[tuple[int, Reply]]:
        device = self.model.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        # A thread starts with gradients on and on the first GPU, whatever the main thread has set
        with torch.no_grad(), on_device, self._autocast():
            return self._backend.step()
