"""Data of a run's report, and the limits for a long run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import embedded, evaluation, make_run, sample

from trivium.report import curves, samples
from trivium.report import run as report
from trivium.report.headline import state
from trivium.report.page import encode
from trivium.report.run import collect, page


def curve(data: dict[str, Any], name: str) -> dict[str, Any]:
    found = [c for chart in data["curves"] for c in chart["series"] if c["name"] == name]
    assert len(found) == 1
    return found[0]


# --- Curves ---------------------------------------------------------------------------------------


def test_curves_have_the_logged_values(tmp_path: Path) -> None:
    metrics = [
        {"step": 1, "elapsed": 2.0, "reward/mean": 0.25, "tokens/generated": 10},
        {"step": 2, "elapsed": 5.0, "reward/mean": "NaN", "tokens/generated": 30},
    ]
    data = embedded(page(collect(make_run(tmp_path, metrics=metrics))))
    reward = curve(data, "reward/mean")
    assert (reward["steps"], reward["values"]) == ([1, 2], [0.25, "NaN"])
    assert reward["meaning"].startswith("Mean total reward")
    assert data["axes"] == {"step": [0, 1, 2], "elapsed": [0, 2.0, 5.0], "generated": [0, 10, 40]}


def test_last_record_of_a_step_counts_and_elapsed_time_continues_after_resume() -> None:
    rows = curves.by_step(
        [
            {"step": s, "elapsed": e, "loss": v}
            for s, e, v in ((1, 4.0, 1), (2, 9.0, 2), (2, 3.0, 3))
        ]
    )
    assert [row["loss"] for row in rows] == [1, 3]
    assert curves.axes(rows)["elapsed"] == [0, 4.0, 7.0]


def test_thinning_keeps_ends_extremes_and_non_finite_values() -> None:
    values = [random.Random(0).random() for _ in range(50_000)]
    values[12_345], values[31_007], values[40_001] = 9.0, -9.0, math.nan
    kept = curves.thin(range(50_000), values, 2000)
    assert len(kept) <= 2000
    assert kept == sorted(set(kept))
    assert {0, 12_345, 31_007, 40_001, 49_999} <= set(kept)
    assert curves.thin(range(2000), values[:2000], 2000) == list(range(2000))


def test_curves_of_one_unit_share_a_chart_unless_magnitudes_differ() -> None:
    row = {"step": 1, "gradient_norm": 0.5, "learning_rate": 1e-6, "kl/k1": 0.1, "kl/k3": 0.2}
    charts = curves.panels([row | {"kl/response": 4.0}])
    names = [[c["name"] for c in chart["series"]] for chart in charts]
    assert names == [["kl/k1", "kl/k3"], ["kl/response"], ["gradient_norm"], ["learning_rate"]]


def test_unknown_metrics_are_shown_last_by_name() -> None:
    charts = curves.panels([{"step": 1, "a/new": 1.0, "loss": 2.0, "word": "x", "flag": True}])
    assert [c["name"] for chart in charts for c in chart["series"]] == ["loss", "a/new"]


def test_reward_metrics_follow_the_order_of_the_table() -> None:
    row = {"step": 1, "rewards/b/mean": 1.0, "rewards/a/std": 1.0, "loss": 1.0, "reward/mean": 1.0}
    charts = curves.panels([row])
    names = [c["name"] for chart in charts for c in chart["series"]]
    assert names == ["loss", "reward/mean", "rewards/b/mean", "rewards/a/std"]


def test_cost_sums_stages_and_the_rest_is_other() -> None:
    stages = {"time/rollout": 2.0, "time/update": 1.0, "time/total": 4.0}
    tokens = {"tokens/generated": 100, "tokens/trained": 60, "flops": 5.0}
    cost = curves.cost([{"step": s, **stages, **tokens} for s in (1, 2)])
    assert cost
    shown = [(stage["name"], stage["seconds"], stage["tokens"]) for stage in cost["stages"]]
    assert shown == [("rollout", 4.0, 200), ("update", 2.0, 120), ("other", 2.0, None)]
    assert cost["bins"][1] == {"first": 2, "last": 2, "seconds": [2.0, 1.0, 1.0]}
    assert (cost["flops"], cost["trained"]) == (10.0, 120)
    assert curves.cost([{"step": 1, "loss": 1.0}]) is None


def test_bins_of_a_long_run_cover_all_seconds() -> None:
    cost = curves.cost([{"step": s, "time/update": 1.0} for s in range(1, 1001)])
    assert cost
    assert len(cost["bins"]) == 120
    assert sum(b["seconds"][0] for b in cost["bins"]) == 1000.0
    assert [b["first"] for b in cost["bins"][1:]] == [b["last"] + 1 for b in cost["bins"][:-1]]


# --- Headline -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "win", "change"),
    [
        (0.75, None, "rose"),
        (0.25, None, "fell"),
        (0.65, None, "unclear"),
        (0.65, (0.51, 0.6), "rose"),
        (0.75, (0.45, 0.6), "unclear"),
        (0.65, (0.3, 0.49), "fell"),
    ],
)
def test_change_is_decided_by_win_rate_or_by_disjoint_intervals(
    tmp_path: Path, last: float, win: tuple[float, float] | None, change: str
) -> None:
    ends = (
        {"win_rate": sum(win) / 2, "win_rate_low": win[0], "win_rate_high": win[1]} if win else {}
    )
    runs = make_run(tmp_path, evaluation=[evaluation(0, 0.5), evaluation(9, last, **ends)])
    quality = collect(runs)["headline"]["quality"]
    assert quality["change"] == change
    assert quality["first"] == {"value": 0.5, "low": 0.4, "high": 0.6, "step": 0}


def test_one_evaluation_has_no_change(tmp_path: Path) -> None:
    quality = collect(make_run(tmp_path, evaluation=[evaluation(9, 0.5)]))["headline"]["quality"]
    assert (quality["first"], quality["change"]) == (None, None)


@pytest.mark.parametrize(
    ("kind", "title", "held_out"),
    [("sft", "held-out negative log-likelihood", True), ("reward-model", "accuracy before", False)],
)
def test_a_run_without_held_out_rewards_reports_its_main_metric(
    tmp_path: Path, kind: str, title: str, held_out: bool
) -> None:
    metrics = [{"step": s, "accuracy": 0.5, "nll": 1} for s in (1, 2)]
    measured = [{"step": 2, "elapsed": 1.0, "n": 3, "nll": 2.5}] if held_out else []
    run = make_run(tmp_path, metrics=metrics, evaluation=measured)
    (run / "run.json").write_text(json.dumps({"kind": kind}))
    description = collect(run)["headline"]["training"]
    assert description["title"].startswith(title)
    assert description["held_out"] is held_out


def test_headline_counts_alarms_tokens_and_time(tmp_path: Path) -> None:
    metrics = [{"step": s, "elapsed": 2.0 * s, "tokens/trained": 7} for s in (1, 2, 3)]
    alarm = {"kind": "alarm", "monitor": "kl", "step": 2, "seen": "s", "why": "w", "remedy": "r"}
    events = [alarm, alarm, {"kind": "saved", "name": "final"}]
    config = "model: {path: the/base}\nsteps: 3\n"
    head = collect(make_run(tmp_path, config, metrics=metrics, events=events))["headline"]
    assert (head["alarms"], head["seconds"], head["trained"], head["step"]) == (2, 6.0, 21, 3)
    assert (head["base"], head["steps"], head["state"]["kind"]) == ("the/base", 3, "finished")


def test_state_follows_the_latest_event_unless_later_steps_were_logged() -> None:
    rows = [{"step": 5}]
    stopped = {"kind": "stopped", "step": 5, "message": "KL"}
    assert state(rows, [stopped]) == {"kind": "stopped", "reason": "KL"}
    assert state([{"step": 6}], [stopped])["kind"] == "open"
    assert state(rows, [stopped, {"kind": "finished", "step": 5}])["kind"] == "finished"
    interrupted = {"kind": "interrupted", "step": 5, "message": "Ctrl-C"}
    assert state(rows, [interrupted]) == {"kind": "interrupted", "reason": "Ctrl-C"}
    assert state(rows, [interrupted, {"kind": "resumed", "step": 5}])["kind"] == "open"
    assert state(rows, [{"kind": "saved", "name": "critic"}])["kind"] == "open"


# --- Evaluations ----------------------------------------------------------------------------------


def test_held_out_curves_have_intervals_and_ordered_pass_at_k(tmp_path: Path) -> None:
    passes = {"pass_at": {"16": 0.9, "4": 0.5}, "win_rate": None}
    records = [evaluation(0, 0.5, **passes), evaluation(4, 0.7, **passes, win_rate_low=None)]
    data = collect(make_run(tmp_path, evaluation=records))
    quality, at_k = data["held_out"]
    assert quality["series"][0]["low"] == [0.4, 0.6]
    assert [c["name"] for c in at_k["series"]] == ["pass@4", "pass@16"]
    assert [c["name"] for c in data["evaluation"]["columns"]] == ["greedy", "pass@4", "pass@16"]


# --- Samples --------------------------------------------------------------------------------------


def test_samples_keep_their_values_and_share_prompts() -> None:
    tokens = {"tokens": ["wo", "rds"], "log_ratio": [0.12345, "NaN"]}
    rows = [sample(0, **tokens), sample(5, index=4), sample(5)]
    found = samples.select(rows)
    assert [p["index"] for p in found["prompts"]] == [3, 4]
    assert [row["prompt"] for row in found["rows"]] == [0, 1, 0]
    assert found["rows"][0]["token_lengths"] == [2, 3]
    assert found["rows"][0]["log_ratio"] == [0.123, "NaN"]
    assert found["rows"][0]["rewards"] == [["r", 1.0]]


def test_tokens_that_do_not_concatenate_to_the_text_are_stored_as_strings() -> None:
    (row,) = samples.select([sample(0, tokens=["x", "\ufffd"], log_ratio=[1, 2])])["rows"]
    assert row["tokens"] == ["x", "\ufffd"]


def test_held_out_and_training_prompts_with_one_index_are_distinct() -> None:
    rows = [sample(0), sample(1, drawn="training"), sample(2, prompt=[{"role": "user"}])]
    found = samples.select(rows)
    assert [p["set"] for p in found["prompts"]] == ["held-out", "training", "held-out"]


def test_too_many_samples_keep_the_first_and_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_ROWS", 6)
    rows = [sample(step, index=i) for step in range(10) for i in range(2)]
    found = samples.select(rows)
    assert sorted({row["step"] for row in found["rows"]}) == [0, 4, 9]
    assert (len(found["rows"]), found["total"]) == (6, 20)


def test_samples_stay_within_the_byte_limit_and_drop_token_values_first() -> None:
    tokens = {"tokens": ["<"] * 1000, "log_ratio": [0.123] * 1000}
    rows = [sample(s, "<" * 1000, **tokens) for s in range(8)]
    found = samples.select(rows, 40_000)
    assert len(encode(found).encode()) < 41_000
    assert [row["step"] for row in found["rows"] if "log_ratio" in row] == [0, 7]
    assert any(row.get("tokens_omitted") for row in found["rows"])


def test_last_step_has_priority_and_training_responses_come_last() -> None:
    assert samples.bisection_order(5) == [4, 0, 2, 1, 3]
    rows = [sample(0, drawn="training"), sample(0), sample(1, drawn="training"), sample(1)]
    room = len(encode({"": samples.select(rows[1:4:2])}).encode())
    assert [row["drawn"] for row in samples.select(rows, room)["rows"]] == ["greedy", "greedy"]


def test_samples_get_the_bytes_left_by_the_rest_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "x" * 5000, samples=[sample(0), sample(1)])
    monkeypatch.setattr(report, "_MAX_DATA_BYTES", 5000)
    found = collect(run)["samples"]
    assert (found["rows"], found["total"]) == ([], 2)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_bisection_order_visits_each_index_once(count: int) -> None:
    assert sorted(samples.bisection_order(count)) == list(range(count))


def test_a_huge_text_is_clipped_and_its_full_length_is_stored() -> None:
    (row,) = samples.select([sample(0, "x" * 200_000)])["rows"]
    assert (len(row["response"]), row["full_length"]) == (150_000, 200_000)


# --- Odd runs -------------------------------------------------------------------------------------


def test_an_unfinished_last_line_is_ignored(tmp_path: Path) -> None:
    run = make_run(tmp_path, metrics=[{"step": 1, "elapsed": 1.0, "loss": 2.0}, '{"step": 2, "lo'])
    assert curve(collect(run), "loss")["steps"] == [1]


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    data = embedded(page(collect(make_run(tmp_path))))
    assert (data["curves"], data["samples"]["rows"], data["cost"]) == ([], [], None)
    assert data["headline"]["state"]["kind"] == "open"


@pytest.mark.parametrize("config", ["{", "a: [\x00", "- 1\n", "", "model: 3\nsteps: {a: b}\n"])
def test_an_unparsable_configuration_is_still_shown(tmp_path: Path, config: str) -> None:
    data = collect(make_run(tmp_path, config))
    assert data["config"]["text"] == config
    assert data["headline"]["base"] is None


def test_a_long_run_full_of_long_hostile_texts_stays_under_six_megabytes(tmp_path: Path) -> None:
    names = [f"rewards/r{i}/mean" for i in range(50)]
    draw = random.Random(0)
    metrics = [
        {"step": s, "elapsed": float(s), **{name: draw.gauss(0, 1) for name in names}}
        for s in range(1, 2501)
    ]
    texts = ["<\u202e\x01>" * 30_000, "x" * 100_000]
    rows = [sample(s, texts[s % 2], index=s) for s in range(60)]
    alarm = {"kind": "alarm", "monitor": "m", "step": 1, "seen": "<" * 3000, "why": ">" * 3000}
    run = make_run(tmp_path, "<" * 300_000, metrics=metrics, samples=rows, events=[alarm] * 500)
    data = collect(run)
    assert len(page(data)) < 6_000_000
    assert {row["step"] for row in data["samples"]["rows"]} >= {0, 59}
    assert (data["alarms"]["total"], len(data["alarms"]["shown"])) == (500, 200)
