"""Coverage of the 95 % intervals, by enumeration and simulation.

    python benchmarks/intervals.py

The script prints the tables in docs/internals/intervals.md. The coverage of a share is exact: the
probabilities of all counts whose interval contains it. The coverage of graded values and of paired
differences is simulated with fixed seeds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trivium.maths.intervals import Bounds, mean_interval, share_interval

COUNTS = (6, 20, 100, 1000)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
DRAWS = 2000
UNLIKELY = math.log(1e-10)
"""Counts with a smaller log-probability are left out."""


def share_coverage(n: int, share: float) -> float:
    """Return the probability that the interval of n trials contains the share."""
    likely = (k for k in range(n + 1) if _log_probability(n, k, share) > UNLIKELY)
    return math.fsum(
        math.exp(_log_probability(n, count, share))
        for count in likely
        if share_interval(count, n).low <= share <= share_interval(count, n).high
    )


def best_coverage(n: int, share: float) -> float:
    """Return the coverage closest to 95 % that a set of counts around the mode can have."""
    counts = sorted(range(n + 1), key=lambda k: -_log_probability(n, k, share))
    total, best = 0.0, 0.0
    for count in counts:
        total += math.exp(_log_probability(n, count, share))
        best = min(best, total, key=lambda coverage: abs(coverage - 0.95))
        if total > 0.999:
            break
    return best


def _log_probability(n: int, count: int, share: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    return ways + count * math.log(share) + (n - count) * math.log1p(-share)


@dataclass(frozen=True)
class Distribution:
    """A distribution of bounded values, with its mean."""

    name: str
    bounds: Bounds
    mean: float
    draw: Callable[[random.Random], float]


def _difference(rng: random.Random, better: float, worse: float) -> float:
    """Return one paired difference of two 0/1 outcomes."""
    x = rng.random()
    return float(x < better) - float(x > 1 - worse)


def _coins(rng: random.Random) -> float:
    return sum(rng.random() < 0.9 for _ in range(4)) / 4


UNIT, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
DISTRIBUTIONS = (
    Distribution("uniform", UNIT, 0.5, lambda rng: rng.random()),
    Distribution("U-shaped, Beta(½, ½)", UNIT, 0.5, lambda rng: rng.betavariate(0.5, 0.5)),
    Distribution("skewed, Beta(8, 1)", UNIT, 8 / 9, lambda rng: rng.betavariate(8, 1)),
    Distribution("mean of four coins of 0.9", UNIT, 0.9, _coins),
    Distribution("0.9, and 0 in one of 50", UNIT, 0.882, lambda rng: 0.9 * (rng.random() > 0.02)),
    Distribution("0.9 always", UNIT, 0.9, lambda rng: 0.9),
    *(
        Distribution(
            f"paired: {up:.0%} better, {down:.0%} worse",
            DIFFERENCE,
            up - down,
            partial(_difference, better=up, worse=down),
        )
        for up, down in ((0.1, 0.1), (0.2, 0.05), (0.01, 0.01))
    ),
)


def mean_coverage(values: Distribution, n: int, draws: int = DRAWS) -> float:
    """Return the share of simulated intervals that contain the mean."""
    rng = random.Random(f"{values.name} {n}")
    inside = 0
    for _ in range(draws):
        interval = mean_interval([values.draw(rng) for _ in range(n)], bounds=values.bounds)
        inside += interval.low - 1e-12 <= values.mean <= interval.high + 1e-12
    return inside / draws


def main() -> None:
    """Print both tables."""
    heads = " | ".join(f"n = {n:,}" for n in COUNTS)
    print(f"| share | {heads} |\n|---|{'---|' * len(COUNTS)}")
    for share in SHARES:
        cells = []
        for n in COUNTS:
            coverage, best = share_coverage(n, share), best_coverage(n, share)
            note = "" if 0.93 <= coverage <= 0.97 else f" ({best:.1%})"
            cells.append(f"{coverage:.1%}{note}")
        print(f"| {share:g} | {' | '.join(cells)} |")
    print(f"\n| values | {heads} |\n|---|{'---|' * len(COUNTS)}")
    for values in DISTRIBUTIONS:
        draws = {n: min(DRAWS, 400_000 // n) for n in COUNTS}
        cells = [f"{mean_coverage(values, n, draws[n]):.1%}" for n in COUNTS]
        print(f"| {values.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
