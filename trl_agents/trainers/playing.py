# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Episodes in the place of TRL's completions: who plays them, by which rules, and how many side by side."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from accelerate.utils import gather_object

from .._trl import RolloutGRPOTrainer
from ..actions import ActionParser
from ..contexts import Briefing
from ..envs.make import make_env
from ..exploration import Mechanism
from ..rollout.generation import Backend, Sampling, SlotBackend, positions_of, replay
from ..rollout.play import Clock, Episode, Player, Rules
from ..rollout.probe import Probe
from ..rollout.workers import EnvPool
from ..types import Trajectory
from .display import TrainingDisplay


class PlayingGRPOTrainer(RolloutGRPOTrainer):
    """`GRPOTrainer` that plays episodes with its model. Whoever extends it sets what has no value here."""

    env_factory: Callable[[], Any]
    action_parser: ActionParser
    briefing: Briefing  # what the environment says before an episode
    context: Any  # of [`contexts`]: what the model reads
    exploration: Mechanism
    rollouts_at_step: tuple[int, int]  # the optimizer step of the latest rollout, and how many it had before
    latest: list[Trajectory]  # of the latest rollout, or of `play` if that was later

    env_pool: EnvPool | None = None
    display: TrainingDisplay | None = None

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
            limits = self.args.env_timeout, self.args.env_reset_timeout, self.args.env_processes
            with closing(Probe(factory, *limits, resets=False)) as probe:
                briefing = probe.begin(0).briefing
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
        limits = [positions_of(model), self.args.max_episode_length, self.args.vllm_max_model_length]
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

    def close_environments(self) -> None:
        """Close all environments; the next rollout makes new ones."""
        if self.env_pool is not None:
            self.env_pool.close()
            self.env_pool = None
