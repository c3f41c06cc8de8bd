# Licensed under the Apache License, Version 2.0 (see LICENSE).
import random
import statistics

import pytest
import torch
from trl.trainer.utils import nanstd

from trl_agents.advantages import (
    combine_moments,
    group_advantages,
    masked_moments,
    spread_over_tokens,
    turn_advantages,
    whiten,
)


SCALES = ["group", "batch", "none"]
NAN = float("nan")


def approx(expected, abs=1e-4):
    return pytest.approx(expected, abs=abs)


def trl_group_advantages(rewards, num_generations, scale):
    """TRL's way, with TRL's `nanstd`."""
    mean = torch.nanmean(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations)
    advantages = rewards - mean
    if scale == "group":
        advantages /= nanstd(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations) + 1e-4
    elif scale == "batch":
        advantages /= nanstd(rewards) + 1e-4
    return torch.nan_to_num(advantages, nan=0.0)


class TestGroupAdvantages:
    def test_hand_worked(self):
        returns = torch.tensor([0.0, 2.0, 1.0, 5.0])  # stds: sqrt(2), sqrt(8), all four sqrt(14 / 3) = 2.160247
        assert group_advantages(returns, 2, "none").tolist() == [-1.0, 1.0, -2.0, 2.0]
        assert group_advantages(returns, 2).tolist() == approx([-0.70706, 0.70706, -0.70708, 0.70708], abs=1e-5)
        batch = group_advantages(returns, 2, "batch").tolist()
        assert batch == approx([-0.462889, 0.462889, -0.925777, 0.925777], abs=1e-5)

    @pytest.mark.parametrize("scale", SCALES)
    def test_equals_trl(self, scale):
        generator = torch.Generator().manual_seed(0)
        returns = torch.randn(240, generator=generator)
        returns[:4] = 0.1  # a group without differences
        valid = torch.rand(240, generator=generator) > 0.3
        valid[4:8], valid[9:12] = False, False  # nobody, and one alone
        expected = trl_group_advantages(torch.where(valid, returns, torch.nan), 4, scale)
        advantages = group_advantages(returns, 4, scale, valid)
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            group_advantages(returns, 4, scale), trl_group_advantages(returns, 4, scale), atol=1e-6, rtol=1e-6
        )
        assert (advantages[~valid] == 0).all() and (advantages[4:12] == 0).all()

    @pytest.mark.parametrize("scale", SCALES)
    def test_not_valid_episodes_do_not_matter(self, scale):
        valid = torch.tensor([True, True, False, True, True, True])
        returns = torch.tensor([1.0, 2.0, 0.0, 4.0, 5.0, 7.0])
        expected = group_advantages(returns, 3, scale, valid)
        for junk in (1e9, NAN, float("inf")):
            returns[2] = junk
            assert torch.equal(group_advantages(returns, 3, scale, valid), expected)
        returns[2] = NAN
        assert torch.equal(group_advantages(returns, 3, scale), expected)

    @pytest.mark.parametrize("scale", SCALES)
    def test_never_nan(self, scale):
        assert group_advantages(torch.ones(4), 4, scale).tolist() == [0.0] * 4
        assert group_advantages(torch.tensor([3.0, 5.0]), 1, scale).tolist() == [0.0, 0.0]
        assert group_advantages(torch.tensor([3.0]), 1, scale).tolist() == [0.0]
        assert group_advantages(torch.ones(4), 2, scale, torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4


def slow_turn_advantages(episodes, num_generations, discount, scale):
    """On lists of rewards, one list per episode; an empty list weighs nothing."""
    returns = []
    for rewards in episodes:
        following, to_go = 0.0, []
        for reward in reversed(rewards):
            following = reward + discount * following
            to_go.insert(0, following)
        returns.append(to_go)
    advantages = []
    for start in range(0, len(episodes), num_generations):
        group = returns[start : start + num_generations]
        for to_go in group:
            baselines = [statistics.fmean([g[k] for g in group if len(g) > k]) for k in range(len(to_go))]
            advantages.append([g - b for g, b in zip(to_go, baselines, strict=True)])
    scaled = []
    for row, values in enumerate(advantages):
        start = row // num_generations * num_generations
        rows = advantages[start : start + num_generations] if scale == "group" else advantages
        pool = [a for other in rows for a in other]
        std = statistics.stdev(pool) if len(pool) > 1 else 0.0
        scaled.append([a / (std + 1e-4) if scale != "none" else a for a in values])
    return scaled


class TestTurnAdvantages:
    def test_hand_worked(self):
        rewards = torch.tensor([[1.0, 0.0], [0.0, 4.0]])  # to go with discount 1/2: [1, 0], [2, 4]
        mask = torch.ones(2, 2, dtype=torch.bool)
        assert turn_advantages(rewards, mask, 2, 0.5, "none").tolist() == [[-0.5, -2.0], [0.5, 2.0]]
        scaled = turn_advantages(rewards, mask, 2, 0.5).flatten().tolist()  # std sqrt(8.5 / 3) = 1.683251
        assert scaled == approx([-0.297026, -1.188106, 0.297026, 1.188106], abs=1e-5)

    def test_baseline_of_the_episodes_that_have_the_turn(self):
        rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])  # the last episode was a fault
        # to go: [6, 5, 3], [2, 1], [1]; baselines 3, 3, 3
        advantages = turn_advantages(rewards, mask, 4, scale="none")
        assert advantages.tolist() == [[3, 2, 0], [-1, -2, 0], [-2, 0, 0], [0, 0, 0]]

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("junk", [0.0, 1e6, NAN])
    def test_agrees_with_a_loop(self, scale, junk):
        rng = random.Random(0)
        episodes = [[rng.gauss(0, 1) for _ in range(rng.randint(0, 6))] for _ in range(120)]
        rewards = torch.tensor([e + [junk] * (8 - len(e)) for e in episodes], dtype=torch.float64)
        mask = torch.tensor([[k < len(e) for k in range(8)] for e in episodes])
        advantages = turn_advantages(rewards, mask, 4, 0.9, scale)
        for row, expected in zip(advantages, slow_turn_advantages(episodes, 4, 0.9, scale), strict=True):
            assert row.tolist() == approx(expected + [0.0] * (8 - len(expected)), abs=1e-9)

    @pytest.mark.parametrize("scale", SCALES)
    def test_one_turn_equals_group_advantages(self, scale):
        generator = torch.Generator().manual_seed(0)
        returns, valid = torch.randn(24, generator=generator), torch.rand(24, generator=generator) > 0.2
        expected = group_advantages(returns, 6, scale, valid)
        if scale == "batch":  # there the std is that of the returns, here of the advantages
            plain = group_advantages(returns, 6, "none", valid)
            expected = plain / (plain[valid].square().sum().div(valid.sum() - 1).sqrt() + 1e-4)
        advantages = turn_advantages(returns[:, None], valid[:, None], 6, scale=scale)
        torch.testing.assert_close(advantages[:, 0], expected, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("scale", SCALES)
    def test_permutation_within_a_group(self, scale):
        torch.manual_seed(0)
        rewards, mask = torch.randn(6, 4), torch.arange(4) < torch.tensor([4, 2, 3, 4, 0, 1])[:, None]
        order = torch.tensor([2, 0, 1, 4, 5, 3])
        advantages = turn_advantages(rewards, mask, 3, 0.9, scale)
        permuted = turn_advantages(rewards[order], mask[order], 3, 0.9, scale)
        torch.testing.assert_close(permuted, advantages[order])
        returns = (rewards * mask).sum(1)
        torch.testing.assert_close(
            group_advantages(returns[order], 3, scale), group_advantages(returns, 3, scale)[order]
        )

    def test_groups_do_not_mix(self):
        torch.manual_seed(0)
        rewards, mask = torch.randn(6, 4), torch.ones(6, 4)
        first = turn_advantages(rewards, mask, 3)[:3]
        rewards[3:] += 100 * torch.randn(3, 4)
        assert torch.equal(turn_advantages(rewards, mask, 3)[:3], first)
        assert not torch.allclose(turn_advantages(rewards, mask, 3, scale="batch")[:3], first)

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_without_differences_exactly_zero(self, scale, dtype):
        rewards = torch.full((7, 20), -1.2345678, dtype=dtype)  # a mean of 7 floats is rounded
        assert (turn_advantages(rewards, torch.ones(7, 20), 7, 0.97, scale) == 0).all()
        assert (turn_advantages(rewards, torch.zeros(7, 20), 7, 0.97, scale) == 0).all()
        assert (turn_advantages(rewards, torch.ones(7, 20), 1, 0.97, scale) == 0).all()

    @pytest.mark.parametrize("scale", SCALES)
    def test_the_only_turn_of_its_group_is_zero(self, scale):
        rewards = torch.tensor([[3.0], [NAN]])
        assert turn_advantages(rewards, torch.tensor([[1], [0]]), 2, scale=scale).tolist() == [[0.0], [0.0]]

    def test_no_turns(self):
        assert turn_advantages(torch.zeros(4, 0), torch.zeros(4, 0), 2).shape == (4, 0)


class TestWhiten:
    VALUES, MASK = torch.tensor([0.76, 0.52, 0.6]), torch.ones(3, dtype=torch.bool)

    def test_golden(self):
        assert whiten(self.VALUES, self.MASK).tolist() == approx([1.0911, -0.8729, -0.2182])
        biased = whiten(self.VALUES, self.MASK, unbiased=False)
        assert biased.tolist() == approx([1.3363, -1.0690, -0.2673])

    def test_keeping_the_mean(self):
        kept = whiten(self.VALUES, self.MASK, shift_mean=False)
        assert kept.tolist() == approx([1.0911 + 0.62667, -0.8729 + 0.62667, -0.2182 + 0.62667])

    @pytest.mark.parametrize("junk", [9.0, NAN, float("inf")])
    def test_only_the_mask_counts(self, junk):
        values = torch.tensor([[0.76, junk, 0.52], [junk, junk, 0.6]])
        mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
        whitened = whiten(values, mask)
        assert whitened.flatten().tolist() == approx([1.0911, 0, -0.8729, 0, 0, -0.2182])
        assert (whitened[mask == 0] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_constant_becomes_zero(self, dtype):
        values = torch.full((7,), 123.456, dtype=dtype)
        whitened = whiten(values, torch.ones(7))
        assert whitened.dtype == dtype and (whitened == 0).all()

    def test_one_element_and_none(self):
        assert whiten(self.VALUES, torch.tensor([0, 1, 0])).tolist() == [0.0, 0.0, 0.0]
        assert whiten(self.VALUES, torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
        assert whiten(self.VALUES, torch.zeros(3), unbiased=False, shift_mean=False).tolist() == [0.0, 0.0, 0.0]

    def test_parts_whitened_by_combined_moments_equal_the_whole(self):
        torch.manual_seed(0)
        values, mask = 5 + 3 * torch.randn(6, 8), torch.rand(6, 8) > 0.4
        mask[4:] = False  # a rank without a single value
        parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
        moments = combine_moments(torch.stack([masked_moments(values[part], mask[part]) for part in parts]))
        torch.testing.assert_close(moments, masked_moments(values, mask))
        assert moments[0] == mask.sum()
        kept = values[mask]
        torch.testing.assert_close(moments[1], kept.mean())
        torch.testing.assert_close(moments[2] / (moments[0] - 1), kept.var())
        pieces = torch.cat([whiten(values[part], mask[part], moments=moments) for part in parts])
        torch.testing.assert_close(pieces, whiten(values, mask))

    def test_constant_over_parts_becomes_zero(self):
        values = torch.full((11,), 123.456)
        parts = values.split([1, 3, 7])
        moments = combine_moments(torch.stack([masked_moments(part, torch.ones_like(part)) for part in parts]))
        assert (whiten(values, torch.ones(11), moments=moments) == 0).all()


class TestSpreadOverTokens:
    def test_hand_worked(self):
        turn_values = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]])
        turn_index = torch.tensor([[-1, 0, 0, -1, 1], [0, -1, 2, 2, 1]])
        assert spread_over_tokens(turn_values, turn_index).tolist() == [[0, 1, 1, 0, 2], [3, 0, 5, 5, 4]]

    def test_no_turns_or_tokens(self):
        assert spread_over_tokens(torch.zeros(2, 0), torch.full((2, 3), -1)).tolist() == [[0.0] * 3] * 2
        assert spread_over_tokens(torch.zeros(2, 4), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"holds turn 2.*\(1, 2\) has turns 0 to 1"):
            spread_over_tokens(torch.zeros(1, 2), torch.tensor([[0, 2]]))
        with pytest.raises(ValueError, match=r"got \(1, 2\) and \(2, 1\)"):
            spread_over_tokens(torch.zeros(1, 2), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_inputs_are_not_touched(dtype):
    rewards, mask = torch.tensor([[1.0, 2.0], [0.0, 5.0]], dtype=dtype), torch.tensor([[True, True], [True, False]])
    copies = rewards.clone(), mask.clone()
    results = [
        group_advantages(rewards[:, 0], 2, valid=mask[:, 0]),
        turn_advantages(rewards, mask, 2),
        whiten(rewards, mask),
        whiten(rewards, mask, shift_mean=False, moments=masked_moments(rewards, mask)),
        spread_over_tokens(rewards, torch.tensor([[0, 1], [1, -1]])),
    ]
    assert [result.dtype for result in results] == [dtype] * 5
    assert torch.equal(rewards, copies[0]) and torch.equal(mask, copies[1])


def test_device_is_kept():
    rewards, mask = torch.zeros(4, 3, device="meta"), torch.ones(4, 3, device="meta")
    for result in (group_advantages(rewards[:, 0], 2), turn_advantages(rewards, mask, 2), whiten(rewards, mask)):
        assert result.device.type == "meta"


class TestErrors:
    @pytest.mark.parametrize("num_generations", [0, 4])
    def test_groups(self, num_generations):
        match = rf"shape \(6,.* does not split into groups of `num_generations`={num_generations}"
        with pytest.raises(ValueError, match=match):
            group_advantages(torch.zeros(6), num_generations)
        with pytest.raises(ValueError, match=match):
            turn_advantages(torch.zeros(6, 2), torch.ones(6, 2), num_generations)

    def test_scale(self):
        with pytest.raises(ValueError, match="'group', 'batch', 'none', got 'groups'"):
            group_advantages(torch.zeros(4), 2, "groups")
        with pytest.raises(ValueError, match="'group', 'batch', 'none', got True"):
            turn_advantages(torch.zeros(4, 1), torch.ones(4, 1), 2, scale=True)

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"`returns` must have shape \(N,\), got \(4, 1\)"):
            group_advantages(torch.zeros(4, 1), 2)
        with pytest.raises(ValueError, match=r"`rewards` must have shape \(N, K\), got \(4,\)"):
            turn_advantages(torch.zeros(4), torch.ones(4), 2)
        with pytest.raises(ValueError, match=r"`valid` must have the shape of `returns`, \(4,\), got \(3,\)"):
            group_advantages(torch.zeros(4), 2, valid=torch.ones(3))
        with pytest.raises(ValueError, match=r"`mask` must have the shape of `rewards`, \(4, 2\), got \(4, 3\)"):
            turn_advantages(torch.zeros(4, 2), torch.ones(4, 3), 2)
        with pytest.raises(ValueError, match=r"the shape of the values, \(4,\), got \(4, 1\)"):
            whiten(torch.zeros(4), torch.ones(4, 1))
        with pytest.raises(ValueError, match=r"\(R, 3\), got \(3,\)"):
            combine_moments(torch.zeros(3))

    def test_integers(self):
        with pytest.raises(ValueError, match="`returns` must be a float tensor, got torch.int64"):
            group_advantages(torch.arange(4), 2)
        with pytest.raises(ValueError, match="`rewards` must be a float tensor, got torch.int64"):
            turn_advantages(torch.zeros(4, 2).long(), torch.ones(4, 2), 2)
        with pytest.raises(ValueError, match="must be a float tensor, got torch.int64"):
            whiten(torch.arange(4), torch.ones(4))
