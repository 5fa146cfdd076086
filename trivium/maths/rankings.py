"""Comparisons of ranked responses, from which reward models learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trivium.maths.objectives import bradley_terry_loss, tie_loss
from trivium.maths.ragged import (
    repeat_per_segment,
    require_lengths,
    require_same_shape,
    segment_starts,
)


class Comparisons(NamedTuple):
    """All comparisons within each ranking of K responses, C(K, 2) of them, ``[P]``.

    Attributes:
        better_P, worse_P: index of the two responses, flat; of a tie, in their order.
        tied_P: bool; whether both responses have the same label.
        ranking_P: index of the ranking.
        weights_P: 1/C(K, 2) in float64, so that all comparisons of a prompt together count once.
    """

    better_P: Tensor
    worse_P: Tensor
    tied_P: Tensor
    ranking_P: Tensor
    weights_P: Tensor


def comparisons(labels_N: Tensor, sizes_G: Tensor) -> Comparisons:
    """Compare each response with each other of its ranking, by their labels; higher is better.

    Raises:
        ValueError: a ranking has one response.
    """
    require_lengths(sizes_G, len(labels_N))
    if len(sizes_G) and int(sizes_G.min()) < 2:
        raise ValueError(
            f"a ranking compares at least 2 responses, got one of {int(sizes_G.min())}"
        )
    pairs = [torch.combinations(torch.arange(int(size))) for size in sizes_G]
    counts_G = torch.tensor([len(p) for p in pairs], dtype=torch.long)
    offset_P = repeat_per_segment(segment_starts(sizes_G.cpu()), counts_G)
    flat = torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)
    first_P, second_P = (flat + offset_P[:, None]).to(labels_N.device).unbind(1)
    swapped_P = labels_N[second_P] > labels_N[first_P]
    return Comparisons(
        better_P=torch.where(swapped_P, second_P, first_P),
        worse_P=torch.where(swapped_P, first_P, second_P),
        tied_P=labels_N[first_P] == labels_N[second_P],
        ranking_P=repeat_per_segment(torch.arange(len(sizes_G)), counts_G).to(labels_N.device),
        weights_P=repeat_per_segment(1 / counts_G.double(), counts_G).to(labels_N.device),
    )


def ranking_losses(
    scores_N: Tensor,
    found: Comparisons,
    *,
    counts_ties_N: Tensor | None = None,
    margin_N: Tensor | None = None,
) -> Tensor:
    """``−log σ(s_w − s_l − m)`` of every comparison, ``[P]`` (Ouyang et al. 2022, eq. 1).

    Weighted by ``1/C(K, 2)`` and summed, it is the paper's loss. A tie is 0, or ``tie_loss`` where
    ``counts_ties_N`` is set. ``m = margin_w − margin_l`` (Touvron et al. 2023, eq. 2).
    """
    require_same_shape(scores_N=scores_N, counts_ties_N=counts_ties_N, margin_N=margin_N)
    better_P, worse_P = scores_N[found.better_P], scores_N[found.worse_P]
    gap_P = None if margin_N is None else margin_N[found.better_P] - margin_N[found.worse_P]
    decided_P = bradley_terry_loss(better_P, worse_P, margin_P=gap_P)
    tied_P = torch.zeros_like(decided_P)
    if counts_ties_N is not None:
        tied_P = torch.where(counts_ties_N[found.better_P], tie_loss(better_P, worse_P), tied_P)
    return torch.where(found.tied_P, tied_P, decided_P)
