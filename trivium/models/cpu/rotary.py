"""Rotary position embeddings (Su et al. 2021, equation 34) as products of complex numbers.

Coordinates ``i`` and ``i + W/2`` of a head form a plane, which position ``p`` rotates by ``p θ_i``:

    y_i + j y_{i+W/2} = (x_i + j x_{i+W/2}) · exp(j p θ_i)

Here both coordinates are adjacent, as one complex number. The weights are reordered for it
(``interleave_pairs``), not the heads: products of queries and keys do not depend on the order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIXED = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary embeddings that rotate a position by the same angle in every forward pass."""
TABLE_MARGIN = 256
"""Positions beyond the longest row for which a table is computed in advance."""


def interleave_pairs(width: int, rotated: int = 1, others: int = 0) -> Tensor:
    """Return the order of coordinates in which the two of each plane are adjacent.

    It reorders ``rotated`` heads; the ``others`` behind them keep their order.
    """
    places = torch.arange((rotated + others) * width).view(-1, width)
    planes = places[:rotated].unflatten(1, (2, -1)).transpose(1, 2)
    return torch.cat([planes.reshape(-1), places[rotated:].reshape(-1)])


class RotaryEmbedding:
    """The rotation of each token's heads, whose coordinates are in ``interleave_pairs`` order.

    Args:
        factor_L1P: the complex factor of each plane.
    """

    def __init__(self, factor_L1P: Tensor) -> None:
        self.factor_L1P = factor_L1P

    @classmethod
    def of(cls, cos_LW: Tensor, sin_LW: Tensor) -> RotaryEmbedding:
        """Convert the cosines and sines of ``transformers``, whose two halves are equal."""
        wide = torch.promote_types(cos_LW.dtype, torch.float32)
        cos_LP, sin_LP = (x.chunk(2, 1)[0].to(wide) for x in (cos_LW, sin_LW))
        return cls(torch.complex(cos_LP, sin_LP)[:, None])

    def __call__(self, x_LHW: Tensor) -> Tensor:
        """Return rotated copies of heads."""
        planes = _planes(self._wide(x_LHW))
        return torch.view_as_real(planes * self.factor_L1P).flatten(2).to(x_LHW.dtype)

    def rotate_(self, x_LHW: Tensor) -> None:
        """Rotate heads in place."""
        wide = self._wide(x_LHW)
        _planes(wide).mul_(self.factor_L1P)
        if wide is not x_LHW:
            x_LHW.copy_(wide)

    def transposed(self) -> RotaryEmbedding:
        """Return the transposed rotation, which the backward pass applies."""
        return RotaryEmbedding(self.factor_L1P.conj_physical())

    def _wide(self, x_LHW: Tensor) -> Tensor:
        return x_LHW.to(self.factor_L1P.dtype.to_real())


def _planes(x_LHW: Tensor) -> Tensor:
    return torch.view_as_complex(x_LHW.unflatten(2, (-1, 2)))


class RotaryTable:
    """The rotations of a backbone, from a table where they depend on the position alone."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.fixed = getattr(rotary, "rope_type", None) in FIXED
        self._table: Tensor | None = None

    def __call__(self, position_L: Tensor, longest: int, like_LD: Tensor) -> RotaryEmbedding:
        """Return the rotations of positions below ``longest``, in the type of ``like_LD``."""
        if not self.fixed:
            return self._computed(position_L, like_LD)
        if self._table is None or longest > len(self._table):
            positions = torch.arange(longest + TABLE_MARGIN, device=position_L.device)
            self._table = self._computed(positions, like_LD).factor_L1P
        return RotaryEmbedding(self._table.index_select(0, position_L))

    def _computed(self, position_L: Tensor, like_LD: Tensor) -> RotaryEmbedding:
        cos, sin = self.rotary(like_LD[None], position_L[None])
        return RotaryEmbedding.of(cos[0], sin[0])
