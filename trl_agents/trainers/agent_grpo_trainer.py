# Licensed under the Apache License, Version 2.0 (see LICENSE).

from __future__ import annotations

import functools
import textwrap
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from gymnasium.wrappers.utils import RunningMeanStd

from .._trl import check_trl
from ..actions import ActionParser
from ..agent_config import AGENT_CONFIG_FILE, AgentConfig
from ..cards import card_name, correct_card
from ..checkpoints import find_checkpoint
from ..contexts import make_context
from ..envs.make import make_env
from ..exploration import make_exploration
from ..hub import PushesSafely
from ..launch import check_processes
from ..rollout.processes import refuse_in_process_of_env
from ..seeds import validation_seeds
from ..types import Trajectory
from .agent_grpo_config import AgentGRPOConfig
from .card import complete_card
from .checks import (
    check_critic,
    check_environment,
    check_evaluation,
    check_fsdp,
    check_model,
    check_room,
    check_settings,
    check_types,
    check_unplayed,
)
from .credit import PLAYED, WINDOW, CreditingGRPOTrainer
from .display import show_training
from .inputs import check_arguments, check_dataset, check_questions
from .memory import Memorize, agreed_on, recall_from, write_memory
from .packages import check_packages


def environment_reward(prompts, completions, environment_score, **kwargs) -> list[float]:
    """The episodes' returns as a reward function, so that TRL logs and normalises them like any other."""
    return environment_score


class AgentGRPOTrainer(PushesSafely, CreditingGRPOTrainer):
    """
    Trainer for agents that act in an environment over many steps, by Group Relative Policy Optimization.

    The only change w.r.t. [`~trl.GRPOTrainer`] is where completions and advantages come from: a completion is an
    episode played in `env`, and its advantage may differ from turn to turn. Loss, KL, clipping, logging, PEFT and
    checkpoints are TRL's. (Where rows are padded the model is told its positions, as the rollout saw them; checkpoints
    also hold what lets a resumed run go on as if it had not stopped.) Without `env` this is `GRPOTrainer`.

    The method is the one of [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078), section 3.2: chain of
    thought and action per step, a penalty for invalid actions, a Monte-Carlo baseline over episodes of fixed length,
    the clipped objective with a KL to the reference.

    Example:

    ```python
    >>> from trl_agents import AgentGRPOConfig, AgentGRPOTrainer

    >>> trainer = AgentGRPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     env="trl_agents/Bandit-v0",
    ...     args=AgentGRPOConfig(max_steps=100, env_kwargs={"n_arms": 5, "horizon": 20}),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model to train.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            With `env`, they add to the environment's reward: each scores a row (an episode with `context="chat"`, a
            turn with `"window"`) and is credited to the row's last turn. They get TRL's arguments, the dataset's
            columns, and `trajectory`, the [`~types.Trajectory`] of each row. Without `env`, as in TRL.
        args ([`AgentGRPOConfig`], *optional*):
            Configuration for this trainer.
        train_dataset ([`~datasets.Dataset`], *optional*):
            With `env`, a column `seed` says which episodes to train on, and a column `options` what else `reset` is
            given. Defaults to `args.num_train_seeds` seeds.
        eval_dataset (*optional*):
            Likewise; defaults to `args.num_eval_seeds` other seeds.
        env (`str` or `Callable`, *optional*):
            Environment id (`"trl_agents/Bandit-v0"`), or a class or factory, itself or by name
            (`"package.module:Class"`). `args.env_kwargs` are its arguments.
        action_parser ([`ActionParser`], *optional*):
            Takes actions out of replies. Defaults to the paper's `ACTION=X`.
        **kwargs:
            The other arguments of [`~trl.GRPOTrainer`] (`processing_class`, `peft_config`, `callbacks`, ...).
    """

    files_beside: tuple[str, ...] = (AGENT_CONFIG_FILE,)  # what is saved beside the model's own weights
    resumed_from: str | None = None  # the checkpoint

    _tag_names = ["trl", "grpo", "trl-agents"]
    _name = "AgentGRPO"
    _paper = {
        "title": "LLMs are Greedy Agents: Effects of RL Fine-tuning on Decision-Making Abilities",
        "id": "2504.16078",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{schmied2025greedy,
                title        = {{LLMs are Greedy Agents: Effects of RL Fine-tuning on Decision-Making Abilities}},
                author       = {Thomas Schmied and J{\\"o}rg Bornschein and Jordi Grau-Moya and Markus Wulfmeier and
                                Razvan Pascanu},
                year         = 2025,
                eprint       = {arXiv:2504.16078},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: AgentGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        *,
        env: str | Callable[..., Any] | None = None,
        action_parser: ActionParser | None = None,
        **kwargs,
    ):
        refuse_in_process_of_env()
        check_trl()
        if args is not None and args.deepspeed_plugin is not None:
            # Another trainer's may have come since `args` was made, and it is read when the model is loaded
            args.deepspeed_plugin.set_deepspeed_weakref()
        check_arguments(type(self).__name__, AgentGRPOConfig if args is None else type(args), kwargs)
        check_critic(args, self.has_critic)
        check_model(model)
        self.plays = env is not None
        if not self.plays:
            check_unplayed(args, action_parser)
            check_questions(args, reward_funcs, train_dataset, eval_dataset, kwargs)
            if args is not None:
                check_processes()
                check_packages(args, kwargs)
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **kwargs)
            self._keep_packing()
            self.add_callback(Memorize(self))
            self.display = show_training(self)
            return

        if args is None:
            args = AgentGRPOConfig("agent-grpo")
        check_processes()
        check_types(args, action_parser)
        self.env_id = env if isinstance(env, str) else None
        self.env_name = env if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        self.card_results = ""  # Markdown: what the trained agent achieved
        self.exploration = make_exploration(args.exploration)
        self.env_kwargs = {**(args.env_kwargs or {}), **self.exploration.env_kwargs}
        self.env_factory = functools.partial(make_env, env, **self.env_kwargs)
        self.action_parser = action_parser or ActionParser()
        self.agent_config = AgentConfig.of_training(args, env, self.action_parser)
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        check_settings(args, model, reward_funcs, kwargs)
        check_packages(args, kwargs)
        if train_dataset is None:
            train_dataset = episode_dataset(range(args.num_train_seeds))
        if eval_dataset is None and args.eval_strategy != "no":
            eval_dataset = episode_dataset(validation_seeds(args.num_eval_seeds))
        check_dataset(train_dataset, args.generation_batch_size // args.num_generations)
        check_dataset(eval_dataset)
        self.briefing, *begun = check_environment(
            self.env_factory, self.action_parser, args, next(iter(train_dataset))
        )
        if kwargs.get("reward_processing_classes") is not None:
            classes = kwargs["reward_processing_classes"]
            kwargs["reward_processing_classes"] = [None, *(classes if isinstance(classes, list) else [classes])]
        weights, args.reward_weights = args.reward_weights, None
        try:
            super().__init__(model, [environment_reward, *reward_funcs], args, train_dataset, eval_dataset, **kwargs)
        finally:
            args.reward_weights = weights
        if weights is not None:  # they weigh what is added to the environment's own reward
            self.reward_weights = torch.tensor([1.0, *weights])
        if self.is_fsdp_enabled:
            check_fsdp(self)
        self._keep_packing()
        self.add_callback(Memorize(self))
        self.display = show_training(self)
        self.rollout_func = self.rollout_output
        self.reward_statistics = RunningMeanStd(epsilon=0)  # exact: nothing is assumed before the first rewards
        self.context = make_context(
            args.context, self.text_tokenizer, self.eos_token_ids, args.chat_template_kwargs, args.window
        )
        check_room(self, self.briefing, *begun)
        self.rollouts_at_step = (-1, 0)  # the optimizer step of the latest rollout, and how many it had before
        self.lost_shares = {mode: deque(maxlen=WINDOW) for mode in PLAYED}
        self.first_faults = {mode: [] for mode in PLAYED}
        self.trajectories: list[Trajectory] = []  # of the latest rollout, this process's
        self.latest: list[Trajectory] = []  # those, or of `play` if that was later

    def _keep_packing(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes packs 4-bit weights anew at the first forward pass in evaluation mode, which a rollout
                # is, and lets no gradient through them from then on
                module.support_avx512bf16_for_cpu = False

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint to go on from; True for the latest whole one in `args.output_dir`, `"auto"` for that if
                there is one.
            *args, **kwargs:
                The other arguments.
        """
        self.resumed_from = agreed_on(find_checkpoint(resume_from_checkpoint, self.args.output_dir))
        if self.resumed_from is not None:
            recall_from(self, self.resumed_from)
        try:
            output = super().train(self.resumed_from, *args, **kwargs)
            if self.plays:
                self.limit_faults("train", len(self.lost_shares["train"]))  # there are no more to come
        finally:
            self.close_environments()
            if self.display is not None:
                self.display.close()
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs, start_time=None):
        with nullcontext() if self.display is None else self.display.aside():
            super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None):
        """As [`~transformers.Trainer.get_eval_dataloader`]; by default of the validation seeds."""
        if self.plays:
            if eval_dataset is None and self.eval_dataset is None:  # `evaluate` without `eval_strategy`
                self.eval_dataset = episode_dataset(validation_seeds(self.args.num_eval_seeds))
            evaluated = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
            check_evaluation(self, evaluated)
        return super().get_eval_dataloader(eval_dataset)

    # -- what a resumed run must not have forgotten -------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, optimizer and random states; JSON. Subclasses add their own."""
        if not self.plays:
            return {}
        statistics = self.reward_statistics
        return {
            "reward_statistics": [float(statistics.mean), float(statistics.var), float(statistics.count)],
            "lost_shares": list(self.lost_shares["train"]),
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Take up a checkpoint's [`memory`]."""
        if "reward_statistics" in memory and self.plays:
            statistics = self.reward_statistics
            mean, var, statistics.count = memory["reward_statistics"]
            statistics.mean, statistics.var = np.float64(mean), np.float64(var)
        if "lost_shares" in memory and self.plays:
            self.lost_shares["train"].extend(memory["lost_shares"])

    def save_with_model(self, folder: Path) -> None:
        if self.plays:
            self.agent_config.save(folder)

    def save_beside(self, folder: Path) -> None:
        write_memory(self, folder)

    # -- the card ----------------------------------------------------------------------------------------------------

    def create_model_card(self, model_name=None, *args, **kwargs) -> None:
        """TRL's model card, with the environment, how to run the agent, `card_results` if set, and some episodes."""
        if not self.may_write():
            return
        super().create_model_card(model_name or card_name(self.args), *args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if not self.is_world_process_zero() or not path.exists():
            return
        if self.plays:
            complete_card(self)
        else:
            correct_card(path.parent, self.hub_model_id or self.args.hub_model_id or self.args.output_dir)


def episode_dataset(seeds) -> Dataset:
    """A dataset of episodes for [`AgentGRPOTrainer`]: one seed each."""
    seeds = list(seeds)
    return Dataset.from_dict({"prompt": [""] * len(seeds), "seed": seeds})
