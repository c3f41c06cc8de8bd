# Licensed under the Apache License, Version 2.0 (see LICENSE).

from __future__ import annotations

from dataclasses import dataclass, field

from ..launch import check_processes, launched_processes
from .agent_grpo_config import AgentGRPOConfig


_CHOICES = {
    "advantage_level": ("auto", "turn", "token"),
    "kl_in": ("reward", "loss"),
}


@dataclass
class AgentPPOConfig(AgentGRPOConfig):
    r"""
    Configuration class for the [`AgentPPOTrainer`].

    This class includes only the parameters of the critic, and of the KL in the reward. For all others see
    [`AgentGRPOConfig`] and [`~trl.GRPOConfig`], whose names PPO's other settings keep: `num_iterations` (optimisation
    epochs per rollout), `epsilon` (clip range of the ratio), `beta` (KL coefficient), `loss_type` (loss aggregation:
    `"dapo"` is the mean over all tokens, `"grpo"` the mean of each sample's mean, `"dr_grpo"` a sum over a constant),
    `max_grad_norm`, `temperature`. `advantage_estimator` and `scale_rewards` have no effect: credit comes from the
    critic.

    Parameters:
        > Parameters that control credit

        num_generations (`int`, *optional*, defaults to `1`):
            Episodes, or completions, that start from the same seed or prompt. The critic is the baseline: 1 is enough.
        advantage_level (`str`, *optional*, defaults to `"auto"`):
            What a step of GAE is. `"turn"`: values are read before a turn's first token, all its tokens share its
            advantage. `"token"`: every sampled token is a step. `"auto"`: turns with an environment, tokens without.
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            Lambda of GAE. ReFT, N+ and most of RLHF: 0.95. For long chains of thought R1 and Open-Reasoner-Zero found
            1.0 better.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether advantages get mean 0 and variance 1 over all steps of the rollout, on all processes.
        missing_eos_reward (`float`, *optional*):
            Without an environment: reward that *replaces* the score of a completion that ran out of tokens (N+: -1,
            Open-Reasoner-Zero: 0). Defaults to scoring it like any other (ReFT).
        missing_eos_penalty (`float`, *optional*):
            Without an environment: subtracted from the score of such a completion.

        > Parameters that control the critic

        value_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss, which has the factor 1/2 inside. N+ and TRL's former trainer: 0.1, ReFT: 5.
        value_clip (`float`, *optional*, defaults to `0.2`):
            How far a value may move from its old one within a rollout (all papers: 0.2, for rewards of size 1). None
            clips nothing. Where `agents/value_clip_ratio` stays high it is too small for the returns.
        value_head_init (`str`, *optional*, defaults to `"zeros"`):
            `"zeros"`, `"normal"` (standard deviation 1 / sqrt(hidden size + 1)), a folder with a saved value head, or
            a reward model whose head to start from. A value head saved beside the model is loaded unless a folder
            with another is named; one beside a trained adapter is not found by itself: name its folder here.
        separate_critic (`bool`, *optional*, defaults to `False`):
            Whether values are read from a trunk of their own, a copy of the policy's or of the reward model's that
            `value_head_init` names, instead of the policy's: a second trunk to hold and to train (ReFT: no
            better, converges sooner). It is saved in the same `value_head.safetensors`.
        value_learning_rate (`float`, *optional*):
            Learning rate of the head, and of its own trunk. Defaults to `learning_rate`, at which a new head may need
            hundreds of updates to get from 0 to the size of the returns: see `agents/value_explained_variance`.
        detach_value_head (`bool`, *optional*, defaults to `False`):
            Whether the value loss stops at the head, so that it leaves the policy's trunk alone.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of first updates in which only the head learns (Open-Reasoner-Zero and VC-PPO warm their critics up
            for 50).

        > Parameters that control the KL penalty

        beta (`float`, *optional*, defaults to `0.05`):
            KL coefficient (ReFT: 0.01 for programs, 0.05 for text; N+ and LLMs are Greedy Agents: 0.05). 0 loads no
            reference.
        kl_in (`str`, *optional*, defaults to `"reward"`):
            `"reward"`: -beta * (log pi - log pi_ref) is added to each token's reward (RLHF, ReFT). `"loss"`: beta
            times the k3 estimate is added to the loss (GRPO, LLMs are Greedy Agents).
        kl_target (`float`, *optional*):
            KL per episode to hold by adapting beta (lm-human-preferences: 6). Defaults to a fixed beta.
        kl_horizon (`int`, *optional*, defaults to `10000`):
            Episodes over which beta adapts.
    """

    has_critic = True

    num_generations: int | None = field(
        default=1,
        metadata={
            "help": "Episodes or completions that share a seed or prompt. The critic is the baseline: 1 is enough."
        },
    )
    advantage_level: str = field(
        default="auto",
        metadata={
            "help": "What a step of GAE is: 'turn' (all tokens of a turn share its advantage), 'token', or 'auto': "
            "turns with an environment, tokens without.",
            "choices": list(_CHOICES["advantage_level"]),
        },
    )
    gae_lambda: float = field(
        default=0.95,
        metadata={"help": "Lambda of GAE (ReFT, N+: 0.95; R1, Open-Reasoner-Zero for long answers: 1.0)."},
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Whether advantages get mean 0 and variance 1 over all steps of the rollout."},
    )
    missing_eos_reward: float | None = field(
        default=None,
        metadata={
            "help": "Without an environment: replaces the score of a completion that ran out of tokens (N+: -1, "
            "Open-Reasoner-Zero: 0). Default: it is scored like any other (ReFT)."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Without an environment: subtracted from the score of a completion that ran out of tokens."},
    )
    value_coef: float = field(
        default=0.1,
        metadata={"help": "Weight of the value loss, which has the 1/2 inside (N+: 0.1, ReFT: 5)."},
    )
    value_clip: float | None = field(
        default=0.2,
        metadata={"help": "How far a value may move from its old one within a rollout (0.2 in all papers)."},
    )
    value_head_init: str = field(
        default="zeros",
        metadata={"help": "'zeros', 'normal', a folder with a saved value head, or a reward model to start from."},
    )
    separate_critic: bool = field(
        default=False,
        metadata={"help": "Whether the value head has a trunk of its own, a second one to hold and to train."},
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value head, own trunk included. Default: learning_rate."}
    )
    detach_value_head: bool = field(
        default=False, metadata={"help": "Whether the value loss stops at the head and leaves the trunk alone."}
    )
    critic_warmup_steps: int = field(
        default=0,
        metadata={"help": "Number of first updates in which only the head learns (Open-Reasoner-Zero: 50)."},
    )
    beta: float = field(
        default=0.05,
        metadata={"help": "KL coefficient (ReFT: 0.01 for programs, 0.05 for text; N+: 0.05). 0 loads no reference."},
    )
    kl_in: str = field(
        default="reward",
        metadata={
            "help": "Where the KL penalty goes: into the tokens' rewards (k1: RLHF, ReFT) or the loss (k3: GRPO).",
            "choices": list(_CHOICES["kl_in"]),
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "KL per episode to hold by adapting beta (lm-human-preferences: 6). Default: beta is fixed."
        },
    )
    kl_horizon: int = field(default=10000, metadata={"help": "Episodes over which beta adapts."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout in the model, so that the ratio is 1 before the first update."},
    )

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        if not 0.0 <= self.gae_lambda <= 1.0:
            raise ValueError(f"gae_lambda={self.gae_lambda!r} must lie between 0 and 1.")
        for name in ("value_coef", "value_clip", "critic_warmup_steps", "beta", "value_learning_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value!r}: give a number of at least 0.")
        for name in ("kl_target", "kl_horizon"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value!r}: give a positive number.")
        if self.separate_critic and self.detach_value_head:
            raise ValueError(
                "detach_value_head=True keeps the value loss from the policy's trunk, which separate_critic=True does "
                "not read: leave detach_value_head out."
            )
        if self.kl_target is not None and self.beta == 0.0:
            raise ValueError(
                f"kl_target={self.kl_target} adapts beta from where it starts, and beta=0.0 stays 0: start it at "
                "0.05, say."
            )
        if self.missing_eos_reward is not None and self.missing_eos_penalty is not None:
            raise ValueError(
                f"missing_eos_reward={self.missing_eos_reward} replaces the score that missing_eos_penalty="
                f"{self.missing_eos_penalty} is subtracted from: give one of them."
            )
        if self.critic_warmup_steps and self.weight_decay:
            raise ValueError(
                f"weight_decay={self.weight_decay} would move the policy during critic_warmup_steps="
                f"{self.critic_warmup_steps}, in which only the head learns: use weight_decay=0.0, or no warm-up."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} normalises rewards within groups, "
                "which the critic's place has none of. Use 'sum_then_normalize'."
            )
        self._check_batches()
        if self.kl_target is not None and 0.2 * self.generation_batch_size >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} is too short for {self.generation_batch_size} episodes a rollout: beta "
                f"could reach 0 and stay there. Make it longer than {0.2 * self.generation_batch_size:g}."
            )

    def _check_batches(self) -> None:
        """TRL's own checks, which refuse a group of one: its baseline would be the completion itself."""
        generations, eval_generations = self.num_generations, self.num_generations_eval
        if generations != 1:
            super().__post_init__()
            return
        # Stands in for the group while TRL looks: a number that divides the generation batch and is not 1
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        if self.generation_batch_size is not None:
            self.num_generations = self.generation_batch_size
        else:
            # transformers counts the processes only while TRL looks
            processes = getattr(self, "world_size", launched_processes())
            self.num_generations = self.per_device_train_batch_size * steps * processes
        if self.num_generations < 2:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} and {steps} accumulation steps "
                "of 1 process leave one episode to learn from at a time. Raise one of them."
            )
        self.num_generations_eval = eval_generations or 1
        try:
            super().__post_init__()
        except ValueError as error:
            if "divisible by num_generations" in str(error):
                check_processes()  # there may be fewer than were launched
            raise
        self.num_generations, self.num_generations_eval = generations, eval_generations
