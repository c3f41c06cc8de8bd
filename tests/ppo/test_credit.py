# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Advantages, returns and whitening of `AgentPPOTrainer`: by hand, and against an independent loop."""

import math
import random

import numpy as np
import pytest
import torch
from by_hand import EOS, GOLDEN, GOLDEN_VALUES, PAD, PROMPT, answers, assert_row, credited, golden_trainer, read, teach
from scripted import Pay, acts, generate, perturb

from trl_agents.types import StopReason


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


def test_the_kl_is_of_what_could_be_scored(make_trainer):
    """`kl_target` adapts to it: an answer that counts as no episode may not add to the KL of the others."""
    trainer = golden_trainer(make_trainer, beta=0.05)
    logps = {"old_per_token_logps": torch.full((2, 3), -1.0), "ref_per_token_logps": torch.full((2, 3), -1.1)}
    credited(trainer, [1.0, math.nan], answers(GOLDEN, GOLDEN, **logps))
    assert trainer._metrics["train"]["agents/kl_mean"] == [pytest.approx(0.3)]


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
