"""Operations on flat segments, against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.maths import (
    repeat_per_segment,
    segment_ids,
    segment_mean,
    segment_starts,
    segment_sum,
    suffix_sum,
)
from trivium.maths.ragged import require_lengths, require_same_shape

RAGGED = st.lists(st.lists(st.floats(-10, 10), max_size=5), max_size=5)
REPRODUCIBLE = settings(max_examples=50, deadline=None, derandomize=True)


def flat(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' numbers end to end, and the rows' lengths."""
    x_T = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    return x_T, torch.tensor([len(row) for row in rows], dtype=torch.long)


def test_segments_are_located_around_an_empty_one() -> None:
    lengths_N = torch.tensor([2, 0, 3])
    assert segment_ids(lengths_N).tolist() == [0, 0, 2, 2, 2]
    assert segment_starts(lengths_N).tolist() == [0, 2, 2]
    assert repeat_per_segment(torch.tensor([7, 8, 9]), lengths_N).tolist() == [7, 7, 9, 9, 9]


@REPRODUCIBLE
@given(RAGGED)
def test_segment_sums_and_means_are_those_of_the_rows(rows: list[list[float]]) -> None:
    x_T, lengths_N = flat(rows)
    sums = torch.tensor([sum(row) for row in rows], dtype=torch.float64)
    means = torch.tensor([sum(row) / len(row) if row else 0 for row in rows], dtype=torch.float64)
    torch.testing.assert_close(segment_sum(x_T, lengths_N), sums)
    torch.testing.assert_close(segment_mean(x_T, lengths_N), means)


@REPRODUCIBLE
@given(RAGGED, st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_suffix_sum_is_the_double_loop(rows: list[list[float]], discount: float) -> None:
    x_T, lengths_N = flat(rows)
    expected = [
        sum(discount ** (k - t) * row[k] for k in range(t, len(row)))
        for row in rows
        for t in range(len(row))
    ]
    torch.testing.assert_close(
        suffix_sum(x_T, lengths_N, discount), torch.tensor(expected, dtype=torch.float64)
    )


def test_gradients_flow_through_sums_means_and_suffix_sums() -> None:
    x_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    lengths_N = torch.tensor([2, 0, 3])
    for function in (segment_sum, segment_mean, lambda x, n: suffix_sum(x, n, 0.9)):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, lengths_N), (x_T,))


def test_a_nan_stays_in_its_own_segment() -> None:
    x_T = torch.tensor([1.0, torch.nan, 3.0, 4.0, 5.0])
    lengths_N = torch.tensor([2, 3])
    assert segment_sum(x_T, lengths_N).isnan().tolist() == [True, False]
    assert suffix_sum(x_T, lengths_N).isnan().tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_keep_the_dtype(dtype: torch.dtype) -> None:
    x_T, lengths_N = torch.ones(3, dtype=dtype), torch.tensor([1, 2])
    for y in (
        segment_sum(x_T, lengths_N),
        segment_mean(x_T, lengths_N),
        suffix_sum(x_T, lengths_N),
    ):
        assert y.dtype == dtype


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 3, but there are 4"):
        require_lengths(torch.tensor([1, 2]), 4)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        require_lengths(torch.tensor([-1, 2]), 1)
    with pytest.raises(ValueError, match="vector of integers"):
        require_lengths(torch.tensor([1.0, 2.0]), 3)
    with pytest.raises(ValueError, match="vector of integers"):
        require_lengths(torch.tensor([[1, 2]]), 3)
    with pytest.raises(ValueError, match="1 values for 2 segments"):
        repeat_per_segment(torch.ones(1), torch.tensor([1, 2]))


def test_shapes_that_would_broadcast_are_refused() -> None:
    require_same_shape(a=torch.ones(3), b=None, c=torch.ones(3))
    with pytest.raises(ValueError, match=r"same shape: a \(3,\), b \(1,\)"):
        require_same_shape(a=torch.ones(3), b=torch.ones(1))
