"""Rotary position embeddings (Su et al. 2021, equation 34), halves of a head turned against each
other: ``y_i = x_i cos_i ∓ x_{i ± W/2} sin_i``, minus in the first half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIXED = {"default", "linear", "llama3", "yarn"}
"""Kinds in which a position is turned alike in every pass."""
AHEAD = 256
"""For so many further positions a table is made beforehand."""


class Rotation:
    """How far the heads of each token of a line are turned.

    Args:
        cos_L1W, sin_L1W: cosines and sines, those of the first half of a head negative.
    """

    def __init__(self, cos_L1W: Tensor, sin_L1W: Tensor) -> None:
        self.cos_L1W, self.sin_L1W = cos_L1W, sin_L1W
        self.half = cos_L1W.shape[2] // 2

    @classmethod
    def of(cls, cos_LW: Tensor, sin_LW: Tensor) -> Rotation:
        """From what ``transformers`` hands to its layers."""
        first, second = sin_LW.chunk(2, 1)
        return cls(cos_LW[:, None], torch.cat([-first, second], 1)[:, None])

    def __call__(self, x_LHW: Tensor) -> Tensor:
        turned = torch.roll(x_LHW, self.half, 2)
        return (x_LHW * self.cos_L1W).addcmul_(turned, self.sin_L1W)

    def turn_(self, x_LHW: Tensor) -> None:
        """Turn heads where they lie."""
        turned = torch.roll(x_LHW, self.half, 2)
        x_LHW.mul_(self.cos_L1W).addcmul_(turned, self.sin_L1W)

    def transposed(self) -> Rotation:
        """What turns a gradient back: the transposed matrix."""
        return Rotation(self.cos_L1W, torch.roll(self.sin_L1W, self.half, 2))


class Rotations:
    """The rotations of a backbone, looked up by position where they depend on nothing else."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.fixed = getattr(rotary, "rope_type", None) in FIXED
        self._table_P2W: Tensor | None = None

    def __call__(self, position_L: Tensor, longest: int, like_LD: Tensor) -> Rotation:
        """The rotation of tokens at these positions, all below ``longest``, of the type of
        ``like_LD``."""
        if not self.fixed:
            return self._made(position_L, like_LD)
        if self._table_P2W is None or longest > len(self._table_P2W):
            made = self._made(torch.arange(longest + AHEAD, device=position_L.device), like_LD)
            self._table_P2W = torch.cat([made.cos_L1W, made.sin_L1W], 1)
        return Rotation(*self._table_P2W.index_select(0, position_L).chunk(2, 1))

    def _made(self, position_L: Tensor, like_LD: Tensor) -> Rotation:
        cos, sin = self.rotary(like_LD[None], position_L[None])
        return Rotation.of(cos[0], sin[0])
