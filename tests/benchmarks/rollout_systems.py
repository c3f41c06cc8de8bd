# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `rollout_speed.py` compares: a case, and the systems that play it."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from scripted_bandit import (
    PARSER,
    SHAPES,
    Script,
    make_bandit,
    make_tokenizer,
    model_of_shape,
    press,
    scripted_generate,
    small_shape,
)
from transformers import GenerationConfig
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from trl_agents.contexts import Briefing, make_context, opening_message
from trl_agents.rollout.generation import Reply, Sampling, SlotBackend
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool


TOOLS = {"tools": [get_json_schema(press)]}


@dataclass(frozen=True)
class Case:
    """
    One line of the table: `episodes` side by side (`rounds` times as many in all), each of `turns` turns, or of 1 to
    `turns` where `varied`; the environment takes `delay` seconds a step; each reply has `tokens` tokens, the one that
    ends it included, or on average so many where `ragged`.
    """

    turns: int
    episodes: int
    tokens: int
    context: str = "chat"
    varied: bool = False
    ragged: bool = False
    rounds: int = 1
    delay: float = 0.0

    @property
    def lengths(self) -> list[int]:
        """Turns of each episode, by its seed."""
        if not self.varied:
            return [self.turns] * (self.episodes * self.rounds)
        return np.random.default_rng(0).integers(1, self.turns + 1, self.episodes * self.rounds).tolist()


@dataclass
class Measured:
    """
    One run of one system. `rows` are the token ids of each episode, where the system has them: of the whole
    conversation, or a list of (prompt, reply) where each turn has a prompt of its own.
    """

    seconds: float
    sampled: int
    rows: list[list[Any]] = field(default_factory=list)
    attended: int = 0  # tokens that the sampled ones follow, summed over them
    passes: int = 0  # through the model, for as many rows as there are


class TimedBandit:
    """A bandit that takes its time, and whose seed says when it ends."""

    def __init__(self, case: Case):
        self.case, self.bandit = case, make_bandit(case.turns)
        self.instructions, self.question = self.bandit.instructions, self.bandit.question

    def reset(self, *, seed: int, options: dict[str, Any] | None = None):
        self.left = self.case.lengths[seed]
        return self.bandit.reset(seed=seed)

    def step(self, action: str):
        time.sleep(self.case.delay)
        self.left -= 1
        observation, reward, terminated, truncated, info = self.bandit.step(action)
        return observation, reward, terminated or self.left == 0, truncated, info

    def close(self) -> None:
        self.bandit.close()


class System:
    """Plays a case with what all systems share: the model, the tokenizer and the script."""

    def __init__(self, bench: Workbench):
        self.bench = bench

    def can_play(self, case: Case) -> bool:
        return True

    def run(self, case: Case) -> Measured:
        raise NotImplementedError


class TRLLoop(System):
    """TRL's `environment_factory`: growing conversations, and no environment ends an episode."""

    class Environment:
        def reset(self, case: Case, seed: int, **kwargs) -> None:
            self.env = TimedBandit(case)
            self.env.reset(seed=seed)

        def press(self, button: str) -> str:
            return self.env.step(button)[0]

        def get_reward(self) -> float:
            return 0.0

    Environment.press.__doc__ = press.__doc__

    class Trainer(GRPOTrainer):
        """Times the rollout alone, and keeps what it made."""

        def _generate(self, prompts):
            started = time.perf_counter()
            output = super()._generate(prompts)
            self.rollout_seconds = time.perf_counter() - started
            self.rollout_output = output
            return output

    def __init__(self, bench: Workbench):
        super().__init__(bench)
        args = GRPOConfig(
            output_dir=str(bench.output_dir),
            per_device_train_batch_size=bench.episodes,
            num_generations=bench.episodes,
            max_completion_length=30000,
            max_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=bench.device == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = self.Trainer(
            bench.model, args=args, processing_class=bench.tokenizer, environment_factory=self.Environment
        )

    def can_play(self, case: Case) -> bool:
        return case.context == "chat" and not case.varied and not case.ragged

    def run(self, case: Case) -> Measured:
        trainer = self.trainer
        trainer.max_tool_calling_iterations = case.turns - 1
        prompt = [{"role": "user", "content": opening_message(Briefing.of(make_bandit(case.turns)), "")}]
        inputs = [{"prompt": prompt, "case": case, "seed": seed} for seed in range(case.episodes)]
        with scripted_generate(self.bench.model, self.bench.script):
            trainer._generate_and_score_completions(inputs)
        prompt_ids, completion_ids, tool_mask, *_ = trainer.rollout_output
        rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        return Measured(trainer.rollout_seconds, sum(map(sum, tool_mask)), rows)


class ScriptedBackend(SlotBackend):
    """Says what the script says, in replies of lengths that depend on the episode alone where they are `ragged`."""

    def __init__(self, bench: Workbench, ragged: bool):
        super().__init__(bench.model, bench.episodes, Sampling((bench.tokenizer.eos_token_id,)))
        self.script, self.ragged = bench.script, ragged
        self.lengths = torch.full((bench.episodes,), self.script.tokens, device=self.decoder.device)
        self.passes = 0

    def submit(self, slot: int, prompt_ids: list[int], max_new_tokens: int, rng: np.random.Generator, is_over=None):
        super().submit(slot, prompt_ids, max_new_tokens, rng, is_over)
        if self.ragged:
            self.lengths[slot] = int(rng.integers(self.script.shortest, longest(self.script) + 1))

    def _sample(self, logits: torch.Tensor, active: list[int]):
        self.passes += 1
        slots = [self.slots[index] for index in active]
        positions = torch.tensor([len(slot.ids) - slot.n_prompt for slot in slots], device=logits.device)
        return super()._sample(self.script.overwrite(logits, positions, self.lengths[active]), active)


def longest(script: Script) -> int:
    """Ragged replies are of the shortest length to this one, all alike often, so that the mean is what it was."""
    return 2 * script.tokens - script.shortest


class LockstepBackend(ScriptedBackend):
    """All replies of a turn come at once."""

    def step(self) -> list[tuple[int, Reply]]:
        replies = []
        while self.busy:
            replies += super().step()
        return replies


class Ours(System):
    """`Player` and `SlotBackend`."""

    action_stop = False

    def run(self, case: Case) -> Measured:
        pool = EnvPool(functools.partial(TimedBandit, case), case.episodes)
        seeds = range(case.episodes * case.rounds)
        try:
            started = time.perf_counter()
            self.passes = 0
            trajectories = self.play(case, pool, [Episode(seed) for seed in seeds])
            seconds = time.perf_counter() - started
        finally:
            pool.close()
        if case.context == "chat":
            rows = [[id_ for turn in t.turns for id_ in (*turn.input_ids, *turn.action_ids)] for t in trajectories]
        else:
            rows = [[(turn.input_ids, turn.action_ids) for turn in t.turns] for t in trajectories]
        sampled = attended = 0
        for trajectory in trajectories:
            read = 0
            for turn in trajectory.turns:
                read = (read if turn.appends else 0) + len(turn.input_ids)
                attended += sum(range(read, read + len(turn.action_ids)))
                sampled += len(turn.action_ids)
                read += len(turn.action_ids)
        return Measured(seconds, sampled, rows, attended, self.passes)

    def play(self, case: Case, pool: EnvPool, episodes: Sequence[Episode], make_backend=ScriptedBackend, **kwargs):
        context = make_context(case.context, self.bench.tokenizer, chat_template_kwargs=TOOLS)
        briefing = Briefing.of(make_bandit(case.turns))
        limit = longest(self.bench.script) if case.ragged else case.tokens
        rules = Rules(max_new_tokens=limit, action_stop=self.action_stop)
        backend = make_backend(self.bench, case.ragged)
        trajectories, self.clock = Player(pool, backend, context, PARSER, briefing, rules, **kwargs).play(episodes)
        self.passes += backend.passes
        return trajectories


class Lockstep(Ours):
    """
    The same, but as loops usually are: a turn is over when all have answered and all environments have, and a batch
    when all its episodes are.
    """

    def play(self, case: Case, pool: EnvPool, episodes: Sequence[Episode]):
        trajectories = []
        for first in range(0, len(episodes), case.episodes):
            batch = episodes[first : first + case.episodes]
            trajectories += super().play(case, pool, batch, LockstepBackend, patience=3600.0)
        return trajectories


class ActionStop(Ours):
    """The same, and a reply is over when it has stated its action."""

    action_stop = True

    def can_play(self, case: Case) -> bool:
        return self.bench.after > 0


class Floor(System):
    """
    One plain `generate` of as many tokens from the same first prompt, with no environment and no end in between. Its
    rows end shorter, as nobody answers them. Where lengths vary, one such `generate` a round, of the mean length.
    """

    @torch.no_grad()
    def run(self, case: Case) -> Measured:
        context = make_context(case.context, self.bench.tokenizer, chat_template_kwargs=TOOLS)
        prompt_ids = context.begin(Briefing.of(make_bandit(case.turns)), "", {}).prompt_ids
        prompt = torch.tensor([prompt_ids] * case.episodes, device=self.bench.device)
        turns = round(sum(case.lengths) / len(case.lengths))
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=turns * case.tokens,
            pad_token_id=self.bench.tokenizer.pad_token_id,
        )
        model, rows = self.bench.model, []
        own_config, model.generation_config = model.generation_config, config  # `None` of the call is filled from it
        try:
            with scripted_generate(model, self.bench.script):
                started = time.perf_counter()
                for _ in range(case.rounds):
                    output = model.generate(
                        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
                    )
                    rows += output.tolist()
                seconds = time.perf_counter() - started
        finally:
            model.generation_config = own_config
        return Measured(seconds, sum(len(row) - len(prompt_ids) for row in rows), rows)


SYSTEMS: dict[str, Callable[[Workbench], System]] = {
    "trl": TRLLoop,
    "lockstep": Lockstep,
    "ours": Ours,
    "stop": ActionStop,
    "floor": Floor,
}
LABELS = {
    "trl": "TRL's environment loop",
    "lockstep": "ours, in lockstep",
    "ours": "trl-agents",
    "stop": "trl-agents, action_stop",
    "floor": "one plain generate",
}


class Workbench:
    """What all systems share. `shape` is a name of `SHAPES`, or (hidden size, layers)."""

    def __init__(
        self,
        output_dir: str,
        episodes: int,
        tokens: int,
        shape: str | tuple[int, int],
        device: str,
        dtype: str,
        after: int = 0,
    ):
        self.output_dir, self.episodes, self.device, self.after = output_dir, episodes, device, after
        self.tokenizer = make_tokenizer()
        shape = SHAPES[shape] if isinstance(shape, str) else small_shape(self.tokenizer, *shape)
        with torch.device(device):
            self.model = model_of_shape(self.tokenizer, shape).to(getattr(torch, dtype))
        self.script = Script(self.tokenizer, tokens, device, after)
