"""Rotary position embeddings (Su et al. 2021, equation 34) as products of complex numbers.

Coordinates ``i`` and ``i + W/2`` of a head make a plane, which position ``p`` turns by ``p θ_i``:

    y_i + j y_{i+W/2} = (x_i + j x_{i+W/2}) · exp(j p θ_i)

Here the two lie beside each other, as one complex number. Weights are brought into that order
(``interleave_pairs``) and not heads: products of queries and keys do not depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIXED = {"default", "linear", "llama3", "yarn"}
"""Kinds in which a position is turned alike in every pass."""
AHEAD = 256
"""For so many further positions a table is made beforehand."""


def interleave_pairs(width: int, rotated: int = 1, others: int = 0) -> Tensor:
    """The order of all coordinates of heads in which those of a plane lie beside each other.

    Of ``rotated`` heads; that of ``others`` behind them stays as it is.
    """
    places = torch.arange((rotated + others) * width).view(-1, width)
    planes = places[:rotated].unflatten(1, (2, -1)).transpose(1, 2)
    return torch.cat([planes.reshape(-1), places[rotated:].reshape(-1)])


class RotaryEmbedding:
    """How far the heads of each token of a line are turned; their coordinates are ``interleave_pairs``.

    Args:
        factor_L1P: the complex number that each plane is multiplied by.
    """

    def __init__(self, factor_L1P: Tensor) -> None:
        self.factor_L1P = factor_L1P

    @classmethod
    def of(cls, cos_LW: Tensor, sin_LW: Tensor) -> RotaryEmbedding:
        """From what ``transformers`` hands to its layers, where both halves of a head are alike."""
        wide = torch.promote_types(cos_LW.dtype, torch.float32)
        cos_LP, sin_LP = (x.chunk(2, 1)[0].to(wide) for x in (cos_LW, sin_LW))
        return cls(torch.complex(cos_LP, sin_LP)[:, None])

    def __call__(self, x_LHW: Tensor) -> Tensor:
        """Turned copies of heads."""
        planes = _planes(self._wide(x_LHW))
        return torch.view_as_real(planes * self.factor_L1P).flatten(2).to(x_LHW.dtype)

    def rotate_(self, x_LHW: Tensor) -> None:
        """Turn heads where they lie."""
        wide = self._wide(x_LHW)
        _planes(wide).mul_(self.factor_L1P)
        if wide is not x_LHW:
            x_LHW.copy_(wide)

    def transposed(self) -> RotaryEmbedding:
        """What turns a gradient back: the transposed matrix."""
        return RotaryEmbedding(self.factor_L1P.conj_physical())

    def _wide(self, x_LHW: Tensor) -> Tensor:
        return x_LHW.to(self.factor_L1P.dtype.to_real())


def _planes(x_LHW: Tensor) -> Tensor:
    return torch.view_as_complex(x_LHW.unflatten(2, (-1, 2)))


class RotaryTable:
    """The rotations of a backbone, looked up by position where they depend on nothing else."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.fixed = getattr(rotary, "rope_type", None) in FIXED
        self._table: Tensor | None = None

    def __call__(self, position_L: Tensor, longest: int, like_LD: Tensor) -> RotaryEmbedding:
        """The rotation of tokens at these positions, all below ``longest``, of the type of
        ``like_LD``."""
        if not self.fixed:
            return self._made(position_L, like_LD)
        if self._table is None or longest > len(self._table):
            positions = torch.arange(longest + AHEAD, device=position_L.device)
            self._table = self._made(positions, like_LD).factor_L1P
        return RotaryEmbedding(self._table.index_select(0, position_L))

    def _made(self, position_L: Tensor, like_LD: Tensor) -> RotaryEmbedding:
        cos, sin = self.rotary(like_LD[None], position_L[None])
        return RotaryEmbedding.of(cos[0], sin[0])
