"""Token weights: how per-token losses become one number.

A loss is ``Σ_t w_t ℓ_t``. The weights are computed once for a whole optimizer step, before it is
split into micro-batches, so gradients cannot depend on the splitting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.maths.options import Aggregation
from trivium.maths.ragged import (
    repeat_per_segment,
    require_lengths,
    require_same_shape,
    segment_sum,
)


def token_weights(
    lengths_N: Tensor,
    aggregation: Aggregation = "sequence_mean",
    *,
    loss_mask_T: Tensor | None = None,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of every response token in the loss of one optimizer step, ``[T]``.

    - ``sequence_mean``: ``1/(N·|o_i|)``, the mean over responses of the mean over tokens
      (GRPO, Shao et al. 2024, eq. 3; the PPO objective of the note).
    - ``token_mean``: ``1/Σ_i |o_i|``, every token counts the same (DAPO, Yu et al. 2025, eq. 8).
    - ``fixed_length``: ``1/(N·max_length)``, a constant that does not depend on the response's own
      length, so that the expected gradient is that of the expected reward
      (Dr. GRPO, Liu et al. 2025).

    ``loss_mask_T`` marks the tokens that the policy wrote; others weigh 0 and do not count in |o_i|.
    N counts the responses that hold at least one trained token. With none at all, weights are 0.
    """
    total = int(lengths_N.sum())
    require_lengths(lengths_N, total)
    if loss_mask_T is None:
        loss_mask_T = torch.ones(total, dtype=torch.bool, device=lengths_N.device)
    if len(loss_mask_T) != total:
        raise ValueError(
            f"loss_mask_T marks {len(loss_mask_T)} tokens, but the responses hold {total}"
        )
    mask_T = loss_mask_T.to(dtype)
    counts_N = segment_sum(mask_T, lengths_N)
    responses = (counts_N > 0).sum().clamp(min=1).to(dtype)
    if aggregation == "sequence_mean":
        return mask_T / (responses * repeat_per_segment(counts_N.clamp(min=1), lengths_N))
    if aggregation == "token_mean":
        return mask_T / mask_T.sum().clamp(min=1)
    if aggregation == "fixed_length":
        if max_length is None or max_length < 1:
            raise ValueError(f"fixed_length needs max_length ≥ 1, got {max_length}")
        return mask_T / (responses * max_length)
    raise ValueError(
        f"unknown aggregation {aggregation!r}: sequence_mean, token_mean or fixed_length"
    )


def weighted_sum(loss_T: Tensor, weights_T: Tensor) -> Tensor:
    """``Σ_t w_t ℓ_t``; a token of weight 0 contributes exactly 0, and a NaN elsewhere stays one."""
    require_same_shape(loss_T=loss_T, weights_T=weights_T)
    return torch.where(weights_T == 0, 0.0, weights_T * loss_T).sum()
