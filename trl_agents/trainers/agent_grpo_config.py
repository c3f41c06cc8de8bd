# Licensed under the Apache License, Version 2.0 (see LICENSE).

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from .._trl import GRPOConfig
from ..exploration import make_exploration, mechanism_names
from ..rollout.rules import INVALID_ACTION_CHOICES


_CHOICES = {
    "context": ("chat", "window"),
    "advantage_estimator": ("turn", "group"),
    "reward_normalization": ("none", "scale", "standardize"),
    "invalid_action": INVALID_ACTION_CHOICES,
}

# Losses that divide by the number of tokens: rows that weigh nothing leave them as they are.
TOKEN_LOSSES = ("dapo", "bnpo", "cispo", "vespo")


@dataclass
class AgentGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`AgentGRPOTrainer`].

    This class includes only the parameters that are specific to playing episodes. For all others see [`GRPOConfig`].
    With an environment, one completion is one episode: `num_generations` episodes start from the same seed, and
    `per_device_train_batch_size` counts episodes.

    Parameters:
        > Parameters that say what the model reads and writes

        context (`str`, *optional*, defaults to `"chat"`):
            `"chat"`: the conversation grows, one training row an episode. `"window"`: the prompt is rendered anew each
            turn with the last `window` transitions, one training row a turn.
        window (`int`, *optional*):
            Number of transitions a windowed prompt keeps; None keeps all. 0 suits games whose state says it all.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Token budget of one *reply* (G in the paper). TRL's meaning, the budget of a completion, holds without an
            environment.
        max_episode_length (`int`, *optional*):
            Most tokens of an episode's row, instructions included; an episode that outgrows it is truncated. Defaults
            to the model's number of positions.
        max_turns (`int`, *optional*):
            Most turns of an episode, for environments that do not end by themselves.

        > Parameters that control rewards and credit

        advantage_estimator (`str`, *optional*, defaults to `"turn"`):
            `"turn"`: each turn's return-to-go minus its mean over the group's episodes at the same turn (a Monte-Carlo
            baseline, for episodes of fixed length). `"group"`: GRPO's, one advantage an episode.
        discount (`float`, *optional*, defaults to `1.0`):
            Discount per turn of the return-to-go; with `"group"`, of the episode's return.
        reward_normalization (`str`, *optional*, defaults to `"scale"`):
            What is done to the environment's rewards, with statistics over all rewards seen so far on all processes:
            `"scale"` divides by their standard deviation, `"standardize"` also subtracts their mean (which, where
            episodes vary in length, pays or charges for each further turn), `"none"` leaves them.
        invalid_action (`str`, *optional*, defaults to `"random"`):
            What a reply without a legal action leads to: `"random"` plays a random legal action (and ends the episode
            where the environment lists none), `"retry"` asks again, `"end"` ends the episode. A reply that was asked
            again is a turn of its own, so `"retry"` is no match for `advantage_estimator="turn"`.
        invalid_action_penalty (`float`, *optional*, defaults to `-5.0`):
            Added to the reward of a turn without a legal action, after normalisation.
        max_retries (`int`, *optional*, defaults to `2`):
            With `invalid_action="retry"`, how often a step is asked again before the episode ends.
        action_stop (`bool`, *optional*, defaults to `False`):
            Whether a reply is over as soon as it states a legal action, in training and in evaluation. For models that
            talk on after it; the token that ends a reply is then never learnt. Not with vLLM.

        > Parameters that control exploration

        exploration (`list[str]`, *optional*):
            Mechanisms that make the player explore, in training and in evaluation: `"try_all"`,
            `"epsilon_greedy=0.1"`, `"context_randomization"`, `"context_summary"`, `"self_correction"`,
            `"self_consistency=16"`, `"exploration_bonus=1"`, `"thinking_budget=64"`, `"no_reasoning"`; see
            `trl_agents/exploration.py`.

        > Parameters that control the environments

        env_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of the environment, as a dictionary or JSON.
        num_train_seeds (`int`, *optional*, defaults to `512`):
            Number of different episodes to train on, when no `train_dataset` with a column `seed` is given. The paper
            trains on 512 instances.
        num_eval_seeds (`int`, *optional*, defaults to `64`):
            Number of held-out seeds for evaluation during training; each is played `num_generations_eval` times.
        eval_temperature (`float`, *optional*):
            Sampling temperature of evaluation episodes, 0 for greedy decoding (the paper's). Defaults to
            `temperature`.
        rollout_batch_size (`int`, *optional*):
            Episodes side by side on each process. A place is used again as soon as its episode ends. Defaults to all
            episodes of the generation batch.
        env_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds an environment may take for a `step`; what takes longer is a fault. None waits for ever.
        env_reset_timeout (`float`, *optional*):
            Seconds it may take for a `reset`, being made included. Defaults to `env_timeout`.
        env_processes (`bool`, *optional*, defaults to `False`):
            Whether each environment gets a process of its own. One that hangs for good is killed then, and one that
            takes its process down does not take the training along. It must be made from what can be pickled.
        max_fault_share (`float`, *optional*, defaults to `0.5`):
            Share of episodes that may be lost to faults of the environment (exceptions, wrong answers, timeouts),
            averaged over three rollouts, before training stops with an error. Those still to be played count as sound,
            but not at the end of a run. Evaluations are held to it by themselves, over three batches. An episode is
            lost when it has failed twice and two others, in its place, have too. 0 stops at the first, 1 never.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["env_kwargs"]

    has_critic = False  # no setting: whether the baseline is a critic's, and not the mean over the group's episodes

    context: str = field(
        default="chat",
        metadata={
            "help": "'chat': the conversation grows, one training row an episode. 'window': the prompt is rendered "
            "anew each turn with the last `window` transitions, one training row a turn.",
            "choices": list(_CHOICES["context"]),
        },
    )
    window: int | None = field(
        default=None,
        metadata={
            "help": "Number of transitions a windowed prompt keeps; None keeps all. 0 suits games whose state says "
            "it all."
        },
    )
    max_completion_length: int | None = field(
        default=256,
        metadata={"help": "Token budget of one reply (of the completion, without an environment)."},
    )
    max_episode_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of an episode's row, instructions included; an episode that outgrows it is "
            "truncated. Defaults to the model's number of positions."
        },
    )
    max_turns: int | None = field(
        default=None,
        metadata={"help": "Most turns of an episode, for environments that do not end by themselves."},
    )
    advantage_estimator: str = field(
        default="turn",
        metadata={
            "help": "'turn': each turn's return-to-go minus its mean over the group at the same turn (episodes of "
            "fixed length). 'group': GRPO's, one advantage an episode.",
            "choices": list(_CHOICES["advantage_estimator"]),
        },
    )
    discount: float = field(default=1.0, metadata={"help": "Discount per turn of the return-to-go."})
    reward_normalization: str = field(
        default="scale",
        metadata={
            "help": "What is done to the environment's rewards, with statistics over all seen so far: 'scale' divides "
            "by their standard deviation, 'standardize' also subtracts their mean, 'none' leaves them.",
            "choices": list(_CHOICES["reward_normalization"]),
        },
    )
    invalid_action: str = field(
        default="random",
        metadata={
            "help": "What a reply without a legal action leads to: 'random' plays a random legal action, 'retry' asks "
            "again, 'end' ends the episode.",
            "choices": list(_CHOICES["invalid_action"]),
        },
    )
    invalid_action_penalty: float = field(
        default=-5.0,
        metadata={"help": "Added to the reward of a turn without a legal action, after normalisation."},
    )
    max_retries: int = field(
        default=2,
        metadata={"help": "With invalid_action='retry', how often a step is asked again before the episode ends."},
    )
    action_stop: bool = field(
        default=False,
        metadata={"help": "Whether a reply is over as soon as it states a legal action. Not with vLLM."},
    )
    exploration: list[str] | None = field(
        default=None,
        metadata={
            "help": "Mechanisms that make the player explore: try_all, epsilon_greedy=0.1, context_randomization, "
            "context_summary, self_correction, self_consistency=16, exploration_bonus=1, thinking_budget=64, "
            "no_reasoning."
        },
    )
    env_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of the environment, as JSON: '{\"n_arms\": 10}'."},
    )
    num_train_seeds: int = field(
        default=512,
        metadata={"help": "Number of different episodes to train on when no dataset with a column `seed` is given."},
    )
    num_eval_seeds: int = field(
        default=64,
        metadata={
            "help": "Number of held-out seeds for evaluation during training, each played num_generations_eval times."
        },
    )
    eval_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of evaluation episodes, 0 for greedy decoding. Defaults to `temperature`."},
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={"help": "Episodes side by side on each process. Defaults to all of the generation batch."},
    )
    env_timeout: float | None = field(
        default=120.0,
        metadata={"help": "Seconds an environment may take for a `step`; what takes longer is a fault."},
    )
    env_reset_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds an environment may take for a `reset`, being made included. Defaults to env_timeout."
        },
    )
    env_processes: bool = field(
        default=False,
        metadata={"help": "Whether each environment gets a process of its own, so that one that hangs can be killed."},
    )
    max_fault_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of episodes that may be lost to faults of the environment, averaged over three rollouts, "
            "before training stops with an error. 0 stops at the first, 1 never."
        },
    )

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")
        for name in ("max_turns", "max_episode_length", "rollout_batch_size", "num_train_seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: give a number of at least 1.")
        for name in ("window", "max_retries", "num_eval_seeds", "eval_temperature"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value!r}: give a number of at least 0.")
        for name in ("env_timeout", "env_reset_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value!r}: give a positive number, or None to wait for ever.")
        if not 0.0 <= self.max_fault_share <= 1.0:
            raise ValueError(f"max_fault_share={self.max_fault_share!r} is a share: give a number from 0 to 1.")
        if self.invalid_action_penalty > 0:
            raise ValueError(
                f"invalid_action_penalty={self.invalid_action_penalty!r} is added to the reward, and would praise "
                f"invalid actions. Use {-self.invalid_action_penalty!r}, or 0."
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature!r}: training samples, so give a positive number. For greedy episodes "
                "in evaluation use eval_temperature=0.0."
            )
        if self.num_generations is not None and self.num_generations < 1:
            raise ValueError(f"num_generations={self.num_generations!r}: give a number of at least 2, or 1 with PPO.")
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"discount={self.discount!r} must lie between 0 and 1.")
        # 0 passes, so that `--context chat` can override a file that says `window: 0`
        if self.context == "chat" and self.window:
            raise ValueError(f"window={self.window} has no effect with context='chat': use context='window'.")
        if self.context == "window" and self.loss_type not in TOKEN_LOSSES:
            raise ValueError(
                f"loss_type={self.loss_type!r} averages over rows, and context='window' pads the number of rows, so "
                f"padding would change the loss. Choose one of {', '.join(TOKEN_LOSSES)}."
            )
        make_exploration(self.exploration).check_context(self.context)
        self._check_json()
        try:
            super().__post_init__()
        except ValueError as error:
            if "divisible by num_generations" not in str(error):
                raise
            raise ValueError(
                f"{error} Use a num_generations that divides per_device_train_batch_size="
                f"{self.per_device_train_batch_size} times the number of processes and steps_per_generation="
                f"{self.steps_per_generation}, or another batch size."
            ) from error
        if self.env_kwargs is not None and not isinstance(self.env_kwargs, dict):
            raise ValueError(
                f"env_kwargs={self.env_kwargs!r} must be a dictionary, or JSON of one: '{{\"n_arms\": 10}}'."
            )
        if self.invalid_action == "retry" and self.advantage_estimator == "turn" and not self.has_critic:
            warnings.warn(
                "invalid_action='retry' with advantage_estimator='turn': turn k is compared with turn k of the "
                "group's other episodes, but a reply that is asked again is a turn of its own and moves later ones "
                "on. Turn k is then another step of the environment in one episode than in the next, even where both "
                "have as many turns. Use advantage_estimator='group', or invalid_action='random'.",
                stacklevel=3,
            )

    def _check_json(self) -> None:
        """Raises `ValueError` for text that `TrainingArguments` is about to read as JSON, and does not say where."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name, None)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{name}={value!r} is no JSON ({error}): write keys and texts in double quotes, "
                        "'{\"n_arms\": 10}'."
                    ) from None

    @property
    def evaluation_temperature(self) -> float:
        """At which evaluation episodes are sampled: `eval_temperature`, or that of training where it is not given."""
        return self.temperature if self.eval_temperature is None else self.eval_temperature

    def to_dict(self):
        values = super().to_dict()
        if self.exploration is not None and not isinstance(self.exploration, str):
            values["exploration"] = mechanism_names(self.exploration)  # also one of the user's own
        return values
