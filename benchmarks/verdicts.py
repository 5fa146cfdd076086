"""Verdicts of simulated comparisons whose truth is known.

    python benchmarks/verdicts.py [--comparisons 1000]

The script prints a table in docs/internals/intervals.md. Each comparison has two to six methods. An
outcome at every held-out prompt is 0 or 1. In half of the comparisons two or more methods have the
highest quality; the others are lower by 0.05 to 0.3. KL, time and generated tokens of a method are
1 or 3 times the usual ones, with a spread from run to run, and one method in ten is unhealthy and
raises an alarm in nearly every run. The true winner is the method of the highest quality to which,
by the true numbers, no other is preferred; if there are several, the truth is a tie.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Any

from trivium.compare.pooling import differences, gains, pool_decodings
from trivium.compare.verdict import judge

TOKENS = "generated_tokens"
COSTS = ("kl", "seconds", TOKENS)
SPREAD = {"kl": 0.15, "seconds": 0.15, TOKENS: 0.05}
"""Standard deviation of the logarithm of each cost from run to run."""
FALSE_ALARM = 0.02


@dataclass(frozen=True)
class Scenario:
    """Sizes of the simulated comparisons.

    ``seed_std`` is the standard deviation of a method's quality from seed to seed.
    """

    prompts: int
    seeds: int
    seed_std: float = 0.0


SCENARIOS = (
    Scenario(1000, 1),
    Scenario(300, 1),
    Scenario(300, 3),
    Scenario(300, 5),
    Scenario(300, 3, 0.03),
    Scenario(300, 5, 0.03),
)


@dataclass(frozen=True)
class Truth:
    """True quality and costs of one method."""

    name: str
    quality: float
    costs: dict[str, float]
    unhealthy: bool

    def preferred(self, other: Truth) -> bool:
        """Return whether this method is better in one criterion and worse in none."""
        pairs = [(self.costs[c], other.costs[c]) for c in COSTS]
        pairs.append((float(self.unhealthy), float(other.unhealthy)))
        return any(x < y for x, y in pairs) and not any(x > y for x, y in pairs)


@dataclass
class Counts:
    """Outcomes of the verdicts of one scenario."""

    winners: int = 0
    ties: int = 0
    wrong: int = 0
    found: int = 0
    called: int = 0


def draw_truth(rng: random.Random) -> list[Truth]:
    """Return two to six methods, of which one or several have the highest quality."""
    count = rng.randint(2, 6)
    best = rng.uniform(0.5, 0.9)
    top = rng.randint(2, count) if rng.random() < 0.5 else 1
    return [
        Truth(
            "ABCDEF"[i],
            best if i < top else best - rng.uniform(0.05, 0.3),
            {name: rng.choice((1.0, 1.0, 3.0)) for name in COSTS},
            rng.random() < 0.1,
        )
        for i in range(count)
    ]


def true_winner(methods: list[Truth]) -> str | None:
    """Return the name of the method that the verdict should recommend; None for a tie."""
    best = max(m.quality for m in methods)
    level = [m for m in methods if m.quality == best]
    kept = [m for m in level if not any(other.preferred(m) for other in level)]
    return kept[0].name if len(kept) == 1 else None


def draw_result(rng: random.Random, truth: list[Truth], scenario: Scenario) -> dict[str, Any]:
    """Return the measurements of one comparison."""
    base = min(m.quality for m in truth) - 0.15
    bases = {seed: {"outcomes": _outcomes(rng, base, scenario)} for seed in range(scenario.seeds)}
    methods = []
    for method in truth:
        runs = [_run(rng, method, scenario, seed) for seed in range(scenario.seeds)]
        methods.append({"name": method.name, "best_of": None, "stages": [], "runs": runs})
    for method in methods:
        method |= pool_decodings(method["runs"], (0.0, 1.0))
    return {
        "methods": methods,
        "base_quality": pool_decodings(list(bases.values()), (0.0, 1.0)),
        "differences": differences(methods, (0.0, 1.0)),
        "gains": gains(methods, bases, (0.0, 1.0)),
        "seeds": list(range(scenario.seeds)),
        "budget": None,
        "n": scenario.prompts,
    }


def _run(rng: random.Random, method: Truth, scenario: Scenario, seed: int) -> dict[str, Any]:
    cost = {name: method.costs[name] * math.exp(rng.gauss(0, SPREAD[name])) for name in COSTS}
    quality = min(1.0, max(0.0, rng.gauss(method.quality, scenario.seed_std)))
    raised = rng.random() < (0.95 if method.unhealthy else FALSE_ALARM)
    return {
        "seed": seed,
        "outcomes": _outcomes(rng, quality, scenario),
        "final": {"kl": cost["kl"], "kl_low": 0.95 * cost["kl"], "kl_high": 1.05 * cost["kl"]},
        "spent": {"seconds": 60 * cost["seconds"], "generated_tokens": 1e5 * cost[TOKENS]},
        "alarms": [{"monitor": "kl"}] if raised else [],
        "curve": [],
    }


def _outcomes(rng: random.Random, quality: float, scenario: Scenario) -> dict[str, Any]:
    greedy = [float(rng.random() < quality) for _ in range(scenario.prompts)]
    return {"greedy": greedy, "sampled": [[q] for q in greedy]}


def simulate(scenario: Scenario, comparisons: int, *, seed: int = 0) -> Counts:
    """Return how often the verdict is right and wrong."""
    counts = Counts()
    for number in range(comparisons):
        rng = random.Random(f"{seed} {number} {scenario}")
        truth = draw_truth(rng)
        winner = true_winner(truth)
        verdict = judge(draw_result(rng, truth, scenario))
        named = verdict["recommended"]
        counts.winners += winner is not None
        counts.ties += winner is None
        counts.wrong += named not in (None, winner)
        counts.found += winner is not None and named == winner
        counts.called += winner is None and named is None
    return counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=1000)
    comparisons = parser.parse_args().comparisons
    print("| prompts | seeds | spread between seeds | wrong winner | tie called | winner named |")
    print("|---|---|---|---|---|---|")
    for scenario in SCENARIOS:
        counts = simulate(scenario, comparisons)
        cells = (
            f"{counts.wrong / comparisons:.1%}",
            f"{counts.called / counts.ties:.1%} of {counts.ties}",
            f"{counts.found / counts.winners:.1%} of {counts.winners}",
        )
        sizes = f"{scenario.prompts:,} | {scenario.seeds} | {scenario.seed_std:g}"
        print(f"| {sizes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
