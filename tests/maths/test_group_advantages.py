"""Advantages relative to a prompt's group: for whole responses and for reasoning steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.equations import ADVANTAGES

from trivium.maths import (
    equal_groups,
    group_advantages,
    leave_one_out_advantages,
    step_advantages,
)
from trivium.maths.options import Scale

SCALES: list[Scale] = ["sample_std", "population_std", "batch_std", "none"]
TWO_GROUPS = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0], dtype=torch.float64)  # means 3 and 2
SIZES_G = torch.tensor([3, 2])


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0
    )


@pytest.mark.parametrize(
    ("scale", "deviations"),
    [
        ("sample_std", (math.sqrt(14 / 2), math.sqrt(8 / 1))),
        ("population_std", (math.sqrt(14 / 3), math.sqrt(8 / 2))),
        ("batch_std", (math.sqrt(22 / 5), math.sqrt(22 / 5))),
        ("none", (1, 1)),
    ],
)
def test_outcome_advantages_by_hand(scale: Scale, deviations: tuple[float, float]) -> None:
    first, second = deviations
    close(
        group_advantages(TWO_GROUPS, SIZES_G, scale=scale),
        [-2 / first, -1 / first, 3 / first, -2 / second, 2 / second],
    )


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    close(
        leave_one_out_advantages(TWO_GROUPS, SIZES_G),
        [1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2, 0 - 4, 4 - 0],
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_of_equal_rewards_has_zero_advantage(scale: Scale, dtype: torch.dtype) -> None:
    rewards_N = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0], dtype=dtype)
    for estimator in ADVANTAGES.values():
        advantages_N = estimator(rewards_N, SIZES_G, scale=scale)
        assert advantages_N[:3].tolist() == [0, 0, 0]
        assert advantages_N[3] > 0 > advantages_N[4]
        assert advantages_N.dtype == dtype
    assert group_advantages(rewards_N[:3], SIZES_G[:1], scale=scale).tolist() == [0, 0, 0]
    steps = torch.ones(5, dtype=torch.long)
    advantages_T = step_advantages(rewards_N, steps - 1, steps, steps, SIZES_G, scale=scale)
    assert advantages_T[:3].tolist() == [0, 0, 0]
    assert advantages_T[3] > 0 > advantages_T[4]


def test_rewards_that_differ_by_rounding_are_equal() -> None:
    rewards_N = torch.tensor([0.3, 0.1 + 0.2, -1e20, -1e20 * (1 + 1e-15)], dtype=torch.float64)
    assert rewards_N[0] != rewards_N[1]
    assert rewards_N[2] != rewards_N[3]
    assert group_advantages(rewards_N, torch.tensor([2, 2])).tolist() == [0, 0, 0, 0]


def test_small_differences_are_differences() -> None:
    rewards_N = torch.tensor([1.0, 1.0 + 1e-5, 0.0, 1e-12])
    assert equal_groups(rewards_N, torch.tensor([2, 2])).tolist() == [False, False]
    half = 0.5**0.5
    torch.testing.assert_close(
        group_advantages(rewards_N, torch.tensor([2, 2])),
        torch.tensor([-half, half, -half, half]),
        atol=1e-3,
        rtol=0,
    )


def test_equality_is_each_groups_own() -> None:
    rewards_N = torch.tensor([2.0, 2.0, 3.0, 3.0, 2.0, torch.inf, 1.0, torch.nan, torch.nan])
    equal_G = equal_groups(rewards_N, torch.tensor([2, 2, 0, 1, 2, 2]))
    assert equal_G.tolist() == [True, True, True, True, False, False]
    assert equal_groups(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]), SIZES_G).tolist() == [True, False]
    assert equal_groups(torch.tensor([1, 1, 1, 2]), SIZES_G[[1, 1]]).tolist() == [True, False]


def test_a_nan_reward_is_not_hidden() -> None:
    rewards_N = torch.tensor([1.0, torch.nan, 1.0, 0.0])
    advantages_N = group_advantages(rewards_N, torch.tensor([2, 2]))
    assert advantages_N.isnan().tolist() == [True, True, False, False]


def test_groups_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="a group of one response"):
        group_advantages(torch.ones(3), torch.tensor([2, 1]))
    with pytest.raises(ValueError, match="add up to 5, but there are 3"):
        group_advantages(torch.ones(3), SIZES_G)
    with pytest.raises(ValueError, match="unknown scale 'std'"):
        group_advantages(torch.ones(2), SIZES_G[1:], scale="std")  # type: ignore[arg-type]


def test_no_groups_have_no_advantages() -> None:
    none = torch.tensor([], dtype=torch.long)
    for scale in SCALES:
        assert group_advantages(torch.ones(0), none, scale=scale).shape == (0,)


# One prompt, three responses of 5, 4 and 2 tokens with 3, 1 and 0 steps; a second prompt with two
# responses of 2 and 3 tokens and a step each.
STEPS: dict[str, Any] = {
    "rewards_S": torch.tensor([1.0, 0.0, 1.0, 0.0, 5.0, 7.0], dtype=torch.float64),
    "ends_S": torch.tensor([0, 2, 3, 2, 1, 2]),
    "steps_N": torch.tensor([3, 1, 0, 1, 1]),
    "lengths_N": torch.tensor([5, 4, 2, 2, 3]),
    "sizes_G": torch.tensor([3, 2]),
}


@pytest.mark.parametrize(
    ("scale", "first", "second"),
    [
        ("sample_std", math.sqrt(1 / 3), math.sqrt(2)),
        ("population_std", 0.5, 1),
        ("batch_std", math.sqrt(3 / 6), math.sqrt(3 / 6)),
        ("none", 1, 1),
    ],
)
def test_step_advantages_are_the_suffix_sums_written_out(
    scale: Scale, first: float, second: float
) -> None:
    up, down = 0.5 / first, -0.5 / first  # the first pool is 1, 0, 1, 0 with mean 0.5
    less, more = -1 / second, 1 / second  # the second is 5, 7 with mean 6
    close(
        step_advantages(**STEPS, scale=scale),
        [
            *(up + down + up, down + up, down + up, up, 0),  # steps end at tokens 0, 2 and 3 of 5
            *(down, down, down, 0),  # one step of three tokens, one token behind it
            *(0, 0),  # no step at all
            *(less, less),
            *(more, more, more),
        ],
    )


def test_steps_that_end_in_one_token_share_it() -> None:
    advantages_T = step_advantages(
        torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64),
        torch.tensor([1, 1, 0]),
        torch.tensor([2, 1]),
        torch.tensor([2, 1]),
        torch.tensor([2]),
        scale="none",
    )
    close(advantages_T, [1 + 2, 1 + 2, -3])


def test_pool_of_equal_or_single_steps_has_zero_advantage() -> None:
    advantages_T = step_advantages(
        torch.tensor([0.1, 0.1, 0.1, 3.0]),
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([2, 1, 1, 0, 0]),
        torch.tensor([2, 2, 1, 1, 1]),
        torch.tensor([2, 2, 1]),
    )
    assert advantages_T.tolist() == [0] * 7


def test_steps_outside_their_response_are_refused() -> None:
    for end in (-1, 5):
        wrong = {**STEPS, "ends_S": torch.tensor([0, 2, end, 2, 1, 2])}
        with pytest.raises(ValueError, match="a step ends outside its response"):
            step_advantages(**wrong)
    with pytest.raises(ValueError, match="add up to 6, but there are 5"):
        step_advantages(
            **{**STEPS, "rewards_S": torch.ones(5), "ends_S": torch.zeros(5, dtype=torch.long)}
        )
