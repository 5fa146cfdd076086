"""Each monitor raises one alarm on metrics that provoke it, and none on healthy metrics."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.config.base import dump, load_configuration
from trivium.errors import ConfigurationError
from trivium.monitoring.metrics import metric
from trivium.monitoring.monitor_config import MonitorsConfig
from trivium.monitoring.monitors import MONITORS, Alarm, Monitors, table

Numbers = Mapping[str, float]


def run(
    steps: Iterable[Numbers],
    evaluations: Mapping[int, Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Alarm]:
    """Return the alarms of a run with these metrics per step and evaluations after some steps."""
    monitors = Monitors(MonitorsConfig.model_validate(config or {}))
    held_out = dict(evaluations or {})
    alarms = monitors.evaluated(0, held_out[0]) if 0 in held_out else []
    for step, numbers in enumerate(steps, start=1):
        alarms += monitors.observe(step, numbers)
        alarms += monitors.evaluated(step, held_out[step]) if step in held_out else []
    return alarms


def names(alarms: Iterable[Alarm]) -> list[tuple[str, int]]:
    return [(alarm.monitor, alarm.step) for alarm in alarms]


def wave(first: float, last: float, steps: int, size: float = 0.05) -> list[float]:
    """Return values on a line, with the pattern +, +, −, − of a given size on it."""
    slope = (last - first) / (steps - 1)
    return [first + slope * k + (size if k % 4 < 2 else -size) for k in range(steps)]


def stream(**series: Iterable[float]) -> list[dict[str, float]]:
    """Return one mapping of metrics per step; `__` in a name stands for `/`."""
    columns = [[(key.replace("__", "/"), x) for x in xs] for key, xs in series.items()]
    return [dict(row) for row in zip(*columns, strict=True)]


def kl(nats: Iterable[float], length: int) -> list[dict[str, float]]:
    return [{"kl/response": x, "kl/k1": x / length} for x in nats]


def preferences(chosen: Iterable[float], margin: Iterable[float]) -> list[dict[str, float]]:
    return stream(implicit_reward__chosen=chosen, implicit_reward__margin=margin)


def learned(accuracy: float, weight: float) -> list[dict[str, float]]:
    step = {"implicit_reward/accuracy": accuracy, "implicit_reward/gradient_weight": weight}
    return [step] * 12


# Per monitor: metrics that raise its alarm, the step of the alarm, and healthy metrics.
STREAMS: dict[str, tuple[list[dict[str, float]], int, list[dict[str, float]]]] = {
    "non_finite": (
        stream(loss=[0.1, 0.2, math.nan, 0.1]),
        3,
        stream(loss=[0.1, 0.2, 1e30, -5.0]),
    ),
    # The median of three exceeds 10 only at the second 12; 8 nats on 8 tokens do not exceed it.
    "kl": (kl([2, 9, 30, 8, 9, 12, 12], 20), 7, kl([2, 8, 8, 8, 8, 30, 8], 8)),
    "kl_old": (stream(policy__kl_old=[0.02, 0.11]), 2, stream(policy__kl_old=[0.02, 0.09])),
    # The first value is 1, so the limit is 0.1; the third low value moves the median of five.
    "entropy": (
        stream(policy__entropy=[1, 0.5, 0.5, 0.5, 0.5, 0.09, 0.09, 0.09]),
        8,
        stream(policy__entropy=[1, 1, 1, 1, 1, 0.09, 0.2, 0.09, 0.2, 0.2, 0.2, 0.19]),
    ),
    "length_growth": (
        stream(length__mean=[20, 20, 22, 18, 21, 31, 31, 31]),
        8,
        stream(length__mean=[20, 20, 22, 18, 20, 29, 29, 29, 29, 29, 90]),
    ),
    "length_collapse": (
        stream(length__mean=[20, 20, 22, 18, 20, 9, 9, 9]),
        8,
        stream(length__mean=[20, 20, 22, 18, 20, 11, 11, 11, 11, 11, 1]),
    ),
    "truncated": (
        stream(length__truncated=[0, 0, 0.9, 0.9, 0.9]),
        5,
        stream(length__truncated=[0, 0, 0.4, 1, 1, 0, 0]),
    ),
    "empty": (
        stream(length__empty=[0.1, 0.4, 0.5, 0.9]),
        3,
        stream(length__empty=[0.0, 0.49, 0.2]),
    ),
    "equal_rewards": (
        stream(group__equal_rewards=[0.1, 0.1, 1, 0.95, 0.9]),
        5,
        stream(group__equal_rewards=[0.1, 0.1, 1, 1, 0.8, 0.8]),
    ),
    # The first ten steps are ignored.
    "critic": (
        stream(value__explained_variance=[-1.0] * 9 + [0.5] * 2),
        11,
        stream(value__explained_variance=[-1.0] * 6 + [-0.04] * 9),
    ),
    "clip_fraction": (
        [{"policy/clip_low": 0.2, "policy/clip_high": 0.1}] * 5,
        5,
        [{"policy/clip_low": 0.2, "policy/clip_high": 0.09}] * 9,
    ),
    "ratio": (
        stream(policy__ratio_max=[1, 1, 101, 101, 101]),
        5,
        stream(policy__ratio_max=[900, 5, 99, 700, 3, 4, 99]),
    ),
    "sampler_difference": (
        stream(policy__sampler_difference=[0.1, 0.3, 0.3]),
        3,
        stream(policy__sampler_difference=[0.1, 0.3, 0.1, 0.1, 5, 0.1]),
    ),
    # Both fall by 1.2; the margin grows by 1 in the first stream and by 2 in the second.
    "chosen_logprob": (
        preferences([0.0] * 5 + [-1.2] * 3, [0.0] * 5 + [1.0] * 3),
        8,
        preferences([0.0] * 5 + [-1.2] * 9, [0.0] * 5 + [2.0] * 9),
    ),
    "preferences_learned": (learned(1.0, 0.04), 10, learned(0.98, 0.04)),
    "gradient_norm": (
        stream(gradient_norm=[1, 2, 1, 2, 1, 1, 1, 1, 11, 12]),
        10,
        stream(gradient_norm=[1, 2, 1, 2, 1, 1, 1, 1, 11, 1, 1, 50, 1, 9, 9]),
    ),
    "lost_updates": (
        stream(weights__changed_share=[0.9, 0.4, 0.4], learning_rate=[1e-6] * 3),
        3,
        stream(weights__changed_share=[0.9, 0.4, 0.6, 0.7, 0.0], learning_rate=[1e-6] * 4 + [0.0]),
    ),
    "fallbacks": (
        stream(rewards__a__fallbacks=[0, 0, 2], rewards__b__fallbacks=[0, 0, 1]),
        3,
        stream(rewards__a__fallbacks=[0, 0, 0], rewards__a__mean=[1, 1, 1]),
    ),
    # A fall over sixteen steps must exceed a quarter of the standard deviation, and its error.
    "reward_fall": (
        stream(reward__mean=[0.5, *wave(0.5, -0.1, 17)], reward__std=[1.0] * 18),
        16,
        stream(
            reward__mean=[*wave(0.5, 0.4, 18), *wave(0.5, 0.1, 18, 0.4)], reward__std=[1.0] * 36
        ),
    ),
    # Steps without a split do not log the metric.
    "out_of_memory": ([{"loss": 1.0}, {"memory/splits": 1.0}, {"memory/splits": 2.0}], 2, [{}] * 3),
}


@pytest.mark.parametrize("name", STREAMS)
def test_monitor_raises_one_alarm_on_provoking_metrics(name: str) -> None:
    provoking, step, _ = STREAMS[name]
    continued = [*provoking, *provoking[-1:] * 30]
    assert names(run(continued)) == [(name, step)]


@pytest.mark.parametrize("name", STREAMS)
def test_monitor_raises_no_alarm_on_healthy_metrics(name: str) -> None:
    assert run(STREAMS[name][2]) == []


def test_every_monitor_has_provoking_and_healthy_metrics() -> None:
    tested_below = {"reward_hacking", "learned_reward", "held_out_quality"}
    assert {*STREAMS, *tested_below} == set(MONITORS)
    assert list(MONITORS) == [n for n in MonitorsConfig.model_fields if n != "again_after"]


def test_streams_use_defined_metric_names() -> None:
    logged = {key for stream, _, _ in STREAMS.values() for row in stream for key in row}
    assert [key for key in logged if metric(key) is None] == []


@pytest.mark.parametrize("name", STREAMS)
def test_disabled_monitor_raises_no_alarm(name: str) -> None:
    assert run(STREAMS[name][0], config={name: {"action": "off"}}) == []


@pytest.mark.parametrize(("half_precision", "at"), [(False, 3), (True, 6)])
def test_rounding_of_bfloat16_is_no_sampler_difference(half_precision: bool, at: int) -> None:
    monitors = Monitors(MonitorsConfig(), half_precision=half_precision)
    differences = [0.6, 0.6, 0.6, 0.6, 9.0, 9.0, 9.0]
    alarms = [
        alarm.step
        for step, value in enumerate(differences, start=1)
        for alarm in monitors.observe(step, {"policy/sampler_difference": value})
    ]
    assert alarms == [at]


def test_only_the_monitor_with_action_stop_stops_the_run() -> None:
    rows = [a | b for a, b in zip(kl([12] * 6, 20), [{"policy/kl_old": 1.0}] * 6, strict=True)]
    alarms = run(rows, config={"kl": {"action": "stop"}})
    assert [(alarm.monitor, alarm.stops) for alarm in alarms] == [("kl_old", False), ("kl", True)]


# --- Alarm texts ----------------------------------------------------------------------------------


def test_alarm_holds_the_observation_the_reason_and_the_remedy() -> None:
    (alarm,) = run(kl([2, 9, 30, 8, 9, 12, 12], 20))
    assert (alarm.metric, alarm.value, alarm.limit) == ("kl/response", 12, 10)
    assert alarm.seen == (
        "KL to the reference is 12 nats per response, 0.6 per token (median of steps 5–7); the "
        "limits are 10 and 0.1"
    )
    assert alarm.message == f"kl, step 7: {alarm.seen}. {alarm.remedy}"
    assert "beta" in alarm.remedy
    assert list(alarm.fields()) == [
        *("monitor", "step", "metric", "value", "limit", "seen", "why", "remedy", "stops")
    ]
    assert json.loads(json.dumps(alarm.fields(), allow_nan=False)) == alarm.fields()


def test_alarm_on_nan_has_finite_numbers_and_names_the_metrics() -> None:
    (alarm,) = run([{"loss": math.nan, "reward/mean": 1.0, "gradient_norm": math.inf}])
    assert alarm.seen == "not finite: loss = nan, gradient_norm = inf"
    assert (alarm.value, alarm.limit) == (2.0, 0.0)


def test_alarm_text_has_the_first_and_the_last_value() -> None:
    (alarm,) = run(STREAMS["length_growth"][0])
    assert alarm.seen == (
        "responses grew from 20 (step 1) to 31 tokens (steps 4–8), by a factor of 1.55; the limit "
        "is a factor of 1.5"
    )
    (alarm,) = run(STREAMS["truncated"][0])
    assert alarm.seen == "the length limit truncated 54% of responses (steps 1–5)"
    (alarm,) = run(STREAMS["fallbacks"][0])
    assert alarm.seen.startswith("the reward a failed on 2 responses")


# --- Rules ----------------------------------------------------------------------------------------


def test_long_responses_may_have_a_large_kl_per_response() -> None:
    assert run(kl([90] * 5, 1000)) == []
    assert names(run(kl([110] * 5, 1000))) == [("kl", 3)]


def test_kl_without_a_value_per_token_is_judged_per_response() -> None:
    assert names(run([{"kl/response": 11.0}] * 3)) == [("kl", 3)]


def test_held_out_kl_is_judged_if_training_logs_no_kl() -> None:
    far = {"kl": 12.0, "length": 20.0}
    assert names(run([{"loss": 0.5}] * 2, {2: far})) == [("kl", 2)]
    assert run([{"loss": 0.5}] * 2, {2: {"kl": 12.0, "length": 200.0}}) == []
    assert run([{"loss": 0.5}] * 2, {2: {"kl": None, "length": 20.0}}) == []
    assert run(kl([2.0] * 4, 20), {4: far}) == []


def test_held_out_length_is_judged_if_training_samples_nothing() -> None:
    grown = {0: {"length": 20.0}, 1: {"length": 31.0}}
    assert names(run([{"loss": 0.5}], grown)) == [("length_growth", 1)]
    assert names(run([{"loss": 0.5}], {0: {"length": 20.0}, 1: {"length": 9.0}})) == [
        ("length_collapse", 1)
    ]
    assert run([{"length/mean": 20.0}], grown) == []


def test_a_share_of_1_raises_an_alarm_if_the_limit_is_1() -> None:
    rows = [{"length/truncated": 1.0, "group/equal_rewards": 1.0}] * 5
    config = {"truncated": {"share": 1, "first_share": 1}, "equal_rewards": {"share": 1}}
    assert names(run(rows, config=config)) == [("truncated", 1), ("equal_rewards", 5)]


def test_low_entropy_at_the_first_step_is_not_a_collapse() -> None:
    assert run([{"policy/entropy": 0.015}] * 5 + [{"policy/entropy": 0.009}] * 9) == []
    assert names(run([{"policy/entropy": 0.02}] * 5 + [{"policy/entropy": 0.009}] * 9)) == [
        ("entropy", 8)
    ]


def test_one_huge_gradient_raises_an_alarm_and_small_ones_never_do() -> None:
    usual = [1.0] * 7
    assert names(run(stream(gradient_norm=[*usual, 101.0, 1.0]))) == [("gradient_norm", 8)]
    assert run(stream(gradient_norm=[*usual, 99.0, 1.0, 1.0])) == []
    assert run(stream(gradient_norm=[0.001] * 8 + [0.9] * 5)) == []


def test_steps_without_a_gradient_are_not_part_of_the_baseline() -> None:
    assert run(stream(gradient_norm=[0.0] * 12 + [15.0] * 9)) == []


def test_clip_fraction_adds_both_sides_and_names_the_larger() -> None:
    (alarm,) = run(STREAMS["clip_fraction"][0])
    assert alarm.metric == "policy/clip_low"
    assert alarm.value == pytest.approx(0.3)


def test_falling_chosen_reward_with_a_shrinking_margin_raises_an_alarm() -> None:
    assert names(run(preferences([0.0] * 5 + [-1.1] * 5, [1.0] * 5 + [0.2] * 5))) == [
        ("chosen_logprob", 8)
    ]
    assert run(preferences([0.0] * 5 + [-0.9] * 5, [0.0] * 10)) == []


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("kl_old", 0.11, 0.1),
        ("entropy", 0.09, 0.1),
        ("length_growth", 31, 30),
        ("length_collapse", 9, 10),
        ("truncated", 0.54, 0.5),
        ("equal_rewards", 0.9, 0.9),
        ("critic", -1, -0.05),
        ("ratio", 101, 100),
        ("sampler_difference", 0.3, 0.2),
        ("chosen_logprob", -1.2, -1),
        ("preferences_learned", 0.04, 0.05),
        ("gradient_norm", 11, 10),
        ("fallbacks", 2, 1),
    ],
)
def test_alarm_holds_the_compared_value_and_its_limit(
    name: str, value: float, limit: float
) -> None:
    (alarm,) = run(STREAMS[name][0])
    assert (alarm.value, alarm.limit) == (pytest.approx(value), pytest.approx(limit))


@pytest.mark.parametrize("name", ["clip_fraction", "chosen_logprob", "preferences_learned"])
def test_rule_of_two_metrics_raises_no_alarm_if_one_is_absent(name: str) -> None:
    rows = STREAMS[name][0]
    for only in rows[0]:
        assert run([{only: row[only]} for row in rows]) == []


def test_only_failing_rewards_count_as_fallbacks() -> None:
    rows = [{"rewards/a/fallbacks": 0.0, "rewards/b/fallbacks": 3.0, "rewards/a/mean": 9.0}]
    (alarm,) = run(rows)
    assert (alarm.metric, alarm.value) == ("rewards/b/fallbacks", 3.0)


@pytest.mark.parametrize(
    ("shares", "at"),
    [
        ([0.8, 0.8], 1),
        ([0.75], 1),
        ([0.74, 0.9, 0.6, 0.1, 0.1], None),
        ([0.6] * 5, 5),
        ([0.9, 0.1, 0.1, 0.1, 0.1], 1),
    ],
)
def test_mostly_truncated_responses_raise_the_alarm_at_the_first_step(
    shares: list[float], at: int | None
) -> None:
    alarms = run(stream(length__truncated=shares))
    assert names(alarms) == ([] if at is None else [("truncated", at)])


def test_a_falling_reward_is_described_by_its_line() -> None:
    falling = [1.0 - 0.1 * k + 0.01 * (-1) ** k for k in range(16)]
    (alarm,) = run(stream(reward__mean=falling, reward__std=[2.0] * 16))
    assert alarm.monitor == "reward_fall"
    assert alarm.seen == (
        "the training reward fell by 1.5 over steps 1–16, from about 1 to -0.502; the limit is 0.5"
    )


def test_noise_of_a_steady_reward_rarely_looks_like_a_fall() -> None:
    raised = 0
    for seed in range(200):
        rng = random.Random(seed)
        rewards = [rng.gauss(0.5, 0.2) for _ in range(50)]
        raised += bool(run(stream(reward__mean=rewards, reward__std=[1.0] * 50)))
    assert raised <= 2, "one run in a hundred"


# --- Learned rewards ------------------------------------------------------------------------------


def updates(accuracies: Iterable[float], labels: float = 128.0) -> list[Alarm]:
    """Return the alarms of a run whose learned reward is updated after every second step."""
    monitors, alarms = Monitors(MonitorsConfig()), []
    for number, accuracy in enumerate(accuracies, start=1):
        fields = {"accuracy": accuracy, "labels": labels, "loss": 0.7, "fresh": 128.0}
        alarms += monitors.event("reward_update", 2 * number, fields)
    return alarms


def test_a_learned_reward_at_chance_raises_one_alarm() -> None:
    alarms = updates([0.69, 0.58, 0.52, 0.49, 0.5, 0.36, 0.47])
    assert names(alarms) == [("learned_reward", 8)]
    # 0.58, 0.52 and 0.49 of 128 pairs each are 204 of 384.
    assert alarms[0].seen == (
        "the learned reward agrees with its labeler on 53% of the policy's own responses "
        "(48% – 58%; updates after steps 4–8); chance is 50%"
    )
    assert (alarms[0].value, alarms[0].limit) == (pytest.approx(204 / 384), 0.5)


def test_a_learned_reward_that_lost_its_accuracy_raises_the_alarm() -> None:
    alarms = updates([0.95, 0.85, 0.7, 0.69, 0.68, 0.68])
    assert names(alarms) == [("learned_reward", 10)]
    assert alarms[0].seen.endswith("it was 95% in the first update")
    assert alarms[0].limit == pytest.approx(0.95 - 0.45 / 2, abs=0.01)


@pytest.mark.parametrize(
    "accuracies", [[0.72, 0.66, 0.7, 0.64, 0.69, 0.63], [0.92, 0.89, 0.8, 0.82, 0.8], [0.5, 0.5]]
)
def test_a_learned_reward_above_chance_raises_no_alarm(accuracies: list[float]) -> None:
    assert updates(accuracies) == []


def test_few_labels_say_little_about_a_fall_but_show_no_knowledge_either() -> None:
    assert names(updates([0.8, 0.55, 0.6, 0.55], labels=8)) == [("learned_reward", 6)]
    assert updates([0.8, 0.7, 0.8], labels=64) == []


def test_updates_without_labels_and_other_events_are_ignored() -> None:
    assert updates([math.nan] * 9, labels=0) == []
    monitors = Monitors(MonitorsConfig())
    record = {"accuracy": 0.1, "labels": 1000.0}
    assert [monitors.event("saved", step, record) for step in range(9)] == [[]] * 9


# --- Held-out quality -----------------------------------------------------------------------------


def outcome(n: int, right: int, shift: int = 0) -> dict[str, Any]:
    """Return the outcomes of n prompts, of which ``right`` from prompt ``shift`` on are right."""
    greedy = [float((k - shift) % n < right) for k in range(n)]
    return {"index": list(range(n)), "greedy": greedy, "sampled": [[q, q] for q in greedy]}


def evaluations(*series: dict[str, Any], config: Mapping[str, Any] | None = None) -> list[Alarm]:
    monitors = Monitors(MonitorsConfig.model_validate(config or {}))
    return [a for i, record in enumerate(series) for a in monitors.evaluated(10 * i, {}, record)]


def test_quality_that_fell_from_its_best_raises_the_alarm_whatever_the_reward_did() -> None:
    alarms = evaluations(outcome(1000, 406), outcome(1000, 567), outcome(1000, 382))
    assert names(alarms) == [("held_out_quality", 20)]
    assert alarms[0].metric == "greedy"
    assert alarms[0].seen.startswith(
        "the greedy reward on held-out prompts fell from 0.567 (step 10) to 0.382 (step 20), by 0.1"
    )
    assert alarms[0].seen.endswith("over the same prompts")


@pytest.mark.parametrize(
    "series",
    [
        (outcome(1000, 406), outcome(1000, 700), outcome(1000, 900), outcome(1000, 880)),
        (outcome(60, 30), outcome(60, 42), outcome(60, 37, 3)),
        (outcome(1000, 400), outcome(1000, 398)),
    ],
)
def test_rising_quality_with_small_falls_raises_no_alarm(
    series: tuple[dict[str, Any], ...],
) -> None:
    assert evaluations(*series) == []


def test_the_paired_test_finds_a_fall_that_the_intervals_of_both_do_not_show() -> None:
    # 300 of 600 are right, then 20 of these are wrong: the intervals of 0.5 and 0.467 overlap.
    assert names(evaluations(outcome(600, 300), outcome(600, 280))) == [("held_out_quality", 10)]


def test_a_fall_must_be_a_share_of_the_gain() -> None:
    series = outcome(1000, 100), outcome(1000, 900), outcome(1000, 850)
    assert evaluations(*series) == [], "5 points of a gain of 80"
    smaller = {"held_out_quality": {"share": 0.05}}
    assert names(evaluations(*series, config=smaller)) == [("held_out_quality", 20)]


def test_more_evaluations_need_a_clearer_fall() -> None:
    high, low = outcome(400, 200), outcome(400, 188)
    assert names(evaluations(high, low)) == [("held_out_quality", 10)]
    assert evaluations(*[high] * 12, low) == []


def test_quality_of_a_plateau_rarely_raises_the_alarm() -> None:
    raised = 0
    for seed in range(100):
        rng = random.Random(seed)
        series = []
        for _ in range(12):
            greedy = [float(rng.random() < 0.7) for _ in range(100)]
            series.append({"greedy": greedy, "sampled": [[q] for q in greedy]})
        raised += bool(evaluations(*series))
    assert raised <= 1


def test_graded_and_unbounded_rewards_are_compared_at_every_prompt() -> None:
    before = [0.1 * (k % 7) - 3 for k in range(50)]
    after = [x - 0.2 - 0.01 * (k % 3) for k, x in enumerate(before)]
    first, last = ({"greedy": xs, "sampled": [[x] for x in xs]} for xs in (before, after))
    assert names(evaluations(first, last)) == [("held_out_quality", 10)]
    assert evaluations(last, first) == []


def test_evaluations_without_responses_or_with_other_prompts_are_not_compared() -> None:
    assert evaluations({}, {}) == []
    assert evaluations(outcome(1000, 900), outcome(500, 100)) == []


def test_resumed_run_remembers_updates_and_the_best_evaluation() -> None:
    monitors = Monitors(MonitorsConfig())
    monitors.evaluated(0, {}, outcome(200, 150))
    for step in (1, 2):
        monitors.event("reward_update", step, {"accuracy": 0.5, "labels": 100.0})
    resumed = Monitors(MonitorsConfig())
    resumed.load_state_dict(json.loads(json.dumps(monitors.state_dict(), allow_nan=False)))
    assert names(resumed.event("reward_update", 3, {"accuracy": 0.5, "labels": 100.0})) == [
        ("learned_reward", 3)
    ]
    assert names(resumed.evaluated(9, {}, outcome(200, 100))) == [("held_out_quality", 9)]


# --- Reward hacking -------------------------------------------------------------------------------


def held_out(**numbers: float | None) -> dict[str, float | None]:
    record = {"n": 100, "greedy": 0.5, "sampled": 0.5, "length": 50.0, "truncated": 0.0, "kl": 1.0}
    record |= {"distinct": 0.8, "repetition": 0.02, "reference_logprob": -1.5}
    record |= numbers
    for name in ("greedy", "sampled"):
        record |= {f"{name}_low": record[name] - 0.05, f"{name}_high": record[name] + 0.05}
    return record


RISING = stream(reward__mean=[0.1 * k for k in range(8)], reward__std=[0.5] * 8)
FLAT = stream(reward__mean=[0.4, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4, 0.5], reward__std=[0.5] * 8)
WORSE = {
    "distinct": {"distinct": 0.76, "repetition": 0.04},
    "repetition": {"distinct": None, "repetition": 0.08},
    "reference_logprob": {"reference_logprob": -1.81},
    "sampled": {"sampled": 0.35},
    "greedy": {"greedy": 0.35},
}
STEADY = {
    "distinct": {"distinct": 0.77, "repetition": 0.03},
    "repetition": {"distinct": None, "repetition": 0.06},
    "reference_logprob": {"reference_logprob": -1.79},
    "sampled": {"sampled": 0.41},
    "greedy": {"greedy": 0.41},
}


@pytest.mark.parametrize("metric_name", WORSE)
def test_rising_reward_with_falling_quality_is_hacking(metric_name: str) -> None:
    base = held_out() if metric_name != "repetition" else held_out(distinct=None)
    alarms = run(RISING, {0: base, 4: base, 8: held_out(**WORSE[metric_name])})
    assert names(alarms) == [("reward_hacking", 8)]
    assert alarms[0].metric == metric_name


@pytest.mark.parametrize("metric_name", WORSE)
def test_falling_quality_without_a_rising_reward_is_not_hacking(metric_name: str) -> None:
    assert run(FLAT, {0: held_out(), 4: held_out(), 8: held_out(**WORSE[metric_name])}) == []


@pytest.mark.parametrize("metric_name", STEADY)
def test_rising_reward_with_steady_quality_is_healthy(metric_name: str) -> None:
    base = held_out() if metric_name != "repetition" else held_out(distinct=None)
    assert run(RISING, {0: base, 4: base, 8: held_out(**STEADY[metric_name])}) == []


def test_hacking_alarm_has_first_and_last_reward_and_quality() -> None:
    (alarm,) = run(RISING, {0: held_out(), 8: held_out(distinct=0.7)})
    assert alarm.seen == (
        "reward/mean rose from 0.1 (steps 1–3) to 0.6 (steps 6–8), while distinct words − repeated "
        "3-grams on held-out prompts fell from 0.78 (step 0) to 0.68 (step 8)"
    )
    assert (alarm.value, alarm.limit) == (pytest.approx(0.68), pytest.approx(0.73))


def test_held_out_reward_is_compared_with_its_best_evaluation() -> None:
    better = held_out(greedy=0.7)
    assert run(RISING, {0: held_out(), 8: held_out(greedy=0.45)}) == []
    alarms = run(RISING, {0: held_out(), 4: better, 8: held_out(greedy=0.45)})
    assert names(alarms) == [("reward_hacking", 8)]
    assert "from 0.2 (steps 2–4) to 0.6 (steps 6–8)" in alarms[0].seen
    assert "the greedy reward on held-out prompts fell from 0.7 (step 4) to 0.45" in alarms[0].seen


def test_longer_responses_are_judged_by_unrepeated_3_grams() -> None:
    longer = held_out(length=90.0, repetition=0.09)
    alarms = run(RISING, {0: held_out(), 8: longer}, {"length_growth": {"action": "off"}})
    assert "not repeated on held-out prompts fell from 0.98 (step 0) to 0.91" in alarms[0].seen


@pytest.mark.parametrize("absent", ["distinct", "repetition", "reference_logprob", "length", "n"])
def test_quality_that_is_absent_from_one_evaluation_is_not_compared(absent: str) -> None:
    without = held_out() | {absent: None}
    assert run(RISING, {0: without, 8: held_out()}) == []
    assert run(RISING, {0: held_out(), 8: without}) == []
    assert run(RISING, {0: without, 8: without}) == []


@pytest.mark.parametrize("absent", ["greedy", "greedy_low", "greedy_high"])
def test_held_out_reward_without_its_interval_is_not_compared(absent: str) -> None:
    fall = {0: held_out() | {absent: None}, 8: held_out(greedy=0.2) | {absent: None}}
    assert run(RISING, fall) == []


def test_late_first_evaluation_is_compared_with_the_reward_at_that_step() -> None:
    reward = stream(reward__mean=[0.0, 0.0, 0.0, 1, 1, 1, 1, 1, 1, 1], reward__std=[0.5] * 10)
    worse = held_out(distinct=0.6)
    assert run(reward, {6: held_out(), 10: worse}) == []
    assert names(run(reward, {3: held_out(), 10: worse})) == [("reward_hacking", 10)]


def test_reward_must_rise_since_the_best_evaluation() -> None:
    reward = stream(reward__mean=[0.0, 0.0, 0.0, 1, 1, 1, 1, 1, 1, 1], reward__std=[0.5] * 10)
    best = held_out(greedy=0.9)
    assert run(reward, {0: held_out(), 6: best, 10: held_out(greedy=0.6)}) == []


def test_small_fall_outside_a_narrow_interval_does_not_count() -> None:
    high = held_out(greedy=0.99) | {"greedy_low": 0.99, "greedy_high": 0.99}
    fallen = held_out(greedy=0.97) | {"greedy_low": 0.97, "greedy_high": 0.97}
    assert run(RISING, {0: held_out(), 4: high, 8: fallen}) == []


def test_longer_responses_may_repeat_words_but_not_3_grams() -> None:
    longer = held_out(distinct=0.6, length=64.0)
    assert run(RISING, {0: held_out(), 8: longer}, {"length_growth": {"action": "off"}}) == []
    assert names(run(RISING, {0: held_out(), 8: longer | {"repetition": 0.08}})) == [
        ("reward_hacking", 8)
    ]


def test_few_held_out_prompts_need_a_larger_fall() -> None:
    few = {0: held_out(n=16), 8: held_out(n=16, distinct=0.7)}
    assert run(RISING, few) == []
    assert names(run(RISING, few | {8: held_out(n=16, distinct=0.66)})) == [("reward_hacking", 8)]


def test_margin_replaces_an_absent_reward() -> None:
    rows = stream(implicit_reward__margin=[0.1 * k for k in range(8)])
    fall = {0: held_out(), 8: held_out(greedy=0.35)}
    alarms = run(rows, fall)
    assert names(alarms) == [("reward_hacking", 8)]
    assert alarms[0].seen.startswith("implicit_reward/margin rose from 0.1")


# --- Repeated alarms ------------------------------------------------------------------------------


@pytest.mark.parametrize(("clear_steps", "again"), [(10, True), (9, False)])
def test_alarm_is_raised_again_only_after_ten_clear_steps(clear_steps: int, again: bool) -> None:
    values = [0.2] * 4 + [0.0] * clear_steps + [0.2] * 4
    alarms = names(run(stream(policy__kl_old=values)))
    assert alarms == [("kl_old", 1), *([("kl_old", 5 + clear_steps)] if again else [])]


def test_a_single_step_with_the_condition_restarts_the_wait() -> None:
    values = [0.2, *[0.0] * 6, 0.2, *[0.0] * 6, 0.2, *[0.0] * 10, 0.2]
    assert names(run(stream(policy__kl_old=values))) == [("kl_old", 1), ("kl_old", 26)]


def test_steps_without_the_metric_do_not_change_the_alarm_state() -> None:
    rows = [{"policy/kl_old": 0.2}, *[{}] * 30, {"policy/kl_old": 0.2}]
    assert names(run(rows)) == [("kl_old", 1)]


def test_again_after_sets_the_number_of_clear_steps() -> None:
    rows = stream(policy__kl_old=[0.2, 0.0, 0.2, 0.0, 0.0, 0.2])
    alarms = names(run(rows, config={"again_after": 2}))
    assert alarms == [("kl_old", 1), ("kl_old", 6)]


# --- Absent metrics and resuming ------------------------------------------------------------------


def test_runs_without_monitored_metrics_raise_no_alarm() -> None:
    assert run([{"step": k, "elapsed": 1.0, "loss": 2.0} for k in range(50)], {20: {"n": 9}}) == []
    assert run([{}] * 50, {20: {}}) == []


def test_evaluation_values_that_are_not_numbers_are_ignored() -> None:
    record = {"kl": None, "pass_at": {"1": 0.5}, "greedy": True, "note": "x", "length": 10}
    assert run([{}] * 3, {0: record, 3: record}) == []


NAMES = sorted({key for rows, _, _ in STREAMS.values() for row in rows for key in row})
VALUES = st.sampled_from([0.0, 0.01, 0.3, 0.95, 1.0, 12.0, 150.0, -2.0, math.nan, math.inf])
STEPS = st.lists(st.dictionaries(st.sampled_from([*NAMES, "reward/mean"]), VALUES), max_size=30)
RECORDS = st.dictionaries(
    st.sampled_from(
        [*("n", "distinct", "repetition", "reference_logprob", "length", "kl")]
        + [f"{name}{end}" for name in ("greedy", "sampled") for end in ("", "_low", "_high")]
    ),
    st.sampled_from([None, 0.0, 0.2, 0.5, 1.0, 60.0, math.nan]),
)


@settings(deadline=None, max_examples=150)
@given(
    steps=STEPS, records=st.lists(RECORDS, min_size=31, max_size=31), resume_at=st.integers(0, 30)
)
def test_resumed_run_raises_the_same_alarms(
    steps: list[dict[str, float]], records: list[dict[str, float | None]], resume_at: int
) -> None:
    config = MonitorsConfig.model_validate(
        {"again_after": 2, "critic": {"grace": 2}, "length_growth": {"window": 1}}
    )

    def alarms_and_state(resume_at: int | None) -> tuple[list[Alarm], str]:
        monitors, alarms = Monitors(config), []
        for step, numbers in enumerate(steps, start=1):
            alarms += monitors.observe(step, numbers)
            if step % 3 == 0:
                alarms += monitors.evaluated(step, records[step])
            if step == resume_at:
                text = json.dumps(monitors.state_dict(), allow_nan=False)
                monitors = Monitors(config)
                monitors.load_state_dict(json.loads(text))
                assert json.dumps(monitors.state_dict()) == text
        return alarms, json.dumps(monitors.state_dict())

    assert alarms_and_state(resume_at) == alarms_and_state(None)


def test_state_dict_is_a_copy() -> None:
    monitors = Monitors(MonitorsConfig())
    monitors.evaluated(0, held_out())
    state = monitors.state_dict()
    text = json.dumps(state)
    for step, numbers in enumerate(RISING, start=1):
        monitors.observe(step, numbers)
    assert json.dumps(state) == text
    other = Monitors(MonitorsConfig())
    other.load_state_dict(state)
    other.observe(1, RISING[0])
    other.evaluated(1, held_out(greedy=0.9))
    assert json.dumps(state) == text


def test_monitor_that_was_disabled_before_starts_empty() -> None:
    before = Monitors(MonitorsConfig.model_validate({"kl": {"action": "off"}}))
    assert "kl" not in before.state_dict()
    after = Monitors(MonitorsConfig())
    after.load_state_dict(before.state_dict())
    assert [len(after.observe(step, {"kl/response": 50.0})) for step in (1, 2, 3)] == [0, 0, 1]


# --- Configuration --------------------------------------------------------------------------------


def load(tmp_path: Path, text: str) -> MonitorsConfig:
    path = tmp_path / "monitors.yaml"
    path.write_text(text, encoding="utf-8")
    return load_configuration(MonitorsConfig, path)


def test_limits_and_actions_are_read_from_yaml(tmp_path: Path) -> None:
    config = load(tmp_path, "kl: {limit: 20, action: stop}\nentropy: {action: off}\n")
    assert (config.kl.limit, config.kl.action, config.kl.window) == (20.0, "stop", 3)
    assert (config.entropy.action, config.ratio.action) == ("off", "warn")
    assert load(tmp_path, dump(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl: {limit: 0}", "kl.limit = 0: must be greater than 0"),
        ("truncated: {share: 1.5}", "truncated.share = 1.5: must be less than or equal to 1"),
        ("entropy: {share: -0.1}", "entropy.share = -0.1: must be greater than 0"),
        ("kl: {window: 0}", "kl.window = 0: must be greater than or equal to 1"),
        ("length_growth: {factor: 1}", "length_growth.factor = 1: must be greater than 1"),
        ("kl: {action: halt}", "kl.action"),
        ("kl: {limt: 3}", "did you mean `kl.limit`?"),
        ("entrpy: {floor: 3}", "did you mean `entropy`?"),
        ("gradient_norm: {factor: 200}", "jump = 100.0: below factor, which is 200"),
        ("critic: {limit: 1}", "critic.limit = 1: must be less than 1"),
    ],
)
def test_impossible_limits_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(tmp_path, text)
    assert message in str(error.value)


def test_docs_table_matches_the_monitors() -> None:
    docs = Path(__file__).parents[2] / "docs" / "monitors.md"
    assert table() in docs.read_text(encoding="utf-8")
