"""Attention of groups on a line, exact and without a copy of the prompt's keys per response.

Softmax over the keys of a prompt and of a response is computed as two attentions, whose outputs
``o_1, o_2`` and log-normalizers ``z_1, z_2`` are merged:

    z = log(exp z_1 + exp z_2),      o = exp(z_1 − z) o_1 + exp(z_2 − z) o_2

Each part's gradient is what an attention's backward pass gives that is told the merged ``o`` and
``z`` in place of its own, for it recomputes its weights as ``exp(score − z)``. (The merging is that
of FlashAttention's blocks, Dao et al. 2022, section 3.1, over two blocks of unequal shape.)

What is computed densely is planned from lengths alone (``plan``): rows are read and written where
they lie, but for short ones, which are copied, those of similar length together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivium.data.batch import Batch
from trivium.maths.ragged import repeat_per_segment, segment_ids, segment_starts
from trivium.models.segments import PaddedSegments, SegmentViews

MAX_PADDING = 1.1
"""A dense attention may be so much larger than the rows in it."""
MIN_SPLIT_PAIRS = 1 << 15
"""Query-key pairs that are cheaper to compute in vain than another call is."""
MIN_UNBATCHED_PAIRS = 1 << 10
"""A row of so many pairs has a call of its own, which costs less than copying the row."""

OutputAndLse = tuple[Tensor, Tensor]
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """Dense attentions between rows of queries and rows of keys, both places on the line.

    Where it is ``causal``, queries are their own keys and see those up to themselves; no token is
    in two causal blocks. Otherwise the queries see all their keys, besides those of other blocks.
    """

    queries: PaddedSegments | SegmentViews
    keys: PaddedSegments | SegmentViews
    causal: bool

    def attend(
        self, query_LHW: Tensor, key_LHW: Tensor, value_LHW: Tensor, scaling: float
    ) -> list[OutputAndLse]:
        """Outputs and log-normalizers, ``[rows, heads, longest, width]`` and less, densely."""
        mask = self._mask(query_LHW.dtype)
        lines = self.queries.dense(query_LHW), self.keys.dense(key_LHW), self.keys.dense(value_LHW)
        return [
            _attention(*rows, is_causal=self.causal, attn_mask=mask, scale=scaling)
            for rows in zip(*lines, strict=True)
        ]

    def gradients(self, grad_LHW: Tensor, saved: Saved, scaling: float) -> list[Sequence[Tensor]]:
        """Gradients of queries, of keys and of values, as dense rows."""
        query_LHW, key_LHW, value_LHW, out_LHW, lse_LH = saved
        mask = self._mask(query_LHW.dtype)
        lse_rows = self.queries.dense(lse_LH)
        if isinstance(self.queries, PaddedSegments) and not self.queries.equal:
            # What is no query of the row has weights of exactly zero and teaches the keys nothing.
            hidden = ~self.queries.held[:, None]
            lse_rows = [x.masked_fill(hidden, torch.inf) for x in lse_rows]
        lines = (
            self.queries.dense(grad_LHW),
            self.queries.dense(query_LHW),
            self.keys.dense(key_LHW),
            self.keys.dense(value_LHW),
            self.queries.dense(out_LHW),
            lse_rows,
        )
        found = [
            _backward(*rows, 0.0, self.causal, attn_mask=mask, scale=scaling)
            for rows in zip(*lines, strict=True)
        ]
        return list(zip(*found, strict=True))

    def _mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, so that a key that is no key of the row is not seen."""
        if self.causal or not isinstance(self.keys, PaddedSegments) or self.keys.equal:
            return None
        held = self.keys.held
        mask = torch.zeros(held.shape, dtype=dtype, device=held.device)
        return mask.masked_fill(~held, -torch.inf)[:, None, None]


def plan(batch: Batch, output_positions: Tensor | None = None) -> list[Block]:
    """The dense attentions of a batch, for positions that are ``output_positions`` at least (None: for all).

    A prompt with one response is a causal row, and so is, of other groups, the prompt and each
    response, which then attend to the prompt together.
    """
    first_N = segment_starts(batch.sizes_G)
    several_G = batch.sizes_G > 1
    apart_N = repeat_per_segment(several_G, batch.sizes_G)
    tokens_G = batch.lengths_N.new_zeros(len(batch.sizes_G)).index_add(
        0, segment_ids(batch.sizes_G), batch.lengths_N
    )
    starts = torch.cat([batch.prompt_starts_G, batch.starts_N[apart_N]])
    rows_G = torch.where(several_G, batch.prompt_lengths_G, batch.prompt_lengths_G + tokens_G)
    lengths = torch.cat([rows_G, batch.lengths_N[apart_N]])
    # A group's responses lie end to end behind its prompt.
    return plan_rows(starts, lengths, output_positions) + _dense(
        batch.starts_N[first_N][several_G],
        tokens_G[several_G],
        batch.prompt_starts_G[several_G],
        batch.prompt_lengths_G[several_G],
    )


def plan_rows(
    starts: Tensor, lengths: Tensor, output_positions: Tensor | None = None
) -> list[Block]:
    """The dense attentions of causal rows.

    What lies before the first position of a row that is ``output_positions`` (ascending) is seen and does not
    look.
    """
    order = starts.argsort()
    starts, lengths, blocks = starts[order], lengths[order], []
    if output_positions is not None:
        at = torch.searchsorted(output_positions, starts)
        firsts, ends = output_positions[at.clamp(max=len(output_positions) - 1)], starts + lengths
        looking = (at < len(output_positions)) & (firsts < ends)
        starts, firsts, ends = starts[looking], firsts[looking], ends[looking]
        late = firsts > starts
        blocks += _dense(firsts[late], (ends - firsts)[late], starts[late], (firsts - starts)[late])
        starts, lengths = firsts, ends - firsts
    rows = [kind(starts[lot], lengths[lot]) for lot, kind in _buckets(lengths, lengths)]
    return [Block(row, row, causal=True) for row in rows] + blocks


def _dense(
    query_starts: Tensor, query_lengths: Tensor, key_starts: Tensor, key_lengths: Tensor
) -> list[Block]:
    """Rows of queries, no token in two of them, that see all of their rows of keys."""
    return [
        Block(
            kind(query_starts[lot], query_lengths[lot]),
            kind(key_starts[lot], key_lengths[lot]),
            causal=False,
        )
        for lot, kind in _buckets(key_lengths, query_lengths)
    ]


def _buckets(
    widths: Tensor, heights: Tensor
) -> Iterator[tuple[Tensor, type[PaddedSegments | SegmentViews]]]:
    """Which rectangles are computed together, and whether they are copied for it."""
    large = widths * heights >= MIN_UNBATCHED_PAIRS
    if large.any():
        yield torch.nonzero(large)[:, 0], SegmentViews
    small = torch.nonzero(~large)[:, 0]
    for lot in bucket_by_size(widths[small], heights[small]):
        yield small[lot], PaddedSegments


def bucket_by_size(widths: Tensor, heights: Tensor) -> list[Tensor]:
    """Rectangles put together so that the box around each lot wastes little: indices of each."""
    sizes = list(zip(widths.tolist(), heights.tolist(), range(len(widths)), strict=True))
    lots: list[list[int]] = []
    used = width = height = 0
    for w, h, i in sorted(sizes, reverse=True):
        row = max(width, w) * max(height, h)
        box = row * (len(lots[-1]) + 1 if lots else 1)
        if not lots or box > max(MAX_PADDING * (used + w * h), MIN_SPLIT_PAIRS):
            lots.append([])
            used = width = height = 0
        lots[-1].append(i)
        used, width, height = used + w * h, max(width, w), max(height, h)
    return [torch.tensor(sorted(lot)) for lot in lots]


class SharedAttention(torch.autograd.Function):
    """Attention of a whole line, ``[L, heads, width]``, by the blocks of its plan."""

    @staticmethod
    def forward(
        ctx: Any,
        query_LHW: Tensor,
        key_LHW: Tensor,
        value_LHW: Tensor,
        blocks: Sequence[Block],
        scaling: float,
    ) -> Tensor:
        wide = torch.promote_types(query_LHW.dtype, torch.float32)
        out_LHW = _blank(query_LHW, blocks)
        lse_LH = query_LHW.new_full(query_LHW.shape[:2], -torch.inf, dtype=wide)
        for block in blocks:
            found = block.attend(query_LHW, key_LHW, value_LHW, scaling)
            queries = block.queries
            if not block.causal:
                before = zip(queries.dense(out_LHW), queries.dense(lse_LH), strict=True)
                found = [_merged(*both) for both in zip(before, found, strict=True)]
            queries.scatter(out_LHW, [out for out, _ in found])
            queries.scatter(lse_LH, [lse for _, lse in found])
        ctx.save_for_backward(query_LHW, key_LHW, value_LHW, out_LHW, lse_LH)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out_LHW

    @staticmethod
    def backward(ctx: Any, grad_LHW: Tensor) -> Any:
        saved = ctx.saved_tensors
        totals = [_blank(x, ctx.blocks) for x in saved[:3]]
        for block in ctx.blocks:
            found = block.gradients(grad_LHW, saved, ctx.scaling)
            for total, rows, x in zip(
                totals, (block.queries, block.keys, block.keys), found, strict=True
            ):
                (rows.scatter if block.causal else rows.add)(total, x)
        return *totals, None, None


def _blank(like_LHW: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Room for results: zeros, unless every token's is going to be written."""
    written = sum(block.queries.size for block in blocks if block.causal)
    make = torch.empty_like if written == len(like_LHW) else torch.zeros_like
    return make(like_LHW, memory_format=torch.contiguous_format)


def _merged(first: OutputAndLse, second: OutputAndLse) -> OutputAndLse:
    """Outputs and log-normalizers of the same queries over two sets of keys, as over both."""
    (out, lse), (other_out, other) = first, second
    both = torch.logaddexp(lse, other)
    share, other_share = ((x - both).exp().to(out.dtype)[..., None] for x in (lse, other))
    return (out * share).add_(other_out * other_share), both
