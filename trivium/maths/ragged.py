"""Operations on flat tensors whose segments have unequal lengths.

A tensor ``x_T`` holds the tokens of N responses end to end, and ``lengths_N`` says how many belong
to each. Inputs and outputs are never padded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all tensors have the same shape, so that "−" never broadcasts."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    if len(set(shapes.values())) > 1:
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these tensors must have the same shape: {listing}")


def require_lengths(lengths_N: Tensor, total: int) -> None:
    """Raise ``ValueError`` unless ``lengths_N`` are integers ≥ 0 that add up to ``total``."""
    if lengths_N.dim() != 1 or lengths_N.is_floating_point():
        shape = tuple(lengths_N.shape)
        raise ValueError(f"lengths must be a vector of integers, got {lengths_N.dtype} {shape}")
    if lengths_N.numel() and int(lengths_N.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths_N.min())}")
    if int(lengths_N.sum()) != total:
        raise ValueError(f"lengths add up to {int(lengths_N.sum())}, but there are {total} values")


def segment_ids(lengths_N: Tensor) -> Tensor:
    """``[2, 0, 3] -> [0, 0, 2, 2, 2]``: the segment of each flat position."""
    index_N = torch.arange(len(lengths_N), device=lengths_N.device)
    return torch.repeat_interleave(index_N, lengths_N)


def segment_starts(lengths_N: Tensor) -> Tensor:
    """``[2, 0, 3] -> [0, 2, 2]``: the flat position of each segment's first token."""
    return torch.cumsum(lengths_N, 0) - lengths_N


def segment_sum(x_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum of each segment, ``[N]``; an empty segment sums to 0. Differentiable in ``x_T``."""
    require_lengths(lengths_N, len(x_T))
    sums_N = x_T.new_zeros(len(lengths_N))
    return sums_N.index_add(0, segment_ids(lengths_N), x_T)


def segment_mean(x_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Mean of each segment, ``[N]``; an empty segment has mean 0. Differentiable in ``x_T``."""
    return segment_sum(x_T, lengths_N) / lengths_N.clamp(min=1).to(x_T.dtype)


def repeat_per_segment(x_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Repeat each segment's value over its tokens: ``[N] -> [T]``."""
    if len(x_N) != len(lengths_N):
        raise ValueError(f"{len(x_N)} values for {len(lengths_N)} segments")
    return torch.repeat_interleave(x_N, lengths_N)


def suffix_sum(x_T: Tensor, lengths_N: Tensor, discount: float = 1.0) -> Tensor:
    """``y_t = x_t + discount · y_{t+1}`` inside each segment, with y = 0 after its end, ``[T]``.

    Discounted returns, GAE (discount γλ) and process advantages are this recursion.
    """
    require_lengths(lengths_N, len(x_T))
    if len(x_T) == 0:
        return x_T.clone()
    longest = int(lengths_N.max())
    # Rows are aligned at the last token, so that one backward loop serves all segments.
    row_T = segment_ids(lengths_N)
    end_N = torch.cumsum(lengths_N, 0)
    column_T = (
        longest - repeat_per_segment(end_N, lengths_N) + torch.arange(len(x_T), device=x_T.device)
    )
    dense_NL = x_T.new_zeros(len(lengths_N), longest).index_put((row_T, column_T), x_T)
    columns = list(dense_NL.unbind(1))
    for t in range(longest - 2, -1, -1):
        columns[t] = columns[t] + discount * columns[t + 1]
    return torch.stack(columns, 1)[row_T, column_T]
