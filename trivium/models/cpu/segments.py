"""Segments of a packed sequence as rows: copied together, or views of their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.models.segments import PaddedSegments


class SegmentCopies(PaddedSegments):
    """Segments copied into one dense tensor."""

    def dense(self, packed_L: Tensor) -> list[Tensor]:
        """``[L, heads, …]`` as one ``[rows, heads, longest, …]``."""
        return [self.gather(packed_L)]

    def scatter(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Write dense rows to their positions in the packed sequence."""
        packed_L.index_copy_(0, self.token_index, self.flatten(dense[0]))

    def add(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Add dense rows at their positions in the packed sequence."""
        there = packed_L.index_select(0, self.token_index)
        packed_L.index_copy_(0, self.token_index, there.add_(self.flatten(dense[0])))


class SegmentViews:
    """Segments that are views of the packed sequence, each a row of its own.

    Args:
        starts, lengths: as for ``PaddedSegments``; the segments are in order and do not overlap.
    """

    def __init__(self, starts: Tensor, lengths: Tensor) -> None:
        self.size = int(lengths.sum())
        before = torch.cat([starts.new_zeros(1), (starts + lengths)[:-1]])
        gaps = (starts - before).tolist()
        self._start, self._adjoin = gaps[0], not any(gaps[1:])
        spans = zip(gaps, lengths.tolist(), strict=True)
        self._sizes = [size for span in spans for size in span]

    def dense(self, packed_L: Tensor) -> list[Tensor]:
        """``[L, heads, …]`` as one ``[1, heads, length, …]`` per row."""
        sizes = [*self._sizes, len(packed_L) - sum(self._sizes)]
        return list(packed_L[None].transpose(1, 2).split(sizes, 2)[1::2])

    def scatter(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Write rows to their positions in the packed sequence."""
        if self._adjoin:
            place = packed_L.narrow(0, self._start, self.size)[None]
            torch.cat([row.transpose(1, 2) for row in dense], 1, out=place)
            return
        for place, row in zip(self.dense(packed_L), dense, strict=True):
            place.copy_(row)

    def add(self, packed_L: Tensor, dense: Sequence[Tensor]) -> None:
        """Add rows at their positions in the packed sequence."""
        for place, row in zip(self.dense(packed_L), dense, strict=True):
            place.add_(row)
