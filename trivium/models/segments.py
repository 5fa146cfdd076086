"""Segments of a line as rows of dense computation, copied together or read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class PaddedSegments:
    """Segments copied into rows that are as long as the longest.

    What lies behind a shorter one is some token of the line, which the caller must keep from being
    seen, and is never brought back.

    Args:
        starts, lengths: where each segment begins on the line, and how long it is.
    """

    def __init__(self, starts: Tensor, lengths: Tensor) -> None:
        self.count, self.longest = len(starts), int(lengths.max())
        self.size = int(lengths.sum())
        self.equal = self.longest * self.count == self.size
        self._spans = starts, lengths

    def dense(self, packed_L: Tensor) -> list[Tensor]:
        """``[L, heads, …]`` as one ``[rows, heads, longest, …]``."""
        return [self.gather(packed_L)]

    def scatter(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Bring dense rows to where they lie on the line."""
        packed_L.index_copy_(0, self.packed_index, self.flatten(dense[0]))

    def add(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Add dense rows to what lies there on the line."""
        there = packed_L.index_select(0, self.packed_index)
        packed_L.index_copy_(0, self.packed_index, there.add_(self.flatten(dense[0])))

    def gather(self, packed_L: Tensor) -> Tensor:
        """``[L, heads, …] -> [rows, heads, longest, …]``."""
        rows = packed_L.index_select(0, self.index.view(-1))
        return rows.view(self.count, self.longest, *packed_L.shape[1:]).transpose(1, 2)

    def flatten(self, rows: Tensor) -> Tensor:
        """``[rows, heads, longest, …] -> [tokens, heads, …]``, row after row."""
        return self._tokens(rows.transpose(1, 2))

    def _tokens(self, rows: Tensor) -> Tensor:
        """``[rows, longest, …] -> [tokens, …]``, row after row."""
        flat = rows.reshape(-1, *rows.shape[2:])
        return flat if self.equal else flat.index_select(0, self._held_index)

    @cached_property
    def held(self) -> Tensor:
        """Which places of the rows are tokens of theirs, ``[rows, longest]``."""
        starts, lengths = self._spans
        return torch.arange(self.longest, device=starts.device) < lengths[:, None]

    @cached_property
    def index(self) -> Tensor:
        """Where on the line each place of the rows is, ``[rows, longest]``."""
        starts, _ = self._spans
        at = starts[:, None] + torch.arange(self.longest, device=starts.device)
        return torch.where(self.held, at, 0)

    @cached_property
    def packed_index(self) -> Tensor:
        """Where each flattened token lies on the line."""
        return self._tokens(self.index)

    @cached_property
    def _held_index(self) -> Tensor:
        return torch.nonzero(self.held.view(-1))[:, 0]


class SegmentViews:
    """Segments that are read where they lie, each a row of its own: none is copied.

    Args:
        starts, lengths: as those of ``PaddedSegments``; no two overlap, and they come in the line's order.
    """

    def __init__(self, starts: Tensor, lengths: Tensor) -> None:
        self.size = int(lengths.sum())
        before = torch.cat([starts.new_zeros(1), (starts + lengths)[:-1]])
        gaps = (starts - before).tolist()
        self._start, self._adjoin = gaps[0], not any(gaps[1:])
        spans = zip(gaps, lengths.tolist(), strict=True)
        self._sizes = [size for span in spans for size in span]

    def dense(self, packed_L: Tensor) -> list[Tensor]:
        """``[L, heads, …]`` as a ``[1, heads, length, …]`` of each row."""
        sizes = [*self._sizes, len(packed_L) - sum(self._sizes)]
        return list(packed_L[None].transpose(1, 2).split(sizes, 2)[1::2])

    def scatter(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Bring rows to where they lie on the line."""
        if self._adjoin:
            place = packed_L.narrow(0, self._start, self.size)[None]
            torch.cat([row.transpose(1, 2) for row in dense], 1, out=place)
            return
        for place, row in zip(self.dense(packed_L), dense, strict=True):
            place.copy_(row)

    def add(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Add rows to what lies there on the line."""
        for place, row in zip(self.dense(packed_L), dense, strict=True):
            place.add_(row)
