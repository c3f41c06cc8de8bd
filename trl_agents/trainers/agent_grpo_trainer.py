# Licensed under the Apache License, Version 2.0 (see LICENSE).

from __future__ import annotations

import functools
import math
import textwrap
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from gymnasium.wrappers.utils import RunningMeanStd

from .._trl import RolloutGRPOTrainer, RolloutRows, check_trl
from ..actions import ActionParser
from ..advantages import group_advantages, spread_over_tokens, turn_advantages
from ..batch import Row, pad_turn_index, pad_turns, padding_row, rows_of
from ..checkpoints import find_checkpoint
from ..contexts import Briefing, make_context
from ..envs.make import make_env
from ..evaluation import validation_seeds
from ..exploration import make_exploration
from ..hub import PushesSafely
from ..returns import discounted_returns
from ..rollout.faults import TOLD
from ..rollout.generation import Backend, Sampling, SlotBackend, replay
from ..rollout.metrics import combine_metrics, rollout_metrics
from ..rollout.play import Clock, Episode, Player, Rules
from ..rollout.workers import EnvPool
from ..types import Trajectory
from .agent_grpo_config import AgentGRPOConfig
from .card import complete_card
from .checks import check_dataset, check_environment, check_fsdp, check_settings, check_types
from .display import TrainingDisplay, show_training
from .memory import Memorize, agreed_on, recall_from, write_memory


def environment_reward(prompts, completions, environment_score, **kwargs) -> list[float]:
    """The episodes' returns as a reward function, so that TRL logs and normalises them like any other."""
    return environment_score


class AgentGRPOTrainer(PushesSafely, RolloutGRPOTrainer):
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
            Likewise; defaults to `args.num_eval_seeds` other seeds if `args.eval_strategy` is set.
        env (`str` or `Callable`, *optional*):
            Environment id (`"trl_agents/Bandit-v0"`), or a class or factory. `args.env_kwargs` are its arguments.
        action_parser ([`ActionParser`], *optional*):
            Takes actions out of replies. Defaults to the paper's `ACTION=X`.
        **kwargs:
            The other arguments of [`~trl.GRPOTrainer`] (`processing_class`, `peft_config`, `callbacks`, ...).
    """

    env_pool: EnvPool | None = None
    files_beside: tuple[str, ...] = ()  # what is saved beside the model's own weights
    resumed_from: str | None = None  # the checkpoint
    display: TrainingDisplay | None = None

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
        check_trl()
        if args is not None and args.deepspeed_plugin is not None:
            # Another trainer's may have come since `args` was made, and it is read when the model is loaded
            args.deepspeed_plugin.set_deepspeed_weakref()
        self.plays = env is not None
        if not self.plays:
            if action_parser is not None:
                raise ValueError("`action_parser` was given without `env`: pass the environment to play in.")
            if getattr(args, "exploration", None):
                raise ValueError(f"exploration={args.exploration} has no effect without `env`: leave it out.")
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **kwargs)
            self._keep_packing()
            self.add_callback(Memorize(self))
            self.display = show_training(self)
            return

        if args is None:
            args = AgentGRPOConfig("agent-grpo")
        check_types(args, action_parser)
        self.env_id = env if isinstance(env, str) else None
        self.env_name = env if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        self.card_results = ""  # Markdown: what the trained agent achieved
        self.exploration = make_exploration(args.exploration)
        self.env_kwargs = {**(args.env_kwargs or {}), **self.exploration.env_kwargs}
        self.env_factory = functools.partial(make_env, env, **self.env_kwargs)
        self.action_parser = action_parser or ActionParser()
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        check_settings(args, model, reward_funcs, kwargs)
        if train_dataset is None:
            train_dataset = episode_dataset(range(args.num_train_seeds))
        if eval_dataset is None and args.eval_strategy != "no":
            eval_dataset = episode_dataset(validation_seeds(args.num_eval_seeds))
        check_dataset(train_dataset, args.generation_batch_size // args.num_generations)
        check_dataset(eval_dataset)
        self.briefing = check_environment(self.env_factory, self.action_parser, args, next(iter(train_dataset)))
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
        self.rollouts_at_step = (-1, 0)  # the optimizer step of the latest rollout, and how many it had before
        self.lost_shares = deque([0.0] * 3, maxlen=3)  # of the latest rollouts' episodes: lost to faults
        self.trajectories: list[Trajectory] = []  # of the latest rollout, this process's
        self.latest: list[Trajectory] = []  # those, or of `play` if that was later

    def _keep_packing(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes packs 4-bit weights anew at the first forward pass in evaluation mode, which a rollout
                # is, and lets no gradient through them from then on
                module.support_avx512bf16_for_cpu = False

    # -- playing -----------------------------------------------------------------------------------------------------

    def roll_out(self, inputs: list[dict[str, Any]]) -> RolloutRows:
        mode = "train" if self.model.training else "eval"
        trajectories, clock = self._play(inputs, mode)
        self.trajectories = self.latest = trajectories
        self._record(trajectories, clock, mode)
        self._normalize(trajectories, mode)
        return self._rows(trajectories, mode)

    def _play(self, inputs: list[dict[str, Any]], mode: str) -> tuple[list[Trajectory], Clock]:
        start = self.accelerator.process_index * len(inputs)
        # In training each rollout brings new luck; evaluations repeat theirs, so that they can be compared
        luck = (self.args.seed, 0, 0)
        if mode == "train":
            step, before = self.rollouts_at_step
            self.rollouts_at_step = (self.state.global_step, before + 1 if step == self.state.global_step else 0)
            luck = (self.args.seed, 1, *self.rollouts_at_step)
        episodes = [
            Episode(row["seed"], (*luck, start + number), row.get("options")) for number, row in enumerate(inputs)
        ]
        if mode == "train":
            return self._play_episodes(episodes, self.temperature, "Rollout")
        return self._play_episodes(episodes, self._eval_temperature, "Evaluation")

    def play(self, seeds: Sequence[int], env: str | Callable[..., Any] | None = None) -> list[Trajectory]:
        """
        Let the model play one episode from each seed, as in evaluation: nothing is learnt and nothing logged.

        The seeds are shared out among the processes; every process gets all trajectories, in the order of the seeds.

        Args:
            seeds (`Sequence[int]`):
                One episode each.
            env (`str` or `Callable`, *optional*):
                Environment id, class or factory to play in, without `args.env_kwargs`, but with what
                `args.exploration` asks of it. Defaults to the one that is trained in.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = list(seeds)[rank::world]
        episodes = [Episode(seed, (self.args.seed, 0, 0)) for seed in own]
        if env is None:
            played, _ = self._play_episodes(episodes, self._eval_temperature, "Evaluation")
        else:
            factory = functools.partial(make_env, env, **self.exploration.env_kwargs)
            example = factory()
            try:
                briefing = Briefing.of(example)
            finally:
                with suppress(Exception):  # nothing depends on a clean end
                    example.close()
            pool = self._make_pool(factory, self._n_slots(len(episodes)))
            try:
                played, _ = self._play_in(pool, briefing, episodes, self._eval_temperature, "Evaluation")
            finally:
                pool.close()
        parts = gather_object([played])
        played = [parts[number % world][number // world] for number in range(len(seeds))]
        if env is None:
            self.latest = played
        return played

    def _n_slots(self, n_episodes: int) -> int:
        side_by_side = (
            self.args.rollout_batch_size or self.args.per_device_train_batch_size * self.args.steps_per_generation
        )
        return max(min(side_by_side, n_episodes), 1)

    def _make_pool(self, factory: Callable[[], Any], n_slots: int) -> EnvPool:
        return EnvPool(
            factory, n_slots, self.args.env_timeout, self.args.env_reset_timeout, processes=self.args.env_processes
        )

    def _play_episodes(
        self, episodes: list[Episode], temperature: float, description: str
    ) -> tuple[list[Trajectory], Clock]:
        n_slots = self._n_slots(len(episodes))
        if self.env_pool is None or len(self.env_pool.workers) != n_slots:
            self.close_environments()
            self.env_pool = self._make_pool(self.env_factory, n_slots)
        return self._play_in(self.env_pool, self.briefing, episodes, temperature, description)

    def _play_in(
        self, pool: EnvPool, briefing: Briefing, episodes: list[Episode], temperature: float, description: str
    ) -> tuple[list[Trajectory], Clock]:
        with self.weights_for_rollout() as model:
            player = Player(
                pool,
                self._make_backend(model, len(pool.workers), temperature),
                self.context,
                self.action_parser,
                briefing,
                self._rules(model),
                self.exploration,
            )
            show = self.accelerator.is_main_process and not self.args.disable_tqdm
            if self.display is not None and self.display.is_open:
                show = self.display.bar
            return player.play(episodes, progress=show, description=description)

    @property
    def _eval_temperature(self) -> float:
        return self.temperature if self.args.eval_temperature is None else self.args.eval_temperature

    def _make_backend(self, model: Any, n_slots: int, temperature: float) -> Backend:
        if self.use_vllm:
            return self.vllm_backend(temperature)
        sampling = Sampling(tuple(self.eos_token_ids), temperature, self.top_p, self.top_k, self.min_p)
        problem = SlotBackend.unsupported(model)
        if problem is None:
            return SlotBackend(model, n_slots, sampling)
        warnings.warn(
            f"Rollouts read the whole history again at each turn, because the model cannot keep it: {problem}.",
            stacklevel=2,
        )
        return replay(model, sampling, self.text_tokenizer.pad_token_id)

    def _rules(self, model: Any) -> Rules:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = [positions, self.args.max_episode_length, self.args.vllm_max_model_length]
        limits = [limit for limit in limits if limit is not None]
        return Rules(
            max_new_tokens=self.args.max_completion_length,
            max_length=min(limits, default=None),
            max_turns=self.args.max_turns,
            invalid_action=self.args.invalid_action,
            invalid_action_penalty=self.args.invalid_action_penalty,
            max_retries=self.args.max_retries,
            action_stop=self.args.action_stop,
        )

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
        finally:
            self.close_environments()
            if self.display is not None:
                self.display.close()
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs, start_time=None):
        with nullcontext() if self.display is None else self.display.aside():
            super().log(logs, start_time)

    # -- what a resumed run must not have forgotten -------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, optimizer and random states; JSON. Subclasses add their own."""
        if not self.plays:
            return {}
        statistics = self.reward_statistics
        return {
            "reward_statistics": [float(statistics.mean), float(statistics.var), float(statistics.count)],
            "lost_shares": list(self.lost_shares),
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Take up a checkpoint's [`memory`]."""
        if "reward_statistics" in memory and self.plays:
            statistics = self.reward_statistics
            mean, var, statistics.count = memory["reward_statistics"]
            statistics.mean, statistics.var = np.float64(mean), np.float64(var)
        if "lost_shares" in memory and self.plays:
            self.lost_shares.extend(memory["lost_shares"])

    def save_beside(self, folder: Path) -> None:
        write_memory(self, folder)

    def close_environments(self) -> None:
        """Close all environments; the next rollout makes new ones."""
        if self.env_pool is not None:
            self.env_pool.close()
            self.env_pool = None

    # -- rewards -----------------------------------------------------------------------------------------------------

    def _normalize(self, trajectories: list[Trajectory], mode: str) -> None:
        """Set `turn_rewards`: per episode, the normalised environment reward of each turn plus its shaping."""
        healthy = [trajectory for trajectory in trajectories if not trajectory.stop.is_fault]
        seen = gather_object([turn.reward for t in healthy for turn in t.turns if turn.executed is not None])
        if mode == "train" and seen:
            self.reward_statistics.update(np.asarray(seen))
        how = self.args.reward_normalization
        std = math.sqrt(self.reward_statistics.var)
        # Rewards that never differ have no scale: divided by their rounding they would drown the penalty
        scale = std if how != "none" and std > 1e-6 * abs(self.reward_statistics.mean) else 1.0
        shift = float(self.reward_statistics.mean) if how == "standardize" else 0.0
        explores = mode == "train"
        self.turn_rewards = [
            [
                (turn.reward - shift) / scale * (turn.executed is not None) + turn.penalty + turn.bonus * explores
                for turn in t.turns
            ]
            for t in trajectories
        ]

    def _record(self, trajectories: list[Trajectory], clock: Clock, mode: str) -> None:
        sums = torch.tensor(rollout_metrics(trajectories, clock), dtype=torch.float64, device=self.accelerator.device)
        metrics = combine_metrics(self.accelerator.reduce(sums, reduction="sum").tolist())
        self.record_metrics(metrics)
        lengths = gather_object([len(trajectory.turns) for trajectory in trajectories if not trajectory.stop.is_fault])
        turn_by_turn = not self.has_critic and self.args.advantage_estimator == "turn"
        if mode == "train" and turn_by_turn and len(set(lengths)) > 1:
            warnings.warn(
                f"advantage_estimator='turn' compares turn k with turn k of the group's other episodes, but episodes "
                f"have between {min(lengths)} and {max(lengths)} turns: the baseline is biased where the policy "
                "decides when to stop. Use advantage_estimator='group', or AgentPPOTrainer.",
                stacklevel=2,
            )
        faults = [trajectory.error for trajectory in trajectories if trajectory.stop.is_fault]
        self._limit_faults(clock, metrics.get("agents/lost_share", 0.0))
        if faults:
            warnings.warn(
                f"{len(faults)} of {len(trajectories)} episodes were lost to a fault of the environment and weigh "
                f"nothing. The first: {faults[0]}",
                stacklevel=2,
            )

    def _limit_faults(self, clock: Clock, share: float) -> None:
        """Raises, on all processes alike, if too many episodes of the latest rollouts were lost. `share`: of all."""
        self.lost_shares.append(share)
        first = gather_object(clock.faults.first)
        lost = sum(self.lost_shares) / len(self.lost_shares)
        if lost > self.args.max_fault_share:
            raise RuntimeError(
                f"{lost:.0%} of the episodes of the last {len(self.lost_shares)} rollouts were lost to faults of the "
                f"environment (max_fault_share={self.args.max_fault_share}), though each was begun again and then "
                f"replaced. The first faults of this rollout: {'; '.join(first[:TOLD])}. Mend the environment, give "
                "it more time (env_timeout, env_reset_timeout), or raise max_fault_share."
            )

    # -- the card ----------------------------------------------------------------------------------------------------

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's model card, with the environment, how to run the agent, `card_results` if set, and some episodes."""
        if not self.may_write():
            return
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.plays and self.is_world_process_zero() and path.exists():
            complete_card(self)

    # -- rows and credit ---------------------------------------------------------------------------------------------

    def _rows(self, trajectories: list[Trajectory], mode: str) -> RolloutRows:
        filler = self.text_tokenizer.pad_token_id
        rows = [row for number, t in enumerate(trajectories) for row in rows_of(t, number, filler, self.has_critic)]
        n_rows = max(gather_object([len(rows)]))
        # The number of rows must be the same on every process, and divide into TRL's groups and steps
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        steps = self.args.steps_per_generation if mode == "train" else 1
        multiple = math.lcm(generations, steps)
        n_rows = -(-n_rows // multiple) * multiple if self.args.context == "window" else len(rows)
        rows += [padding_row(filler) for _ in range(n_rows - len(rows))]
        scores = self._scores(rows, trajectories)
        return RolloutRows(
            rows=rows,
            prompts=[[{"role": "user", "content": self._prompt_of(row, trajectories)}] for row in rows],
            origins=[max(row.episode, 0) for row in rows],
            scores=scores,
            extras={
                "environment_score": [0.0 if score is None else score for score in scores],
                # What reward functions say of padding rows is thrown away, but they are asked
                "trajectory": [trajectories[max(row.episode, 0)] for row in rows],
            },
        )

    def _scores(self, rows: list[Row], trajectories: list[Trajectory]) -> list[float | None]:
        """An episode's return, on its first row."""
        scores: list[float | None] = []
        scored: set[int] = {-1}
        for row in rows:
            fault = row.episode >= 0 and trajectories[row.episode].stop.is_fault
            scores.append(None if row.episode in scored or fault else sum(self.turn_rewards[row.episode]))
            scored.add(row.episode)
        return scores

    def _prompt_of(self, row: Row, trajectories: list[Trajectory]) -> str:
        return trajectories[row.episode].instructions if row.episode >= 0 else ""

    def add_to_turns(self, rollout: RolloutRows, rewards: torch.Tensor) -> list[list[float]]:
        """`turn_rewards` plus what the user's reward functions gave each row `(B,)`, at the row's last turn."""
        turn_rewards = [list(rewards) for rewards in self.turn_rewards]
        for row, reward in zip(rollout.rows, rewards.tolist(), strict=True):
            if row.turns:
                turn_rewards[row.episode][row.turns[-1]] += reward
        return turn_rewards

    def assign_credit(self, rollout, rewards, batch):
        trajectories = self.trajectories
        turn_rewards = self.add_to_turns(rollout, rewards)
        weighs = [not trajectory.stop.is_fault for trajectory in trajectories]
        rewards, mask = pad_turns(gather_object(turn_rewards))  # (N, K) of all processes
        valid = torch.tensor(gather_object(weighs))  # (N,)
        generations = self.num_generations if self.model.training else self.num_generations_eval
        if self.args.advantage_estimator == "group":
            returns = discounted_returns(rewards, torch.full_like(rewards, self.args.discount), mask)[:, 0]  # (N,)
            advantages = group_advantages(returns, generations, self.scale_rewards, valid)
            turn_values = advantages[:, None].expand_as(rewards)
        else:
            mask = mask & valid[:, None]
            turn_values = turn_advantages(rewards, mask, generations, self.args.discount, self.scale_rewards)
        start = self.accelerator.process_index * len(trajectories)
        own = turn_values[start : start + len(trajectories)]
        self.turn_values = own
        episodes = torch.tensor([max(row.episode, 0) for row in rollout.rows])
        index = pad_turn_index(rollout.rows, batch["completion_ids"].shape[1])  # (B, T)
        return {"advantages": spread_over_tokens(own[episodes], index)}

    def transcript_rows(self, rollout: RolloutRows) -> dict[str, list[Any]]:
        # A number an episode for the eye: the mean over its turns
        lengths = [max(len(rewards), 1) for rewards in self.turn_rewards]
        turns = [values[:length] for values, length in zip(self.turn_values, lengths, strict=True)]
        return {
            "prompt": gather_object([t.instructions for t in self.trajectories]),
            "completion": gather_object([str(t) for t in self.trajectories]),
            "reward": gather_object([sum(rewards) for rewards in self.turn_rewards]),
            "advantage": gather_object([values.mean().item() for values in turns]),
        }


def episode_dataset(seeds) -> Dataset:
    """A dataset of episodes for [`AgentGRPOTrainer`]: one seed each."""
    seeds = list(seeds)
    return Dataset.from_dict({"prompt": [""] * len(seeds), "seed": seeds})
