"""Quantiles and intervals, compared with tables, exact coverage and hand-computed values."""

from __future__ import annotations

import math
from itertools import product
from statistics import NormalDist

import pytest
from helpers.scripts import load_script
from hypothesis import given
from hypothesis import strategies as st

from trivium.maths.distributions import at_least, incomplete_beta, student_quantile
from trivium.maths.intervals import SHARE, UNBOUNDED, Interval, mean_interval, share_interval

# --- Quantiles ------------------------------------------------------------------------------------

# Two-sided 95 %, from the tables of Student's t (NIST/SEMATECH, section 1.3.6.7.2).
TABLE = {
    1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060,
    9: 2.2622, 10: 2.2281, 11: 2.2010, 12: 2.1788, 15: 2.1314, 20: 2.0860, 30: 2.0423, 40: 2.0211,
    60: 2.0003, 100: 1.9840, 200: 1.9719, 1000: 1.9623,
}  # fmt: skip


@pytest.mark.parametrize(("df", "expected"), TABLE.items())
def test_student_quantile_equals_the_table(df: int, expected: float) -> None:
    assert student_quantile(0.975, df) == pytest.approx(expected, abs=6e-5)


def test_student_quantile_has_its_closed_forms() -> None:
    for p in (0.6, 0.9, 0.975, 0.9999):
        assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        two = 2 * (p - 0.5) / math.sqrt(2 * p * (1 - p))
        assert student_quantile(p, 2) == pytest.approx(two, rel=1e-9)


def test_student_quantile_falls_to_the_normal_one() -> None:
    quantiles = [student_quantile(0.975, df) for df in (*range(1, 60), 1e3, 1e4, 1e5, 9e5, 2e6)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] == NormalDist().inv_cdf(0.975)
    assert quantiles[-2] == pytest.approx(quantiles[-1], abs=1e-5)


def test_student_quantile_of_an_impossible_probability_is_an_error() -> None:
    for p, df in ((0.5, 3), (1.0, 3), (0.975, 0.5)):
        with pytest.raises(ValueError, match="give"):
            student_quantile(p, df)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.99])
def test_binomial_tail_equals_the_sum_of_its_terms(p: float) -> None:
    for n, k in product((1, 5, 40), range(42)):
        terms = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)]
        assert at_least(k, n, p) == pytest.approx(math.fsum(terms), abs=1e-12)


def test_incomplete_beta_is_symmetric_and_monotone() -> None:
    for a, b in ((0.5, 0.5), (2.0, 7.5), (300.0, 4.0)):
        values = [incomplete_beta(a, b, k / 20) for k in range(21)]
        assert values == sorted(values) and (values[0], values[-1]) == (0.0, 1.0)
        for k in range(21):
            assert incomplete_beta(b, a, 1 - k / 20) == pytest.approx(1 - values[k], abs=1e-12)


# --- Intervals ------------------------------------------------------------------------------------


def acceptability(successes: int, n: int, p: float) -> float:
    """Blaker's acceptability by its definition, from sums over all counts."""
    terms = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    below = [math.fsum(terms[: k + 1]) for k in range(n + 1)]
    above = [math.fsum(terms[k:]) for k in range(n + 1)]
    tail = min(below[successes], above[successes])
    others = above if below[successes] <= above[successes] else below
    return tail + max((other for other in others if other <= tail * (1 + 1e-12)), default=0.0)


@pytest.mark.parametrize("n", [1, 2, 6, 13])
def test_share_interval_holds_the_acceptable_proportions(n: int) -> None:
    grid = [k / 2000 for k in range(1, 2000)]
    for successes in range(n + 1):
        interval = share_interval(successes, n)
        accepted = [p for p in grid if acceptability(successes, n, p) > 0.05]
        assert interval.low == (0 if successes == 0 else pytest.approx(accepted[0], abs=6e-4))
        assert interval.high == (1 if successes == n else pytest.approx(accepted[-1], abs=6e-4))


def test_share_interval_is_symmetric_and_within_clopper_and_pearsons() -> None:
    for successes in range(21):
        interval, mirrored = share_interval(successes, 20), share_interval(20 - successes, 20)
        assert interval.low == pytest.approx(1 - mirrored.high)
        assert at_least(successes, 20, interval.low) >= 0.025 - 1e-9
        assert 1 - at_least(successes + 1, 20, interval.high) >= 0.025 - 1e-9
        assert interval.low <= successes / 20 <= interval.high


def test_bounded_values_have_students_interval_with_one_value_at_each_bound() -> None:
    interval = mean_interval([0.25, 0.75, 0.5])
    # 0, 0.25, 0.5, 0.75, 1: standard deviation √(0.625/4), four degrees of freedom.
    half = 2.776445 * math.sqrt(0.625 / 4 / 5)
    assert interval.mean == 0.5
    assert (interval.low, interval.high) == (
        pytest.approx(0.5 - half, abs=1e-6),
        pytest.approx(0.5 + half, abs=1e-6),
    )


def test_unbounded_values_have_students_interval() -> None:
    interval = mean_interval([-1.0, 2.0, 5.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 * 3 / math.sqrt(3), abs=1e-5)


@pytest.mark.parametrize(
    "values", [[0.5], [0.9] * 6, [1.0, 1, 1, 1, 1, 0.5], [1.0], [0.0] * 9, [1.0] * 999]
)
def test_bounded_values_have_an_interval_of_some_width_within_the_bounds(
    values: list[float],
) -> None:
    interval = mean_interval(values)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.high - interval.low > 0.9 / len(values)


@pytest.mark.parametrize("values", [[3.0], [-2.0] * 7, [0.0] * 5])
def test_equal_unbounded_values_have_no_interval(values: list[float]) -> None:
    interval = mean_interval(values, bounds=UNBOUNDED)
    assert interval == Interval(values[0], -math.inf, math.inf)
    assert interval.ends() == (None, None)


def test_an_interval_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one observation"):
        mean_interval([])
    with pytest.raises(ValueError, match="at least one observation"):
        share_interval(0, 0)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.sampled_from([SHARE, (-1.0, 1.0), UNBOUNDED]),
    st.sampled_from([0.9, 0.95, 0.999]),
)
def test_interval_holds_the_mean_and_grows_with_the_confidence(
    values: list[float], bounds: tuple[float, float], confidence: float
) -> None:
    interval = mean_interval(values, bounds=bounds, confidence=confidence)
    wider = mean_interval(values, bounds=bounds, confidence=0.9999)
    slack = 1e-9
    assert bounds[0] <= interval.low <= interval.mean + slack
    assert interval.mean - slack <= interval.high <= bounds[1]
    assert wider.low <= interval.low + slack and interval.high <= wider.high + slack
    if bounds != UNBOUNDED:
        assert interval.low < interval.high


# --- Coverage -------------------------------------------------------------------------------------

benchmark = load_script("intervals")


@pytest.mark.parametrize("n", [6, 20, 100])
def test_share_intervals_cover_every_share_with_at_least_95_percent(n: int) -> None:
    shares = [k / 50 for k in range(1, 50)]
    coverage = [benchmark.share_coverage(n, share) for share in shares]
    assert min(coverage) >= 0.95
    many = [c for c, share in zip(coverage, shares, strict=True) if n * min(share, 1 - share) > 4]
    assert all(c <= 0.97 for c in many if n == 100)


@pytest.mark.parametrize("share", [0.02, 0.98])
def test_intervals_of_a_thousand_cover_95_to_97_percent(share: float) -> None:
    assert 0.95 <= benchmark.share_coverage(1000, share) <= 0.97


@pytest.mark.parametrize("values", benchmark.DISTRIBUTIONS, ids=lambda v: v.name)
@pytest.mark.parametrize("n", [6, 20, 100])
def test_graded_values_and_differences_are_covered(values: object, n: int) -> None:
    # The standard error of 500 draws at 95 % is one point.
    assert benchmark.mean_coverage(values, n, 500) >= 0.92
