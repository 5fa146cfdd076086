"""Segments of a line gathered into rows for dense computation, and back."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Rows:
    """Rows are as long as the longest segment.

    What lies behind a shorter one is some token of the line, which the caller must keep from being
    seen, and is never brought back.

    Args:
        starts, lengths: where each segment begins on the line, and how long it is.
    """

    def __init__(self, starts: Tensor, lengths: Tensor) -> None:
        self.count, self.longest = len(starts), int(lengths.max())
        self.equal = self.longest * self.count == int(lengths.sum())
        offset = torch.arange(self.longest, device=starts.device)
        self.held = offset < lengths[:, None]
        self.index = torch.where(self.held, starts[:, None] + offset, 0)

    def gather(self, line_LHD: Tensor) -> Tensor:
        """``[L, heads, width] -> [rows, heads, longest, width]``."""
        return self.line(line_LHD).transpose(1, 2)

    def line(self, line_L: Tensor) -> Tensor:
        """``[L, …] -> [rows, longest, …]``."""
        rows = line_L.index_select(0, self.index.view(-1))
        return rows.view(self.count, self.longest, *line_L.shape[1:])

    def flatten(self, rows: Tensor) -> Tensor:
        """``[rows, heads, longest, width] -> [tokens, heads, width]``, row after row."""
        return self.tokens(rows.transpose(1, 2))

    def tokens(self, rows: Tensor) -> Tensor:
        """``[rows, longest, …] -> [tokens, …]``, row after row."""
        flat = rows.reshape(-1, *rows.shape[2:])
        return flat if self.equal else flat.index_select(0, self._held_index)

    @cached_property
    def line_index(self) -> Tensor:
        """Where each flattened token lies on the line."""
        return self.tokens(self.index)

    @cached_property
    def _held_index(self) -> Tensor:
        return torch.nonzero(self.held.view(-1))[:, 0]
