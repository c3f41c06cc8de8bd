# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`AgentPPOTrainer` from end to end: its head, its optimisation, its metrics, datasets, runs in parts, mistakes.

What each detail of PPO for language models comes down to, and the test that holds it (here, in test_credit.py or in
test_ppo_loss.py, unless a file is named):

  tokens are scored, values read, in the state before them    test_tokens_and_values_are_read_in_the_state_before_them
  the ratio is 1 before the first update                      test_the_ratio_is_one_before_the_first_update
  padding left of absolute positions                          test_padding_on_the_left_moves_nothing
  temperature in all log-probabilities                        test_the_ratio_is_one_before_the_first_update
  the end is trained, padding is not                          test_the_token_that_ends_a_reply_...,
                                                              test_padding_changes_neither_loss_nor_gradients
  pad == eos                                                  test_a_tokenizer_that_pads_with_its_end_token,
                                                              test_the_end_is_found_by_the_mask_...
  score on the last action, KL on every one                   test_the_score_is_on_the_last_action_...
  golden GAE, limits of lambda                                test_golden_advantages, test_limits_of_lambda_...;
                                                              test_returns.py
  nothing leaks across padding                                test_a_batch_of_many_is_many_batches_of_one;
                                                              test_returns.py::TestRaggedBatches
  terminated is not truncated                                 test_truncated_episodes_bootstrap_...,
                                                              test_completions_that_ran_out_of_tokens
  returns of raw advantages                                   test_returns_are_of_the_raw_advantages
  whitening: masked, constant, one step; over processes       test_whitening_is_over_steps_and_masked,
                                                              test_advantages_that_do_not_differ_...;
                                                              test_advantages.py::TestWhiten
  sides of the ratio's clip                                   test_the_ratio_is_clipped_on_the_side_it_moves_to
  value clip, its coefficient and 1/2                         test_golden_value_loss;
                                                              test_losses.py::TestClippedValueLoss
  loss aggregation, accumulation                              test_loss_aggregation, test_accumulated_gradients_...
  KL: estimators, place                                       test_losses.py::TestKL, test_kl_is_in_the_reward_or_...
  the reference is frozen; adapter off                        test_the_reference_is_where_the_policy_started_...,
                                                              test_an_adapter_turned_off_is_the_reference
  beta 0, beta large                                          test_without_kl_there_is_no_reference,
                                                              test_a_strong_kl_holds_the_policy_...
  adaptive KL                                                 test_beta_adapts_...; test_losses.py::TestAdaptKLCoef
  missing end: replaced or subtracted                         test_completions_that_ran_out_of_tokens
  the head: float32, zeros, detach, kept                      test_value_head.py, test_a_head_of_zeros_...,
                                                              test_the_value_loss_reaches_..., test_a_saved_head_...,
                                                              test_a_checkpoint_without_a_head_warns
  critic-only warm-up                                         test_only_the_critic_learns_while_it_warms_up
  policy and value gradients apart                            test_policy_and_value_gradients_add_up,
                                                              test_without_a_value_loss_it_is_the_policys_...
  Adam's epsilon, decay, clipping, schedule                   test_the_optimizer_is_as_configured,
                                                              test_gradients_are_clipped_together,
                                                              test_the_schedule_moves_once_an_update
  seeds; epochs are fresh permutations                        test_the_same_seed_plays_...; test_each_epoch_...;
                                                              test_agent_grpo_trainer.py::test_two_processes_...
  generation leaves the model as it was                       test_a_rollout_leaves_the_model_as_it_was
  logits are never held                                       test_the_logits_of_a_batch_are_never_held
  metrics are masked                                          test_metrics_are_of_the_steps_that_exist,
                                                              test_what_is_logged
  resume                                                      test_a_resumed_run_is_an_uninterrupted_one
  toys                                                        test_learning.py
"""

import shutil

import numpy as np
import pytest
import torch
import trl
from by_hand import EOS, PROMPT, Spy, answers, credited, hash_of, teach
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from scripted import Pay, acts, generate, loss_and_gradients, make_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForSequenceClassification
from trl import GRPOConfig

from trl_agents import AgentPPOConfig, AgentPPOTrainer
from trl_agents.value_head import VALUE_HEAD_FILE


# -- the head -----------------------------------------------------------------------------------------------------


def test_a_head_of_zeros_makes_advantages_of_rewards_to_go(make_trainer):
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), gae_lambda=1.0)
    batch = generate(trainer)
    assert (batch["old_values"] == 0).all()
    mask = batch["value_mask"].bool()
    assert batch["advantages"][mask].tolist() == [4, 4, 3, 3, 0, 0, 3, 2, 1, 4, 1, 0]


@pytest.mark.parametrize("detach", [False, True])
def test_the_value_loss_reaches_the_trunk_unless_it_is_detached(make_trainer, detach):
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), detach_value_head=detach, value_head_init="normal")
    batch = generate(trainer)
    batch["advantages"] = 0 * batch["advantages"]
    _, gradients = loss_and_gradients(trainer, batch)
    assert gradients["value_head.weight"].any()
    assert gradients["model.layers.0.mlp.up_proj.weight"].any() == (not detach)


def test_how_a_head_starts(make_trainer, model_dir, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(model_dir).config
    config.num_labels = 1
    reward_model = Qwen3ForSequenceClassification(config)
    torch.nn.init.normal_(reward_model.score.weight)
    reward_model.save_pretrained(tmp_path / "reward")
    assert not make_trainer().value_head.weight.any()
    assert make_trainer(value_head_init="normal").value_head.weight.detach().std() == pytest.approx(33**-0.5, rel=0.5)
    started = make_trainer(value_head_init=str(tmp_path / "reward")).value_head
    assert torch.equal(started.weight, reward_model.score.weight) and started.weight.dtype == torch.float32
    assert started.bias.item() == 0.0


@pytest.mark.parametrize("peft", [False, True])
def test_a_saved_head_is_loaded_bit_equal(make_trainer, model_dir, tmp_path, peft):
    kwargs = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if peft else {}
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), kwargs=kwargs, learning_rate=0.1)
    trainer.train()
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    assert (folder / VALUE_HEAD_FILE).exists() and trainer.value_head.weight.any()
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    assert not any("value_head" in name for name in load_file(str(folder / weights)))
    if peft:
        again = make_trainer(
            model=AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True),
            kwargs={"processing_class": AutoTokenizer.from_pretrained(model_dir)},
            value_head_init=str(folder),
        )
    else:
        again = make_trainer(model=str(folder), value_head_init="normal")
    assert torch.equal(again.value_head.weight, trainer.value_head.weight)
    assert torch.equal(again.value_head.bias, trainer.value_head.bias)
    ids = torch.tensor([PROMPT])
    torch.testing.assert_close(again.model(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_only_the_critic_learns_while_it_warms_up(make_trainer):
    trainer = make_trainer(
        acts("abc", "caa", "bbb", "cba"), critic_warmup_steps=4, max_steps=6, save_strategy="steps", save_steps=4,
        beta=0.1, learning_rate=0.05, gae_lambda=1.0, value_coef=1.0, value_clip=None,
    )  # fmt: skip
    start = hash_of(trainer.model)
    trainer.train()
    kept = AutoModelForCausalLM.from_pretrained(f"{trainer.args.output_dir}/checkpoint-4").state_dict()
    torch.testing.assert_close(kept, {name: start[name] for name in kept}, rtol=0, atol=0)
    losses = [log["agents/value_loss"] for log in trainer.state.log_history if "agents/value_loss" in log]
    assert losses[3] < losses[1] < losses[0]
    now = hash_of(trainer.model)
    assert not torch.equal(now["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


# -- optimisation -------------------------------------------------------------------------------------------------


def test_the_optimizer_is_as_configured(make_trainer):
    trainer = make_trainer(
        acts("abc", "caa", "bbb", "cba"), adam_epsilon=1e-5, weight_decay=0.1, learning_rate=1e-3,
        value_learning_rate=1e-2, max_steps=1,
    )  # fmt: skip
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    found = {}
    for group in groups:
        assert group["eps"] == 1e-5
        for parameter in group["params"]:
            assert found.setdefault(names[id(parameter)], group) is group
    assert set(found) == set(names.values())  # each once
    assert {name: group["lr"] for name, group in found.items()} == {
        name: 1e-2 if "value_head" in name else 1e-3 for name in names.values()
    }
    for name, group in found.items():
        assert (group["weight_decay"] == 0) == any(part in name for part in ("norm", "bias", "value_head"))


def test_without_a_learning_rate_of_its_own_the_head_has_the_policys(make_trainer):
    trainer = make_trainer()
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3}
    parameters = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert id(trainer.value_head.weight) in parameters and len(parameters) == len(set(parameters))


@pytest.mark.parametrize("bound", [0.5, 0.01])
def test_gradients_are_clipped_together(make_trainer, bound):
    class Rich(Pay):
        PRICES = {"a": 0.0, "b": 1e4, "c": -3e4}

    trainer = make_trainer(
        acts("abc", "caa", "bbb", "cba"), env=Rich, optim="sgd", learning_rate=1.0, max_grad_norm=bound, max_steps=1
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    squares = [(now - then).square().sum() for now, then in zip(trainer.model.parameters(), before, strict=True)]
    assert sum(squares).sqrt().item() == pytest.approx(bound, rel=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] > 100


def test_the_schedule_moves_once_an_update(make_trainer):
    trainer = make_trainer(
        acts(*["abc", "caa", "bbb", "cba"] * 2), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        lr_scheduler_type="linear", learning_rate=1e-3, max_steps=2,
    )  # fmt: skip
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1e-3, 0.5e-3]) and trainer.lr_scheduler.last_epoch == 2


def test_each_epoch_over_a_rollout_meets_every_row_once_in_a_new_order(make_trainer):
    class Seen(Spy):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.seen.append(inputs["returns"][:, 0].tolist())
            self.whole &= {"old_per_token_logps", "old_values"} <= inputs.keys() and inputs["num_value_steps"] == 8
            return loss

    class Numbered(Pay):
        def step(self, action):
            return "", float(action), True, False, {}

    names = [str(number) for number in range(8)]
    trainer = make_trainer(
        [[f"ACTION={name}"] for name in names], env=Numbered, env_kwargs={"actions": names}, trainer_class=Seen,
        per_device_train_batch_size=2, steps_per_generation=4, num_iterations=3, max_steps=12, learning_rate=0.0,
    )  # fmt: skip
    trainer.seen, trainer.whole = [], True
    trainer.train()
    epochs = [sum(trainer.seen[start : start + 4], []) for start in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [[float(name) for name in names]] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    batches = [{frozenset(batch) for batch in trainer.seen[start : start + 4]} for start in (0, 4)]
    assert batches[0] != batches[1] and trainer.whole


def test_the_same_seed_plays_the_same_episodes(make_trainer):
    def texts(seed):
        trainer = make_trainer(env="trl_agents/Bandit-v0", env_kwargs={"n_arms": 3, "horizon": 2}, seed=seed)
        generate(trainer)
        return [str(trajectory) for trajectory in trainer.trajectories]

    first = texts(1)
    assert first == texts(1) != texts(2)
    assert len(set(first)) == 4


@pytest.mark.parametrize("env", [Pay, None])
def test_a_rollout_leaves_the_model_as_it_was(make_trainer, env):
    found = []

    trainer = make_trainer(env=env, gradient_checkpointing=True, max_completion_length=4)
    model = trainer.causal_lm
    model.model.register_forward_hook(
        lambda module, args, output: found.append((module.training, torch.is_grad_enabled()))
    )

    model.gradient_checkpointing_enable()

    def state():
        return model.config.to_dict(), model.generation_config.to_dict(), model.is_gradient_checkpointing

    before = state()
    generate(trainer)
    assert len(found) > 1 and not any(grad for _, grad in found)
    if env:  # TRL's own generation counts on `disable_dropout`
        assert found[0] == (False, False)
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    assert trainer.model.training and state() == before and model.is_gradient_checkpointing
    found.clear()
    trainer.train()
    assert (True, True) in found and all(np.isfinite(log.get("loss", 0)) for log in trainer.state.log_history)


class Largest(TorchDispatchMode):
    """The largest tensor of logits that any operation returns."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.numel = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.shape[-1:] == (self.vocabulary,):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.skipif(trl.__version__ < "1.15", reason="trl 1.14 makes whole logits")
def test_the_logits_of_a_batch_are_never_held(make_trainer):
    trainer = make_trainer(env=None, num_iterations=2)
    completions = [[50 + number % 7 for number in range(400)] for _ in range(24)]
    batch = answers(*completions)
    vocabulary = len(trainer.processing_class)
    with Largest(vocabulary) as largest:
        batch |= {"old_per_token_logps": trainer.score_batch(batch)}
        loss_and_gradients(trainer, credited(trainer, [1.0] * 24, batch))
    assert 0 < largest.numel < 0.6 * 24 * 400 * vocabulary


# -- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_are_of_the_steps_that_exist(make_trainer):
    trainer = make_trainer(env=None, gae_lambda=1.0, num_iterations=2, value_coef=1.0)
    teach(trainer, [(PROMPT, 0.5), ([*PROMPT, 50], 1.5), ([*PROMPT, 51], 0.5)])
    batch = answers([50, EOS], [51, EOS], [EOS], width=4)
    batch = credited(trainer, [1.0, 0.0, 3.0], batch | {"old_per_token_logps": trainer.score_batch(batch)})
    metrics = trainer._metrics["train"]
    values, returns = np.array([0.5, 1.5, 0.5, 0.5, 0.5]), np.array([1, 1, 0, 0, 3])
    assert metrics["agents/value_mean"] == [pytest.approx(values.mean(), abs=1e-3)]
    assert metrics["agents/value_target_mean"] == [pytest.approx(1.0)]
    explained = 1 - np.var(returns - values) / np.var(returns)
    assert metrics["agents/value_explained_variance"] == [pytest.approx(explained, abs=1e-3)]
    trainer.compute_loss(trainer.model, batch)
    assert metrics["agents/value_loss"] == [pytest.approx(0.5 * np.mean((returns - values) ** 2), abs=1e-3)]
    assert metrics["agents/value_clip_ratio"] == [0.0]
    batch["old_values"] = batch["old_values"] + torch.tensor([[0.3, 0.1, 9, 9], [-0.3, 0, 9, 9], [0, 9, 9, 9]])
    trainer.compute_loss(trainer.model, batch)
    assert metrics["agents/value_clip_ratio"][1] == pytest.approx(2 / 5)


def test_what_is_logged(make_trainer):
    trainer = make_trainer(
        acts("ab?", "s", "as", "b?b"), env_kwargs={"actions": "abs"}, beta=0.1, num_iterations=2, max_steps=4,
        learning_rate=0.05, whiten_advantages=True,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert (
            log["entropy"] >= 0
            and 0 <= log["clip_ratio/region_mean"] <= 1
            and 0 <= log["agents/value_clip_ratio"] <= 1
        )
        assert log["agents/value_loss"] >= 0 and np.isfinite(log["grad_norm"])
    for log in logs[::2]:  # a rollout each
        assert log["agents/value_explained_variance"] <= 1
        assert log["agents/stop_terminated"] == 1 and log["agents/invalid_share"] > 0
        assert {"completions/clipped_ratio", "rewards/environment_reward/mean", "agents/kl_mean"} <= log.keys()
    assert logs[1]["clip_ratio/region_mean"] > 0 and logs[0]["clip_ratio/region_mean"] == 0


# -- without an environment ---------------------------------------------------------------------------------------


def by_length(completions, **kwargs):
    """Whatever a model of random weights writes, rewards differ."""
    return [float(len(completion) % 7) for completion in completions]


@pytest.mark.parametrize("generations", [1, 2])
@pytest.mark.parametrize("judge", ["function", "reward model", "both"])
def test_it_trains_on_a_dataset(make_trainer, model_dir, tmp_path, judge, generations):
    config = AutoModelForCausalLM.from_pretrained(model_dir).config
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "reward")
    judges = {"function": [by_length], "reward model": [str(tmp_path / "reward")]}
    judges["both"] = judges["function"] + judges["reward model"]
    trainer = make_trainer(
        env=None, num_generations=generations, kwargs={"reward_funcs": judges[judge]}, beta=0.1, num_iterations=2,
        max_steps=4, whiten_advantages=True, reward_weights=[0.5] * len(judges[judge]), trainer_class=Spy,
    )  # fmt: skip
    start = hash_of(trainer.model)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and all(log["grad_norm"] > 0 and log["agents/value_loss"] > 0 for log in logs)
    assert not torch.equal(hash_of(trainer.model)["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    batch = trainer.trained_on
    prompts = {
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert len(prompts) == 4 // generations
    mask = batch["completion_mask"].bool()
    assert (batch["advantages"][mask] != 0).all() and (batch["advantages"][~mask] == 0).all()
    assert batch["value_mask"].bool().equal(mask)  # every token is a step


def test_the_reward_of_a_completion_is_its_functions_sum(make_trainer):
    def first(completions, **kwargs):
        return [1.0, 2.0, None, None]

    def second(completions, **kwargs):
        return [10.0, None, 30.0, None]

    kwargs = {"reward_funcs": [first, second]}
    trainer = make_trainer(env=None, kwargs=kwargs, reward_weights=[1.0, 0.5], gae_lambda=1.0)
    batch = generate(trainer)
    assert [row.max().item() for row in batch["returns"]] == [6.0, 2.0, 15.0, 0.0]
    assert batch["value_mask"].sum(1).bool().tolist() == [True, True, True, False]
    assert batch["advantages"][:3].any(1).all() and not batch["advantages"][3].any()


def test_rewards_stay_with_their_completions_when_rows_are_shuffled(make_trainer):
    class Kept(Spy):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for ids, mask, returns in zip(
                inputs["completion_ids"], inputs["completion_mask"], inputs["returns"], strict=True
            ):
                text = self.processing_class.decode(ids[mask.bool()], skip_special_tokens=True)
                self.pairs.append((float(len(text)), returns[0].item()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    trainer = make_trainer(
        env=None, kwargs={"reward_funcs": length}, gae_lambda=1.0, trainer_class=Kept, value_coef=0.0,
        per_device_train_batch_size=2, steps_per_generation=2, num_iterations=2, max_steps=4, learning_rate=0.0,
    )  # fmt: skip
    trainer.pairs = []
    trainer.train()
    assert len(trainer.pairs) == 8 and len(set(trainer.pairs)) > 2
    assert all(text == pytest.approx(reward) for text, reward in trainer.pairs)


def test_a_reward_function_that_fails_or_miscounts_is_an_error(make_trainer):
    trainer = make_trainer(env=None, kwargs={"reward_funcs": lambda completions, **kwargs: [1.0]})
    with pytest.raises((ValueError, RuntimeError)):
        generate(trainer)


# -- a run in parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["trl_agents/Bandit-v0", None])
def test_a_resumed_run_is_an_uninterrupted_one(make_trainer, model_dir, tmp_path, env):
    def run(name, **more):
        config = {
            "beta": 0.1, "kl_target": 0.01, "kl_horizon": 50, "learning_rate": 0.02, "value_learning_rate": 0.05,
            "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "whiten_advantages": True, "value_coef": 1.0,
            "reward_normalization": "scale", "lr_scheduler_type": "linear", "num_generations": 1,
            "env_kwargs": {"n_arms": 2, "horizon": 2} if env else None,
        }  # fmt: skip
        args = make_config(tmp_path / name, AgentPPOConfig, **config)
        kwargs = {} if env else {
            "reward_funcs": by_length, "train_dataset": Dataset.from_dict({"prompt": [f"paid {n}" for n in range(24)]})
        }  # fmt: skip
        trainer = AgentPPOTrainer(model_dir, env=env, args=args, **kwargs)
        trainer.train(**more)
        return trainer

    whole = run("whole")
    # "Killed" after the checkpoint: what was written up to then is all there is
    folder = tmp_path / "parts" / "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder)
    parts = run("parts", resume_from_checkpoint=str(folder))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=0, atol=0)
    times = ("time", "runtime", "seconds", "per_second", "flos", "train_loss")

    def numbers(trainer):
        logs = [log for log in trainer.state.log_history if "loss" in log and log["step"] > 3]
        return [{k: v for k, v in log.items() if not any(part in k for part in times)} for log in logs]

    assert numbers(parts) == [pytest.approx(log, nan_ok=True) for log in numbers(whole)]
    assert len(numbers(whole)) == 3 and {"agents/kl_coef", "agents/value_loss"} <= numbers(whole)[0].keys()
    assert whole.beta == parts.beta != 0.1 and whole.value_head.weight.any()


def test_a_checkpoint_without_a_head_warns(make_trainer, tmp_path):
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-1"
    (folder / VALUE_HEAD_FILE).unlink()
    again = make_trainer(acts("abc", "caa", "bbb", "cba"), max_steps=2)
    with pytest.warns(UserWarning, match=f"checkpoint-1 has no {VALUE_HEAD_FILE}.*critic_warmup_steps"):
        again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == 2


def test_the_best_checkpoint_comes_with_its_head(make_trainer, tmp_path):
    trainer = make_trainer(
        acts("abc", "caa", "bbb", "cba"), max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="first", per_device_eval_batch_size=4,
        num_eval_seeds=4, learning_rate=0.1,
    )  # fmt: skip
    evaluate = trainer.evaluate

    def prefer_the_first(*args, **kwargs):
        metrics = evaluate(*args, **kwargs) | {"eval_first": float(trainer.state.global_step)}
        return metrics

    trainer.evaluate = prefer_the_first
    trainer.args.greater_is_better = False
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = load_file(str(tmp_path / "out" / "checkpoint-1" / VALUE_HEAD_FILE))
    later = load_file(str(tmp_path / "out" / "checkpoint-2" / VALUE_HEAD_FILE))
    assert torch.equal(trainer.value_head.weight, saved["weight"]) and not torch.equal(
        saved["weight"], later["weight"]
    )


def test_a_reference_that_follows_the_policy(make_trainer):
    trainer = make_trainer(
        acts("abc", "caa", "bbb", "cba"), beta=0.1, learning_rate=0.1, sync_ref_model=True, ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0, max_steps=2,
    )  # fmt: skip
    start = hash_of(trainer.model)
    trainer.train()
    now = hash_of(trainer.model)
    torch.testing.assert_close(hash_of(trainer.ref_model), now, rtol=0, atol=0)
    assert not torch.equal(now["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert trainer.model.value_head is trainer.value_head


@pytest.mark.parametrize("env", ["trl_agents/Bandit-v0", None])
def test_evaluation_during_training(make_trainer, env):
    kwargs = {} if env else {"eval_dataset": Dataset.from_dict({"prompt": ["Choose.", "what?", "noise"]})}
    trainer = make_trainer(
        env=env, env_kwargs={"n_arms": 2, "horizon": 2} if env else None, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=2, num_eval_seeds=3, beta=0.1, kl_target=6.0, kl_horizon=100, kwargs=kwargs,
        whiten_advantages=True, learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert np.isfinite(log["eval_loss"]) and log["eval_agents/value_loss"] >= 0
        assert {"eval_agents/value_mean", "eval_agents/kl_mean", "eval_reward"} <= log.keys()
    coefficients = [log["agents/kl_coef"] for log in trainer.state.log_history if "agents/kl_coef" in log]
    # Training alone adapts it: below the target by more than a fifth, by .2 * 4 episodes / 100 each time
    assert coefficients == pytest.approx([0.1, 0.1 * (1 - 0.2 * 4 / 100)])


def test_gradient_checkpointing_changes_nothing(make_trainer):
    def weights(**config):
        trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), value_head_init="normal", optim="sgd", **config)
        trainer.train()
        return trainer.model.state_dict()

    plain = weights()
    torch.testing.assert_close(weights(gradient_checkpointing=True), plain, rtol=0, atol=1e-6)


def test_in_bfloat16_the_head_stays_in_float32(make_trainer, model_dir):
    for config in ({"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}):
        trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), learning_rate=0.05, **config)
        trainer.train()
        assert trainer.value_head.weight.dtype == torch.float32 and trainer.value_head.weight.any()
        assert all(np.isfinite(log.get("agents/value_loss", 0)) for log in trainer.state.log_history)


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_level": "word"}, "advantage_level='word'.*auto, turn, token"),
        ({"kl_in": "both"}, "kl_in='both'.*reward, loss"),
        ({"gae_lambda": 1.5}, "gae_lambda=1.5 must lie between 0 and 1"),
        ({"gae_lambda": -0.1}, "gae_lambda=-0.1"),
        ({"value_coef": -1.0}, "value_coef=-1.0: give a number of at least 0"),
        ({"value_clip": -0.2}, "value_clip=-0.2"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps=-1"),
        ({"value_learning_rate": -1e-3}, "value_learning_rate=-0.001"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"kl_target": 0.0}, "kl_target=0.0: give a positive number"),
        ({"kl_horizon": 0}, "kl_horizon=0: give a positive number"),
        ({"kl_target": 6.0, "beta": 0.0}, "kl_target=6.0.*beta=0.0.*0.05"),
        ({"kl_target": 6.0, "kl_horizon": 1}, "kl_horizon=1 is too short.*longer than 1.6"),
        ({"missing_eos_reward": -1.0, "missing_eos_penalty": 1.0}, "missing_eos_reward=-1.0.*missing_eos_penalty=1.0"),
        ({"critic_warmup_steps": 5, "weight_decay": 0.1}, "weight_decay=0.1.*critic_warmup_steps=5.*weight_decay=0.0"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "normalize_then_sum.*sum_then_normalize"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1.*Raise"),
        ({"per_device_train_batch_size": 6, "num_generations": 4}, "6.*4"),
        ({"discount": 1.5}, "discount=1.5"),
        ({"context": "table"}, "context='table'.*chat, window"),
    ],
)
def test_config_mistakes(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(
            tmp_path / "out", AgentPPOConfig, **{"num_generations": 1, "per_device_train_batch_size": 8, **settings}
        )
    assert not (tmp_path / "out").exists()


def test_one_episode_a_process(tmp_path, monkeypatch):
    """As `trl-agents estimate` counts processes, and as launchers do, of which transformers hears only later."""
    settings = {"per_device_train_batch_size": 1, "num_generations": 1}
    eight = type("Eight", (AgentPPOConfig,), {"world_size": property(lambda self: 8)})
    args = make_config(tmp_path / "out", eight, **settings)
    assert (args.generation_batch_size, args.num_generations) == (8, 1)
    with pytest.raises(ValueError, match="of 1 process leave one episode.*Raise one of them"):
        make_config(tmp_path / "out", AgentPPOConfig, **settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched .* accelerate counts 1"):  # and do not know it
        make_config(tmp_path / "out", AgentPPOConfig, use_cpu=False, **settings)


def test_another_trainers_config(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`GRPOConfig`: pass an `AgentPPOConfig`"):
        AgentPPOTrainer(model_dir, env=Pay, args=make_config(tmp_path / "out", GRPOConfig))


@pytest.mark.parametrize(
    "sizes",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 3},
        {"per_device_train_batch_size": 2, "steps_per_generation": 3},
        {"per_device_train_batch_size": 2, "generation_batch_size": 4},
    ],
)
def test_groups_of_one_of_any_batch_size(make_trainer, sizes):
    trainer = make_trainer(env="trl_agents/Bandit-v0", env_kwargs={"n_arms": 2, "horizon": 1}, **sizes)
    assert trainer.num_generations == trainer.args.num_generations == 1
    trainer.train()
    assert trainer.state.global_step == 2
