# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math

import pytest
import torch

from trl_agents.losses import adapt_kl_coef, clipped_value_loss, explained_variance, kl_k1, kl_k2, kl_k3


LOGPS, REF_LOGPS = torch.tensor([-1.0, -0.5, -2.0]), torch.tensor([-1.2, -0.4, -2.0])


def approx(expected, abs=1e-6):
    return pytest.approx(expected, abs=abs)


class TestClippedValueLoss:
    def test_golden(self):
        value = torch.tensor([[0.9]], requires_grad=True)
        loss = clipped_value_loss(value, torch.tensor([[0.5]]), torch.tensor([[1.0]]), 0.2)
        assert loss.tolist() == [[approx(0.045)]]
        assert (5 * loss).item() == approx(0.225)  # ReFT's coefficient
        assert (0.1 * loss).item() == approx(0.0045)  # TRL's
        loss.sum().backward()
        assert value.grad.item() == 0

    @pytest.mark.parametrize(
        ("value", "expected", "gradient"),
        [
            (0.6, 0.08, -0.4),  # within the range
            (1.0, 0.045, 0.0),  # moved to the target, beyond the range
            (0.2, 0.32, -0.8),  # moved away from the target: the plain error is the larger one, and it pulls back
            (1.5, 0.125, 0.5),  # beyond the target: the same
        ],
    )
    def test_sides(self, value, expected, gradient):
        value = torch.tensor([value], requires_grad=True)
        loss = clipped_value_loss(value, torch.tensor([0.5]), torch.tensor([1.0]), 0.2)
        loss.sum().backward()
        assert (loss.item(), value.grad.item()) == approx((expected, gradient))

    def test_downwards(self):
        value = torch.tensor([0.1], requires_grad=True)
        loss = clipped_value_loss(value, torch.tensor([0.5]), torch.tensor([0.0]), 0.2)
        loss.sum().backward()
        assert (loss.item(), value.grad.item()) == approx((0.045, 0.0))

    def test_without_clipping(self):
        value = torch.tensor([0.9], requires_grad=True)
        loss = clipped_value_loss(value, torch.tensor([0.5]), torch.tensor([1.0]), None)
        loss.sum().backward()
        assert (loss.item(), value.grad.item()) == approx((0.005, -0.1))

    def test_no_move_no_clipping(self):
        torch.manual_seed(0)
        values, returns = torch.randn(2, 5), torch.randn(2, 5)
        loss = clipped_value_loss(values, values, returns, 0.0)
        torch.testing.assert_close(loss, 0.5 * (values - returns) ** 2)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_shape_and_dtype(self, dtype):
        values, old_values, returns = torch.randn(3, 2, 5).to(dtype).unbind()
        loss = clipped_value_loss(values, old_values, returns)
        assert loss.shape == (2, 5) and loss.dtype == dtype

    def test_errors(self):
        with pytest.raises(ValueError, match=r"\(2, 1\), \(2, 1\) and \(2,\)"):
            clipped_value_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2))
        with pytest.raises(ValueError, match="`clip_range` must be at least 0.*got -0.2"):
            clipped_value_loss(*torch.zeros(3, 1), -0.2)


class TestKL:
    def test_golden(self):
        assert kl_k1(LOGPS, REF_LOGPS).tolist() == approx([0.2, -0.1, 0.0])
        assert kl_k2(LOGPS, REF_LOGPS).tolist() == approx([0.02, 0.005, 0.0])
        assert kl_k3(LOGPS, REF_LOGPS).tolist() == approx([0.018731, 0.005171, 0.0])

    @pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
    def test_zero_where_the_policies_agree(self, estimator):
        assert (estimator(LOGPS, LOGPS) == 0).all()

    def test_reward_is_negative_where_the_policy_raised_its_own_token(self):
        assert (-0.05 * kl_k1(LOGPS, REF_LOGPS))[0] < 0

    @pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 10.0])
    def test_k3_is_never_negative(self, size):
        torch.manual_seed(0)
        assert (kl_k3(size * torch.randn(10_000), torch.zeros(10_000)) >= 0).all()

    def test_expectations(self):
        pi, ref = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.4, 0.4, 0.2]).double().log()
        kl = (pi.exp() * (pi - ref)).sum().item()
        assert (pi.exp() * kl_k1(pi, ref)).sum().item() == approx(kl, abs=1e-12)
        assert (pi.exp() * kl_k3(pi, ref)).sum().item() == approx(kl, abs=1e-12)
        assert (pi.exp() * kl_k2(pi, ref)).sum().item() == approx(kl, abs=0.01)  # biased, but near


class TestAdaptKLCoef:
    def test_golden(self):
        assert adapt_kl_coef(0.2, 12, 6, 256, 1e4) == approx(0.201024, abs=1e-9)

    @pytest.mark.parametrize(
        ("kl", "factor"),
        [
            (6, 1),
            (0, 1 - 0.2 * 0.0256),
            (6.6, 1 + 0.1 * 0.0256),
            (5.4, 1 - 0.1 * 0.0256),
            (math.inf, 1 + 0.2 * 0.0256),
        ],
    )
    def test_direction_and_clip(self, kl, factor):
        assert adapt_kl_coef(0.2, kl, 6, 256, 1e4) == approx(0.2 * factor, abs=1e-12)

    def test_errors(self):
        with pytest.raises(ValueError, match="`target` must be positive, got 0"):
            adapt_kl_coef(0.2, 1, 0, 256, 1e4)
        with pytest.raises(ValueError, match="`horizon`=50 .* `n_episodes`=256.*longer than 51.2"):
            adapt_kl_coef(0.2, 1, 6, 256, 50)


class TestExplainedVariance:
    RETURNS, MASK = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([1.0, 2.0, 3.0, 4.0], 1.0),
            ([6.0, 7.0, 8.0, 9.0], 1.0),  # a constant error is no variance
            ([5.0, 5.0, 5.0, 5.0], 0.0),
            ([1.0, 2.0, 3.0, 3.0], 0.85),  # errors [0, 0, 0, 1]: 0.75 of 5
            ([4.0, 3.0, 2.0, 1.0], -3.0),
        ],
    )
    def test_hand_worked(self, values, expected):
        assert explained_variance(torch.tensor(values), self.RETURNS, self.MASK).item() == approx(expected)

    def test_only_the_mask_counts(self):
        values, returns = torch.tensor([1.0, 9.0, 2.0, 3.0, 3.0]), torch.tensor([1.0, math.nan, 2.0, 3.0, 4.0])
        assert explained_variance(values, returns, torch.tensor([1, 0, 1, 1, 1])).item() == approx(0.85)

    def test_nothing_to_explain(self):
        assert explained_variance(torch.randn(7), torch.full((7,), 0.1), torch.ones(7)).isnan()
        assert explained_variance(torch.randn(4), self.RETURNS, torch.zeros(4)).isnan()

    def test_errors(self):
        with pytest.raises(ValueError, match=r"\(4, 1\) and \(4,\)"):
            explained_variance(torch.zeros(4, 1), self.RETURNS, self.MASK)
        with pytest.raises(ValueError, match=r"\(4,\), got \(3,\)"):
            explained_variance(self.RETURNS, self.RETURNS, torch.ones(3))
