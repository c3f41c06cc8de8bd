# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `train_speed.py` compares: episodes to train on, and the trainers that make a step on them."""

from __future__ import annotations

import argparse
import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rollout_systems import Case, TimedBandit
from scripted_bandit import CALL, FILLER, PARSER, SHAPES, make_tokenizer, model_of_shape, small_shape
from step_cost import now, update
from trl import SFTConfig, SFTTrainer

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer
from trl_agents.batch import Row, rows_of
from trl_agents.contexts import Briefing, make_context
from trl_agents.rollout.generation import Reply
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool


GENERATIONS = 2  # episodes from one seed
PHASES = ("building", "scoring", "updating")


# -- episodes ---------------------------------------------------------------------------------------------------------


class Writer:
    """A backend without a model: some filler, the action, the end-of-turn token. The episode's luck says how long."""

    def __init__(self, tokenizer: Any, tokens: int):
        self.call, self.filler = tokenizer.encode(CALL), tokenizer.encode(FILLER)
        self.eos_token_id, self.tokens = tokenizer.eos_token_id, tokens
        self.replies: list[tuple[int, Reply]] = []

    def submit(self, slot: int, prompt_ids: list[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        n_fillers = rng.integers(2 * max(self.tokens - len(self.call) - 1, 0) + 1)
        self.replies.append((slot, Reply((*self.filler * n_fillers, *self.call, self.eos_token_id), False)))

    def step(self) -> list[tuple[int, Reply]]:
        replies, self.replies = self.replies, []
        return replies

    @property
    def busy(self) -> bool:
        return bool(self.replies)

    def drain(self) -> None:
        pass


def play(tokenizer: Any, case: Case, window: int) -> tuple[list[Any], Any]:
    """Trajectories and the clock of their rollout; the same replies whatever the context."""
    factory = functools.partial(TimedBandit, case)
    context = make_context(case.context, tokenizer, [tokenizer.eos_token_id], None, window)
    pool = EnvPool(factory, case.episodes)
    try:
        writer = Writer(tokenizer, case.tokens)
        player = Player(pool, writer, context, PARSER, Briefing.of(factory()), Rules(max_new_tokens=4 * case.tokens))
        return player.play([Episode(number // GENERATIONS, (number,)) for number in range(case.episodes)])
    finally:
        pool.close()


@dataclass(frozen=True)
class Work:
    """Episodes to train on in one step, and in how many batches."""

    case: Case
    trajectories: list[Any]
    clock: Any
    n_batches: int

    @property
    def rows(self) -> list[Row]:
        return [row for number, played in enumerate(self.trajectories) for row in rows_of(played, number, 0)]


class Workbench:
    """The weights, the tokenizer and the settings that all systems share."""

    def __init__(self, args: argparse.Namespace, folder: str):
        self.args, self.folder, self.tokenizer = args, folder, make_tokenizer()
        self.tokenizer.response_template = None  # few models have one, by which TRL would look for calls in each row
        self.settings = {
            "bf16": args.bf16,
            "gradient_checkpointing": args.gradient_checkpointing,
            "use_cpu": args.device == "cpu",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        if args.shape is None and args.vocab_size < len(self.tokenizer):
            raise ValueError(f"--vocab_size {args.vocab_size} is too small: the tokenizer has {len(self.tokenizer)}.")
        small = {**small_shape(self.tokenizer, args.hidden_size, args.layers), "vocab_size": args.vocab_size}
        model = model_of_shape(self.tokenizer, SHAPES.get(args.shape, small))
        model.save_pretrained(folder)
        self.n_parameters = model.num_parameters()

    def work(self, case: Case, n_batches: int) -> Work:
        return Work(case, *play(self.tokenizer, case, self.args.window), n_batches)


# -- the systems ------------------------------------------------------------------------------------------------------


class SFT:
    """The rows in an order drawn once, each batch padded to its longest row."""

    def __init__(self, bench: Workbench):
        self.device = bench.args.device
        args = SFTConfig(
            output_dir=bench.folder, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **bench.settings
        )
        dataset = Dataset.from_dict({"input_ids": [[1, 1]], "labels": [[1, 1]]})  # the batches are handed over
        self.trainer = SFTTrainer(bench.folder, args, train_dataset=dataset, processing_class=bench.tokenizer)
        start(self.trainer)

    def step(self, work: Work) -> dict[str, float]:
        rows = [
            {
                "input_ids": [*row.prompt_ids, *row.completion_ids],
                "labels": [-100] * len(row.prompt_ids)
                + [id_ if trained else -100 for id_, trained in zip(row.completion_ids, row.mask, strict=True)],
            }
            for row in work.rows
        ]
        random.Random(0).shuffle(rows)
        n_trained = torch.tensor(sum(label != -100 for row in rows for label in row["labels"]), device=self.device)
        self.trainer.current_gradient_accumulation_steps = work.n_batches
        started = now(self.device)
        size = -(-len(rows) // work.n_batches)
        for first in range(0, len(rows), size):
            batch = self.trainer.data_collator(rows[first : first + size])
            self.trainer.training_step(self.trainer.model_wrapped, batch, n_trained)
        update(self.trainer)
        return {"building": 0.0, "scoring": 0.0, "updating": now(self.device) - started}


class Replaying:
    """A trainer of ours that gets its episodes from outside and times its phases."""

    work: Work
    spent: dict[str, float]

    def _play(self, inputs, mode):
        return self.work.trajectories, self.work.clock

    def _generate_and_score_completions(self, inputs):
        started, scored = now(self.work_device), self.spent["scoring"]
        batch = super()._generate_and_score_completions(inputs)
        self.spent["building"] += now(self.work_device) - started - (self.spent["scoring"] - scored)
        return batch

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        started = now(self.work_device)
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.spent["scoring"] += now(self.work_device) - started
        return scores


class GRPO:
    """`AgentGRPOTrainer`."""

    trainer_class, config_class = AgentGRPOTrainer, AgentGRPOConfig
    extra = {"num_generations": GENERATIONS, "advantage_estimator": "group"}

    def __init__(self, bench: Workbench):
        self.device = bench.args.device
        beta = {} if bench.args.beta is None else {"beta": bench.args.beta}
        args = self.config_class(
            output_dir=bench.folder,
            per_device_train_batch_size=GENERATIONS,
            context="window",
            window=bench.args.window,
            **self.extra,
            **beta,
            **bench.settings,
        )
        trainer_class = type(f"Replaying{self.trainer_class.__name__}", (Replaying, self.trainer_class), {})
        self.trainer = trainer_class(
            bench.folder,
            env=functools.partial(TimedBandit, Case(1, 2 * GENERATIONS, 1)),  # asked once what it is about
            args=args,
            action_parser=PARSER,
            processing_class=bench.tokenizer,
        )
        self.trainer.work_device = self.device
        start(self.trainer)

    def step(self, work: Work) -> dict[str, float]:
        trainer, args = self.trainer, self.trainer.args
        trainer.work, trainer.spent = work, dict.fromkeys(PHASES, 0.0)
        args.context, n_episodes = work.case.context, len(work.trajectories)
        args.per_device_train_batch_size = n_episodes // work.n_batches
        args.gradient_accumulation_steps = args.steps_per_generation = work.n_batches
        trainer.current_gradient_accumulation_steps = work.n_batches
        inputs = [{"prompt": "", "seed": number // GENERATIONS} for number in range(n_episodes)]
        started = now(self.device)
        trainer._step = 0  # a rollout begins
        for _ in range(work.n_batches):
            trainer.training_step(trainer.model_wrapped, inputs, None)
        update(trainer)
        seconds = now(self.device) - started
        return {**trainer.spent, "updating": seconds - sum(trainer.spent.values())}


class PPO(GRPO):
    """`AgentPPOTrainer`."""

    trainer_class, config_class = AgentPPOTrainer, AgentPPOConfig
    extra = {"num_generations": 1}


def start(trainer: Any) -> None:
    """What `train` does before the first step."""
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model.train()


SYSTEMS = {"sft": SFT, "grpo": GRPO, "ppo": PPO}
