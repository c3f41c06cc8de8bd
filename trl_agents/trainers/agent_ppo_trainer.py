# Licensed under the Apache License, Version 2.0 (see LICENSE).

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._trl import disable_dropout_in_model
from ..advantages import combine_moments, masked_moments, spread_over_tokens, whiten
from ..batch import NO_TURN, Row, Steps, steps_of
from ..losses import adapt_kl_coef, clipped_value_loss, explained_variance, kl_k1
from ..returns import generalized_advantages
from ..value_head import (
    VALUE_HEAD_FILE,
    VALUE_HEAD_NAME,
    SeparateCritic,
    ValueHead,
    cast_parameters,
    hidden_size_of,
    save_value_head,
    split_value_head,
    warn_of_missing_head,
    without_value_head,
)
from .agent_grpo_trainer import AgentGRPOTrainer
from .agent_ppo_config import AgentPPOConfig
from .checks import check_separate_critic


class AgentPPOTrainer(AgentGRPOTrainer):
    """
    Trainer for agents and for reasoning by Proximal Policy Optimization with a value head on the policy's own trunk.

    The only change w.r.t. [`AgentGRPOTrainer`] is where advantages come from: a value head, trained by the clipped
    value loss in the same forward pass, and generalized advantage estimation over turns or over tokens. It needs no
    groups (`num_generations=1`), and episodes may differ in length. Without `env` it trains on `train_dataset` and
    `reward_funcs` (functions and reward models), as ReFT and RLHF do.

    PPO is from [Schulman et al.](https://huggingface.co/papers/1707.06347), GAE from [Schulman et
    al.](https://huggingface.co/papers/1506.02438); the details follow [The N+ Implementation Details of RLHF with
    PPO](https://huggingface.co/papers/2403.17031) and [ReFT](https://huggingface.co/papers/2401.08967).

    Example:

    ```python
    >>> from trl_agents import AgentPPOConfig, AgentPPOTrainer

    >>> trainer = AgentPPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     env="trl_agents/TicTacToe-v0",
    ...     args=AgentPPOConfig(max_steps=100, env_kwargs={"opponent": "random"}),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model to train. A value head saved beside it (`value_head.safetensors`) is loaded too.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            With `env`, they add to the environment's reward as in [`AgentGRPOTrainer`]. Without, as in TRL; the score
            is the reward of the completion's last token.
        args ([`AgentPPOConfig`], *optional*):
            Configuration for this trainer.
        train_dataset, eval_dataset, env, action_parser, **kwargs:
            As in [`AgentGRPOTrainer`].
    """

    has_critic = True
    files_beside = (*AgentGRPOTrainer.files_beside, VALUE_HEAD_FILE)

    _tag_names = ["trl", "ppo", "trl-agents"]
    _name = "AgentPPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title        = {{Proximal Policy Optimization Algorithms}},
                author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year         = 2017,
                eprint       = {arXiv:1707.06347},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: AgentPPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        *,
        env: str | Callable[..., Any] | None = None,
        **kwargs,
    ):
        if args is None:
            args = AgentPPOConfig("agent-ppo")
        elif not isinstance(args, AgentPPOConfig):
            raise ValueError(f"`args` is a `{type(args).__name__}`: pass an `AgentPPOConfig`.")
        check_separate_critic(args, model, kwargs)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, env=env, **kwargs)
        self.value_head = self._make_value_head()
        self._readings: list[torch.Tensor] = []  # (B, T + 1) of each forward pass since the last use
        # Whatever walks over the policy's parameters beside those of another model must not meet the head
        if self.use_vllm:
            self._hide_from(self.vllm_generation, "sync_weights")
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "sync_target_model"):
                self._hide_from(callback, "sync_target_model")

    def _make_value_head(self) -> ValueHead:
        model, init = self.causal_lm, self.args.value_head_init
        if self.args.separate_critic:
            head = SeparateCritic(model.base_model)
        else:
            head = ValueHead(hidden_size_of(model), self.args.detach_value_head)
        name = self.model.name_or_path or model.name_or_path
        named = init not in ("zeros", "normal")
        # A trained adapter's head lies beside the adapter, whose folder a model with an adapter does not remember
        if not (named and head.load(init)) and not (name and head.load(name)):
            if init == "normal":
                # The same on every process, which by now have random numbers of their own
                generator = torch.Generator(head.weight.device).manual_seed(self.args.seed)
                nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5, generator=generator)
            elif named:
                head.load_reward_model(init)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.mixed_precision == "no"):
            # ZeRO-3 and FSDP2 shard parameters of one type only. DeepSpeed's optimizer has its own copies in float32;
            # accelerate makes all that FSDP2 trains float32 where precision is mixed
            cast_parameters(head, next(p.dtype for p in self.model.parameters() if p.requires_grad))
        if self.args.disable_dropout:
            disable_dropout_in_model(head)  # TRL has done so in the policy before there was one
        return head.attach(model)

    def _hide_from(self, owner: Any, method: str) -> None:
        call = getattr(owner, method)

        def without_head(*args, **kwargs):
            with without_value_head(self.causal_lm):
                return call(*args, **kwargs)

        setattr(owner, method, without_head)

    # -- reading values along with the policy's own forward pass -----------------------------------------------------

    @contextmanager
    def reading(self, width: int) -> Iterator[Callable[[int, int], None]]:
        with self.value_head.listen() as heard:

            def widen(left: int, right: int) -> None:
                if heard:
                    heard[-1] = nn.functional.pad(heard[-1], (left, right))

            yield widen
        if heard:  # not of the reference model, which has no head
            # Value t is that of the state before completion token t is sampled; the last one follows all tokens
            self._readings.append(torch.cat(heard)[:, -width - 1 :])  # (B, T + 1)

    def forget_readings(self):
        self._readings.clear()

    def _values_of(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `(B, T)` and values `(B, T + 1)` under the policy that played."""
        logps = batch.get("old_per_token_logps")
        if logps is None:  # TRL needs none when it makes one update of a rollout
            self._readings.clear()
            logps = self.score_batch(batch)
        # The first: TRL may have read the reference after it, which is the same trunk without its adapter
        values = self._readings[0]
        self._readings.clear()
        if values.shape != (logps.shape[0], logps.shape[1] + 1):
            raise RuntimeError(f"Values of shape {tuple(values.shape)} were read for {tuple(logps.shape)} tokens.")
        return logps, values

    # -- credit ------------------------------------------------------------------------------------------------------

    def assign_credit(self, rollout, rewards, batch):
        logps, values = self._values_of(batch)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        if rollout is None:
            rows, turn_rewards, terminal = self._answers(batch, mask, rewards)
        else:
            rows, turn_rewards = rollout.rows, self.add_to_turns(rollout, rewards)
            terminal = [trajectory.stop.is_terminal for trajectory in self.trajectories]
        width = mask.shape[1]
        steps = steps_of(rows, len(turn_rewards), width, by_turn=self._by_turn)
        episodes = torch.tensor([max(row.episode, 0) for row in rows])
        values, device = values.float().cpu(), mask.device
        step_rewards = steps.place(turn_rewards)
        kl = self._kl_of(logps, batch, mask)
        if kl is not None and self.args.kl_in == "reward":
            step_rewards = step_rewards - self.beta * steps.sum_tokens(kl, episodes)

        old_values, discounts = self._values_and_discounts(steps, values, terminal)
        advantages = generalized_advantages(step_rewards, discounts, old_values, self.args.gae_lambda, steps.mask)
        returns = advantages + old_values[:, :-1]  # of the raw advantages
        self._record_credit(steps, old_values[:, :-1], returns, kl)
        if self.args.whiten_advantages:
            moments = self.accelerator.gather(masked_moments(advantages, steps.mask)[None].to(device)).cpu()
            advantages = whiten(advantages, steps.mask, moments=combine_moments(moments))
        self.turn_values = advantages
        n_steps = self.accelerator.gather(steps.mask.sum().to(device)).sum()
        return {
            "advantages": spread_over_tokens(advantages[episodes], steps.index),
            "old_values": steps.scatter(old_values[:, :-1], width),
            "returns": steps.scatter(returns, width),
            "value_mask": steps.scatter(steps.mask.float(), width),
            "num_value_steps": n_steps,
        }

    @property
    def _by_turn(self) -> bool:
        level = self.args.advantage_level
        return self.plays if level == "auto" else level == "turn"

    def _answers(self, batch: dict[str, Any], mask: torch.Tensor, rewards: torch.Tensor) -> tuple[list, list, list]:
        """Rows, rewards and ends of TRL's own completions: each is an episode of one turn."""
        lengths = batch["completion_mask"].sum(dim=1)
        last_ids = batch["completion_ids"].gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        cut_off = ~torch.isin(last_ids, torch.tensor(self.eos_token_ids, device=last_ids.device))
        scores = rewards
        if self.args.missing_eos_reward is not None:
            scores = torch.where(cut_off, self.args.missing_eos_reward, scores)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * cut_off
        # A completion that no reward function could score has no step, and so weighs nothing
        counts = mask.bool() & ~rewards.isnan()[:, None]
        rows = [
            Row([], [], [0 if counted else NO_TURN for counted in row], number)
            for number, row in enumerate(counts.tolist())
        ]
        # Cut off or not, nothing follows: no bootstrap (ReFT)
        return rows, [[score] for score in scores.nan_to_num().tolist()], [True] * len(rows)

    def _values_and_discounts(
        self, steps: Steps, values: torch.Tensor, terminal: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """V of each step and of what follows the last one `(N, K + 1)`, and the discounts `(N, K)`."""
        at_steps = steps.gather(values)  # (N, K)
        padded = torch.cat([at_steps, torch.zeros(len(at_steps), 1)], dim=1)  # (N, K + 1)
        discounts = self.args.discount * steps.mask.float()
        for number, length in enumerate(steps.mask.sum(dim=1).tolist()):
            if length == 0:
                continue
            if terminal[number]:
                discounts[number, length - 1] = 0.0
            else:
                # What did not fit the context any more cannot be read: the last state's value stands in for it
                place = steps.bootstraps[number]
                padded[number, length] = at_steps[number, length - 1] if place is None else values[place]
        return padded, discounts

    def _kl_of(self, logps: torch.Tensor, batch: dict[str, Any], mask: torch.Tensor) -> torch.Tensor | None:
        if "ref_per_token_logps" not in batch:
            return None
        return (kl_k1(logps, batch["ref_per_token_logps"]) * mask).float().cpu()  # (B, T)

    def _record_credit(
        self,
        steps: Steps,
        values: torch.Tensor,
        returns: torch.Tensor,
        kl: torch.Tensor | None,
    ) -> None:
        device = self.accelerator.device

        def everywhere(tensor: torch.Tensor) -> torch.Tensor:
            return self.accelerator.pad_across_processes(tensor.flatten().to(device), dim=0)

        gathered = [self.accelerator.gather(everywhere(x)).cpu() for x in (values, returns, steps.mask.float())]
        values, returns, mask = gathered
        count = mask.sum().clamp(min=1)
        metrics = {
            "agents/value_mean": (values * mask).sum() / count,
            "agents/value_target_mean": (returns * mask).sum() / count,
            "agents/value_explained_variance": explained_variance(values, returns, mask),
        }
        if kl is not None:
            # Of the episodes that weigh something: an answer that nothing could score is in neither sum
            spent = kl[steps.index != NO_TURN].sum()
            sums = torch.tensor([spent.item(), steps.mask.any(dim=1).sum().item()], device=device)
            total, number = self.accelerator.reduce(sums, reduction="sum").tolist()
            number = max(number, 1.0)
            metrics |= {"agents/kl_mean": total / number, "agents/kl_coef": self.beta}
            if self.args.kl_target is not None and self.model.training:
                self.beta = adapt_kl_coef(
                    self.beta, total / number, self.args.kl_target, int(number), self.args.kl_horizon
                )
        self.record_metrics({name: float(value) for name, value in metrics.items()})

    # -- loss --------------------------------------------------------------------------------------------------------

    @property
    def _only_critic(self) -> bool:
        return self.model.training and self.state.global_step < self.args.critic_warmup_steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        only_critic = self._only_critic
        beta = self.beta
        # A trunk of its own learns from the beginning
        self.value_head.detach = not self.args.separate_critic and (self.args.detach_value_head or only_critic)
        if self.args.kl_in == "reward":
            self.beta = 0.0  # it is in the advantages already
        try:
            policy_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.beta = beta
        values = self._readings[-1][:, :-1]  # (B, T)
        self._readings.clear()
        loss = self.args.value_coef * self._value_loss(values, inputs)
        # Times 0, not left out: every parameter keeps a gradient, which data-parallel wrappers wait for
        return loss + (0.0 if only_critic else 1.0) * policy_loss

    def _value_loss(self, values: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The clipped value loss, aggregated over steps as the policy's is over tokens."""
        mask, old_values, clip = inputs["value_mask"], inputs["old_values"], self.args.value_clip
        losses = clipped_value_loss(values, old_values, inputs["returns"], clip) * mask  # (B, T)
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type in ("grpo", "sapo"):
            loss = (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean() / accumulation
        elif self.loss_type == "bnpo":
            loss = losses.sum() / mask.sum().clamp(min=1) / accumulation
        elif self.loss_type == "dr_grpo":
            loss = losses.sum() / (len(losses) * self.max_completion_length) / accumulation
        elif self.loss_type == "luspo":
            loss = losses.sum(dim=1).mean() / accumulation
        else:  # over all steps of the update, on all processes
            n_steps = inputs["num_value_steps"].clamp(min=1) / self.accelerator.num_processes
            if training:
                n_steps = n_steps * accumulation / self.args.steps_per_generation
            loss = losses.sum() / n_steps
        sums = [losses.sum(), mask.sum(), losses.new_zeros(()) if clip is None else _moved(values, inputs, clip).sum()]
        total, count, moved = self.accelerator.reduce(torch.stack(sums).detach(), reduction="sum").tolist()
        self.record_metrics(
            {"agents/value_loss": total / max(count, 1), "agents/value_clip_ratio": moved / max(count, 1)}
        )
        return loss

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        learning_rate = self.args.value_learning_rate
        named = (self.model if model is None else model).named_parameters()
        head = {id(parameter): parameter for name, parameter in named if f"{VALUE_HEAD_NAME}." in name}
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if learning_rate is None and head.keys() <= known:  # an optimizer made by the user knows no head
            return optimizer
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
        own_rate = {} if learning_rate is None else {"lr": learning_rate}
        optimizer.add_param_group({"params": list(head.values()), "weight_decay": 0.0, **own_rate})
        return optimizer

    # -- saving ------------------------------------------------------------------------------------------------------

    def state_dict_to_save(self, output_dir, state_dict):
        policy, head = split_value_head(state_dict)
        if head and self.args.should_save:
            save_value_head(head, output_dir)
        return policy

    def load_beside(self, folder):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # their own checkpoints hold it, shards and all
        if not self.value_head.load(folder):
            warn_of_missing_head(folder)

    def memory(self):
        return {**super().memory(), "kl_coef": self.beta}

    def recall(self, memory):
        super().recall(memory)
        if self.args.kl_target is not None:
            self.beta = memory.get("kl_coef", self.beta)


def _moved(values: torch.Tensor, inputs: dict[str, Any], clip: float) -> torch.Tensor:
    """1 for the steps whose value has left the clip range."""
    return ((values - inputs["old_values"]).abs() > clip).float() * inputs["value_mask"]
