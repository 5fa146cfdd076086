"""Exact attention of groups in a packed sequence, without a copy of the prompt per response.

Softmax over the keys of a prompt and of a response is computed as two attentions, whose outputs
``o_1, o_2`` and log-sum-exps ``z_1, z_2`` are merged:

    z = log(exp z_1 + exp z_2),      o = exp(z_1 − z) o_1 + exp(z_2 − z) o_2

The backward pass of each part is an attention's own backward pass that gets the merged ``o`` and
``z`` in place of its own, for it recomputes its weights as ``exp(score − z)``. (This is the merging
of FlashAttention's blocks, Dao et al. 2022, section 3.1, for two blocks of unequal shape.)

The dense attentions are planned from lengths alone (``plan``). Long rows are views of the packed
sequence; short rows of similar length are copied together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trivium.data.batch import Batch
from trivium.maths.ragged import repeat_per_segment, segment_ids, segment_starts
from trivium.models.cpu.segments import SegmentCopies, SegmentViews
from trivium.models.group_layout import GroupLayout
from trivium.models.layout import AttentionSpec

MAX_PADDING = 1.1
"""The most that padding may enlarge a dense attention."""
MIN_SPLIT_PAIRS = 1 << 15
"""Query-key pairs of padding that cost less than another call."""
MIN_UNBATCHED_PAIRS = 1 << 10
"""Rows with at least this many query-key pairs get their own call instead of a copy."""

OutputAndLse = tuple[Tensor, Tensor]
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PrefixLayout(GroupLayout):
    """Groups whose attention is computed in parts, unless a layer has a window or a soft cap.

    Args:
        batch: the groups.
        output_positions: positions that need an output in layer ``last_layer``, ascending; None:
            all.
        last_layer: the ``layer_idx`` of the last layer.
    """

    def __init__(
        self, batch: Batch, output_positions: Tensor | None = None, last_layer: int | None = None
    ) -> None:
        super().__init__(batch)
        self.output_positions, self.last_layer = output_positions, last_layer
        prompt_lengths_N = repeat_per_segment(batch.prompt_lengths_G, batch.sizes_G)
        self.longest = int((prompt_lengths_N + batch.lengths_N).max())

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        window = self.longest if spec.window is None else spec.window
        if spec.softcap is not None or window < self.longest:
            return super().attend(layer, query_LHD, key_LHD, value_LHD, spec)
        blocks = self._last_blocks if layer == self.last_layer else self._blocks
        return SharedAttention.apply(query_LHD, key_LHD, value_LHD, blocks, spec.scaling)

    @cached_property
    def _blocks(self) -> list[Block]:
        return plan(self.batch)

    @cached_property
    def _last_blocks(self) -> list[Block]:
        return plan(self.batch, self.output_positions)


@dataclass(frozen=True)
class Block:
    """Dense attentions between rows of queries and rows of keys of the packed sequence.

    In a ``causal`` block the queries are the keys, and each sees those up to itself; no token is in
    two causal blocks. In other blocks the queries see all keys of their row, in addition to those
    of other blocks.
    """

    queries: SegmentCopies | SegmentViews
    keys: SegmentCopies | SegmentViews
    causal: bool

    def attend(
        self, query_LHW: Tensor, key_LHW: Tensor, value_LHW: Tensor, scaling: float
    ) -> list[OutputAndLse]:
        """Return dense outputs ``[rows, heads, longest, width]`` and their log-sum-exps."""
        mask = self._mask(query_LHW.dtype)
        query, key, value = (
            self.queries.dense(query_LHW),
            self.keys.dense(key_LHW),
            self.keys.dense(value_LHW),
        )
        return [
            _attention(*rows, is_causal=self.causal, attn_mask=mask, scale=scaling)
            for rows in zip(query, key, value, strict=True)
        ]

    def gradients(self, grad_LHW: Tensor, saved: Saved, scaling: float) -> list[Sequence[Tensor]]:
        """Return the gradients of queries, of keys and of values as dense rows."""
        query_LHW, key_LHW, value_LHW, out_LHW, lse_LH = saved
        mask = self._mask(query_LHW.dtype)
        lse_rows = self.queries.dense(lse_LH)
        if isinstance(self.queries, SegmentCopies) and not self.queries.equal:
            # Places that hold no query of the row get weights of exactly zero.
            padding = ~self.queries.held[:, None]
            lse_rows = [x.masked_fill(padding, torch.inf) for x in lse_rows]
        inputs = (
            self.queries.dense(grad_LHW),
            self.queries.dense(query_LHW),
            self.keys.dense(key_LHW),
            self.keys.dense(value_LHW),
            self.queries.dense(out_LHW),
            lse_rows,
        )
        gradients = [
            _backward(*rows, 0.0, self.causal, attn_mask=mask, scale=scaling)
            for rows in zip(*inputs, strict=True)
        ]
        return list(zip(*gradients, strict=True))

    def _mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the scores to hide places that hold no key of the row."""
        if self.causal or not isinstance(self.keys, SegmentCopies) or self.keys.equal:
            return None
        held = self.keys.held
        mask = torch.zeros(held.shape, dtype=dtype, device=held.device)
        return mask.masked_fill(~held, -torch.inf)[:, None, None]


def plan(batch: Batch, output_positions: Tensor | None = None) -> list[Block]:
    """Return the dense attentions of a batch that ``output_positions`` need (None: all).

    A prompt with one response is one causal row. In other groups the prompt and each response are
    causal rows, and the responses attend to the prompt together.
    """
    first_N = segment_starts(batch.sizes_G)
    several_G = batch.sizes_G > 1
    several_N = repeat_per_segment(several_G, batch.sizes_G)
    tokens_G = batch.lengths_N.new_zeros(len(batch.sizes_G)).index_add(
        0, segment_ids(batch.sizes_G), batch.lengths_N
    )
    starts = torch.cat([batch.prompt_starts_G, batch.starts_N[several_N]])
    rows_G = torch.where(several_G, batch.prompt_lengths_G, batch.prompt_lengths_G + tokens_G)
    lengths = torch.cat([rows_G, batch.lengths_N[several_N]])
    # The responses of a group are contiguous.
    return plan_rows(starts, lengths, output_positions) + _dense(
        batch.starts_N[first_N][several_G],
        tokens_G[several_G],
        batch.prompt_starts_G[several_G],
        batch.prompt_lengths_G[several_G],
    )


def plan_rows(
    starts: Tensor, lengths: Tensor, output_positions: Tensor | None = None
) -> list[Block]:
    """Return the dense attentions of causal rows.

    Tokens before a row's first output position (``output_positions`` ascend) are keys only.
    """
    order = starts.argsort()
    starts, lengths, blocks = starts[order], lengths[order], []
    if output_positions is not None:
        at = torch.searchsorted(output_positions, starts)
        firsts, ends = output_positions[at.clamp(max=len(output_positions) - 1)], starts + lengths
        needed = (at < len(output_positions)) & (firsts < ends)
        starts, firsts, ends = starts[needed], firsts[needed], ends[needed]
        late = firsts > starts
        blocks += _dense(firsts[late], (ends - firsts)[late], starts[late], (firsts - starts)[late])
        starts, lengths = firsts, ends - firsts
    rows = [kind(starts[at], lengths[at]) for at, kind in _buckets(lengths, lengths)]
    return [Block(row, row, causal=True) for row in rows] + blocks


def _dense(
    query_starts: Tensor, query_lengths: Tensor, key_starts: Tensor, key_lengths: Tensor
) -> list[Block]:
    """Return blocks of disjoint rows of queries that see all keys of their rows."""
    return [
        Block(
            kind(query_starts[at], query_lengths[at]),
            kind(key_starts[at], key_lengths[at]),
            causal=False,
        )
        for at, kind in _buckets(key_lengths, query_lengths)
    ]


def _buckets(
    widths: Tensor, heights: Tensor
) -> Iterator[tuple[Tensor, type[SegmentCopies | SegmentViews]]]:
    """Yield the indices of rectangles that are computed together, and how."""
    large = widths * heights >= MIN_UNBATCHED_PAIRS
    if large.any():
        yield torch.nonzero(large)[:, 0], SegmentViews
    small = torch.nonzero(~large)[:, 0]
    for bucket in bucket_by_size(widths[small], heights[small]):
        yield small[bucket], SegmentCopies


def bucket_by_size(widths: Tensor, heights: Tensor) -> list[Tensor]:
    """Group rectangles so that padding each bucket to its largest wastes little: their indices."""
    sizes = list(zip(widths.tolist(), heights.tolist(), range(len(widths)), strict=True))
    buckets: list[list[int]] = []
    used = width = height = 0
    for w, h, i in sorted(sizes, reverse=True):
        row = max(width, w) * max(height, h)
        box = row * (len(buckets[-1]) + 1 if buckets else 1)
        if not buckets or box > max(MAX_PADDING * (used + w * h), MIN_SPLIT_PAIRS):
            buckets.append([])
            used = width = height = 0
        buckets[-1].append(i)
        used, width, height = used + w * h, max(width, w), max(height, h)
    return [torch.tensor(sorted(bucket)) for bucket in buckets]


class SharedAttention(torch.autograd.Function):
    """Attention of a packed sequence, ``[L, heads, width]``, by the blocks of its plan."""

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
            results = block.attend(query_LHW, key_LHW, value_LHW, scaling)
            queries = block.queries
            if not block.causal:
                before = zip(queries.dense(out_LHW), queries.dense(lse_LH), strict=True)
                results = [_merged(*both) for both in zip(before, results, strict=True)]
            queries.scatter(out_LHW, [out for out, _ in results])
            queries.scatter(lse_LH, [lse for _, lse in results])
        ctx.save_for_backward(query_LHW, key_LHW, value_LHW, out_LHW, lse_LH)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out_LHW

    @staticmethod
    def backward(ctx: Any, grad_LHW: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        totals = [_blank(x, ctx.blocks) for x in saved[:3]]
        for block in ctx.blocks:
            gradients = block.gradients(grad_LHW, saved, ctx.scaling)
            for total, rows, x in zip(
                totals, (block.queries, block.keys, block.keys), gradients, strict=True
            ):
                (rows.scatter if block.causal else rows.add)(total, x)
        return *totals, None, None


def _blank(like_LHW: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Return a tensor for results: zeros, unless every token's result will be written."""
    written = sum(block.queries.size for block in blocks if block.causal)
    make = torch.empty_like if written == len(like_LHW) else torch.zeros_like
    return make(like_LHW, memory_format=torch.contiguous_format)


def _merged(first: OutputAndLse, second: OutputAndLse) -> OutputAndLse:
    """Merge outputs and log-sum-exps of the same queries over two sets of keys."""
    (out, lse), (other_out, other) = first, second
    both = torch.logaddexp(lse, other)
    share, other_share = ((x - both).exp().to(out.dtype)[..., None] for x in (lse, other))
    return (out * share).add_(other_out * other_share), both
