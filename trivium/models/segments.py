"""Segments of a packed sequence, padded to rows for dense computation."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class PaddedSegments:
    """Segments copied into rows that are as long as the longest segment.

    Positions after the end of a shorter segment hold some other token; the caller must mask them.

    Args:
        starts, lengths: where each segment begins in the packed sequence, and how long it is.
    """

    def __init__(self, starts: Tensor, lengths: Tensor) -> None:
        self.count, self.longest = len(starts), int(lengths.max())
        self.size = int(lengths.sum())
        self.equal = self.longest * self.count == self.size
        self._starts, self._lengths = starts, lengths

    def gather(self, packed_L: Tensor) -> Tensor:
        """``[L, heads, …] -> [rows, heads, longest, …]``."""
        rows = packed_L.index_select(0, self.index.view(-1))
        return rows.view(self.count, self.longest, *packed_L.shape[1:]).transpose(1, 2)

    def flatten(self, rows: Tensor) -> Tensor:
        """``[rows, heads, longest, …] -> [tokens, heads, …]``, row after row."""
        flat = rows.transpose(1, 2).flatten(0, 1)
        return flat if self.equal else flat.index_select(0, self._held_index)

    @cached_property
    def held(self) -> Tensor:
        """Mask of the positions that hold the row's own tokens, ``[rows, longest]`` bool."""
        places = torch.arange(self.longest, device=self._starts.device)
        return places < self._lengths[:, None]

    @cached_property
    def index(self) -> Tensor:
        """Position in the packed sequence of each element of the rows, ``[rows, longest]``."""
        at = self._starts[:, None] + torch.arange(self.longest, device=self._starts.device)
        return torch.where(self.held, at, 0)

    @cached_property
    def token_index(self) -> Tensor:
        """Position in the packed sequence of each flattened token."""
        return self.index.view(-1).index_select(0, self._held_index)

    @cached_property
    def _held_index(self) -> Tensor:
        return torch.nonzero(self.held.view(-1))[:, 0]
