# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What TRL lacks: the clipped value loss, KL estimators, the adaptive KL coefficient, explained variance. Tensors only.

Losses and estimators keep one entry a token: the caller masks and reduces.
"""

from __future__ import annotations

import torch

from .advantages import masked_moments


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None = 0.2
) -> torch.Tensor:
    """
    Squared error of the value function, where a step beyond the clip range earns nothing
    (https://huggingface.co/papers/2403.17031):

        L = 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    The 1/2 is inside: ReFT's coefficient of 5 and the 0.1 of the paper above both count on it.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            Values under the current parameters.
        old_values (`torch.Tensor` of shape `(B, T)`):
            Values at rollout time.
        returns (`torch.Tensor` of shape `(B, T)`):
            Targets, from [`lambda_returns`].
        clip_range (`float` or `None`, *optional*, defaults to `0.2`):
            How far a value may move from the old one. `None` clips nothing.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    # broadcasting (B, 1) with (B, T), or (B,) with (B, B), would take a wrong shape without a word
    if not values.shape == old_values.shape == returns.shape:
        raise ValueError(
            "`values`, `old_values` and `returns` must have one shape, got "
            f"{tuple(values.shape)}, {tuple(old_values.shape)} and {tuple(returns.shape)}."
        )
    errors = (values - returns).square()
    if clip_range is None:
        return 0.5 * errors
    if clip_range < 0:
        raise ValueError(f"`clip_range` must be at least 0, or None for no clipping, got {clip_range}.")
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum(errors, (clipped - returns).square())


def kl_k1(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """
    KL(pi || pi_ref) of tokens sampled from pi, first estimator (http://joschu.net/blog/kl-approx.html):

        k1 = log pi - log pi_ref

    Unbiased, of either sign. The one to subtract from rewards.
    """
    return logps - ref_logps


def kl_k2(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """
    KL(pi || pi_ref) of tokens sampled from pi, second estimator:

        k2 = 1/2 (log pi - log pi_ref)^2

    Biased, never negative.
    """
    return 0.5 * (logps - ref_logps).square()


def kl_k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """
    KL(pi || pi_ref) of tokens sampled from pi, third estimator, the one of GRPO's loss:

        k3 = exp(d) - 1 - d,    d = log pi_ref - log pi

    Unbiased as a value, never negative.
    """
    difference = ref_logps - logps
    return torch.expm1(difference) - difference


def adapt_kl_coef(coef: float, kl: float, target: float, n_episodes: int, horizon: float) -> float:
    """
    The KL coefficient for the next rollout (https://huggingface.co/papers/1909.08593):

        coef' = coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_episodes / horizon)

    Args:
        coef (`float`):
            Current coefficient: the controller's only state.
        kl (`float`):
            KL to the reference measured in the rollout, summed over each episode and averaged over episodes.
        target (`float`):
            KL to hold.
        n_episodes (`int`):
            Episodes in the rollout, over all processes.
        horizon (`float`):
            Episodes over which the coefficient adapts.

    Returns:
        `float`: the new coefficient.
    """
    if target <= 0:
        raise ValueError(f"`target` must be positive, got {target}.")
    if 0.2 * n_episodes >= horizon:
        raise ValueError(
            f"`horizon`={horizon} is too short for `n_episodes`={n_episodes}: the coefficient could reach 0 and stay "
            f"there. Make it longer than {0.2 * n_episodes:g}."
        )
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * n_episodes / horizon)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Share of the returns' variance that the values explain:

        ev = 1 - Var(R - V) / Var(R)

    1 is perfect, 0 is no better than a constant, below 0 is worse.

    Args:
        values (`torch.Tensor`):
            Predicted values.
        returns (`torch.Tensor` of the same shape):
            What they should have been.
        mask (`torch.Tensor` of the same shape):
            Which entries count.

    Returns:
        `torch.Tensor` without dimensions; NaN, which TRL's metrics leave out, where the returns do not vary.
    """
    if values.shape != returns.shape:
        raise ValueError(f"`values` and `returns` differ in shape: {tuple(values.shape)} and {tuple(returns.shape)}.")
    _, _, unexplained = masked_moments(returns - values, mask)
    _, _, total = masked_moments(returns, mask)
    return torch.where(total > 0, 1 - unexplained / total, torch.nan)
