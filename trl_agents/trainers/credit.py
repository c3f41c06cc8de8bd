# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""From episodes to what TRL trains on: their rewards, the rows, and the advantage of each token."""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from gymnasium.wrappers.utils import RunningMeanStd

from .._trl import RolloutRows
from ..actions import DEFAULT_PATTERN, DEFAULT_TEMPLATE
from ..advantages import group_advantages, spread_over_tokens, turn_advantages
from ..batch import Row, pad_turn_index, pad_turns, padding_row, rows_of
from ..returns import discounted_returns
from ..rollout.faults import TOLD
from ..rollout.metrics import combine_metrics, rollout_metrics
from ..rollout.play import Clock
from ..types import Trajectory
from .playing import PlayingGRPOTrainer


# From which share of invalid replies on one is told, and how much of the first.
MOSTLY_INVALID = 0.9
SHOWN = 200

# What `max_fault_share` is averaged over, by mode: one, and several.
WINDOW = 3
PLAYED = {"train": ("rollout", "rollouts"), "eval": ("batch of evaluation", "batches of evaluation")}

# From which share of forced replies on one is told.
MOSTLY_FORCED = 0.95


class CreditingGRPOTrainer(PlayingGRPOTrainer):
    """`GRPOTrainer` whose rows are episodes, and whose advantages come from the rewards of their turns."""

    reward_statistics: RunningMeanStd  # of all rewards so far, on all processes
    lost_shares: dict[str, deque[float]]  # by mode, of the latest rollouts' episodes: lost to faults
    first_faults: dict[str, list[str]]  # by mode, of the latest rollout
    told_of_invalid = told_of_forced = told_of_lengths = False  # each is told once a run
    trajectories: list[Trajectory]  # of the latest rollout, this process's

    def roll_out(self, inputs: list[dict[str, Any]]) -> RolloutRows:
        mode = "train" if self.model.training else "eval"
        trajectories, clock = self._play(inputs, mode)
        self.trajectories = self.latest = trajectories
        self._record(trajectories, clock, mode)
        self._normalize(trajectories, mode)
        return self._rows(trajectories, mode)

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
        if mode == "train":
            self._tell_of_invalid(trajectories, metrics)
            self._tell_of_forced(metrics)
        lengths = gather_object([len(trajectory.turns) for trajectory in trajectories if not trajectory.stop.is_fault])
        turn_by_turn = not self.has_critic and self.args.advantage_estimator == "turn"
        if mode == "train" and turn_by_turn and len(set(lengths)) > 1 and not self.told_of_lengths:
            self.told_of_lengths = True
            warnings.warn(
                f"advantage_estimator='turn' compares turn k with turn k of the group's other episodes, but episodes "
                f"have between {min(lengths)} and {max(lengths)} turns: the baseline is biased where the policy "
                "decides when to stop. Use advantage_estimator='group', or AgentPPOTrainer.",
                stacklevel=2,
            )
        faults = [trajectory.error for trajectory in trajectories if trajectory.stop.is_fault]
        self.lost_shares[mode].append(metrics.get("agents/lost_share", 0.0))
        self.first_faults[mode] = gather_object(clock.faults.first)[:TOLD]
        self.limit_faults(mode, WINDOW)
        if faults:
            warnings.warn(
                f"{len(faults)} of {len(trajectories)} episodes were lost to a fault of the environment and weigh "
                f"nothing. The first: {faults[0]}",
                stacklevel=2,
            )

    def limit_faults(self, mode: str, n_rollouts: int) -> None:
        """
        Raises, on all processes alike, if of `n_rollouts` rollouts in `mode` too many episodes were lost. Those still
        to be played count as sound: what has begun badly may go on well.
        """
        lost = self.lost_shares[mode]
        if not sum(lost) > self.args.max_fault_share * n_rollouts:
            return
        one, several = PLAYED[mode]
        played = f"{len(lost)} {several}" if len(lost) > 1 else one
        faults = self.first_faults[mode]
        first = f" The first faults of the latest: {'; '.join(faults)}." if faults else ""
        raise RuntimeError(
            f"{sum(lost) / len(lost):.0%} of the episodes of the last {played} were lost to faults of the "
            f"environment (max_fault_share={self.args.max_fault_share}), though each was begun again and then "
            f"replaced.{first} Mend the environment, give it more time (env_timeout, env_reset_timeout), or raise "
            "max_fault_share."
        )

    def _tell_of_invalid(self, trajectories: list[Trajectory], metrics: dict[str, float]) -> None:
        """Warns once a run, on the main process, if hardly a reply of all processes stated a legal action."""
        own = 1 - metrics.get("agents/forced_share", 0.0)  # what the model wrote, and no mechanism
        share = metrics.get("agents/invalid_share", 0.0) / max(own, 1e-9)
        if self.told_of_invalid or share < MOSTLY_INVALID:
            return
        self.told_of_invalid = True
        turns = [turn for t in trajectories if not t.stop.is_fault for turn in t.turns]
        first = next((turn.text for turn in turns if not turn.parsed.is_valid), None)
        first = next(text for text in gather_object([first]) if text is not None)
        if self.accelerator.is_main_process:
            shown = first if len(first) <= SHOWN else f"{first[:SHOWN]}..."
            patterns = [name for name in getattr(self.action_parser, "patterns", ()) if name != DEFAULT_PATTERN]
            warnings.warn(
                f"{share:.0%} of the replies of a rollout stated no legal action, so that its returns say nothing of "
                f"the model. The first such reply: {shown!r}. What is looked for: "
                f"{', '.join(map(repr, patterns)) or DEFAULT_TEMPLATE.format(action='X')}. Check that the "
                "environment's instructions ask for what `action_parser` reads, that replies are long enough for it "
                f"(max_completion_length={self.args.max_completion_length}), and that the model follows instructions "
                "(a few steps of SFT teach it).",
                stacklevel=2,
            )

    def _tell_of_forced(self, metrics: dict[str, float]) -> None:
        """Warns once a run, on the main process, if a mechanism wrote nearly all replies of all processes."""
        share = metrics.get("agents/forced_share", 0.0)
        if self.told_of_forced or share < MOSTLY_FORCED:
            return
        self.told_of_forced = True
        if self.accelerator.is_main_process:
            warnings.warn(
                f"{share:.0%} of the replies of a rollout were written by exploration={self.exploration.names} in the "
                "model's place, so that it has hardly a choice of its own to learn from. Leave the mechanism out, or "
                "let it leave more to the model: longer episodes than there are actions with try_all, a smaller "
                "number with epsilon_greedy.",
                stacklevel=2,
            )

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
