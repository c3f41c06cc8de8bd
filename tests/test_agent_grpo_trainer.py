# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`AgentGRPOTrainer` from end to end: scripted players through the real trainer, with numbers worked by hand."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from launching import free_port, let_gloo_go_at_exit
from peft import LoraConfig
from scripted import (
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
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from trl_agents import ActionParser, AgentGRPOConfig, AgentGRPOTrainer
from trl_agents.batch import rows_of
from trl_agents.tiny import tiny_model
from trl_agents.trainers.agent_grpo_trainer import episode_dataset
from trl_agents.types import StopReason


ROOT = Path(__file__).resolve().parents[1]
STD_EPS = 1e-4  # added to the standard deviation, by TRL too


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_trainer(model_dir, tmp_path):
    def make(script=None, *, env=Pay, model=model_dir, trainer_class=ScriptedTrainer, kwargs=None, **config):
        trainer = trainer_class(model, env=env, args=make_config(tmp_path / "out", **config), **(kwargs or {}))
        trainer.script = script
        return ready(trainer)

    return make


# -- numbers worked by hand ---------------------------------------------------------------------------------------

# Two bandits, two episodes each, three turns.  Rewards: a 0, b 1, c 3.
#   episode   rewards  returns-to-go  group mean        return-to-go - mean
#   abc       0 1 3    4 4 3          3.5 2   1.5        .5  2   1.5
#   caa       3 0 0    3 0 0                            -.5 -2  -1.5
#   bbb       1 1 1    3 2 1          3.5 1.5 .5        -.5  .5   .5
#   cba       3 1 0    4 1 0                             .5 -.5  -.5
SCRIPT = ("abc", "caa", "bbb", "cba")
TURN = [[0.5, 2, 1.5], [-0.5, -2, -1.5], [-0.5, 0.5, 0.5], [0.5, -0.5, -0.5]]
#   discount 1/2: 1.25 2.5 3 | 3 0 0 || 1.75 1.5 1 | 3.5 1 0
TURN_DISCOUNTED = [[-0.875, 1.25, 1.5], [0.875, -1.25, -1.5], [-0.875, 0.25, 0.5], [0.875, -0.25, -0.5]]
GROUP = [[0.5] * 3, [-0.5] * 3, [-0.5] * 3, [0.5] * 3]
GROUP_DISCOUNTED = [[-0.875] * 3, [0.875] * 3, [-0.875] * 3, [0.875] * 3]
# Sums of squares over the turns: 13 in the first group, 1.5 in the second; 6 turns each
STD_OF_TURNS = [(13 / 5) ** 0.5] * 2 + [(1.5 / 5) ** 0.5] * 2
STD_OF_ALL_TURNS = [(14.5 / 11) ** 0.5] * 4
# Of the returns: 4 and 3 in both groups
STD_OF_RETURNS = [0.5**0.5] * 4
STD_OF_ALL_RETURNS = [(1 / 3) ** 0.5] * 4

CASES = {
    "turn": ({}, TURN, None),
    "turn, discount": ({"discount": 0.5}, TURN_DISCOUNTED, None),
    "turn, scale group": ({"scale_rewards": "group"}, TURN, STD_OF_TURNS),
    "turn, scale batch": ({"scale_rewards": "batch"}, TURN, STD_OF_ALL_TURNS),
    "group": ({"advantage_estimator": "group"}, GROUP, None),
    "group, discount": ({"advantage_estimator": "group", "discount": 0.5}, GROUP_DISCOUNTED, None),
    "group, scale group": ({"advantage_estimator": "group", "scale_rewards": "group"}, GROUP, STD_OF_RETURNS),
    "group, scale batch": ({"advantage_estimator": "group", "scale_rewards": "batch"}, GROUP, STD_OF_ALL_RETURNS),
}
PAID = {"a": 0, "b": 1, "c": 3}
OPENING = "<|im_start|>user\nChoose.{}<|im_end|>\n<|im_start|>assistant\n"


def chat_rows(tokenizer, word, advantages):
    """The one row of an episode, written down piece by piece: prompt, completion, mask, advantages."""
    completion, mask, values = [], [], []
    for number, (letter, advantage) in enumerate(zip(word, advantages, strict=True)):
        reply = [*tokenizer.encode(f"ACTION={letter}"), tokenizer.eos_token_id]
        answer = f"\n<|im_start|>user\npaid {PAID[letter]}<|im_end|>\n<|im_start|>assistant\n"
        answer = tokenizer.encode(answer) if number < len(word) - 1 else []
        completion += reply + answer
        mask += [1] * len(reply) + [0] * len(answer)
        values += [advantage] * len(reply) + [0] * len(answer)
    return [(tokenizer.encode(OPENING.format("")), completion, mask, values)]


def window_rows(tokenizer, word, advantages):
    """The three rows of an episode, each with the transitions so far as text."""
    rows, lines, seen = [], [], ""
    for number, (letter, advantage) in enumerate(zip(word, advantages, strict=True)):
        history = "".join(f"\n{line}" for line in ["So far you have tried/seen:", *lines, seen]) if number else ""
        reply = [*tokenizer.encode(f"ACTION={letter}"), tokenizer.eos_token_id]
        prompt = tokenizer.encode(OPENING.format(history))
        rows.append((prompt, reply, [1] * len(reply), [advantage] * len(reply)))
        state = f" State={seen}" if seen else ""
        lines.append(f"Step={number}{state} Action={letter} Reward={PAID[letter]}")
        seen = f"paid {PAID[letter]}"
    return rows


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("context", ["chat", "window"])
def test_masks_and_advantages_are_exact(make_trainer, context, case):
    config, advantages, std = CASES[case]
    trainer = make_trainer(acts(*SCRIPT), context=context, **config)
    batch = generate(trainer)

    tokenizer = trainer.processing_class
    build = chat_rows if context == "chat" else window_rows
    expected = []
    for index, word in enumerate(SCRIPT):
        scale = 1.0 if std is None else 1 / (std[index] + STD_EPS)
        expected += build(tokenizer, word, [scale * value for value in advantages[index]])

    assert len(batch["completion_ids"]) == len(expected) == (4 if context == "chat" else 12)
    assert batch["advantages"].shape == batch["completion_ids"].shape
    for row, (prompt, completion, mask, values) in enumerate(expected):
        width = len(completion)
        assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == prompt
        assert batch["completion_mask"][row].tolist() == [1] * width + [0] * (len(batch["advantages"][row]) - width)
        assert batch["completion_ids"][row, :width].tolist() == completion
        assert batch["tool_mask"][row, :width].tolist() == mask
        torch.testing.assert_close(batch["advantages"][row, :width], torch.tensor(values))
        assert (batch["advantages"][row, width:] == 0).all()
    assert batch["num_items_in_batch"] == sum(sum(mask) for _, _, mask, _ in expected)


def test_window_keeps_the_last_transitions(make_trainer):
    trainer = make_trainer(acts(*SCRIPT), context="window", window=1)
    batch = generate(trainer)
    prompt = trainer.processing_class.decode(batch["prompt_ids"][2][batch["prompt_mask"][2].bool()])
    assert "Step=1 State=paid 0 Action=b Reward=1\npaid 1" in prompt and "Step=0" not in prompt


# -- the same loss as TRL's -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    ("estimator", "scale"),
    [("group", "group"), ("group", "batch"), ("group", "none"), ("turn", "group"), ("turn", "none")],
)
def test_one_turn_equals_grpo(make_trainer, model_dir, tmp_path, estimator, scale):
    # Off-policy (two iterations) with a moved policy and a reference, so that ratio, clipping and KL all take part
    common = {"scale_rewards": scale, "num_iterations": 2, "beta": 0.1, "per_device_train_batch_size": 8}
    common |= {"num_generations": 4, "loss_type": "dapo"}
    agent = make_trainer(
        acts(*"abcabbca"),
        advantage_estimator=estimator,
        env_kwargs={"horizon": 1},
        invalid_action_penalty=0.0,
        **common,
    )
    ours = generate(agent)
    played = [rows_of(trajectory, 0, 0)[0] for trajectory in agent.trajectories]
    rewards = [trajectory.return_ for trajectory in agent.trajectories]
    assert len(set(rewards)) > 1

    def rollout(prompts, trainer):
        prompt_ids, completion_ids = [row.prompt_ids for row in played], [row.completion_ids for row in played]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    grpo = ready(
        GRPOTrainer(
            model_dir,
            reward_funcs=lambda prompts, **kwargs: rewards,
            args=make_config(tmp_path / "grpo", GRPOConfig, **common),
            train_dataset=Dataset.from_dict({"prompt": ["?"] * 8}),
            rollout_func=rollout,
        )
    )
    theirs = generate(grpo)
    for name in ("prompt_ids", "completion_ids", "completion_mask", "old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(ours[name], theirs[name])
    assert ours["tool_mask"].logical_or(ours["completion_mask"] == 0).all()  # one turn: nothing but sampled tokens
    mask = ours["completion_mask"]
    torch.testing.assert_close(ours["advantages"], theirs["advantages"][:, None] * mask, rtol=0, atol=1e-6)

    perturb(agent.model)
    perturb(grpo.model)
    our_loss, our_gradients = loss_and_gradients(agent, ours)
    their_loss, their_gradients = loss_and_gradients(grpo, theirs)
    assert abs(their_loss) > 1e-3
    torch.testing.assert_close(our_loss, their_loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=0, atol=1e-6)


def test_without_env_it_is_grpo(model_dir, tmp_path):
    def by_length(completions, **kwargs):
        return [float(len(completion) % 7) for completion in completions]

    def run(trainer_class, config_class):
        args = make_config(tmp_path / trainer_class.__name__, config_class, beta=0.1, seed=3)
        dataset = Dataset.from_dict({"prompt": ["Choose.", "paid 3", "noise", "what?"]})
        trainer = trainer_class(model_dir, reward_funcs=by_length, args=args, train_dataset=dataset)
        trainer.train()
        times = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        history = [{k: v for k, v in log.items() if k not in times} for log in trainer.state.log_history]
        return history, trainer.model.state_dict()

    our_history, our_weights = run(AgentGRPOTrainer, AgentGRPOConfig)
    their_history, their_weights = run(GRPOTrainer, GRPOConfig)
    assert our_history == their_history and len(our_history) == 3
    assert any(log.get("grad_norm", 0) > 0 for log in our_history)
    torch.testing.assert_close(our_weights, their_weights, rtol=0, atol=0)


# -- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["none", "scale", "standardize"])
def test_rewards_are_normalized_and_penalties_keep_their_size(make_trainer, how):
    trainer = make_trainer(acts("ab?", "c?a", "?bb", "cba"), reward_normalization=how)
    seen = []
    for _ in range(2):  # the statistics run on
        generate(trainer)
        seen += [turn.reward for trajectory in trainer.trajectories for turn in trajectory.turns]
        shift = np.mean(seen) if how == "standardize" else 0.0
        scale = np.std(seen) if how != "none" else 1.0
        penalties = 0
        for trajectory, rewards in zip(trainer.trajectories, trainer.turn_rewards, strict=True):
            assert len(rewards) == 3
            for turn, reward in zip(trajectory.turns, rewards, strict=True):
                assert turn.executed is not None  # a random legal action in place of none
                penalty = -5.0 if turn.text == "what?" else 0.0
                penalties += penalty
                assert reward == pytest.approx((turn.reward - shift) / scale + penalty)
        assert penalties == -15.0
    assert trainer.reward_statistics.count == len(seen) == 24


def test_turns_that_play_nothing_earn_the_penalty_alone(make_trainer):
    config = {"reward_normalization": "standardize", "advantage_estimator": "group", "invalid_action_penalty": -2.0}
    trainer = make_trainer(acts("b?", "?", "cb?", "bbb"), invalid_action="end", **config)
    batch = generate(trainer)
    # Environment rewards: 1 | nothing | 3 1 | 1 1 1
    mean, std = np.mean([1, 3, 1, 1, 1, 1]), np.std([1, 3, 1, 1, 1, 1])
    b, c = (1 - mean) / std, (3 - mean) / std
    expected = [[b, -2.0], [-2.0], [c, b, -2.0], [b, b, b]]
    for rewards, values in zip(trainer.turn_rewards, expected, strict=True):
        assert rewards == pytest.approx(values)
    first = batch["advantages"][0][batch["tool_mask"][0].bool() & batch["completion_mask"][0].bool()]
    torch.testing.assert_close(first, torch.full_like(first, b / 2))  # (b - 2) less the mean of b - 2 and -2


def test_retries_are_turns_of_the_episode(make_trainer):
    trainer = make_trainer(
        acts("?b", "?b", "b", "b"), invalid_action="retry", env_kwargs={"horizon": 1}, advantage_estimator="group"
    )
    generate(trainer)
    assert trainer.turn_rewards == [[-5.0, 1.0], [-5.0, 1.0], [1.0], [1.0]]
    assert [trajectory.steps for trajectory in trainer.trajectories] == [1] * 4


def test_rewards_that_never_differ_keep_their_size(make_trainer):
    trainer = make_trainer(acts("bbb", "bbb", "bbb", "bbb"), reward_normalization="scale")
    generate(trainer)
    assert trainer.turn_rewards == [[1.0] * 3] * 4


def test_reward_functions_add_to_the_last_turn(make_trainer):
    asked = []

    def by_row(prompts, completions, trajectory, **kwargs):
        asked.append([len(t.turns) for t in trajectory])
        return [float(number) for number in range(len(prompts))]

    def only_first(prompts, **kwargs):
        return [1.0] + [None] * (len(prompts) - 1)

    config = {"reward_weights": [0.5, 10.0]}
    trainer = make_trainer(acts(*SCRIPT), kwargs={"reward_funcs": [by_row, only_first]}, **config)
    assert trainer.args.reward_weights == [0.5, 10.0] and trainer.reward_weights.tolist() == [1.0, 0.5, 10.0]
    batch = generate(trainer)
    assert asked == [[3, 3, 3, 3]]
    # Rows get 0, 1, 2, 3 times .5 and 10 on the first: 10 .5 | 1 1.5, in every return-to-go of the episode
    shift = [4.75, -4.75, -0.25, 0.25]
    expected = [[value + more for value in values] for values, more in zip(TURN, shift, strict=True)]
    assert turn_advantages_of(trainer, batch) == pytest.approx(np.array(expected))
    assert trainer._metrics["train"]["rewards/by_row/mean"] == [1.5]
    assert trainer._metrics["train"]["rewards/only_first/mean"] == [1.0]

    # One row a turn: each turn has its own
    trainer = make_trainer(acts(*SCRIPT), kwargs={"reward_funcs": [by_row]}, context="window", discount=0.0)
    batch = generate(trainer)
    # r + row: 0 2 5 | 6 4 5 | 7 8 9 | 12 11 11
    expected = [[-3, -1, 0], [3, 1, 0], [-2.5, -1.5, -1], [2.5, 1.5, 1]]
    assert turn_advantages_of(trainer, batch) == pytest.approx(np.array(expected))
    # Logged are episodes all the same: their sums are 7, 15, 24, 34
    assert trainer._metrics["train"]["reward"] == [20.0]
    assert trainer._metrics["train"]["reward_std"] == [pytest.approx(np.std([7, 15, 24, 34], ddof=1))]


def turn_advantages_of(trainer, batch):
    """The advantage of each turn, read off its tokens; all tokens of a turn must agree."""
    per_turn = {}
    row = 0
    for episode, trajectory in enumerate(trainer.trajectories):
        for part in rows_of(trajectory, episode, 0):
            for position, turn in enumerate(part.turn_index):
                if turn >= 0:
                    per_turn.setdefault((episode, turn), set()).add(batch["advantages"][row, position].item())
            row += 1
    assert all(len(values) == 1 for values in per_turn.values())
    shape = len(trainer.trajectories), 1 + max(turn for _, turn in per_turn)
    return np.array([values.pop() for values in per_turn.values()]).reshape(shape)


# -- what weighs nothing ----------------------------------------------------------------------------------------------


def test_padding_rows_weigh_nothing(make_trainer):
    def by_row(prompts, trajectory, **kwargs):
        assert all(t.turns for t in trajectory)  # padding rows too are shown an episode
        return [float(number) for number in range(len(prompts))]

    trainer = make_trainer(
        acts("s", "as", "abc", "cba"),
        env_kwargs={"actions": "abcs"},
        context="window",
        advantage_estimator="group",
        num_iterations=2,
        beta=0.1,
        reward_weights=[0.0],
        kwargs={"reward_funcs": by_row},
    )
    batch = generate(trainer)
    loss_mask = batch["completion_mask"] * batch["tool_mask"]
    real = loss_mask.sum(1) > 0
    assert real.tolist() == [True] * 9 + [False]  # 1 + 2 + 3 + 3 turns, to a multiple of the group's 2
    assert (batch["advantages"][~real] == 0).all()
    metrics = trainer._metrics["train"]
    assert metrics["rewards/environment_reward/mean"] == [3.0]  # 2, 2, 4 and 4: an episode counts once
    assert metrics["rewards/by_row/mean"] == [4.0]  # of rows 0 to 8
    assert "frac_reward_zero_std" not in metrics  # TRL's would compare rows of one episode

    perturb(trainer.model)
    loss, gradients = loss_and_gradients(trainer, batch)
    alone = {name: value if value.ndim == 0 else value[real] for name, value in batch.items()}
    loss_alone, gradients_alone = loss_and_gradients(trainer, alone)
    padding = {
        name: value if value.ndim == 0 else torch.cat([value, value[[9, 9, 9]]]) for name, value in batch.items()
    }
    loss_padded, gradients_padded = loss_and_gradients(trainer, padding)
    assert abs(loss) > 1e-4
    torch.testing.assert_close((loss_alone, gradients_alone), (loss, gradients))
    torch.testing.assert_close((loss_padded, gradients_padded), (loss, gradients))


@pytest.mark.parametrize("context", ["chat", "window"])
def test_faulty_episodes_weigh_nothing(make_trainer, context):
    trainer = make_trainer(
        acts("abc", "cx" * 6, "caa", "bbb"),  # an episode that fails is begun six times
        env_kwargs={"actions": "abcx"},
        num_generations=4,
        context=context,
        advantage_estimator="group",
        reward_normalization="scale",
    )
    with pytest.warns(UserWarning, match="1 of 4 episodes were lost .* RuntimeError: the environment broke"):
        batch = generate(trainer)
    assert [trajectory.stop for trajectory in trainer.trajectories].count(StopReason.ENV_ERROR) == 1
    assert trainer.reward_statistics.count == 9  # the lost episode's reward is not among them
    std = np.std([0, 1, 3, 3, 0, 0, 1, 1, 1])
    # Returns 4, 3, 3 of the others: the lost one is not in their mean
    expected = np.array([4, 3, 3]) / std - 10 / 3 / std
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    rows = {"chat": [[0], [2], [3]], "window": [[0, 1, 2], [4, 5, 6], [7, 8, 9]]}[context]
    for of_episode, value in zip(rows, expected, strict=True):
        advantages = batch["advantages"][of_episode][mask[of_episode]]
        torch.testing.assert_close(advantages, torch.full_like(advantages, value))
    lost = rows[0][-1] + 1
    assert not mask[lost].any() and (batch["advantages"][lost] == 0).all()
    assert trainer._metrics["train"]["agents/stop_env_error"] == [0.25]
    assert trainer._metrics["train"]["reward"] == [pytest.approx(10 / 3 / std)]

    trainer.script = acts("abc", "cx" * 12, "caa", "bbb")
    with pytest.warns(UserWarning, match="were lost"):
        trainer.train()  # and training goes on
    assert trainer.state.global_step == 2


def test_rollout_of_faults_only_trains_nothing(make_trainer):
    trainer = make_trainer(acts(*["x" * 12] * 4), env_kwargs={"actions": "abcx"}, max_fault_share=1.0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.warns(UserWarning, match="4 of 4 episodes were lost"):
        trainer.train()
    torch.testing.assert_close(dict(trainer.model.state_dict()), before, rtol=0, atol=0)


def test_an_environment_that_never_works_stops_training(make_trainer):
    trainer = make_trainer(acts(*["x" * 12] * 4), env_kwargs={"actions": "abcx"}, max_steps=4)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="^100% .* last 2 .*max_fault_share=0.5.*broke"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("context", ["chat", "window"])
def test_an_episode_without_room_for_a_reply_is_told_first(make_trainer, context):
    """Two rollouts were played, and the environment was blamed."""
    trainer = make_trainer(context=context)
    length = len(trainer.context.begin(trainer.briefing, "", {}).prompt_ids)
    with pytest.raises(ValueError, match=f"max_episode_length={length} leaves no room.* {length} tokens.*Raise it"):
        make_trainer(context=context, max_episode_length=length)
    make_trainer(context=context, max_episode_length=length + 1)


def test_an_episode_that_outgrows_the_context_trains_on(make_trainer):
    tokenizer = make_trainer().processing_class
    prompt = len(tokenizer.encode(OPENING.format("")))
    reply = len(tokenizer.encode("ACTION=a")) + 1
    answer = len(tokenizer.encode("\n<|im_start|>user\npaid 0<|im_end|>\n<|im_start|>assistant\n"))
    trainer = make_trainer(
        acts("aaa", "s", "bbb", "ccc"),
        env_kwargs={"actions": "abcs"},
        max_episode_length=prompt + 2 * (reply + answer),
        advantage_estimator="group",
    )
    batch = generate(trainer)
    stops = [trajectory.stop for trajectory in trainer.trajectories]
    assert stops == [StopReason.CONTEXT_FULL, StopReason.TERMINATED, *[StopReason.CONTEXT_FULL] * 2]
    assert trainer._metrics["train"]["agents/stop_context_full"] == [0.75]
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert mask[0].sum() == 2 * reply
    # Returns 0 and 2, 2 and 6
    for row, value in enumerate([-1.0, 1.0, -2.0, 2.0]):
        torch.testing.assert_close(batch["advantages"][row][mask[row]], torch.full((int(mask[row].sum()),), value))


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["chat", "window"])
def test_completions_table_holds_whole_episodes(make_trainer, tmp_path, context):
    def turns(prompts, log_extra, **kwargs):
        log_extra("note", list("abcd" * 3)[: len(prompts)])
        return [1.0] * len(prompts)

    trainer = make_trainer(
        acts(*SCRIPT), context=context, max_steps=1, log_completions=True, kwargs={"reward_funcs": [turns]}
    )
    trainer.train()
    (path,) = (tmp_path / "out" / "completions").glob("*.parquet")
    table = pd.read_parquet(path)
    assert len(table) == 4
    assert table["prompt"].tolist() == ["Choose."] * 4
    assert table["completion"][0] == (
        "> ACTION=a\npaid 0\n> ACTION=b\npaid 1\n> ACTION=c\npaid 3\n[terminated, return 4]"
    )
    assert table["environment_reward"].tolist() == [4.0, 3.0, 3.0, 4.0]
    assert table["turns"].tolist() == [1.0 if context == "chat" else 3.0] * 4
    assert ("note" in table) == (context == "chat")  # noted on rows: here they are episodes, there turns
    assert table["advantage"].tolist() == pytest.approx([4 / 3, -4 / 3, 1 / 6, -1 / 6])


def test_metrics_and_evaluation_during_training(make_trainer):
    trainer = make_trainer(
        env="trl_agents/Bandit-v0",
        env_kwargs='{"n_arms": 3, "horizon": 2}',
        reward_normalization="scale",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_eval_seeds=4,
        learning_rate=0.0,
    )
    trainer.train()
    train_logs = [log for log in trainer.state.log_history if "agents/return_mean" in log]
    eval_logs = [log for log in trainer.state.log_history if "eval_agents/return_mean" in log]
    assert len(train_logs) == len(eval_logs) == 2
    for log, prefix in ((train_logs[0], ""), (eval_logs[0], "eval_")):
        assert log[f"{prefix}agents/turns_mean"] == 2.0
        assert log[f"{prefix}agents/invalid_share"] > 0.5  # an untrained model
        assert log[f"{prefix}agents/regret_mean"] >= 0.0
        assert 0 < log[f"{prefix}agents/coverage_mean"] <= 1
        assert log[f"{prefix}agents/stop_terminated"] == 1.0
        assert {"reward", "rewards/environment_reward/mean"} <= {name.removeprefix("eval_") for name in log}
    assert trainer.reward_statistics.count == 2 * 4 * 2  # two rollouts of four episodes: evaluation left it alone
    # Evaluations repeat their luck (the policy did not move), training does not
    same = ("eval_agents/return_mean", "eval_agents/regret_mean", "eval_agents/tokens_per_turn")
    assert [eval_logs[0][name] for name in same] == [eval_logs[1][name] for name in same]
    assert trainer.env_pool is None  # and the environments were closed


class CountingTrainer(ScriptedTrainer):
    """Keeps what was played and trained on."""

    def __init__(self, *args, **kwargs):
        self.texts, self.off_policy, self.losses = [], [], []
        super().__init__(*args, **kwargs)

    def roll_out(self, inputs):
        rollout = super().roll_out(inputs)
        self.texts.append([turn.text for trajectory in self.trajectories for turn in trajectory.turns])
        return rollout

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.off_policy.append("old_per_token_logps" in inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("schedule", "rollouts", "steps", "off_policy"),
    [
        ({"num_iterations": 2}, 2, 4, True),
        ({"steps_per_generation": 2}, 2, 4, True),
        ({"gradient_accumulation_steps": 2}, 4, 8, False),  # generates 2 x 4 episodes for both accumulation steps
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 8, 8, False),
    ],
)
@pytest.mark.parametrize("context", ["chat", "window"])
def test_schedules(make_trainer, context, schedule, rollouts, steps, off_policy):
    trainer = make_trainer(
        trainer_class=CountingTrainer,
        env="trl_agents/Bandit-v0",
        env_kwargs={"n_arms": 2, "horizon": 2},
        context=context,
        num_train_seeds=4,
        max_steps=4,
        max_completion_length=4,
        beta=0.1,
        **schedule,
    )
    trainer.train()
    assert len(trainer.texts) == rollouts and trainer.off_policy == [off_policy] * steps
    assert len({tuple(texts) for texts in trainer.texts}) == rollouts  # no rollout repeats another's luck
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0  # the policy left its reference


def test_rollouts_between_two_steps_have_different_luck(make_trainer):
    trainer = make_trainer(
        trainer_class=CountingTrainer,
        env_kwargs={"horizon": 1},
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        max_steps=1,
        kwargs={"train_dataset": episode_dataset([0, 1, 0, 1])},
    )
    trainer.train()
    first, second = trainer.texts
    assert first != second


def test_lora_changes_adapters_only(make_trainer):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(acts(*SCRIPT), beta=0.1, kwargs={"peft_config": config}, learning_rate=0.1)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 0  # the reference is the model without its adapters


def test_qlora_trains_on_cpu(make_trainer, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_tiny_model(tmp_path / "model", hidden_size=64)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = make_trainer(
        model=folder,
        env="trl_agents/Bandit-v0",
        env_kwargs={"n_arms": 2, "horizon": 2},
        max_completion_length=4,
        learning_rate=0.1,
        kwargs={
            "quantization_config": quantization,
            "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        },
    )
    packed = dict(trainer.model.named_parameters())["base_model.model.model.layers.0.mlp.up_proj.weight"]
    assert packed.dtype == torch.uint8
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    # A rollout must leave the weights in the layout that gradients pass
    assert [log["grad_norm"] > 0 for log in trainer.state.log_history[:2]] == [True, True]
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)


class AsLongAsAsked(Pay):
    """Takes its horizon from the dataset."""

    def reset(self, *, seed=None, options=None):
        self.horizon = options["horizon"]
        return super().reset(seed=seed)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_says_what_to_play(make_trainer, streamed):
    dataset = Dataset.from_dict({"seed": [7, 5], "options": [{"horizon": 1}, {"horizon": 2}]})
    if streamed:
        dataset = dataset.to_iterable_dataset()
    trainer = make_trainer(
        acts("a", "b", "ab", "bc"),
        env=AsLongAsAsked,
        advantage_estimator="group",
        max_steps=1,
        kwargs={"train_dataset": dataset},
    )
    trainer.train()
    assert [trajectory.seed for trajectory in trainer.trajectories] == [7, 7, 5, 5]
    assert [len(trajectory.turns) for trajectory in trainer.trajectories] == [1, 1, 2, 2]


@pytest.mark.parametrize("side_by_side", [1, 3])
def test_episodes_side_by_side_do_not_touch_each_other(make_trainer, side_by_side):
    def sampled(**config):
        trainer = make_trainer(env="trl_agents/Bandit-v0", env_kwargs={"n_arms": 3, "horizon": 2}, **config)
        generate(trainer)
        return [str(trajectory) for trajectory in trainer.trajectories]

    assert sampled(rollout_batch_size=side_by_side) == sampled()


def test_play_is_reproducible_and_learns_nothing(make_trainer):
    trainer = make_trainer(env="trl_agents/Bandit-v0", env_kwargs={"n_arms": 3, "horizon": 2}, rollout_batch_size=2)
    first, again = trainer.play([7, 5, 9]), trainer.play([7, 5, 9])
    assert [trajectory.seed for trajectory in first] == [7, 5, 9]
    assert [str(trajectory) for trajectory in first] == [str(trajectory) for trajectory in again]
    assert trainer.reward_statistics.count == 0 and not trainer._metrics["train"]


# -- mistakes ---------------------------------------------------------------------------------------------------------


class Silent(Pay):
    instructions = None


MISTAKES = {
    "unknown id": ({"env": "trl_agents/Bandid-v0"}, "Bandid-v0.*trl_agents/Bandit-v0"),
    "an instance": ({"env": Pay()}, "an instance does not do"),
    "horizon 0": ({"env": "trl_agents/Bandit-v0", "env_kwargs": {"horizon": 0}}, "horizon=0.*at least 1"),
    "no instructions": ({"env": Silent}, "Silent has no text `instructions`"),
    "unreachable action": (
        {"kwargs": {"action_parser": ActionParser(r"ACTION=(\d)")}},
        "No pattern can produce the legal action 'a'",
    ),
    "parser without env": ({"env": None, "kwargs": {"action_parser": ActionParser()}}, "without `env`"),
    "window with grpo": ({"context": "window", "loss_type": "grpo"}, "loss_type='grpo'.*dapo"),
    "no seed": ({"kwargs": {"train_dataset": Dataset.from_dict({"prompt": ["?"] * 4})}}, r"'seed'.*\['prompt'\]"),
    "no seed, eval": (
        {"eval_strategy": "steps", "kwargs": {"eval_dataset": Dataset.from_dict({"prompt": ["?"] * 4})}},
        "'seed'",
    ),
    "few seeds": ({"num_train_seeds": 1}, "1 seeds to train on.*takes 2"),
    "weights": ({"reward_weights": [1.0, 2.0]}, r"\[1.0, 2.0\] for 0 reward functions"),
    "reply budget": ({"max_completion_length": None}, "max_completion_length=None"),
    "columns": ({"remove_unused_columns": True}, "remove_unused_columns=True"),
    "two rollouts": ({"kwargs": {"rollout_func": print}}, "`rollout_func` and `env`"),
    "generation_kwargs": ({"generation_kwargs": {"top_k": 3}}, "generation_kwargs={'top_k': 3}"),
    "repetition": ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
    "aggregation": ({"multi_objective_aggregation": "normalize_then_sum"}, "normalize_then_sum"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_written(make_trainer, tmp_path, mistake):
    settings, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer_class=AgentGRPOTrainer, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": "table"}, "context='table'.*chat, window"),
        ({"advantage_estimator": "gae"}, "advantage_estimator='gae'.*turn, group"),
        ({"reward_normalization": "max"}, "reward_normalization='max'"),
        ({"invalid_action": "ignore"}, "invalid_action='ignore'"),
        ({"discount": 1.5}, "discount=1.5"),
        ({"window": 3}, "window=3 has no effect"),
        ({"context": "window", "window": -1}, "window=-1"),
        ({"invalid_action_penalty": 5.0}, "invalid_action_penalty=5.0.*-5.0"),
        ({"env_timeout": 0.0}, "env_timeout=0.0"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"per_device_train_batch_size": 6, "num_generations": 4}, r"6.*4"),
    ],
)
def test_config_mistakes(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_pattern_without_group():
    with pytest.raises(ValueError, match="has no group"):
        ActionParser(r"ACTION=\w+")


def test_plain_config_with_env(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`GRPOConfig`.*`AgentGRPOConfig`"):
        AgentGRPOTrainer(model_dir, env=Pay, args=make_config(tmp_path / "out", GRPOConfig))


def test_reference_of_a_model_made_in_memory(make_trainer, model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = tiny_model(tokenizer, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="beta=0.1 needs a reference model"):
        make_trainer(model=model, beta=0.1, kwargs={"processing_class": tokenizer})
    assert not (tmp_path / "out").exists()


def test_turn_estimator_warns_of_variable_length(make_trainer):
    trainer = make_trainer(acts("s", "abc", "bbb", "cba"), env_kwargs={"actions": "abcs"})
    with pytest.warns(UserWarning, match="between 1 and 3 turns.*advantage_estimator='group'"):
        generate(trainer)


def test_unequal_lengths_are_told_once(make_trainer):
    trainer = make_trainer(acts("s", "abc", "bbb", "cba"), env_kwargs={"actions": "abcs"})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        generate(trainer)
        trainer.script = acts("sa", "cs", "bs", "cs")  # between 1 and 2
        generate(trainer)
    assert sum("advantage_estimator='turn'" in str(each.message) for each in told) == 1


def test_a_mechanism_that_leaves_no_choice_is_told_once(make_trainer):
    """The first action ends each episode, and try_all always plays it."""
    trainer = make_trainer(env_kwargs={"horizon": 1}, exploration=["try_all"], max_completion_length=40)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        generate(trainer)
        generate(trainer)
    (told,) = [str(each.message) for each in told if "in the model's place" in str(each.message)]
    assert re.match(r"100% of the replies.*exploration=\['try_all'\].*Leave the mechanism out", told)


@pytest.mark.filterwarnings("error:advantage_estimator")
def test_turn_estimator_does_not_warn_of_equal_length(make_trainer):
    generate(make_trainer(acts(*SCRIPT)))


# -- several processes ----------------------------------------------------------------------------------------------

# G=4 lies across both processes; episodes end early, so that the processes have different numbers of rows; one fails.
RUNS = {
    "chat": {"context": "chat", "advantage_estimator": "turn", "scale_rewards": "group"},
    "window": {"context": "window", "advantage_estimator": "group", "scale_rewards": "batch"},
    "sampled": {"context": "chat", "advantage_estimator": "turn", "scale_rewards": "batch", "beta": 0.1},
}
PARALLEL_SCRIPT = acts("abc", "b?b", "s", "cx" * 6)  # begun six times


def run_in_parallel(model_dir, folder, n_processes):
    """Trains a step of each run as one of `n_processes`; returns what must not depend on their number."""
    results = {}
    for name, settings in RUNS.items():
        args = make_config(
            folder / name,
            per_device_train_batch_size=4 // n_processes,
            num_generations=4,
            reward_normalization="scale",
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            env_kwargs={"actions": "abcsx"} if name != "sampled" else None,
            invalid_action="end" if name != "sampled" else "random",
            max_completion_length=8,
            ddp_find_unused_parameters=False,
            **settings,
        )
        trainer = CountingTrainer(model_dir, env=Pay, args=args)
        if name != "sampled":
            share = 4 // n_processes
            start = trainer.accelerator.process_index * share
            trainer.script = PARALLEL_SCRIPT[start : start + share]
        trainer.train()
        logs = trainer.state.log_history[0]
        results[name] = {
            "weights": {key: value.tolist() for key, value in trainer.model.state_dict().items()},
            "loss": logs["loss"],
            "reward": logs["reward"],
            "agents": {k: v for k, v in logs.items() if k.startswith("agents/") and "seconds" not in k},
            "turn_values": trainer.turn_values.tolist(),
            "texts": trainer.texts[0],
        }
    return results


@pytest.mark.filterwarnings("ignore:advantage_estimator", "ignore:1 of")
def test_two_processes_equal_one(model_dir, tmp_path):
    port, processes = free_port(), []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, __file__, model_dir, str(tmp_path / "two")]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    one = run_in_parallel(model_dir, tmp_path / "one", 1)
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    two = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in range(2)]
    start = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    for name in RUNS:
        first, second, alone = two[0][name], two[1][name], one[name]
        assert first["texts"] + second["texts"] == alone["texts"]
        assert first["turn_values"] + second["turn_values"] == [pytest.approx(row) for row in alone["turn_values"]]
        assert np.any(alone["turn_values"])
        assert first["agents"] == pytest.approx(alone["agents"])
        assert (first["loss"], first["reward"]) == pytest.approx((alone["loss"], alone["reward"]), abs=1e-6)
        moved = False
        for key, value in alone["weights"].items():
            torch.testing.assert_close(torch.tensor(first["weights"][key]), torch.tensor(value), rtol=0, atol=1e-6)
            assert first["weights"][key] == second["weights"][key]
            moved |= not torch.equal(torch.tensor(value), start[key])
        assert moved


if __name__ == "__main__":  # one of the two processes
    let_gloo_go_at_exit()
    folder = Path(sys.argv[2])
    folder.mkdir(exist_ok=True)
    found = run_in_parallel(sys.argv[1], folder, 2)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
