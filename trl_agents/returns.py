# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a step was worth: discounted returns, generalized advantages, lambda-returns. Tensors only.

A step is whatever the caller counts by, a turn or a token. `discounts[k]` weighs what follows step k, so it carries
the end of the episode: 0 where the episode terminated, the discount everywhere else, also where it was truncated.
Everything is differentiable: targets come out detached only if `values` went in detached.
"""

from __future__ import annotations

import torch


def discounted_returns(
    rewards: torch.Tensor, discounts: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return-to-go of every step:

        G_k = r_k + discount_k * G_{k+1},    G_K = 0

    Args:
        rewards (`torch.Tensor` of shape `(K,)` or `(B, K)`):
            Reward of each step. Padding after the end of an episode holds 0.
        discounts (`torch.Tensor` of the same shape):
            Weight of what follows each step: 0 where the episode terminated and in the padding.
        mask (`torch.Tensor` of the same shape, *optional*):
            Which steps exist. With it the padding may hold anything, and its results are 0.

    Returns:
        `torch.Tensor` of the same shape.
    """
    _check_shapes(rewards, discounts, None, mask)
    if mask is not None:
        rewards, discounts = torch.where(mask.bool(), rewards, 0), torch.where(mask.bool(), discounts, 0)
    return _accumulate(rewards, discounts)


def generalized_advantages(
    rewards: torch.Tensor,
    discounts: torch.Tensor,
    values: torch.Tensor,
    lambda_: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Generalized advantage estimation (https://huggingface.co/papers/1506.02438):

        delta_k = r_k + discount_k * V_{k+1} - V_k
        A_k = delta_k + discount_k * lambda * A_{k+1},    A_K = 0

    `lambda_=1` gives G_k - V_k (with G_K = V_K), `lambda_=0` gives delta_k.

    Args:
        rewards (`torch.Tensor` of shape `(K,)` or `(B, K)`):
            Reward of each step. Padding after the end of an episode holds 0.
        discounts (`torch.Tensor` of the same shape):
            Weight of what follows each step: 0 where the episode terminated and in the padding.
        values (`torch.Tensor` of shape `(K + 1,)` or `(B, K + 1)`):
            Value of the state before each step. The entry after an episode's last step is the bootstrap, which counts
            only if that step's discount is not 0.
        lambda_ (`float`):
            Weight of the longer returns, from 0 to 1.
        mask (`torch.Tensor` of the shape of `rewards`, *optional*):
            Which steps exist. With it the padding may hold anything, and its results are 0.

            A truncated episode shorter than K needs it: without `mask`, the padding that follows reads as one more
            step from the bootstrap's state, which earned 0 and ended the episode.

    Returns:
        `torch.Tensor` of the shape of `rewards`.
    """
    _check_shapes(rewards, discounts, values, mask)
    if not 0 <= lambda_ <= 1:
        raise ValueError(f"`lambda_` must lie between 0 and 1, got {lambda_}.")
    deltas = rewards + discounts * values[..., 1:] - values[..., :-1]
    decays = discounts * lambda_
    if mask is not None:
        deltas, decays = torch.where(mask.bool(), deltas, 0), torch.where(mask.bool(), decays, 0)
    return _accumulate(deltas, decays)


def lambda_returns(
    rewards: torch.Tensor,
    discounts: torch.Tensor,
    values: torch.Tensor,
    lambda_: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Lambda-returns, the targets of the value function:

        R_k = r_k + discount_k * ((1 - lambda) * V_{k+1} + lambda * R_{k+1}),    R_K = V_K

    which is A_k + V_k with the raw advantages of [`generalized_advantages`]: never add values to whitened ones.

    Args:
        rewards, discounts, values, lambda_, mask:
            As in [`generalized_advantages`].

    Returns:
        `torch.Tensor` of the shape of `rewards`.
    """
    returns = generalized_advantages(rewards, discounts, values, lambda_, mask) + values[..., :-1]
    return returns if mask is None else torch.where(mask.bool(), returns, 0)


def _accumulate(terms: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
    """x_k = terms_k + decays_k * x_{k+1}, x_K = 0"""
    following = terms.new_zeros(terms.shape[:-1])
    reversed_sums = []
    for term, decay in zip(reversed(terms.unbind(-1)), reversed(decays.unbind(-1)), strict=True):
        following = term + decay * following
        reversed_sums.append(following)
    return torch.stack(reversed_sums[::-1], dim=-1) if reversed_sums else terms.clone()


def _check_shapes(
    rewards: torch.Tensor, discounts: torch.Tensor, values: torch.Tensor | None, mask: torch.Tensor | None
) -> None:
    if rewards.ndim not in (1, 2):
        raise ValueError(f"`rewards` must have shape (K,) or (B, K), got {tuple(rewards.shape)}.")
    steps = rewards.shape
    expected = {"discounts": (discounts, steps)}
    if values is not None:
        expected["values"] = (values, (*steps[:-1], steps[-1] + 1))
    if mask is not None:
        expected["mask"] = (mask, steps)
    for name, (tensor, shape) in expected.items():
        # broadcasting would take a wrong shape without a word
        if tensor.shape != torch.Size(shape):
            raise ValueError(
                f"`{name}` must have shape {tuple(shape)} beside `rewards` of shape {tuple(steps)}, got "
                f"{tuple(tensor.shape)}." + (" Its last entry is the bootstrap." if name == "values" else "")
            )
    for name, tensor in {"rewards": rewards, "discounts": discounts, "values": values}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be a float tensor, got {tensor.dtype}: convert it with `.float()`.")
