"""Token weights: how per-token losses become one number.

A loss is ``Σ_t w_t ℓ_t``. The weights are computed once for a whole optimizer step, before the
step is split into micro-batches, so gradients cannot depend on the split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trivium.maths.ragged import (
    repeat_per_segment,
    require_lengths,
    require_same_shape,
    segment_sum,
)

Aggregation = Callable[[Tensor, Tensor, int | None], Tensor]
"""Compute token weights ``[T]`` from a 0/1 mask ``[T]``, lengths ``[N]`` and the length limit."""


def sequence_mean(mask_T: Tensor, lengths_N: Tensor, max_length: int | None = None) -> Tensor:
    """``1/(N·|o_i|)``: the mean over responses of the mean over tokens, ``[T]``.

    Used by PPO and GRPO as Shao et al. 2024 write them (eq. 1 and 3).
    """
    counts_N = segment_sum(mask_T, lengths_N)
    per_token_T = repeat_per_segment(counts_N.clamp(min=1), lengths_N)
    return mask_T / (_trained_responses(counts_N) * per_token_T)


def token_mean(mask_T: Tensor, lengths_N: Tensor, max_length: int | None = None) -> Tensor:
    """``1/Σ_i |o_i|``: every token counts the same, ``[T]`` (DAPO, Yu et al. 2025, eq. 8)."""
    return mask_T / mask_T.sum().clamp(min=1)


def fixed_length(mask_T: Tensor, lengths_N: Tensor, max_length: int | None = None) -> Tensor:
    """``1/(N·max_length)``: a constant, ``[T]`` (Dr. GRPO, Liu et al. 2025).

    The weight does not depend on the response's own length, so the expected gradient is that of
    the expected reward.
    """
    if max_length is None or max_length < 1:
        raise ValueError(f"fixed_length needs max_length ≥ 1, got {max_length}")
    return mask_T / (_trained_responses(segment_sum(mask_T, lengths_N)) * max_length)


def token_weights(
    lengths_N: Tensor,
    aggregation: Aggregation = sequence_mean,
    *,
    loss_mask_T: Tensor | None = None,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight of every response token in the loss of one optimizer step, ``[T]``.

    ``loss_mask_T`` marks the tokens that are trained on; others weigh 0 and do not count in
    ``|o_i|``. N counts the responses with at least one trained token. If there is none, all weights
    are 0.
    """
    total = int(lengths_N.sum())
    require_lengths(lengths_N, total)
    if loss_mask_T is None:
        loss_mask_T = torch.ones(total, dtype=torch.bool, device=lengths_N.device)
    if len(loss_mask_T) != total:
        raise ValueError(
            f"loss_mask_T marks {len(loss_mask_T)} tokens, but the responses hold {total}"
        )
    return aggregation(loss_mask_T.to(dtype), lengths_N, max_length)


def weighted_sum(loss_T: Tensor, weights_T: Tensor) -> Tensor:
    """``Σ_t w_t ℓ_t``; a token of weight 0 contributes exactly 0, and a NaN elsewhere stays NaN."""
    require_same_shape(loss_T=loss_T, weights_T=weights_T)
    return torch.where(weights_T == 0, 0.0, weights_T * loss_T).sum()


def _trained_responses(counts_N: Tensor) -> Tensor:
    """Return the number of responses with at least one trained token, at least 1."""
    return (counts_N > 0).sum().clamp(min=1).to(counts_N.dtype)
