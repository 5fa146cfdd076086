"""Segments of a line gathered into rows for dense computation, and back."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Rows:
    """Rows are as long as the longest segment.

    What lies behind a shorter one is some token of the line, which the caller must keep from being
    seen, and is never brought back. A single row is not copied: it is a part of the line.

    Args:
        starts, lengths: where each segment begins on the line, and how long it is.
    """

    def __init__(self, starts: Tensor, lengths: Tensor) -> None:
        self.count, self.longest = len(starts), int(lengths.max())
        self.size = int(lengths.sum())
        self.equal = self.longest * self.count == self.size
        self.single, self.start = self.count == 1, int(starts[0])
        self._spans = starts, lengths

    def gather(self, line_LHD: Tensor) -> Tensor:
        """``[L, heads, width] -> [rows, heads, longest, width]``."""
        return self.line(line_LHD).transpose(1, 2)

    def line(self, line_L: Tensor) -> Tensor:
        """``[L, …] -> [rows, longest, …]``."""
        if self.single:
            return self._part(line_L)[None]
        rows = line_L.index_select(0, self.index.view(-1))
        return rows.view(self.count, self.longest, *line_L.shape[1:])

    def flatten(self, rows: Tensor) -> Tensor:
        """``[rows, heads, longest, width] -> [tokens, heads, width]``, row after row."""
        return self.tokens(rows.transpose(1, 2))

    def tokens(self, rows: Tensor) -> Tensor:
        """``[rows, longest, …] -> [tokens, …]``, row after row."""
        flat = rows.reshape(-1, *rows.shape[2:])
        return flat if self.equal else flat.index_select(0, self._held_index)

    def read(self, line_L: Tensor) -> Tensor:
        """``[L, …] -> [tokens, …]``, row after row."""
        return self._part(line_L) if self.single else line_L.index_select(0, self.line_index)

    def write(self, line_L: Tensor, x: Tensor) -> None:
        """Put ``[tokens, …]``, row after row, where they lie on the line."""
        if self.single:
            self._part(line_L).copy_(x)
        else:
            line_L.index_copy_(0, self.line_index, x)

    def add(self, line_L: Tensor, x: Tensor) -> None:
        """Add ``[tokens, …]``, row after row, to what lies there on the line."""
        if self.single:
            self._part(line_L).add_(x)
        else:
            self.write(line_L, self.read(line_L) + x)

    def _part(self, line_L: Tensor) -> Tensor:
        return line_L.narrow(0, self.start, self.longest)

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
    def line_index(self) -> Tensor:
        """Where each flattened token lies on the line."""
        return self.tokens(self.index)

    @cached_property
    def _held_index(self) -> Tensor:
        return torch.nonzero(self.held.view(-1))[:, 0]
