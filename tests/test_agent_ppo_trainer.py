# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`AgentPPOTrainer` from end to end: scripted players and completions written by hand through the real trainer, with
numbers worked by hand, then small things to learn.

What each detail of PPO for language models comes down to, and the test that holds it (here unless a file is named):

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
  toys                                                        "things to learn", at the end
"""

import math
import random
import shutil

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from scripted import (
    TEXTS,
    Pay,
    ScriptedTrainer,
    acts,
    generate,
    loss_and_gradients,
    make_config,
    perturb,
    ready,
    save_tiny_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3ForSequenceClassification,
)
from trl import GRPOConfig

from trl_agents import ActionParser, AgentPPOConfig, AgentPPOTrainer
from trl_agents.tiny import tiny_model, tiny_tokenizer
from trl_agents.types import StopReason
from trl_agents.value_head import VALUE_HEAD_FILE


class ScriptedPPOTrainer(ScriptedTrainer, AgentPPOTrainer):
    """The real trainer, whose model's replies are written down."""


class Spy(ScriptedPPOTrainer):
    """Keeps what the loss of the latest batch was made of."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        results = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.logps = results[0]
        return results

    def _value_loss(self, values, inputs):
        self.values, self.trained_on = values, inputs
        return super()._value_loss(values, inputs)


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    """Absolute position embeddings, and dropout."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tiny_tokenizer(TEXTS, vocab_size=300)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_trainer(model_dir, tmp_path):
    """A trainer in which every number can be worked by hand: no groups, no whitening, no KL, unless asked for."""

    def make(script=None, *, env=Pay, model=model_dir, trainer_class=ScriptedPPOTrainer, kwargs=None, **config):
        kwargs = dict(kwargs or {})
        if env is None:
            kwargs.setdefault("reward_funcs", no_reward)
            kwargs.setdefault("train_dataset", Dataset.from_dict({"prompt": ["Choose.", "paid 3", "noise", "what?"]}))
        config = {"num_generations": 1, "whiten_advantages": False, "beta": 0.0, **config}
        args = make_config(tmp_path / "out", AgentPPOConfig, **config)
        trainer = trainer_class(model, env=env, args=args, **kwargs)
        trainer.script = script
        return ready(trainer)

    return make


# -- reading by hand: one sequence at a time, without padding, without the trainer's forward pass -----------------


def read(trainer, ids, model=None):
    """Log-probability of each token but the first, and the value of the state after each token."""
    model = model or trainer.causal_lm
    training = model.training
    model.eval()
    with torch.no_grad():
        states = model.base_model(torch.tensor([list(ids)])).last_hidden_state[0]
        logps = (model.lm_head(states) / trainer.temperature).log_softmax(-1)
        values = states @ trainer.value_head.weight[0] + trainer.value_head.bias
    model.train(training)
    picked = logps[:-1].gather(1, torch.tensor(list(ids))[1:, None])[:, 0]
    return picked.tolist(), values.tolist()


def teach(trainer, told):
    """Sets the head so that the state after each of the sequences `told` has the value it is told."""
    with torch.no_grad():
        states = [trainer.causal_lm.base_model(torch.tensor([list(ids)])).last_hidden_state[0, -1] for ids, _ in told]
        features = torch.cat([torch.stack(states), torch.ones(len(told), 1)], dim=1).double()
        solution = torch.linalg.pinv(features) @ torch.tensor([value for _, value in told]).double()
        trainer.value_head.weight.copy_(solution[None, :-1])
        trainer.value_head.bias.copy_(solution[-1:])
    for ids, value in told:
        assert read(trainer, ids)[1][-1] == pytest.approx(value, abs=1e-4)


PROMPT, PAD, EOS = [40, 41, 42], 0, 2


def answers(*completions, prompts=None, pad=PAD, width=0, left=0, **tensors):
    """TRL's batch of completions that are given as token ids."""
    prompts = prompts or [PROMPT] * len(completions)
    width, left = max([width, *map(len, completions)]), left + max(map(len, prompts))
    batch = {
        "prompt_ids": torch.tensor([[pad] * (left - len(ids)) + list(ids) for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (left - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([list(ids) + [pad] * (width - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in completions]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    return batch | tensors


def credited(trainer, rewards, batch):
    """The batch with the credit that the trainer assigns for `rewards`."""
    if "old_per_token_logps" in batch:  # TRL has scored it then
        trainer.score_batch(batch)
    return batch | trainer.assign_credit(None, torch.tensor(rewards), batch)


# One completion of three tokens, whose values are told
GOLDEN = [50, 51, EOS]
GOLDEN_VALUES = [0.2, 0.5, 0.4]


def golden_trainer(make_trainer, **config):
    trainer = make_trainer(env=None, **config)
    teach(trainer, [(PROMPT + GOLDEN[:n], value) for n, value in enumerate(GOLDEN_VALUES)])
    return trainer


def assert_row(found, expected):
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=2e-4)


# -- advantages worked by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lambda_", "expected"), [(0.95, [0.7465, 0.47, 0.6]), (1.0, [0.8, 0.5, 0.6]), (0.0, [0.3, -0.1, 0.6])]
)
def test_golden_advantages(make_trainer, lambda_, expected):
    trainer = golden_trainer(make_trainer, gae_lambda=lambda_)
    batch = credited(trainer, [1.0], answers(GOLDEN))
    assert_row(batch["old_values"], GOLDEN_VALUES)
    assert_row(batch["advantages"], expected)
    assert_row(batch["returns"], [a + v for a, v in zip(expected, GOLDEN_VALUES, strict=True)])
    assert batch["value_mask"].tolist() == [[1, 1, 1]] and batch["num_value_steps"] == 3


@pytest.mark.parametrize(("kl_in", "expected"), [("reward", [0.74125, 0.475, 0.6]), ("loss", [0.7465, 0.47, 0.6])])
def test_the_score_is_on_the_last_action_and_the_kl_on_every_one(make_trainer, kl_in, expected):
    trainer = golden_trainer(make_trainer, beta=0.05, kl_in=kl_in)
    logps = {"old_per_token_logps": torch.tensor([[-1.0, -0.5, -2.0]])}
    logps["ref_per_token_logps"] = torch.tensor([[-1.2, -0.4, -2.0]])
    assert_row(credited(trainer, [1.0], answers(GOLDEN, **logps))["advantages"], expected)
    assert trainer._metrics["train"]["agents/kl_mean"] == [pytest.approx(0.1)]  # .2 - .1 + 0, of the sequence
    # What lies behind the end, or is masked, has no KL
    junk = {name: torch.cat([value, torch.full((1, 2), 9.0)], dim=1) for name, value in logps.items()}
    junk["ref_per_token_logps"][0, 3:] = -9.0
    padded = credited(trainer, [1.0], answers(GOLDEN, width=5, **junk))
    assert_row(padded["advantages"], [*expected, 0, 0])
    assert trainer._metrics["train"]["agents/kl_mean"] == [pytest.approx(0.1)] * 2


def test_returns_are_of_the_raw_advantages(make_trainer):
    raw = credited(golden_trainer(make_trainer), [1.0], answers(GOLDEN))
    white = credited(golden_trainer(make_trainer, whiten_advantages=True), [1.0], answers(GOLDEN))
    assert_row(white["returns"], [0.9465, 0.97, 1.0])
    torch.testing.assert_close(white["returns"] - white["old_values"], raw["advantages"])
    assert white["advantages"].mean() == pytest.approx(0, abs=1e-6)
    assert white["advantages"].std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("by_turn", [False, True])
def test_whitening_is_over_steps_and_masked(make_trainer, by_turn):
    # Advantages .76, .52, .6 (rewards on values of 0), of three completions of different length
    level = "turn" if by_turn else "token"
    trainer = make_trainer(env=None, whiten_advantages=True, advantage_level=level, gae_lambda=1.0)
    batch = credited(trainer, [0.76, 0.52, 0.6], answers([50, EOS], [50, 51, 52, EOS], [EOS]))
    if by_turn:  # three steps
        golden = [1.0911, -0.8729, -0.2182]
    else:  # seven
        raw = np.array([0.76] * 2 + [0.52] * 4 + [0.6])
        golden = ((np.array([0.76, 0.52, 0.6]) - raw.mean()) / raw.std(ddof=1)).tolist()
    for row, length, value in zip(batch["advantages"], (2, 4, 1), golden, strict=True):
        assert row.tolist() == pytest.approx([value] * length + [0.0] * (4 - length), abs=1e-4)


@pytest.mark.parametrize("completions", [([50, EOS], [50, EOS]), ([EOS],)])
def test_advantages_that_do_not_differ_are_whitened_to_zero(make_trainer, completions):
    trainer = make_trainer(env=None, whiten_advantages=True, gae_lambda=1.0)
    batch = credited(trainer, [0.1] * len(completions), answers(*completions))
    assert (batch["advantages"] == 0).all() and (batch["returns"] == 0.1).all()


def test_limits_of_lambda_in_the_trainer(make_trainer):
    to_go = credited(golden_trainer(make_trainer, gae_lambda=1.0), [1.0], answers(GOLDEN))
    assert_row(to_go["advantages"] + to_go["old_values"], [1.0, 1.0, 1.0])
    # ... whose KL of a token counts from that token on
    trainer = golden_trainer(make_trainer, gae_lambda=1.0, beta=1.0)
    logps = {"old_per_token_logps": torch.tensor([[0.1, 0.2, 0.4]]), "ref_per_token_logps": torch.zeros(1, 3)}
    assert_row(credited(trainer, [1.0], answers(GOLDEN, **logps))["returns"], [0.3, 0.4, 0.6])


def test_a_batch_of_many_is_many_batches_of_one(make_trainer):
    trainer = make_trainer(env=None)
    perturb(trainer.model, size=0.3)
    completions = [[50, 51, 52, 53, EOS], [54, EOS], [55, 56, EOS], [EOS]]
    prompts = [PROMPT, [60], [61, 62, 63, 64, 65], [66, 67]]
    rewards = [1.0, -2.0, 0.5, 3.0]
    together = credited(trainer, rewards, answers(*completions, prompts=prompts, width=8, left=4))
    assert together["advantages"].abs().max() > 0.5
    for row, (completion, prompt, reward) in enumerate(zip(completions, prompts, rewards, strict=True)):
        alone = credited(trainer, [reward], answers(completion, prompts=[prompt]))
        length = len(completion)
        for name in ("advantages", "returns", "old_values", "value_mask"):
            torch.testing.assert_close(together[name][row, :length], alone[name][0], rtol=0, atol=1e-5)
            assert (together[name][row, length:] == 0).all()
    assert together["num_value_steps"] == 11


# -- GAE against an independent loop ------------------------------------------------------------------------------


class Ragged:
    """As many steps as its seed decides, then terminated, truncated, or going on; breaks on `x`."""

    instructions = "Choose."

    def reset(self, *, seed=None, options=None):
        self.luck = random.Random(seed)
        self.left, self.ending = self.luck.randint(1, 4), self.luck.choice(["terminated", "truncated", "never"])
        return "", {"legal_actions": list("abcx")}

    def step(self, action):
        if action == "x":
            raise RuntimeError("the environment broke")
        self.left -= 1
        over = self.left == 0
        text = "noise " * self.luck.randint(0, 3) + f"paid {self.luck.randint(0, 9)}"
        ends = over and self.ending == "terminated", over and self.ending == "truncated"
        return text, self.luck.gauss(0, 1), *ends, {"legal_actions": list("abcx")}

    def close(self):
        pass


def loop_over(trainer, trajectory, by_turn):
    """Advantages and lambda-returns of an episode's steps in plain Python; one entry a sampled token for the first."""
    seen, steps = [], []
    for turn in trajectory.turns:
        seen = [*(seen if turn.appends else []), *turn.input_ids]
        for number, token in enumerate(turn.action_ids):
            if number == 0 or not by_turn:
                steps.append({"value": read(trainer, seen)[1][-1], "reward": 0.0, "tokens": 0})
            seen = [*seen, token]
            if trainer.beta:
                kl = read(trainer, seen)[0][-1] - read(trainer, seen, trainer.ref_model)[0][-1]
                steps[-1]["reward"] -= trainer.beta * kl
            steps[-1]["tokens"] += 1
        steps[-1]["reward"] += turn.reward + turn.penalty
    following = 0.0
    if not trajectory.stop.is_terminal:
        following = steps[-1]["value"]
        if trajectory.final_ids:
            seen = [*(seen if turn.appends else []), *trajectory.final_ids]
            following = read(trainer, seen)[1][-1]
    advantage, of_tokens, returns = 0.0, [], []
    for number in reversed(range(len(steps))):
        step = steps[number]
        discount, decay = trainer.args.discount, trainer.args.discount * trainer.args.gae_lambda
        if number == len(steps) - 1:
            decay = 0.0
            discount = 0.0 if trajectory.stop.is_terminal else discount
        delta = step["reward"] + discount * following - step["value"]
        advantage = delta + decay * advantage
        of_tokens = [advantage] * step["tokens"] + of_tokens
        returns.insert(0, advantage + step["value"])
        following = step["value"]
    return of_tokens, returns, [step["value"] for step in steps]


@pytest.mark.filterwarnings("ignore:.*were lost to a fault")
@pytest.mark.parametrize("level", ["turn", "token"])
@pytest.mark.parametrize("context", ["chat", "window"])
def test_credit_agrees_with_a_loop_over_random_episodes(make_trainer, context, level):
    luck = random.Random(3)
    words = ["".join(luck.choice("abc?") for _ in range(6)) for _ in range(16)]
    words[5] = "ax" * 6  # begun six times
    settings = {"discount": 0.9, "gae_lambda": 0.8, "beta": 0.3, "max_turns": 4, "invalid_action_penalty": -0.7}
    trainer = make_trainer(
        acts(*words),
        env=Ragged,
        context=context,
        advantage_level=level,
        per_device_train_batch_size=16,
        max_completion_length=6,
        max_episode_length={"chat": 60, "window": 105}[context],
        **settings,
    )
    perturb(trainer.model, size=0.1)
    batch = generate(trainer)
    stops = {trajectory.stop.value for trajectory in trainer.trajectories}
    assert stops >= {"terminated", "truncated", "env_error", "max_turns", "context_full"}
    expected, returns, values = [], [], []
    for trajectory in trainer.trajectories:
        if not trajectory.stop.is_fault:
            for whole, part in zip(
                (expected, returns, values), loop_over(trainer, trajectory, level == "turn"), strict=True
            ):
                whole += part
    loss_mask, value_mask = (batch["completion_mask"] * batch["tool_mask"]).bool(), batch["value_mask"].bool()
    assert batch["advantages"][loss_mask].tolist() == pytest.approx(expected, abs=1e-4)
    assert batch["returns"][value_mask].tolist() == pytest.approx(returns, abs=1e-4)
    assert batch["old_values"][value_mask].tolist() == pytest.approx(values, abs=1e-4)
    for name in ("returns", "old_values"):
        assert (batch[name][~value_mask] == 0).all()
    assert (batch["advantages"][~loss_mask] == 0).all()
    assert batch["num_value_steps"] == len(returns)
    assert np.std(expected) > 0.5 and np.std(values) > 0.1


class Cut(Pay):
    """`t` is the time limit."""

    PRICES = {**Pay.PRICES, "t": 0.0}

    def step(self, action):
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated and action != "t", action == "t", info


@pytest.mark.parametrize("context", ["chat", "window"])
def test_truncated_episodes_bootstrap_from_what_follows_and_terminated_ones_do_not(make_trainer, context):
    script = acts("bb", "bt", "bb", "bt")
    env_kwargs = {"horizon": 2, "actions": "bt"}
    trainer = make_trainer(script, env=Cut, context=context, env_kwargs=env_kwargs, discount=0.5, gae_lambda=0.0)
    generate(trainer)
    stops = [StopReason.TERMINATED, StopReason.TRUNCATED] * 2
    assert [trajectory.stop for trajectory in trainer.trajectories] == stops
    _, cut = trainer.trajectories[:2]
    first, second = (list(turn.input_ids) for turn in cut.turns)
    before, after = (
        (first + list(cut.turns[0].action_ids), list(cut.turns[1].action_ids)) if context == "chat" else ([], [])
    )
    final = [*before, *(second if context == "chat" else []), *after, *cut.final_ids]
    teach(trainer, [(first, 0.25), (before + second, 4.0), (final, 10.0)])
    trainer.script = script
    batch = generate(trainer)
    mask = batch["value_mask"].bool()
    #    1 + .5 * 4 - .25 in all; then 1 - 4, or 0 + .5 * 10 - 4
    expected = [2.75, -3.0, 2.75, 1.0] * 2
    assert batch["advantages"][mask].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, 2.0]),  # ReFT: scored like any other, and nothing follows
        ({"missing_eos_reward": -1.0}, [1.0, -1.0]),  # N+: replaced
        ({"missing_eos_reward": 0.0}, [1.0, 0.0]),  # Open-Reasoner-Zero
        ({"missing_eos_penalty": 0.5}, [1.0, 1.5]),  # subtracted
    ],
)
def test_completions_that_ran_out_of_tokens(make_trainer, settings, expected):
    trainer = make_trainer(env=None, gae_lambda=1.0, **settings)
    batch = credited(trainer, [1.0, 2.0], answers([50, 51, EOS], [50, 51, 52]))
    assert batch["returns"].tolist() == [[expected[0]] * 3, [expected[1]] * 3]
    # A stop token of one's own counts as an end
    trainer.eos_token_ids = [*trainer.eos_token_ids, 52]
    batch = credited(trainer, [1.0, 2.0], answers([50, 51, EOS], [50, 51, 52]))
    assert batch["returns"].tolist() == [[1.0] * 3, [2.0] * 3]


def test_the_end_is_found_by_the_mask_and_not_by_the_padding(make_trainer):
    trainer = make_trainer(env=None, gae_lambda=1.0, missing_eos_penalty=0.5)
    for pad in (PAD, EOS):
        batch = credited(trainer, [1.0, 2.0], answers([50, EOS], [50], width=4, pad=pad))
        assert batch["returns"].tolist() == [[1.0, 1.0, 0, 0], [1.5, 0, 0, 0]]


def test_completions_that_could_not_be_scored_weigh_nothing(make_trainer):
    trainer = make_trainer(env=None, whiten_advantages=True, missing_eos_reward=-1.0)
    teach(trainer, [(PROMPT, 0.5), ([*PROMPT, 50], 0.25)])
    completions = [[50, 51, EOS], [50, 52, 53], [50, EOS]]
    batch = credited(trainer, [1.0, math.nan, 0.0], answers(*completions))
    assert batch["value_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]] and batch["num_value_steps"] == 5
    for name in ("advantages", "returns", "old_values"):
        assert (batch[name][1] == 0).all() and not batch[name].isnan().any()
    others = credited(trainer, [1.0, 0.0], answers(completions[0], completions[2]))
    torch.testing.assert_close(batch["advantages"][[0, 2]], others["advantages"])


# -- what is scored, and where it is read -------------------------------------------------------------------------


def test_tokens_and_values_are_read_in_the_state_before_them(make_trainer):
    trainer = make_trainer(env=None)
    perturb(trainer.model, size=0.1)
    completion = [50, 51, 52, EOS]
    batch = answers(completion, [53, EOS])
    logps = trainer.score_batch(batch)
    ids = torch.tensor([PROMPT + completion])
    labels = ids.clone()
    labels[:, : len(PROMPT)] = -100
    loss = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    loss.load_state_dict(trainer.model.state_dict(), strict=False)
    assert logps[0].sum().item() == pytest.approx(-4 * loss(ids, labels=labels).loss.item(), abs=1e-4)
    by_hand, values = read(trainer, PROMPT + completion)
    assert logps[0].tolist() == pytest.approx(by_hand[2:], abs=1e-5)
    old_values = credited(trainer, [0.0, 0.0], batch)["old_values"]
    assert old_values[0].tolist() == pytest.approx(values[2:-1], abs=1e-5) and np.std(values) > 0.1


@pytest.mark.parametrize("level", ["turn", "token"])
@pytest.mark.parametrize("context", ["chat", "window"])
def test_the_ratio_is_one_before_the_first_update(make_trainer, gpt2_dir, context, level):
    # Rows of different length in a model with dropout and absolute positions, at a temperature
    trainer = make_trainer(
        acts("ab?", "s", "as", "bbb"), env_kwargs={"actions": "abs"}, model=gpt2_dir, temperature=0.7,
        num_iterations=2, beta=0.1, context=context, advantage_level=level, max_episode_length=128, trainer_class=Spy,
    )  # fmt: skip
    perturb(trainer.value_head, size=1.0)
    batch = generate(trainer)
    mask = batch["completion_mask"] * batch["tool_mask"]
    trainer.compute_loss(trainer.model, batch)
    logps = trainer.logps
    assert logps.requires_grad
    ratio = ((logps - batch["old_per_token_logps"]).exp() - 1) * mask
    assert ratio.abs().max() < 1e-5
    moved = (trainer.values - batch["old_values"]) * batch["value_mask"]
    assert moved.abs().max() < 1e-5 and batch["old_values"].std() > 0.1
    assert ((logps - batch["ref_per_token_logps"]) * mask).abs().max() < 1e-5
    metrics = trainer._metrics["train"]
    assert metrics["clip_ratio/region_mean"] == metrics["agents/value_clip_ratio"] == [0.0]
    assert metrics["agents/kl_mean"] == [pytest.approx(0.0, abs=1e-5)]
    # ... which are those of the tokens alone, at that temperature
    rows = [(batch["prompt_ids"][0][batch["prompt_mask"][0].bool()], batch["completion_ids"][0])]
    for prompt, completion in rows:
        length = int(batch["completion_mask"][0].sum())
        by_hand, values = read(trainer, [*prompt.tolist(), *completion[:length].tolist()])
        sampled = mask[0, :length].bool()  # the others carry no loss, and are not scored
        assert logps[0, :length][sampled].tolist() == pytest.approx(
            torch.tensor(by_hand[-length:])[sampled].tolist(), abs=1e-4
        )


def test_padding_on_the_left_moves_nothing(make_trainer, gpt2_dir):
    trainer = make_trainer(env=None, model=gpt2_dir)
    perturb(trainer.value_head, size=1.0)
    completions = [[50, 51, 52, EOS], [53, EOS]]
    scored = []
    for left in (0, 3, 40):
        batch = answers(*completions, prompts=[PROMPT, [60]], left=left)
        values = credited(trainer, [1.0, 0.0], batch)["old_values"]
        scored.append((trainer.score_batch(batch), values))
    mask = batch["completion_mask"]
    for logps, values in scored[1:]:
        torch.testing.assert_close(logps * mask, scored[0][0] * mask, rtol=0, atol=1e-5)
        torch.testing.assert_close(values, scored[0][1], rtol=0, atol=1e-5)
    by_hand, values = read(trainer, [60, 53, EOS])
    assert scored[2][0][1, :2].tolist() == pytest.approx(by_hand, abs=1e-5)
    assert scored[2][1][1, :2].tolist() == pytest.approx(values[:2], abs=1e-5)


@pytest.mark.parametrize("name", ["pad", "what pads"])
def test_padding_changes_neither_loss_nor_gradients(make_trainer, name):
    trainer = make_trainer(env=None, beta=0.1, num_iterations=2)
    perturb(trainer.model)
    completions, rewards = [[50, 51, 52, EOS], [53, EOS]], [1.0, -1.0]

    def losses(**padding):
        batch = answers(*completions, prompts=[PROMPT, [60]], **padding)
        shape = batch["completion_ids"].shape
        batch |= {f"{which}_per_token_logps": torch.full(shape, -5.0) for which in ("old", "ref")}
        return loss_and_gradients(trainer, credited(trainer, rewards, batch))

    loss, gradients = losses()
    # pad == eos, another token, and more of it on both sides
    others = [{"pad": EOS}, {"pad": 99}] if name == "pad" else [{"width": 9}, {"left": 5}, {"width": 9, "pad": EOS}]
    for padding in others:
        other_loss, other_gradients = losses(**padding)
        torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_gradients, gradients, rtol=0, atol=1e-4)
    assert abs(loss) > 0.01 and gradients["value_head.weight"].abs().max() > 1e-3


def test_the_token_that_ends_a_reply_is_trained_and_none_behind_it(make_trainer):
    trainer = make_trainer(env=None, gae_lambda=1.0, value_coef=0.0)
    batch = credited(trainer, [1.0, 2.0], answers([50, 51, EOS], [EOS], width=5))
    assert batch["value_mask"].sum(1).tolist() == [3, 1]
    loss, _ = loss_and_gradients(trainer, batch)
    assert loss.item() == pytest.approx(-(3 * 1 + 1 * 2) / 4)  # ratio 1, the mean over all tokens
    trainer = make_trainer(acts("ab", "b?", "bb", "a"), env_kwargs={"horizon": 2})
    trainer.script[3] = ["ACTION=a", "ACTION=b"]
    batch = generate(trainer)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert (batch["completion_ids"][mask] == trainer.processing_class.eos_token_id).sum() == 8  # one a turn
    sampled = sum(len(turn.action_ids) for trajectory in trainer.trajectories for turn in trajectory.turns)
    assert mask.sum() == batch["num_items_in_batch"] == sampled


def test_a_tokenizer_that_pads_with_its_end_token(make_trainer, model_dir, tmp_path):
    losses = []
    for pad in ("<|pad|>", "<|im_end|>"):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        tokenizer.pad_token = pad
        script = acts("ab?", "s", "as", "bbb")
        kwargs = {"processing_class": tokenizer}
        trainer = make_trainer(script, env_kwargs={"actions": "abs"}, kwargs=kwargs, beta=0.1, whiten_advantages=True)
        perturb(trainer.model)
        batch = generate(trainer)
        losses.append(loss_and_gradients(trainer, batch))
        assert (batch["completion_ids"][batch["completion_mask"] == 0] == tokenizer.pad_token_id).all()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert losses[0][0].abs() > 1e-3


# -- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "ratio", "learns"), [(1.0, 1.5, False), (-1.0, 1.5, True), (-1.0, 0.5, False), (1.0, 0.5, True)]
)
def test_the_ratio_is_clipped_on_the_side_it_moves_to(make_trainer, reward, ratio, learns):
    trainer = make_trainer(env=None, num_iterations=2, value_coef=0.0, gae_lambda=1.0)
    batch = answers([50, EOS])
    batch = credited(trainer, [reward], batch | {"old_per_token_logps": trainer.score_batch(batch) - math.log(ratio)})
    _, gradients = loss_and_gradients(trainer, batch)
    assert gradients["model.layers.0.mlp.up_proj.weight"].any() == learns


def value_golden(make_trainer, **config):
    """V_old .5, V .9, R 1 at one token, and no advantage."""
    trainer = make_trainer(env=None, **config)
    teach(trainer, [(PROMPT, 0.9)])
    one = torch.ones(1, 1)
    credit = {"advantages": 0 * one, "old_values": 0.5 * one, "returns": one, "value_mask": one}
    return trainer, answers([EOS]) | credit | {"num_value_steps": torch.tensor(1)}


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        ({"value_coef": 5.0}, 0.225, 0.0),  # ReFT: 5 * 1/2 * .3^2
        ({}, 0.0045, 0.0),  # N+: .1
        ({"value_coef": 5.0, "value_clip": None}, 0.025, -0.5),
        ({"value_coef": 5.0, "value_clip": 0.5}, 0.025, -0.5),
        ({"value_coef": 0.0}, 0.0, 0.0),
    ],
)
def test_golden_value_loss(make_trainer, settings, loss, gradient):
    trainer, batch = value_golden(make_trainer, **settings)
    found, gradients = loss_and_gradients(trainer, batch)
    assert found.item() == pytest.approx(loss, abs=1e-4)
    assert gradients["value_head.bias"].item() == pytest.approx(gradient, abs=1e-3)
    plain = {0.225: 0.045, 0.0045: 0.045, 0.025: 0.005, 0.0: 0.045}[loss]
    assert trainer._metrics["train"]["agents/value_loss"] == [pytest.approx(plain, abs=1e-4)]
    clipped = settings.get("value_clip", 0.2) == 0.2
    assert trainer._metrics["train"]["agents/value_clip_ratio"] == [float(clipped)]


# Advantages 1 and -3 of completions of 2 and 8 tokens, with V 0, lambda 1: value losses .5 and 4.5
AGGREGATED = {
    "dapo": ((-2 + 24) / 10, (1 + 36) / 10),  # the mean over all tokens
    "bnpo": ((-2 + 24) / 10, (1 + 36) / 10),
    "grpo": ((-1 + 3) / 2, (0.5 + 4.5) / 2),  # the mean of each sample's mean
    "dr_grpo": ((-2 + 24) / 24, (1 + 36) / 24),  # over a constant: 2 samples of max_completion_length 12
}


@pytest.mark.parametrize("loss_type", AGGREGATED)
def test_loss_aggregation(make_trainer, loss_type):
    policy, value = AGGREGATED[loss_type]
    completions = [50, EOS], [50, 51, 52, 53, 54, 55, 56, EOS]
    for coef in (0.0, 1.0):
        trainer = make_trainer(env=None, gae_lambda=1.0, loss_type=loss_type, value_coef=coef, value_clip=None)
        batch = credited(trainer, [1.0, -3.0], answers(*completions))
        for training in (True, False):
            trainer.model.train(training)
            loss = trainer.compute_loss(trainer.model, batch)
            assert loss.item() == pytest.approx(policy + coef * value, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_accumulated_gradients_are_those_of_one_batch(make_trainer, loss_type):
    completions = [[50, EOS], [51, 52, 53, EOS], [EOS], [54, 55, 56, 57, EOS]] * 2
    found = []
    for steps, accumulation in ((1, 1), (4, 4), (4, 2)):  # the last: two updates a rollout, which are twice as much
        trainer = make_trainer(
            env=None,
            loss_type=loss_type,
            per_device_train_batch_size=8 // steps,
            steps_per_generation=steps,
            gradient_accumulation_steps=accumulation,
        )
        perturb(trainer.model)
        batch = credited(trainer, [1.0, -1.0, 0.5, 2.0, 0.0, -2.0, 1.0, 0.3], answers(*completions))
        trainer.model.zero_grad()
        for part in range(steps):
            rows = slice(part * 8 // steps, (part + 1) * 8 // steps)
            micro = {name: value if value.ndim == 0 else value[rows] for name, value in batch.items()}
            trainer.compute_loss(trainer.model, micro).backward()
        share = accumulation / steps
        found.append({name: share * value.grad for name, value in trainer.model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=2e-6)
    assert found[0]["value_head.weight"].abs().max() > 1e-3


def test_policy_and_value_gradients_add_up(make_trainer):
    def gradients(**config):
        trainer = make_trainer(acts("ab?", "s", "as", "bbb"), env_kwargs={"actions": "abs"}, **config)
        perturb(trainer.model)
        batch = generate(trainer)
        return loss_and_gradients(trainer, batch)[1], trainer, batch

    policy, trainer, batch = gradients(value_coef=0.0)
    both, _, _ = gradients(value_coef=2.0)
    batch["advantages"] = 0 * batch["advantages"]
    trainer.args.value_coef = 1.0
    _, value = loss_and_gradients(trainer, batch)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, policy[name] + 2 * value[name], rtol=0, atol=1e-5)
    assert not policy["value_head.weight"].any() and value["model.layers.0.mlp.up_proj.weight"].any()


def test_without_a_value_loss_it_is_the_policys_loss_alone(make_trainer, model_dir, tmp_path):
    script, env_kwargs = acts("ab?", "s", "as", "bbb"), {"actions": "abs"}
    ppo = make_trainer(script, env_kwargs=env_kwargs, value_coef=0.0, beta=0.1, kl_in="loss", num_iterations=2)
    batch = generate(ppo)
    grpo = ScriptedTrainer(
        model_dir, env=Pay, args=make_config(tmp_path / "grpo", env_kwargs=env_kwargs, beta=0.1, num_iterations=2)
    )
    grpo.script = script
    theirs = generate(ready(grpo)) | {"advantages": batch["advantages"]}
    perturb(ppo.model)
    perturb(grpo.model)
    loss, gradients = loss_and_gradients(ppo, batch)
    their_loss, their_gradients = loss_and_gradients(grpo, theirs)
    torch.testing.assert_close(loss, their_loss, rtol=0, atol=1e-6)
    ours = {name: value for name, value in gradients.items() if "value_head" not in name}
    torch.testing.assert_close(ours, their_gradients, rtol=0, atol=1e-6)
    assert loss.abs() > 1e-3 and not gradients["value_head.weight"].any()


def test_kl_is_in_the_reward_or_in_the_loss_never_in_both(make_trainer):
    losses = {}
    for kl_in in ("reward", "loss"):
        for beta in (1e-6, 10.0):
            trainer = make_trainer(env=None, beta=beta, kl_in=kl_in, value_coef=0.0, gae_lambda=1.0, num_iterations=2)
            batch = answers([50, EOS])
            logps = trainer.score_batch(batch)
            batch |= {"old_per_token_logps": logps, "ref_per_token_logps": logps - torch.tensor([[0.2, -0.1]])}
            losses[kl_in, beta] = trainer.compute_loss(trainer.model, credited(trainer, [1.0], batch)).item()
            assert trainer.beta == beta  # put back
    assert losses["reward", 1e-6] == pytest.approx(-1.0, abs=1e-4) == losses["loss", 1e-6]
    # To go: 1 - 10 * .1 = 0 from the first token, 1 + 10 * .1 = 2 from the second
    assert losses["reward", 10.0] == pytest.approx(-1.0, abs=1e-4)
    assert losses["loss", 10.0] == pytest.approx(-1.0 + 10 * (0.018731 + 0.005171) / 2, abs=1e-4)


# -- KL and its controller ----------------------------------------------------------------------------------------


def hash_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "value_head" not in name}


def test_the_reference_is_where_the_policy_started_and_stays_there(make_trainer):
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), beta=0.1, learning_rate=0.1, max_steps=3)
    start = hash_of(trainer.model)
    torch.testing.assert_close(hash_of(trainer.ref_model), start, rtol=0, atol=0)
    trainer.train()
    torch.testing.assert_close(hash_of(trainer.ref_model), start, rtol=0, atol=0)
    kl = [log["agents/kl_mean"] for log in trainer.state.log_history if "agents/kl_mean" in log]
    assert len(kl) == 3 and kl[0] == 0.0 and abs(kl[1]) > 1e-3


def test_an_adapter_turned_off_is_the_reference(make_trainer, model_dir):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    kwargs = {"peft_config": config}
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), beta=0.1, learning_rate=0.1, kwargs=kwargs, max_steps=3)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "value_head" in name for name in changed)
    assert any("lora_" in name for name in changed) and any("value_head" in name for name in changed)
    kl = [log["agents/kl_mean"] for log in trainer.state.log_history if "agents/kl_mean" in log]
    assert kl[0] == pytest.approx(0, abs=1e-5) and abs(kl[1]) > 1e-3
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    batch = generate(ready(trainer))
    first = slice(0, 1)
    ids = torch.cat([batch["prompt_ids"][first], batch["completion_ids"][first]], dim=1)
    with torch.no_grad(), trainer.model.disable_adapter():
        torch.testing.assert_close(trainer.model(ids).logits, base(ids).logits)
    scored = batch["ref_per_token_logps"][0]
    picked = base(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(scored) :, 0]
    sampled = batch["tool_mask"][0].bool()
    torch.testing.assert_close(scored[sampled], picked[sampled], rtol=0, atol=1e-4)


def test_without_kl_there_is_no_reference(make_trainer):
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), beta=0.0)
    assert trainer.ref_model is None
    trainer.train()
    assert "ref_per_token_logps" not in generate(ready(trainer))
    assert not any("agents/kl_mean" in log for log in trainer.state.log_history)
    assert trainer.state.global_step == 2


def test_beta_adapts_to_the_kl_of_an_episode(make_trainer):
    config = {"beta": 0.2, "kl_target": 6.0, "kl_horizon": 10_000}
    trainer = make_trainer(env=None, **config)
    batch = answers([50, EOS], [50, EOS])
    logps = {"old_per_token_logps": torch.zeros(2, 2), "ref_per_token_logps": torch.full((2, 2), -6.0)}
    credited(trainer, [0.0, 0.0], batch | logps)  # 12 an episode: the error is cut to .2
    assert trainer.beta == pytest.approx(0.2 * (1 + 0.2 * 2 / 10_000))
    assert trainer._metrics["train"]["agents/kl_coef"] == [0.2]  # what the rewards were made with
    trainer.model.eval()
    before = trainer.beta
    credited(trainer, [0.0, 0.0], batch | logps)
    assert trainer.beta == before  # an evaluation leaves it alone
    assert trainer.memory()["kl_coef"] == before
    other = make_trainer(env=None, **config)
    other.recall(trainer.memory())
    assert other.beta == before
    fixed = make_trainer(env=None, beta=0.2)
    fixed.recall(trainer.memory())
    assert fixed.beta == 0.2


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


# -- things to learn ----------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", "go", "red", "green", "one", "two", "three", "a", "b"]
A, B = WORDS.index("a"), WORDS.index("b")


@pytest.fixture(scope="module")
def words_dir(tmp_path_factory):
    """A model of eleven words: an action is a token."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] + ' <eos> ' }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template,
        padding_side="left",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer, hidden_size=32, num_hidden_layers=1).save_pretrained(folder)
    return str(folder)


class Probe:
    """Shows what it is told, and pays by a function of what it showed and what was done; ends after the last."""

    instructions = "go"

    def __init__(self, shown=("one",), pays=lambda shown, action: 0.0):
        self.shown, self.pays = shown, pays

    def reset(self, *, seed=None, options=None):
        self.step_number = 0
        first = self.shown[0]
        self.now = first if isinstance(first, str) else first[seed % len(first)]
        return self.now, {"legal_actions": ["a", "b"]}

    def step(self, action):
        reward = self.pays(self.now, action)
        self.step_number += 1
        over = self.step_number == len(self.shown)
        self.now = "" if over else self.shown[self.step_number]
        return self.now, reward, over, False, {"legal_actions": ["a", "b"]}

    def close(self):
        pass


@pytest.fixture
def learn(make_trainer, words_dir):
    def run(pays=None, shown=("one",), steps=60, **config):
        defaults = {
            "per_device_train_batch_size": 16, "max_completion_length": 1, "learning_rate": 1e-2, "max_steps": steps,
            "whiten_advantages": True, "value_coef": 0.5, "value_clip": None, "invalid_action_penalty": 0.0,
            "reward_normalization": "none", "num_iterations": 2, "value_learning_rate": 3e-2,
        }  # fmt: skip
        kwargs = {"action_parser": ActionParser(r"\b([ab])\b", template="{action}")}
        trainer = make_trainer(
            env=Probe, env_kwargs={"shown": shown, "pays": pays}, model=words_dir, kwargs=kwargs,
            **{"trainer_class": AgentPPOTrainer, **defaults, **config},
        )  # fmt: skip
        trainer.train()
        return trainer

    return run


def probability(trainer, shown, token, so_far=()):
    """Of a token as the first action on what is shown, and V before it."""
    ids = [*so_far, *trainer.processing_class.encode(f"go\n{shown} <eos>")]
    with torch.no_grad():
        states = trainer.causal_lm.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        return trainer.causal_lm.lm_head(states).softmax(-1)[token].item(), trainer.value_head(
            states[None, None]
        ).item()


def pays_a(shown, action):
    return float(action == "a")


def pays_b(shown, action):
    return float(action == "b")


@pytest.mark.parametrize(("pays", "token"), [(pays_a, A), (pays_b, B)])
def test_the_action_decides_the_reward(learn, pays, token):
    trainer = learn(pays)
    p, value = probability(trainer, "one", token)
    assert p > 0.95
    assert value == pytest.approx(1.0, abs=0.1)
    returns = [log["agents/return_mean"] for log in trainer.state.log_history if "agents/return_mean" in log]
    assert np.mean(returns[:3]) < 0.8 < 0.95 < np.mean(returns[-5:])


# Where nothing but values is to be learnt: whitening would blow the noise around them up
VALUES = {"whiten_advantages": False, "learning_rate": 3e-3, "value_coef": 1.0, "steps": 80}


def pays_by_colour(shown, action):
    return {"red": 1.0, "green": -1.0}[shown]


def test_the_observation_decides_the_value(learn):
    trainer = learn(pays_by_colour, shown=(("red", "green"),), **VALUES)
    assert probability(trainer, "red", A)[1] == pytest.approx(1.0, abs=0.06)
    assert probability(trainer, "green", A)[1] == pytest.approx(-1.0, abs=0.06)


def pays_by_both(shown, action):
    return float((shown == "red") == (action == "a"))


def test_observation_and_action_decide(learn):
    # With invalid actions at no cost, the random ones in their place would be a way out at half the pay
    settings = {"learning_rate": 3e-3, "steps": 120, "invalid_action_penalty": -1.0}
    trainer = learn(pays_by_both, shown=(("red", "green"),), per_device_train_batch_size=32, **settings)
    assert probability(trainer, "red", A)[0] > 0.9 and probability(trainer, "green", B)[0] > 0.9


def pays_at_the_end(shown, action):
    return float(shown == "three")


@pytest.mark.parametrize("lambda_", [0.0, 0.95])
def test_a_delayed_reward_is_discounted_per_turn(learn, lambda_):
    trainer = learn(pays_at_the_end, shown=("one", "two", "three"), discount=0.5, gae_lambda=lambda_, **VALUES)
    (played,) = trainer.play([0])
    seen, values = [], []
    for turn in played.turns:
        seen += turn.input_ids
        values.append(read(trainer, seen)[1][-1])
        seen += turn.action_ids
    assert values == pytest.approx([0.25, 0.5, 1.0], abs=0.06)  # three steps, two and one from the reward


def pays_the_same(shown, action):
    return 1.0


def test_a_constant_reward_moves_nothing_but_the_kl(learn):
    # Without a critic that must first find the constant: its value is told, and is right
    settings = {"detach_value_head": True, "steps": 10, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}

    class Told(AgentPPOTrainer):
        def _make_value_head(self):
            head = super()._make_value_head()
            torch.nn.init.ones_(head.bias)
            return head

    for whiten in (True, False):
        trainer = learn(pays_the_same, trainer_class=Told, whiten_advantages=whiten, **settings)
        start = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path).state_dict()
        now = hash_of(trainer.model)
        torch.testing.assert_close(now, {name: start[name] for name in now}, rtol=0, atol=0)
        assert trainer.value_head.bias.item() == 1.0


def test_with_a_constant_reward_the_kl_falls(learn):
    class Moved(AgentPPOTrainer):
        def train(self, *args, **kwargs):
            perturb(self.causal_lm.base_model, size=0.1)
            return super().train(*args, **kwargs)

    settings = {"whiten_advantages": False, "learning_rate": 1e-3, "gae_lambda": 1.0, "trainer_class": Moved}
    ends = []
    for beta in (1e-9, 1.0):
        trainer = learn(pays_the_same, beta=beta, steps=40, **settings)
        kl = [log["agents/kl_mean"] for log in trainer.state.log_history if "agents/kl_mean" in log]
        ends.append(np.mean(kl[-5:]))
        assert kl[0] > 0.8
    assert ends[1] < 0.25 and ends[0] > 0.8


def test_a_strong_kl_holds_the_policy_to_its_reference(learn):
    free = learn(pays_a, beta=0.0, steps=30)
    for kl_in in ("reward", "loss"):
        held = learn(pays_a, beta=20.0, kl_in=kl_in, whiten_advantages=False, gae_lambda=1.0, steps=30)
        start = AutoModelForCausalLM.from_pretrained(held.model.name_or_path)
        ids = torch.tensor([held.processing_class.encode("go\none <eos>")])
        with torch.no_grad():
            kls = []
            for trainer in (held, free):
                now, then = (model(ids).logits[0, -1].log_softmax(-1) for model in (trainer.causal_lm, start))
                kls.append((now.exp() * (now - then)).sum().item())
        assert abs(kls[0]) < 0.1 < 1 < kls[1]
