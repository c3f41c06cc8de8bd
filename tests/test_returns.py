# Licensed under the Apache License, Version 2.0 (see LICENSE).
import random

import pytest
import torch

from trl_agents.losses import kl_k1
from trl_agents.returns import discounted_returns, generalized_advantages, lambda_returns


REWARDS = torch.tensor([0.0, 0.0, 1.0])
VALUES = torch.tensor([0.2, 0.5, 0.4, 0.0])
TERMINATED = torch.tensor([1.0, 1.0, 0.0])
TRUNCATED = torch.tensor([1.0, 1.0, 1.0])
JUNK = float("nan")


def approx(expected):
    return pytest.approx(expected, abs=1e-6)


class TestHandWorked:
    @pytest.mark.parametrize(
        ("lambda_", "expected"), [(0.95, [0.7465, 0.47, 0.6]), (1, [0.8, 0.5, 0.6]), (0, [0.3, -0.1, 0.6])]
    )
    def test_generalized_advantages(self, lambda_, expected):
        assert generalized_advantages(REWARDS, TERMINATED, VALUES, lambda_).tolist() == approx(expected)

    def test_lambda_returns(self):
        assert lambda_returns(REWARDS, TERMINATED, VALUES, 0.95).tolist() == approx([0.9465, 0.97, 1.0])

    def test_kl_in_the_reward(self):
        logps, ref_logps = torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([-1.2, -0.4, -2.0])
        rewards = REWARDS - 0.05 * kl_k1(logps, ref_logps)  # the score is on the last action, the KL on every one
        assert rewards.tolist() == approx([-0.01, 0.005, 1.0])
        assert generalized_advantages(rewards, TERMINATED, VALUES, 0.95).tolist() == approx([0.74125, 0.475, 0.6])

    def test_discounted_returns(self):
        rewards = torch.tensor([1.0, 2.0, 3.0])
        assert discounted_returns(rewards, torch.tensor([0.5, 0.5, 0.5])).tolist() == approx([2.75, 3.5, 3.0])
        assert discounted_returns(rewards, torch.tensor([0.5, 0.0, 0.5])).tolist() == approx([2.0, 2.0, 3.0])

    def test_termination_ignores_the_bootstrap(self):
        values = torch.tensor([0.2, 0.5, 0.4, 7.0])
        assert generalized_advantages(REWARDS, TERMINATED, values, 1).tolist() == approx([0.8, 0.5, 0.6])

    def test_truncation_bootstraps(self):
        values = torch.tensor([0.2, 0.5, 0.4, 0.7])
        assert generalized_advantages(REWARDS, TRUNCATED, values, 1).tolist() == approx([1.5, 1.2, 1.3])
        assert generalized_advantages(REWARDS, TRUNCATED, values, 0).tolist() == approx([0.3, -0.1, 1.3])
        assert lambda_returns(REWARDS, 0.9 * TRUNCATED, values, 1).tolist() == approx([1.3203, 1.467, 1.63])

    def test_one_step(self):
        one = torch.ones(1)
        assert generalized_advantages(one, one, torch.tensor([0.25, 0.5]), 0.95).tolist() == approx([1.25])

    def test_no_steps(self):
        empty = torch.zeros(2, 0)
        assert discounted_returns(empty, empty).shape == (2, 0)
        assert generalized_advantages(empty, empty, torch.zeros(2, 1), 0.95).shape == (2, 0)


def slow_lambda_returns(rewards, discounts, values, lambda_):
    """The lambda-return as a recursion on Python floats; `values` has one entry more than `rewards`."""
    following, returns = values[-1], []
    for k in reversed(range(len(rewards))):
        following = rewards[k] + discounts[k] * ((1 - lambda_) * values[k + 1] + lambda_ * following)
        returns.insert(0, following)
    return returns


def random_episodes(seed, n_episodes=60, longest=9):
    """Ragged episodes as lists: terminated in the middle (two episodes in one row), at the end, or truncated."""
    rng = random.Random(seed)
    episodes = []
    for _ in range(n_episodes):
        length = rng.randint(1, longest)
        discounts = [rng.choice([0.0, 0.9, 1.0, 1.0]) for _ in range(length)]
        discounts[-1] = rng.choice([0.0, 0.97])
        rewards = [rng.gauss(0, 1) for _ in range(length)]
        episodes.append((rewards, discounts, [rng.gauss(0, 1) for _ in range(length + 1)]))
    return episodes


def minus(returns, values):
    return [return_ - value for return_, value in zip(returns, values[:-1], strict=True)]


def pad(rows, length, filler):
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
class TestRaggedBatches:
    @pytest.mark.parametrize("filler", [0.0, 123.0, JUNK])
    def test_with_mask_any_padding_agrees_with_a_loop(self, lambda_, filler):
        episodes = random_episodes(seed=0)
        rewards = pad([rewards for rewards, _, _ in episodes], 11, filler)
        discounts = pad([discounts for _, discounts, _ in episodes], 11, filler)
        values = pad([values for _, _, values in episodes], 12, filler)
        mask = torch.arange(11) < torch.tensor([len(rewards) for rewards, _, _ in episodes])[:, None]
        returns = lambda_returns(rewards, discounts, values, lambda_, mask)
        advantages = generalized_advantages(rewards, discounts, values, lambda_, mask)
        to_go = discounted_returns(rewards, discounts, mask)
        for row, (rewards_, discounts_, values_) in enumerate(episodes):
            n = len(rewards_)
            expected = slow_lambda_returns(rewards_, discounts_, values_, lambda_)
            assert returns[row, :n].tolist() == approx(expected)
            assert advantages[row, :n].tolist() == approx(minus(expected, values_))
            assert to_go[row, :n].tolist() == approx(slow_lambda_returns(rewards_, discounts_, [0] * (n + 1), 1))
        for result in (returns, advantages, to_go):
            assert (result[~mask] == 0).all()

    def test_terminated_episodes_need_no_mask(self, lambda_):
        episodes = [(rewards, [*discounts[:-1], 0.0], values) for rewards, discounts, values in random_episodes(1)]
        rewards = pad([rewards for rewards, _, _ in episodes], 11, 0.0)
        discounts = pad([discounts for _, discounts, _ in episodes], 11, 0.0)
        values = pad([values for _, _, values in episodes], 12, 123.0)
        advantages = generalized_advantages(rewards, discounts, values, lambda_)
        returns = lambda_returns(rewards, discounts, values, lambda_)
        to_go = discounted_returns(rewards, discounts)
        for row, (rewards_, discounts_, values_) in enumerate(episodes):
            n = len(rewards_)
            expected = slow_lambda_returns(rewards_, discounts_, values_, lambda_)
            assert advantages[row, :n].tolist() == approx(minus(expected, values_))
            assert returns[row].tolist() == approx(expected + [0.0] * (11 - n))
            assert to_go[row, n:].tolist() == [0.0] * (11 - n)


def test_a_truncated_short_episode_needs_the_mask():
    rewards, discounts = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    values, mask = torch.tensor([0.0, 10.0, 0.0]), torch.tensor([True, False])
    assert generalized_advantages(rewards, discounts, values, 1.0, mask).tolist() == [11.0, 0.0]
    # the same tensors are also a real second step that earned 0 and terminated
    assert generalized_advantages(rewards, discounts, values, 1.0).tolist() == [1.0, -10.0]


def test_limits_of_lambda():
    torch.manual_seed(0)
    rewards, discounts = torch.randn(4, 7, dtype=torch.float64), torch.ones(4, 7, dtype=torch.float64)
    values = torch.randn(4, 8, dtype=torch.float64)
    future = rewards.flip(-1).cumsum(-1).flip(-1) + values[:, -1:]
    torch.testing.assert_close(generalized_advantages(rewards, discounts, values, 1) + values[:, :-1], future)
    deltas = rewards + values[:, 1:] - values[:, :-1]
    torch.testing.assert_close(generalized_advantages(rewards, discounts, values, 0), deltas)


def test_rows_do_not_mix():
    torch.manual_seed(0)
    rewards, discounts, values = torch.randn(3, 5), torch.rand(3, 5), torch.randn(3, 6)
    for function, arguments in [
        (discounted_returns, (rewards, discounts)),
        (generalized_advantages, (rewards, discounts, values)),
        (lambda_returns, (rewards, discounts, values)),
    ]:
        rest = () if function is discounted_returns else (0.9,)
        rows = torch.stack([function(*(tensor[row] for tensor in arguments), *rest) for row in range(3)])
        assert torch.equal(function(*arguments, *rest), rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_inputs_are_not_touched(dtype):
    inputs = [REWARDS.to(dtype), TERMINATED.to(dtype), VALUES.to(dtype), torch.tensor([True, True, False])]
    copies = [tensor.clone() for tensor in inputs]
    rewards, discounts, values, mask = inputs
    assert discounted_returns(rewards, discounts, mask).dtype == dtype
    advantages = generalized_advantages(rewards, discounts, values, 0.95)
    assert advantages.dtype == lambda_returns(rewards, discounts, values, 0.95, mask).dtype == dtype
    assert advantages.tolist() == pytest.approx([0.7465, 0.47, 0.6], abs=1e-2)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


def test_device_is_kept():
    meta = {"device": "meta"}
    rewards, values = torch.zeros(2, 3, **meta), torch.zeros(2, 4, **meta)
    mask = torch.ones(2, 3, dtype=torch.bool, **meta)
    assert lambda_returns(rewards, rewards, values, 0.95, mask).device.type == "meta"


def test_gradients():
    torch.manual_seed(0)
    rewards, discounts, values = (torch.rand(2, n, dtype=torch.float64, requires_grad=True) for n in (4, 4, 5))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda r, d, v: lambda_returns(r, d, v, 0.9, mask), (rewards, discounts, values))
    assert not generalized_advantages(rewards.detach(), discounts.detach(), values.detach(), 0.9).requires_grad


class TestErrors:
    @pytest.mark.parametrize("shape", [(), (2, 3, 4)])
    def test_dimensions(self, shape):
        with pytest.raises(ValueError, match=r"`rewards` must have shape \(K,\) or \(B, K\)"):
            discounted_returns(torch.zeros(shape), torch.zeros(shape))

    def test_discounts(self):
        with pytest.raises(ValueError, match=r"`discounts` must have shape \(2, 3\).*got \(3,\)"):
            discounted_returns(torch.zeros(2, 3), torch.zeros(3))

    @pytest.mark.parametrize("function", [generalized_advantages, lambda_returns])
    def test_values_without_the_bootstrap(self, function):
        with pytest.raises(ValueError, match=r"`values` must have shape \(2, 4\).*got \(2, 3\).*bootstrap"):
            function(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), 0.95)

    def test_mask(self):
        with pytest.raises(ValueError, match=r"`mask` must have shape \(3,\).*got \(4,\)"):
            discounted_returns(torch.zeros(3), torch.zeros(3), torch.ones(4))

    @pytest.mark.parametrize("position, name", enumerate(["rewards", "discounts", "values"]))
    def test_integers(self, position, name):
        tensors = [torch.zeros(3), torch.zeros(3), torch.zeros(4)]
        tensors[position] = tensors[position].long()
        with pytest.raises(ValueError, match=f"`{name}` must be a float tensor, got torch.int64"):
            generalized_advantages(*tensors, 0.95)

    @pytest.mark.parametrize("lambda_", [-0.1, 1.5])
    def test_lambda(self, lambda_):
        with pytest.raises(ValueError, match=f"`lambda_` must lie between 0 and 1, got {lambda_}"):
            generalized_advantages(REWARDS, TERMINATED, VALUES, lambda_)
