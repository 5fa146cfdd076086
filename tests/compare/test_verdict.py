"""Pooling over seeds, the criteria of level methods, and the verdict, on numbers made by hand."""

from __future__ import annotations

import math
import random
from statistics import fmean
from typing import Any

import pytest
from helpers.scripts import load_script

from trivium.compare.criteria import CRITERIA, KL
from trivium.compare.pooling import (
    differences,
    gains,
    over_seeds,
    pool,
    pool_decodings,
    quality_unit,
    reward_bounds,
    separate,
)
from trivium.compare.verdict import judge, quality_at
from trivium.maths.distributions import student_quantile
from trivium.maths.intervals import SHARE, UNBOUNDED, mean_interval


def make_method(
    name: str, greedy: list[list[float]], *, kl: float = 1.0, alarms: int = 0, **more: Any
) -> dict[str, Any]:
    """Make the record of a method from the greedy quality of every prompt, per seed."""
    cost = {"seconds": 10.0, "generated_tokens": 1000.0} | more.pop("spent", {})
    runs = [
        {
            "seed": seed,
            "outcomes": {"greedy": row, "sampled": [[q] for q in row]},
            "final": {"greedy": fmean(row), "kl": kl},
            "alarms": [{"monitor": "entropy"}] * alarms,
            "spent": dict(cost),
            "curve": [],
        }
        for seed, row in enumerate(greedy)
    ]
    stages = [{"sampling": "during training"}]
    record = {"name": name, "runs": runs, "stages": stages, "best_of": None, **more}
    return record | pool_decodings(runs, reward_bounds(runs))


def make_result(*methods: dict[str, Any], base: float = 0.1, **options: Any) -> dict[str, Any]:
    n = len(methods[0]["runs"][0]["outcomes"]["greedy"])
    right = outcomes(n, round(base * n))
    bases = {
        run["seed"]: {"outcomes": {"greedy": right, "sampled": [[q] for q in right]}}
        for run in methods[0]["runs"]
    }
    bounds = reward_bounds([run for method in methods for run in method["runs"]])
    return {
        "methods": list(methods),
        "base_quality": pool_decodings(list(bases.values()), bounds),
        "differences": differences(methods, bounds),
        "gains": gains(methods, bases, bounds),
        "seeds": list(bases),
        "budget": None,
        "n": n,
        **options,
    }


def outcomes(n: int, right: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def mixed(n: int, right: int, seed: int = 0) -> list[float]:
    """Return outcomes whose right answers are at random prompts."""
    row = outcomes(n, right)
    random.Random(seed).shuffle(row)
    return row


# --- Pooling --------------------------------------------------------------------------------------


def test_one_seed_has_the_interval_over_prompts() -> None:
    row = outcomes(50, 40)
    pooled = pool([row], SHARE)
    expected = mean_interval(row)
    assert (pooled["mean"], pooled["low"], pooled["high"]) == (0.8, expected.low, expected.high)
    assert (pooled["seeds"], pooled["over"]) == ([0.8], "prompts")


@pytest.mark.parametrize("seeds", [2, 3])
def test_few_seeds_are_shown_as_points_with_the_interval_over_prompts(seeds: int) -> None:
    rows = [mixed(200, 190 - 40 * seed, seed) for seed in range(seeds)]
    pooled = pool(rows, SHARE)
    columns = [fmean(column) for column in zip(*rows, strict=True)]
    expected = mean_interval(columns, bounds=SHARE)
    assert (pooled["low"], pooled["high"]) == (expected.low, expected.high)
    assert pooled["high"] - pooled["low"] < 0.15, "Student's interval of two seeds has a width of 1"
    assert pooled["seeds"] == [0.95, 0.75, 0.55][:seeds]
    assert pooled["over"] == "prompts"


def test_the_spread_between_many_seeds_widens_the_interval() -> None:
    steady = pool([mixed(300, 240, seed) for seed in range(5)], SHARE)
    varied = pool([mixed(300, 180 + 30 * seed, seed) for seed in range(5)], SHARE)
    assert steady["mean"] == varied["mean"] == 0.8
    assert steady["high"] - steady["low"] < 0.06
    # Means 0.6 … 1.0 have the standard deviation √0.025; the t quantile of four is 2.776.
    assert varied["low"] == pytest.approx(0.8 - 2.776 * math.sqrt(0.025 / 5), abs=0.02)
    assert varied["high"] == pytest.approx(0.8 + 2.776 * math.sqrt(0.025 / 5), abs=0.02)
    assert varied["over"] == "prompts and seeds"


def test_variance_over_seeds_and_prompts_is_that_of_the_crossed_table() -> None:
    rows = [[1.0, 2.0, 6.0], [3.0, 4.0, 5.0], [2.0, 6.0, 7.0], [0.0, 0.0, 0.0]]
    seeds, prompts, grand = [3.0, 4.0, 5.0, 0.0], [1.5, 3.0, 4.5], 3.0
    between_seeds = 3 * sum((m - grand) ** 2 for m in seeds) / 3
    between_prompts = 4 * sum((c - grand) ** 2 for c in prompts) / 2
    rest = sum(
        (rows[i][j] - seeds[i] - prompts[j] + grand) ** 2 for i in range(4) for j in range(3)
    )
    variance = (between_seeds + between_prompts - rest / 6) / 12
    interval = over_seeds(rows, 0.95)
    assert interval.mean == grand
    assert interval.high - grand == pytest.approx(student_quantile(0.975, 3) * math.sqrt(variance))


def test_intervals_over_seeds_and_prompts_cover_the_mean() -> None:
    rng = random.Random(0)
    inside = 0
    for _ in range(400):
        shares = [min(1.0, max(0.0, rng.gauss(0.6, 0.1))) for _ in range(6)]
        rows = [[float(rng.random() < share) for _ in range(60)] for share in shares]
        pooled = pool(rows, SHARE)
        inside += pooled["low"] <= 0.6 <= pooled["high"]
    assert 0.93 <= inside / 400 <= 0.98


def test_equal_seeds_have_an_interval_of_some_width_within_the_bounds() -> None:
    pooled = pool([[1.0] * 30] * 6, SHARE)
    assert pooled["high"] == 1.0 and 0.85 < pooled["low"] < 0.95


def test_seeds_with_different_numbers_of_prompts_are_pooled_as_independent() -> None:
    rows = [outcomes(40, 20), outcomes(90, 60)]
    pooled = pool(rows, SHARE)
    each = [mean_interval(row) for row in rows]
    assert pooled["mean"] == pytest.approx((0.5 + 2 / 3) / 2)
    below = math.hypot(*(i.mean - i.low for i in each)) / 2
    assert pooled["low"] == pytest.approx(pooled["mean"] - below)


def test_unbounded_equal_values_have_no_ends() -> None:
    pooled = pool([[3.0, 3.0]], UNBOUNDED)
    assert (pooled["mean"], pooled["low"], pooled["high"]) == (3.0, None, None)


def test_differences_are_paired_over_prompts_and_averaged_over_seeds() -> None:
    methods = [make_method("a", [[1, 0, 1], [1, 1, 1]]), make_method("b", [[0, 0, 1]] * 2)]
    (difference,) = differences(methods, SHARE)
    expected = mean_interval([1.0, 0.5, 0.0], bounds=(-1.0, 1.0))
    assert difference["methods"] == ["a", "b"] and difference["mean"] == 0.5
    assert (difference["low"], difference["high"]) == (expected.low, expected.high)
    assert difference["seeds"] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


def test_intervals_of_differences_hold_for_all_pairs_together() -> None:
    methods = [make_method(name, [mixed(80, 50, i)]) for i, name in enumerate("abcd")]
    first = differences(methods, SHARE)[0]
    rows = [m["runs"][0]["outcomes"]["greedy"] for m in methods[:2]]
    paired = [x - y for x, y in zip(*rows, strict=True)]
    expected = mean_interval(paired, bounds=(-1.0, 1.0), confidence=1 - 0.05 / 6)
    assert (first["low"], first["high"]) == (expected.low, expected.high)


@pytest.mark.parametrize(
    ("difference", "significant"),
    [
        ({"mean": 0.1, "low": 0.05, "high": 0.2, "seeds": [0.1]}, True),
        ({"mean": -0.1, "low": -0.2, "high": -0.05, "seeds": [-0.1]}, True),
        ({"mean": 0.1, "low": -0.05, "high": 0.2, "seeds": [0.1]}, False),
        ({"mean": 0.1, "low": 0.05, "high": 0.2, "seeds": [0.3, -0.1]}, False),
        ({"mean": 0.1, "low": 0.05, "high": 0.2, "seeds": [0.2, 0.0]}, True),
        ({"mean": 0.1, "low": 0.05, "high": 0.2, "seeds": [0.3, 0.3, 0.3, -0.1]}, True),
        ({"mean": 0.1, "low": None, "high": None, "seeds": [0.1]}, False),
    ],
)
def test_a_difference_is_significant_if_interval_and_few_seeds_agree(
    difference: dict[str, Any], significant: bool
) -> None:
    assert separate(difference) is significant


def test_quality_is_a_share_only_if_every_reward_is_0_or_1() -> None:
    share, graded = make_method("a", [[0.0, 1.0]]), make_method("b", [[0.4, 0.923]])
    assert quality_unit(share["runs"]) == "share"
    assert quality_unit([*share["runs"], *graded["runs"]]) == ""
    assert reward_bounds(graded["runs"]) == SHARE
    assert reward_bounds(make_method("c", [[-0.5, 1.0]])["runs"]) == UNBOUNDED


# --- Criteria -------------------------------------------------------------------------------------


def criterion(name: str) -> Any:
    (found,) = [c for c in CRITERIA if c.name == name]
    return found


@pytest.mark.parametrize(("large", "counts"), [(1.38, False), (1.9, False), (2.1, True)])
def test_one_seed_needs_a_factor_of_two(large: float, counts: bool) -> None:
    rows = [outcomes(100, 80)]
    far, near = make_method("far", rows, kl=large), make_method("near", rows, kl=1.0)
    assert KL.worse(far, near) is counts
    slow = make_method("slow", rows, spent={"seconds": 10 * large})
    assert criterion("time").worse(slow, near) is counts
    assert not KL.worse(near, far) and not criterion("time").worse(near, slow)


def test_several_seeds_need_a_factor_of_one_and_a_half_and_more_than_their_spread() -> None:
    def method(*seconds: float) -> dict[str, Any]:
        made = make_method("m", [outcomes(10, 8)] * len(seconds))
        for run, spent in zip(made["runs"], seconds, strict=True):
            run["spent"]["seconds"] = spent
        return made

    worse = criterion("time").worse
    assert worse(method(16, 16.5, 15.8), method(10, 10.2, 9.9))
    assert not worse(method(14, 14.1, 13.9), method(10, 10.2, 9.9)), "a factor of 1.4"
    assert not worse(method(10, 40, 12), method(10, 9, 12)), "the spread is larger"


def test_a_kl_difference_within_the_intervals_over_prompts_does_not_count() -> None:
    one, other = (make_method(n, [outcomes(9, 8)], kl=kl) for n, kl in (("a", 2.5), ("b", 1.0)))
    assert KL.worse(one, other)
    one["runs"][0]["final"] |= {"kl_low": 0.0, "kl_high": 5.0}
    other["runs"][0]["final"] |= {"kl_low": 0.5, "kl_high": 1.5}
    assert not KL.worse(one, other)
    one["runs"][0]["final"]["kl"] = None
    assert not KL.worse(one, other) and not KL.worse(other, one)


def test_tiny_kl_divergences_are_level() -> None:
    one, other = (make_method(n, [outcomes(9, 8)], kl=kl) for n, kl in (("a", 0.09), ("b", 0.001)))
    assert not KL.worse(one, other)


def test_alarms_count_if_most_runs_raised_them_and_none_of_the_other() -> None:
    loud, quiet = make_method("l", [[1.0]] * 3, alarms=1), make_method("q", [[1.0]] * 3)
    worse = criterion("alarms").worse
    assert worse(loud, quiet) and not worse(quiet, loud)
    quiet["runs"][0]["alarms"] = [{"monitor": "kl"}]
    assert not worse(loud, quiet)
    quiet["runs"][0]["alarms"] = loud["runs"][0]["alarms"] = loud["runs"][1]["alarms"] = []
    assert not worse(loud, quiet), "one of three runs"


# --- Verdict --------------------------------------------------------------------------------------


def test_best_method_is_recommended_and_the_next_is_named_with_its_gap() -> None:
    weak, strong = (
        make_method("weak", [outcomes(100, 30)]),
        make_method("strong", [outcomes(100, 80)]),
    )
    verdict = judge(make_result(weak, strong))
    assert verdict["recommended"] == verdict["best"] == verdict["headline"] == "strong"
    assert verdict["level"] == ["strong"] and verdict["tied"] == []
    # 50 prompts are better, the added 1 and −1 leave the mean of 102 at 50/102.
    error = student_quantile(0.975, 101) * math.sqrt((52 - 50**2 / 102) / 101 / 102)
    low, high = 50 / 102 - error, 50 / 102 + error
    assert f"Behind it, weak is lower by 0.500 ({low:.3f} – {high:.3f})." in verdict["sentences"]


def test_a_small_significant_difference_is_not_level() -> None:
    verdict = judge(
        make_result(
            make_method("a", [outcomes(100, 70)], kl=0.1), make_method("b", [outcomes(100, 80)])
        )
    )
    assert verdict["level"] == ["b"] and verdict["recommended"] == "b"


def level_methods(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two methods of equal quality, the second with these options."""
    return make_method("PPO", [mixed(300, 240, 1)]), make_method(
        "GRPO", [mixed(300, 240, 2)], **options
    )


def test_level_methods_without_clear_differences_are_a_tie() -> None:
    verdict = judge(make_result(*level_methods(kl=1.06, spent={"seconds": 14.0})))
    assert verdict["recommended"] is None and set(verdict["tied"]) == {"PPO", "GRPO"}
    assert verdict["headline"] == "A tie: PPO and GRPO are level in quality"
    assert any(
        s.startswith("It is a tie: PPO and GRPO do not differ clearly in alarms, KL, time")
        for s in verdict["sentences"]
    )


def test_trade_offs_of_a_tie_have_one_line_each() -> None:
    ppo, grpo = level_methods(spent={"seconds": 10 / 2.7, "generated_tokens": 2100.0})
    verdict = judge(make_result(ppo, grpo))
    assert set(verdict["tied"]) == {"PPO", "GRPO"}
    assert "PPO: 2.7 times the time." in verdict["sentences"]
    assert "GRPO: 2.1 times the generated tokens." in verdict["sentences"]


@pytest.mark.parametrize("worse", [{"kl": 3.0}, {"alarms": 1}, {"spent": {"seconds": 27.0}}])
def test_a_level_method_that_is_worse_in_one_criterion_is_not_recommended(
    worse: dict[str, Any],
) -> None:
    verdict = judge(make_result(*level_methods(**worse)))
    assert verdict["recommended"] == verdict["headline"] == "PPO"
    assert "Among these, PPO is preferred." in verdict["sentences"]
    assert any(s.startswith("GRPO: ") for s in verdict["sentences"])


def test_a_cheaper_level_method_that_seems_lower_in_quality_is_tied() -> None:
    high = make_method("high", [mixed(300, 240, 1)], spent={"seconds": 30.0})
    low = make_method("low", [mixed(300, 222, 2)])
    verdict = judge(make_result(high, low))
    assert set(verdict["level"]) == set(verdict["tied"]) == {"high", "low"}
    assert "low: perhaps lower quality." in verdict["sentences"]
    assert "high: 3.0 times the time." in verdict["sentences"]


def test_best_of_n_is_not_preferred_for_its_training_time() -> None:
    trained = make_method("GRPO", [mixed(300, 240, 1)])
    nothing = {"seconds": 0.0, "generated_tokens": 0.0}
    best_of = make_method("best of 8", [mixed(300, 240, 2)], spent=nothing, best_of=8)
    verdict = judge(make_result(trained, best_of))
    assert set(verdict["tied"]) == {"GRPO", "best of 8"}
    assert "best of 8: 8 responses per prompt instead of 1." in verdict["sentences"]
    assert any("1,000 generated tokens, against none" in s for s in verdict["sentences"])


@pytest.mark.parametrize("right", [31, 28, 36])
def test_a_method_that_does_not_clearly_exceed_its_base_is_not_recommended(right: int) -> None:
    verdict = judge(make_result(make_method("a", [mixed(100, right)]), base=0.3))
    assert verdict["recommended"] is None and verdict["tied"] == []
    assert verdict["headline"] == "No method is recommended"
    assert any("No method is shown to exceed its base" in s for s in verdict["sentences"])


def test_seeds_that_disagree_are_level() -> None:
    one = make_method("one", [outcomes(400, 360), outcomes(400, 300)])
    other = make_method("other", [outcomes(400, 280), outcomes(400, 320)])
    verdict = judge(make_result(one, other))
    assert set(verdict["level"]) == {"one", "other"}
    both = make_method("other", [outcomes(400, 280), outcomes(400, 280)])
    assert judge(make_result(one, both))["recommended"] == "one"


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(1, "only more seeds can say"), (3, "3 seeds, shown as points, are too few"), (4, "4 seeds")],
)
def test_verdict_says_what_the_number_of_seeds_allows(seeds: int, words: str) -> None:
    verdict = judge(make_result(make_method("a", [outcomes(50, 40)] * seeds)))
    assert words in verdict["sentences"][-1]
    assert any(s.startswith("More seeds") for s in verdict["would_change"]) is (seeds < 4)


def test_quality_that_is_no_share_has_no_per_cent() -> None:
    graded = make_method("a", [[0.5 + 0.001 * k for k in range(60)]])
    assert "%" not in " ".join(judge(make_result(graded))["sentences"])


@pytest.mark.parametrize(
    ("spent", "words"),
    [
        ([800.0, 805.0], "a budget of 800 generated tokens for each method,"),
        ([1152.0, 1152.0], "for each method (1,152 were spent),"),
        ([1152.0, 900.0, 0.0], "for each method (900 to 1,152 were spent),"),
    ],
)
def test_the_first_sentence_has_what_was_spent(spent: list[float], words: str) -> None:
    methods = [
        make_method(f"m{i}", [outcomes(50, 40)], spent={"generated_tokens": tokens})
        for i, tokens in enumerate(spent)
    ]
    budget = {"currency": "generated_tokens", "amount": 800}
    assert words in judge(make_result(*methods, budget=budget))["sentences"][0]


# --- What would change it -------------------------------------------------------------------------


def curve_point(seconds: float, greedy: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "greedy": greedy,
        "greedy_low": greedy - 0.05,
        "greedy_high": greedy + 0.05,
    }


def test_quality_is_interpolated_between_points_and_constant_after_the_last() -> None:
    one = {"runs": [{"curve": [curve_point(0, 0.2), curve_point(10, 0.4), curve_point(20, 0.8)]}]}
    assert quality_at(one, "seconds", 5) == pytest.approx(0.3)
    assert quality_at(one, "seconds", 15) == pytest.approx(0.6)
    assert quality_at(one, "seconds", 99) == pytest.approx(0.8)
    assert quality_at(one, "seconds", 15, "greedy_low") == pytest.approx(0.55)


@pytest.mark.parametrize(("early", "named"), [(0.5, True), (0.15, False)])
def test_a_method_that_clearly_led_at_half_the_budget_is_named(early: float, named: bool) -> None:
    fast, slow = make_method("fast", [outcomes(100, 50)]), make_method("slow", [outcomes(100, 90)])
    fast["runs"][0]["curve"] = [curve_point(0, 0.1), curve_point(5, early), curve_point(10, early)]
    slow["runs"][0]["curve"] = [curve_point(0, 0.1), curve_point(5, 0.1), curve_point(10, 0.9)]
    changes = judge(make_result(fast, slow))["would_change"]
    led = [s for s in changes if "after 5 seconds of training" in s and "fast led with 0.500" in s]
    assert bool(led) is named


def test_offline_and_low_kl_methods_are_named_as_alternatives() -> None:
    offline = make_method("DPO", [outcomes(100, 40)], kl=0.2)
    offline["stages"] = [{"sampling": "none"}]
    changes = judge(make_result(offline, make_method("GRPO", [outcomes(100, 90)], kl=2.0)))[
        "would_change"
    ]
    assert any(s.startswith("No sampling") and "DPO, at 0.400" in s for s in changes)
    assert any(s.startswith("A limit on KL below 2.00") and "DPO" in s for s in changes)


# --- Simulated comparisons ------------------------------------------------------------------------

benchmark = load_script("verdicts")


@pytest.mark.parametrize(("prompts", "seeds"), [(400, 1), (200, 3)])
def test_verdicts_of_simulated_comparisons_are_rarely_wrong(prompts: int, seeds: int) -> None:
    counts = benchmark.simulate(benchmark.Scenario(prompts, seeds), 100, seed=1)
    assert counts.wrong <= 5
    assert counts.called >= 0.9 * counts.ties
    assert counts.found >= 0.6 * counts.winners
