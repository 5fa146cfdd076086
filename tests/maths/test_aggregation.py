"""Token weights: how per-token losses become one number."""

from __future__ import annotations

import pytest
import torch
from helpers.equations import AGGREGATIONS

from trivium.maths import fixed_length, segment_sum, token_weights, weighted_sum

LENGTHS_N = torch.tensor([1, 4, 2])
TRAINED_T = torch.tensor([1, 1, 0, 0, 1, 0, 0]).bool()  # the last response holds no trained token


def weights(aggregation: str, loss_mask_T: torch.Tensor | None = None) -> torch.Tensor:
    return token_weights(
        LENGTHS_N,
        AGGREGATIONS[aggregation],
        loss_mask_T=loss_mask_T,
        max_length=5 if aggregation == "fixed_length" else None,
        dtype=torch.float64,
    )


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [1 / 3, 1 / 12, 1 / 12, 1 / 12, 1 / 12, 1 / 6, 1 / 6]),
        ("token_mean", [1 / 7] * 7),
        ("fixed_length", [1 / 15] * 7),
    ],
)
def test_weights_by_hand(aggregation: str, expected: list[float]) -> None:
    torch.testing.assert_close(
        weights(aggregation), torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0
    )


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [1 / 2, 1 / 4, 0, 0, 1 / 4, 0, 0]),
        ("token_mean", [1 / 3, 1 / 3, 0, 0, 1 / 3, 0, 0]),
        ("fixed_length", [1 / 10, 1 / 10, 0, 0, 1 / 10, 0, 0]),
    ],
)
def test_untrained_tokens_and_responses_count_nowhere(
    aggregation: str, expected: list[float]
) -> None:
    torch.testing.assert_close(
        weights(aggregation, TRAINED_T),
        torch.tensor(expected, dtype=torch.float64),
        atol=1e-15,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("aggregation", "total"),
    [("sequence_mean", 1), ("token_mean", 1), ("fixed_length", 7 / 15)],
)
def test_weights_sum_to_one_or_to_the_used_share_of_the_length(
    aggregation: str, total: float
) -> None:
    assert weights(aggregation).sum().item() == pytest.approx(total, abs=1e-15)


def test_sequence_mean_gives_every_response_the_same_say() -> None:
    share_N = segment_sum(weights("sequence_mean"), LENGTHS_N)
    torch.testing.assert_close(share_N, torch.full_like(share_N, 1 / 3))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_is_the_sum_over_any_partition_of_the_responses(aggregation: str) -> None:
    loss_T = torch.linspace(-1, 2, 7, dtype=torch.float64)
    weights_T = weights(aggregation)
    whole = weighted_sum(loss_T, weights_T)
    starts = [0, 1, 5, 7]
    for parts in ([[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]):
        split = sum(
            weighted_sum(loss_T[starts[i] : starts[i + 1]], weights_T[starts[i] : starts[i + 1]])
            for part in parts
            for i in part
        )
        torch.testing.assert_close(split, whole, atol=1e-15, rtol=0)


def test_nothing_trained_weighs_nothing() -> None:
    for aggregation in AGGREGATIONS:
        assert weights(aggregation, torch.zeros(7).bool()).tolist() == [0] * 7
    assert token_weights(torch.tensor([], dtype=torch.long)).shape == (0,)
    assert weighted_sum(torch.ones(0), torch.ones(0)).item() == 0


def test_a_nan_counts_only_where_a_token_is_trained() -> None:
    loss_T = torch.tensor([1.0, torch.nan, 3.0])
    assert weighted_sum(loss_T, torch.tensor([0.5, 0.0, 0.5])).item() == 2
    assert weighted_sum(loss_T, torch.tensor([0.5, 0.1, 0.4])).isnan()


def test_weights_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="max_length ≥ 1, got None"):
        token_weights(LENGTHS_N, fixed_length)
    with pytest.raises(ValueError, match="marks 3 tokens, but the responses hold 7"):
        token_weights(LENGTHS_N, loss_mask_T=torch.ones(3).bool())
    with pytest.raises(ValueError, match="same shape"):
        weighted_sum(torch.ones(3), torch.ones(1))
