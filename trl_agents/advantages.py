# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
From returns to advantages: group baselines, whitening, spreading turn values over tokens. Tensors only.

Nothing here communicates: in a distributed run the caller gathers, and these functions take the global tensors. The
episodes of a group are `num_generations` consecutive rows, as TRL's sampler lays them out.
"""

from __future__ import annotations

import torch

from .returns import discounted_returns


SCALES = ("group", "batch", "none")
EPS = 1e-4  # TRL's; keeps a group without differences at 0


def group_advantages(
    returns: torch.Tensor, num_generations: int, scale: str = "group", valid: torch.Tensor | None = None
) -> torch.Tensor:
    """
    One advantage per episode, as TRL computes it (https://huggingface.co/papers/2402.03300):

        A_i = (R_i - mean(R of i's group)) / (std + 1e-4)

    Args:
        returns (`torch.Tensor` of shape `(N,)`):
            Return of each episode. NaN marks an episode that weighs nothing.
        num_generations (`int`):
            Episodes per group.
        scale (`str`, *optional*, defaults to `"group"`):
            Where the unbiased std is taken: over the `"group"`, over the `"batch"`, or `"none"` to divide by nothing.
        valid (`torch.Tensor` of shape `(N,)`, *optional*):
            Which episodes count. The others stay out of mean and std and get 0.

    Returns:
        `torch.Tensor` of shape `(N,)`. An episode without another to compare with gets 0.
    """
    if returns.ndim != 1:
        raise ValueError(f"`returns` must have shape (N,), got {tuple(returns.shape)}.")
    _check_groups(returns, "returns", valid, "valid", num_generations, scale)
    if valid is not None:
        returns = torch.where(valid.bool(), returns, torch.nan)
    grouped = returns.unflatten(0, (-1, num_generations))  # (N / G, G)
    advantages = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale != "none":
        pool = grouped if scale == "group" else returns.unsqueeze(0)
        count = (~pool.isnan()).sum(dim=1, keepdim=True)
        variance = (pool - pool.nanmean(dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True) / (count - 1)
        advantages = advantages / (variance.sqrt() + EPS)
    return advantages.flatten().nan_to_num(nan=0.0)  # NaN: not valid, or a variance of one episode


def turn_advantages(
    rewards: torch.Tensor, mask: torch.Tensor, num_generations: int, discount: float = 1.0, scale: str = "group"
) -> torch.Tensor:
    """
    One advantage per turn: the return-to-go minus its Monte-Carlo baseline, the mean over the group's episodes at the
    same turn (https://huggingface.co/papers/2504.16078):

        G_k = r_k + discount * G_{k+1}
        A_ik = (G_ik - mean(G_jk over the episodes j of i's group that have a turn k)) / (std + 1e-4)

    With one turn this is [`group_advantages`], but for `scale="batch"`, whose std is there that of the returns. Sound
    for episodes of one length only: where lengths differ, the episodes that reach turn k are a biased sample, and one
    that is alone there learns nothing.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`):
            Reward of each turn.
        mask (`torch.Tensor` of shape `(N, K)`):
            Which turns exist: the first ones of each episode, none of an episode that weighs nothing.
        num_generations (`int`):
            Episodes per group.
        discount (`float`, *optional*, defaults to `1.0`):
            Weight of the following turn.
        scale (`str`, *optional*, defaults to `"group"`):
            Where the unbiased std of the advantages is taken: over all turns of the `"group"`, over all turns of the
            `"batch"`, or `"none"` to divide by nothing.

    Returns:
        `torch.Tensor` of shape `(N, K)`, 0 where no turn exists or no other episode has that turn.
    """
    if rewards.ndim != 2:
        raise ValueError(f"`rewards` must have shape (N, K), got {tuple(rewards.shape)}.")
    _check_groups(rewards, "rewards", mask, "mask", num_generations, scale)
    returns = discounted_returns(rewards, torch.full_like(rewards, discount), mask)  # (N, K)
    grouped = returns.unflatten(0, (-1, num_generations))  # (N / G, G, K)
    exists = mask.bool().to(returns.dtype).unflatten(0, (-1, num_generations))
    advantages = (grouped - _mean(grouped, exists, dim=1)) * exists
    if scale != "none":
        # Pooled over the turns: a std per turn would blow the small differences of the last turns up to the size of
        # the first ones'. The advantages have mean 0 by construction.
        dim = (1, 2) if scale == "group" else (0, 1, 2)
        count = exists.sum(dim, keepdim=True)
        variance = advantages.square().sum(dim, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + EPS)
    return advantages.flatten(0, 1)


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    eps: float = 1e-8,
    unbiased: bool = True,
    moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Masked whitening:

        w_i = (x_i - mean(x)) / sqrt(var(x) + eps)

    Args:
        values (`torch.Tensor`):
            Values to whiten, of any shape.
        mask (`torch.Tensor` of the same shape):
            Which values count. The others come out as 0.
        shift_mean (`bool`, *optional*, defaults to `True`):
            Whether the result has mean 0. If `False` the mean is put back, which is the custom for rewards.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the variance.
        unbiased (`bool`, *optional*, defaults to `True`):
            Whether the variance divides by the count less one.
        moments (`torch.Tensor` of shape `(3,)`, *optional*, defaults to those of `values`):
            Moments to whiten by, from [`combine_moments`] in a distributed run.

    Returns:
        `torch.Tensor` of the same shape. Equal values become 0, without `shift_mean` they stay.
    """
    count, mean, squares = masked_moments(values, mask) if moments is None else moments
    variance = squares / (count - int(unbiased)).clamp(min=1)
    whitened = (values - mean) * (variance + eps).rsqrt()
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask.bool(), whitened, 0)


def masked_moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Count, mean and sum of squared deviations of the values under the mask. One tensor, so that one gather moves it.

    Args:
        values (`torch.Tensor`):
            Values of any shape.
        mask (`torch.Tensor` of the same shape):
            Which values count.

    Returns:
        `torch.Tensor` of shape `(3,)`, at least float32. All 0 under an empty mask.
    """
    if values.shape != mask.shape:
        raise ValueError(f"`mask` must have the shape of the values, {tuple(values.shape)}, got {tuple(mask.shape)}.")
    if not values.is_floating_point():
        raise ValueError(f"The values must be a float tensor, got {values.dtype}: convert them with `.float()`.")
    dtype = torch.promote_types(values.dtype, torch.float32)  # half precision would lose the count and `eps`
    weights = mask.bool().to(dtype)
    values = torch.where(mask.bool(), values, 0).to(dtype)
    mean = _mean(values, weights)
    return torch.stack([weights.sum(), mean.squeeze(), (weights * (values - mean).square()).sum()])


def combine_moments(moments: torch.Tensor) -> torch.Tensor:
    """
    Moments of the union of several parts, as of the ranks of a distributed run (Chan, Golub and LeVeque, 1983):

        n = sum n_r,    mean = sum n_r mean_r / n,    M = sum (M_r + n_r (mean_r - mean)^2)

    Args:
        moments (`torch.Tensor` of shape `(R, 3)`):
            One row of [`masked_moments`] for each part.

    Returns:
        `torch.Tensor` of shape `(3,)`.
    """
    if moments.ndim != 2 or moments.shape[1] != 3:
        raise ValueError(f"`moments` must have shape (R, 3), got {tuple(moments.shape)}.")
    counts, means, squares = moments.unbind(1)
    mean = _mean(means, counts)
    return torch.stack([counts.sum(), mean.squeeze(), (squares + counts * (means - mean).square()).sum()])


def spread_over_tokens(turn_values: torch.Tensor, turn_index: torch.Tensor) -> torch.Tensor:
    """
    Give every action token the value of its turn.

    Args:
        turn_values (`torch.Tensor` of shape `(B, K)`):
            One value per turn.
        turn_index (`torch.Tensor` of shape `(B, T)`):
            Turn each action token belongs to, -1 for tokens that carry no loss.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 where `turn_index` is -1.
    """
    if turn_values.ndim != 2 or turn_index.ndim != 2 or len(turn_values) != len(turn_index):
        raise ValueError(
            "`turn_values` must have shape (B, K) and `turn_index` (B, T), got "
            f"{tuple(turn_values.shape)} and {tuple(turn_index.shape)}."
        )
    n_turns = turn_values.shape[1]
    if (turn_index >= n_turns).any():
        raise ValueError(
            f"`turn_index` holds turn {turn_index.max().item()}, but `turn_values` of shape "
            f"{tuple(turn_values.shape)} has turns 0 to {n_turns - 1}."
        )
    no_turn = turn_values.new_zeros(len(turn_values), 1)
    padded = torch.cat([turn_values, no_turn], dim=1)  # (B, K + 1)
    return padded.gather(1, torch.where(turn_index < 0, n_turns, turn_index))


def _mean(values: torch.Tensor, weights: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """mean = sum w x / sum w, with the reduced dimensions kept; 0 where nothing weighs"""
    total = weights.sum(dim, keepdim=True).clamp(min=1)
    mean = (weights * values).sum(dim, keepdim=True) / total
    # The second pass takes out the rounding of the first, which a tiny std would blow up: equal values must give 0.
    return mean + (weights * (values - mean)).sum(dim, keepdim=True) / total


def _check_groups(
    values: torch.Tensor, name: str, mask: torch.Tensor | None, mask_name: str, num_generations: int, scale: str
) -> None:
    shape = tuple(values.shape)
    if not values.is_floating_point():
        raise ValueError(f"`{name}` must be a float tensor, got {values.dtype}: convert it with `.float()`.")
    if mask is not None and mask.shape != values.shape:
        raise ValueError(f"`{mask_name}` must have the shape of `{name}`, {shape}, got {tuple(mask.shape)}.")
    if num_generations < 1 or shape[0] % num_generations != 0:
        raise ValueError(
            f"`{name}` of shape {shape} does not split into groups of `num_generations`={num_generations}."
        )
    if scale not in SCALES:
        raise ValueError(f"`scale` must be one of {', '.join(map(repr, SCALES))}, got {scale!r}.")
