"""Attention in parts equals masked attention: values and gradients."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.tiny_models import random_groups
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.models.cpu import prefix_attention
from trivium.models.cpu.prefix_attention import (
    MAX_PADDING,
    MIN_SPLIT_PAIRS,
    MIN_UNBATCHED_PAIRS,
    PrefixLayout,
    bucket_by_size,
    plan,
)
from trivium.models.cpu.segments import SegmentViews
from trivium.models.group_layout import MaskedLayout
from trivium.models.layout import AttentionSpec

pytestmark = pytest.mark.fast_path


def inputs_of(batch: Batch, heads: int, key_heads: int, width: int = 8) -> list[Tensor]:
    """Return queries, keys and values, and a gradient by the output, in float64."""
    generator = torch.Generator().manual_seed(len(batch.tokens_L))
    return [
        torch.randn(len(batch.tokens_L), n, width, dtype=torch.float64, generator=generator)
        for n in (heads, key_heads, key_heads, heads)
    ]


def outputs(
    attend: object, batch: Batch, heads: int, key_heads: int, positions: Tensor | None = None
) -> list[Tensor]:
    """Return the output of an attention and its gradients by queries, keys and values."""
    *inputs, gradient = inputs_of(batch, heads, key_heads)
    gradient = gradient if positions is None else gradient[positions]
    leaves = [x.requires_grad_() for x in inputs]
    out = attend(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


SHAPES = {
    "one response each": ([9, 3, 40], [[4], [7], [1]]),
    "pairs": ([9, 3, 40], [[4, 2], [7, 7], [1, 30]]),
    "groups": ([30, 30, 5], [[4, 2, 9, 1], [7, 7], [1, 30, 3]]),
    "one and several": ([6, 2], [[3], [1, 2, 3]]),
    "single tokens": ([1, 1], [[1, 1], [1]]),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["equal", "grouped", "one"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_prefix_attention_equals_masked_attention(
    shape: tuple[list[int], list[list[int]]], heads: tuple[int, int]
) -> None:
    batch = Batch.of(random_groups(50, *shape))
    spec = AttentionSpec(0.3, None, None)
    shared, masked = PrefixLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, *heads)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, *heads)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("unbatched", [1, 200, MIN_UNBATCHED_PAIRS, 1 << 30])
@pytest.mark.parametrize("seed", range(20))
def test_prefix_attention_of_mixed_shapes_equals_masked_attention(
    monkeypatch: pytest.MonkeyPatch, seed: int, unbatched: int
) -> None:
    monkeypatch.setattr(prefix_attention, "MIN_UNBATCHED_PAIRS", unbatched)
    rng = random.Random(seed)
    groups = [
        Group([1] * rng.randint(1, 60), [[2] * rng.randint(1, 50) for _ in range(n)])
        for n in (rng.randint(1, 6) for _ in range(rng.randint(1, 12)))
    ]
    batch, spec = Batch.of(groups), AttentionSpec(0.3, None, None)
    shared, masked = PrefixLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, 4, 2)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, 4, 2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("unbatched", [1, 200, 1 << 30])
@pytest.mark.parametrize("seed", range(10))
def test_output_positions_of_the_last_layer_and_their_gradients_equal_masked_attention(
    monkeypatch: pytest.MonkeyPatch, seed: int, unbatched: int, share: float
) -> None:
    monkeypatch.setattr(prefix_attention, "MIN_UNBATCHED_PAIRS", unbatched)
    rng = random.Random(seed)
    shape = [rng.randint(1, 30) for _ in range(5)]
    batch = Batch.of(random_groups(50, shape, [[4, 2, 25], [1], [30], [7, 7], [12]], seed=seed))
    length = len(batch.tokens_L)
    output_positions = torch.tensor(sorted(rng.sample(range(length), max(1, int(share * length)))))
    spec, masked = AttentionSpec(0.3, None, None), MaskedLayout(batch)
    shared = PrefixLayout(batch, output_positions, last_layer=3)

    def found(layer: int) -> list[Tensor]:
        return outputs(
            lambda *qkv: shared.attend(layer, *qkv, spec=spec)[output_positions],
            batch,
            4,
            2,
            output_positions,
        )

    expected = outputs(
        lambda *qkv: masked.attend(3, *qkv, spec=spec)[output_positions],
        batch,
        4,
        2,
        output_positions,
    )
    for mine, theirs in zip(found(3) + found(2), expected * 2, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_last_layer_computes_few_query_key_pairs_for_few_output_positions() -> None:
    batch = Batch.of(random_groups(50, [100] * 4, [[50]] * 4))

    def pairs(output_positions: Tensor | None) -> int:
        packed = torch.zeros(len(batch.tokens_L), 1)
        blocks = [
            (b.queries.dense(packed), b.keys.dense(packed)) for b in plan(batch, output_positions)
        ]
        both = [pair for queries, keys in blocks for pair in zip(queries, keys, strict=True)]
        return sum(q.shape[0] * q.shape[2] * k.shape[2] for q, k in both)

    assert pairs(None) == 4 * 150**2
    assert pairs(batch.last_tokens_N) == 4 * (149 + 1)


def test_merging_large_scores_does_not_overflow() -> None:
    batch, spec = (
        Batch.of(random_groups(50, [9, 4], [[5, 6, 2], [3, 1]])),
        AttentionSpec(300.0, None, None),
    )
    shared, masked = PrefixLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, 2, 2)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, 2, 2)
    for mine, theirs in zip(found, expected, strict=True):
        assert bool(mine.isfinite().all())
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_prompt_keys_are_not_copied_per_response() -> None:
    def keys(prompt: int, responses: int) -> int:
        groups = [Group([1] * prompt, [[2] * 3] * responses)] * 2
        packed = torch.zeros(2 * (prompt + 3 * responses), 1)
        blocks = [block for block in plan(Batch.of(groups)) if not block.causal]
        return sum(keys.numel() for block in blocks for keys in block.keys.dense(packed))

    assert keys(400, 2) == keys(400, 80) == 2 * 400
    assert keys(4, 2) == keys(4, 80) == 2 * 4


def test_long_rows_are_views_and_equal_masked_attention() -> None:
    batch = Batch.of(random_groups(50, [801, 300, 9, 8], [[250, 3], [40], [3, 140], [90, 2]]))
    packed = torch.randn(len(batch.tokens_L), 4, 8)
    for rows in (rows for block in plan(batch) for rows in (block.queries, block.keys)):
        for dense in rows.dense(packed):
            is_view = dense.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
            assert is_view == isinstance(rows, SegmentViews)
    # A prompt and its response, or the responses to one prompt, are contiguous.
    found_rows = []
    for block in plan(batch):
        rows = block.queries
        views = isinstance(rows, SegmentViews)
        lengths = [x.shape[2] for x in rows.dense(packed)] if views else rows.held.sum(1).tolist()
        found_rows.append((views, block.causal, lengths))
    assert found_rows == [
        (True, True, [801, 250, 340, 140, 90]),
        (False, True, [3, 9, 3, 8, 2]),
        (True, False, [253, 143]),
        (False, False, [92]),
    ]
    spec = AttentionSpec(0.3, None, None)
    shared, masked = PrefixLayout(batch), MaskedLayout(batch)
    found = outputs(lambda *qkv: shared.attend(0, *qkv, spec=spec), batch, 4, 2)
    expected = outputs(lambda *qkv: masked.attend(0, *qkv, spec=spec), batch, 4, 2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=40))
def test_buckets_hold_each_rectangle_once_and_pad_little(sizes: list[tuple[int, int]]) -> None:
    widths, heights = (torch.tensor(x) for x in zip(*sizes, strict=True))
    buckets = bucket_by_size(widths, heights)
    assert sorted(i for bucket in buckets for i in bucket.tolist()) == list(range(len(sizes)))
    for bucket in buckets:
        box = int(widths[bucket].max()) * int(heights[bucket].max()) * len(bucket)
        used = int((widths[bucket] * heights[bucket]).sum())
        assert len(bucket) == 1 or box <= max(MAX_PADDING * used, MIN_SPLIT_PAIRS)


def test_rows_from_a_size_on_are_views() -> None:
    def views(prompt: int, response: int) -> set[tuple[bool, bool]]:
        batch = Batch.of([Group([1] * prompt, [[2] * response] * 2)])
        return {(block.causal, isinstance(block.queries, SegmentViews)) for block in plan(batch)}

    assert views(32, 31) == {(True, True), (True, False), (False, True)}
    assert views(31, 32) == {(True, False), (True, True), (False, True)}
    assert views(16, 31) == {(True, False), (False, False)}
    assert views(16, 32) == {(True, False), (True, True), (False, True)}


def test_positions_without_output_get_no_gradient() -> None:
    # The second half attends to both halves: as many queries as the batch has tokens.
    batch = Batch.of([Group([1] * 6, [[2] * 6])])
    output_positions, spec = torch.arange(6, 12), AttentionSpec(0.3, None, None)
    layout = PrefixLayout(batch, output_positions, last_layer=0)
    for _ in range(20):
        query, key, value, gradient = (x.fill_(torch.nan) for x in inputs_of(batch, 4, 2))
        del query, key, value, gradient
        out, of_query, *_ = outputs(lambda *qkv: layout.attend(0, *qkv, spec=spec), batch, 4, 2)
        assert not out[:6].any() and not of_query[:6].any()
