"""Advantages: how much better a token was than expected.

PPO computes them from a critic by GAE. GRPO computes them from the rewards of one prompt's group of
responses, for whole responses (outcome) or for reasoning steps (process). Callers compute
them without gradients and keep them fixed while a rollout batch is reused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trivium.maths.options import Scale
from trivium.maths.ragged import (
    repeat_per_segment,
    require_lengths,
    require_same_shape,
    segment_ids,
    segment_mean,
    segment_starts,
    segment_sum,
    suffix_sum,
)

AdvantageEstimator = Callable[..., Tensor]
"""Outcome advantages, ``[N]``, with the arguments of ``group_advantages``."""


def gae(
    rewards_T: Tensor,
    values_T: Tensor,
    lengths_N: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_N: Tensor | None = None,
) -> Tensor:
    """Generalized advantage estimates, ``[T]`` (Schulman et al. 2016, eq. 16).

    ``δ_t = r_t + γ V(s_{t+1}) − V(s_t)`` and ``Â_t = Σ_k (γλ)^k δ_{t+k}``. ``values_T[t]`` is
    V(s_t), read at the position that predicts token t. After a response's last token V is
    ``bootstrap_N``; the default 0 means that the response ended and its score is final.
    """
    if not (0 <= gamma <= 1 and 0 <= gae_lambda <= 1):
        raise ValueError(f"gamma and gae_lambda must be in [0, 1], got {gamma} and {gae_lambda}")
    require_same_shape(rewards_T=rewards_T, values_T=values_T)
    require_lengths(lengths_N, len(rewards_T))
    if bootstrap_N is None:
        bootstrap_N = values_T.new_zeros(len(lengths_N))
    require_same_shape(bootstrap_N=bootstrap_N, lengths_N=lengths_N)
    next_values_T = torch.cat([values_T[1:], values_T.new_zeros(min(1, len(values_T)))])
    nonempty_N = lengths_N > 0
    last_N = (segment_starts(lengths_N) + lengths_N - 1)[nonempty_N]
    next_values_T = next_values_T.index_copy(0, last_N, bootstrap_N[nonempty_N].to(values_T.dtype))
    delta_T = rewards_T + gamma * next_values_T - values_T
    return suffix_sum(delta_T, lengths_N, gamma * gae_lambda)


def return_targets(values_T: Tensor, advantages_T: Tensor) -> Tensor:
    """``Target_t = V_old(s_t) + Â_t``: the λ-return that the critic regresses to, ``[T]``."""
    require_same_shape(values_T=values_T, advantages_T=advantages_T)
    return values_T + advantages_T


def group_advantages(rewards_N: Tensor, sizes_G: Tensor, *, scale: Scale = "sample_std") -> Tensor:
    """``Â_i = (r_i − mean(r)) / std(r)`` within each group, ``[N]`` (Shao et al. 2024, sec. 4.1.2).

    ``scale`` chooses the deviation: sample (n − 1) or population (n) standard deviation of the
    group, that of the whole batch's centered rewards (REINFORCE++-baseline, Hu et al. 2025), or
    none (Dr. GRPO). A group whose rewards are all equal has advantage exactly 0.

    Raises:
        ValueError: a group has one response.
    """
    centered_N = _centered(rewards_N, sizes_G)
    return _scaled(centered_N, _deviation(centered_N, sizes_G, scale))


def leave_one_out_advantages(
    rewards_N: Tensor, sizes_G: Tensor, *, scale: Scale = "none"
) -> Tensor:
    """Like ``group_advantages``, with the mean of the *other* responses as baseline, ``[N]``.

    ``r_i − mean_{j≠i}(r_j) = (r_i − mean(r)) · n/(n − 1)`` (RLOO, Ahmadian et al. 2024).
    """
    centered_N = _centered(rewards_N, sizes_G)
    std_N = _deviation(centered_N, sizes_G, scale)
    sizes_N = repeat_per_segment(sizes_G, sizes_G).to(rewards_N.dtype)
    return _scaled(centered_N * sizes_N / (sizes_N - 1), std_N)


def decoupled_advantages(
    rewards_RN: Tensor,
    weights_R: Tensor,
    sizes_G: Tensor,
    *,
    applies_RN: Tensor | None = None,
    estimator: AdvantageEstimator = group_advantages,
    scale: Scale = "sample_std",
) -> Tensor:
    """GDPO: each reward normalized in its group, then the weighted sum (Liu et al. 2026), ``[N]``.

    ``Â_k = (r_k − mean(r_k)) / std(r_k)`` and ``Σ_k w_k Â_k`` (eq. 4 and 7), for the R rewards in
    ``rewards_RN``. A response that a reward does not apply to (``applies_RN``, bool) is not
    compared by it. Advantages that cancel within rounding sum to exactly 0.
    """
    if rewards_RN.dim() != 2 or weights_R.shape != rewards_RN.shape[:1]:
        shapes = f"{tuple(rewards_RN.shape)} and {tuple(weights_R.shape)}"
        raise ValueError(f"rewards_RN and weights_R must be [R, N] and [R], got {shapes}")
    require_same_shape(rewards_RN=rewards_RN, applies_RN=applies_RN)
    applies_RN = torch.ones_like(rewards_RN, dtype=torch.bool) if applies_RN is None else applies_RN
    parts = [
        _where_it_applies(rewards_N, applies_N, sizes_G, estimator, scale)
        for rewards_N, applies_N in zip(rewards_RN, applies_RN, strict=True)
    ]
    weighted_RN = weights_R[:, None] * torch.stack(parts)
    sum_N, size_N = weighted_RN.sum(0), weighted_RN.abs().sum(0)
    return torch.where(sum_N.abs() <= 8 * torch.finfo(sum_N.dtype).eps * size_N, 0.0, sum_N)


def _where_it_applies(
    rewards_N: Tensor,
    applies_N: Tensor,
    sizes_G: Tensor,
    estimator: AdvantageEstimator,
    scale: Scale,
) -> Tensor:
    """Return advantages among the responses of each group that a reward applies to, else 0."""
    if bool(applies_N.all()):
        return estimator(rewards_N, sizes_G, scale=scale)
    counts_G = segment_sum(applies_N.long(), sizes_G)
    compared_N = applies_N & repeat_per_segment(counts_G > 1, sizes_G)
    advantages_N = torch.zeros_like(rewards_N)
    if bool(compared_N.any()):
        counts_G = counts_G[counts_G > 1]
        advantages_N[compared_N] = estimator(rewards_N[compared_N], counts_G, scale=scale)
    return advantages_N


def normalize_over_batch(advantages_N: Tensor) -> Tensor:
    """``Â / std(Â)`` over all responses of the batch, ``[N]`` (GDPO, Liu et al. 2026, eq. 6).

    The paper also subtracts the batch's mean, which is 0 because that of every group is. Leaving it
    out keeps an advantage of 0 at exactly 0.
    """
    sizes_G = torch.tensor([len(advantages_N)], device=advantages_N.device)
    return _scaled(advantages_N, _deviation(advantages_N, sizes_G, "batch_std"))


def equal_groups(rewards_N: Tensor, sizes_G: Tensor) -> Tensor:
    """Return which groups have all rewards equal, ``[G]`` bool: they carry no signal.

    Equal means within rounding (8 units in the last place): 0.1 + 0.2 equals 0.3. Otherwise the
    division by the standard deviation would turn that difference into advantages of ±1. A NaN
    equals nothing.
    """
    require_lengths(sizes_G, len(rewards_N))
    x_N = rewards_N if rewards_N.is_floating_point() else rewards_N.to(torch.float64)
    group_N = segment_ids(sizes_G)
    largest_G = x_N.new_full((len(sizes_G),), -torch.inf).scatter_reduce(0, group_N, x_N, "amax")
    smallest_G = x_N.new_full((len(sizes_G),), torch.inf).scatter_reduce(0, group_N, x_N, "amin")
    rounding_G = 8 * torch.finfo(x_N.dtype).eps * torch.maximum(largest_G, -smallest_G)
    equal_G = (largest_G == smallest_G) | (largest_G - smallest_G < rounding_G)
    return equal_G | (sizes_G == 0)


def step_advantages(
    rewards_S: Tensor,
    ends_S: Tensor,
    steps_N: Tensor,
    lengths_N: Tensor,
    sizes_G: Tensor,
    *,
    scale: Scale = "sample_std",
) -> Tensor:
    """Process supervision: one advantage per token from its group's step rewards, ``[T]``.

    The step rewards of all responses of a group form one pool,
    ``r̃_{i,j} = (r_{i,j} − mean(pool)) / std(pool)``, and a token of step j gets
    ``Σ_{k ≥ j} r̃_{i,k}`` (Shao et al. 2024, sec. 4.1.3).

    Args:
        rewards_S: the step rewards of all responses, flat.
        ends_S: index *inside its response* of each step's last token, increasing in a response.
        steps_N: the number of steps of each response.
        lengths_N, sizes_G: tokens of each response, responses of each group.
        scale: see ``group_advantages``.

    Tokens after the last step get 0. A pool of fewer than two steps carries no signal: advantage 0.
    """
    require_same_shape(rewards_S=rewards_S, ends_S=ends_S)
    require_lengths(steps_N, len(rewards_S))
    require_same_shape(steps_N=steps_N, lengths_N=lengths_N)
    require_lengths(sizes_G, len(lengths_N))
    limit_S = repeat_per_segment(lengths_N, steps_N)
    if bool(((ends_S < 0) | (ends_S >= limit_S)).any()):
        raise ValueError("a step ends outside its response")
    pool_G = segment_sum(steps_N, sizes_G)
    centered_S = rewards_S - repeat_per_segment(segment_mean(rewards_S, pool_G), pool_G)
    equal_S = repeat_per_segment(equal_groups(rewards_S, pool_G), pool_G)
    centered_S = torch.where(equal_S, 0.0, centered_S)
    normalized_S = torch.where(equal_S, 0.0, centered_S / _deviation(centered_S, pool_G, scale))
    token_S = repeat_per_segment(segment_starts(lengths_N), steps_N) + ends_S
    at_ends_T = normalized_S.new_zeros(int(lengths_N.sum())).index_add(0, token_S, normalized_S)
    return suffix_sum(at_ends_T, lengths_N)


def whiten(x_T: Tensor, selected_T: Tensor | None = None, *, epsilon: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and (population) variance 1 over the selected tokens.

    The statistics are those of the whole rollout batch, never of a micro-batch. Tokens outside the
    selection become 0. Values that are equal within rounding become exactly 0.
    """
    require_same_shape(x_T=x_T, selected_T=selected_T)
    kept_T = torch.ones_like(x_T, dtype=torch.bool) if selected_T is None else selected_T.bool()
    if bool(equal_groups(x_T[kept_T], kept_T.sum()[None])):
        return torch.where(kept_T, x_T - x_T, 0.0)  # 0, and NaN where a value is not finite
    count = kept_T.sum()
    mean = torch.where(kept_T, x_T, 0.0).sum() / count
    centered_T = torch.where(kept_T, x_T - mean, 0.0)
    return centered_T / (centered_T.square().sum() / count + epsilon).sqrt()


def _centered(rewards_N: Tensor, sizes_G: Tensor) -> Tensor:
    """``r_i − mean(r)`` within each group; exactly 0 if the group's rewards are equal, ``[N]``."""
    require_lengths(sizes_G, len(rewards_N))
    if len(sizes_G) and int(sizes_G.min()) < 2:
        raise ValueError(
            "a group of one response has nothing to be compared with: "
            f"sample at least 2 responses per prompt, got {int(sizes_G.min())}"
        )
    centered_N = rewards_N - repeat_per_segment(segment_mean(rewards_N, sizes_G), sizes_G)
    equal_N = repeat_per_segment(equal_groups(rewards_N, sizes_G), sizes_G)
    return torch.where(equal_N, 0.0, centered_N)


def _scaled(centered_N: Tensor, std_N: Tensor) -> Tensor:
    return torch.where(centered_N == 0, 0.0, centered_N / std_N)


def _deviation(centered_N: Tensor, sizes_G: Tensor, scale: Scale) -> Tensor:
    """Return the standard deviation that divides each centered reward, ``[N]``."""
    if scale == "none":
        return torch.ones_like(centered_N)
    if scale == "batch_std":
        deviation = centered_N.square().mean().sqrt() if len(centered_N) else centered_N.sum()
        return torch.full_like(centered_N, float(deviation))
    if scale not in ("sample_std", "population_std"):
        raise ValueError(f"unknown scale {scale!r}: sample_std, population_std, batch_std or none")
    correction = 1 if scale == "sample_std" else 0
    degrees_G = (sizes_G - correction).clamp(min=1).to(centered_N.dtype)
    variance_G = segment_sum(centered_N.square(), sizes_G) / degrees_G
    return repeat_per_segment(variance_G.sqrt(), sizes_G)
