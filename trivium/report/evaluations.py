"""What the lines of evaluation.jsonl mean, and their curves.

Their names are not among METRICS, which are of training steps; here is what they are called, what
they mean and what is drawn together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trivium.report.curves import by_step, evenly, is_number, short

MOST_EVALUATIONS = 400
"""Evaluations that a page carries at most."""


@dataclass(frozen=True)
class Measure:
    """One held-out number: its name in evaluation.jsonl, title, unit, panel and meaning."""

    name: str
    title: str
    unit: str
    panel: str
    meaning: str


_TABLE = (
    Measure(
        "greedy",
        "held-out reward, greedy",
        "",
        "Quality",
        "Mean reward of the most probable response to each held-out prompt, with its 95 % "
        "interval.",
    ),
    Measure(
        "sampled",
        "held-out reward, sampled",
        "",
        "Quality",
        "Mean reward of sampled responses to the held-out prompts, with its 95 % interval.",
    ),
    Measure(
        "win_rate",
        "win rate against the base",
        "share",
        "Win rate",
        "Share of held-out prompts on which the response beats the first evaluation's, ties "
        "counted half, with its 95 % interval; 0.5 is no difference.",
    ),
    Measure(
        "kl",
        "KL to the reference",
        "nats",
        "Held-out KL",
        "Mean over sampled responses of the summed log π − log π_ref, with its 95 % interval.",
    ),
    Measure("length", "length", "tokens", "Held-out length", "Mean length of sampled responses."),
    Measure(
        "cut_off",
        "cut off",
        "share",
        "Held-out cut off",
        "Share of sampled responses that ran into the length limit.",
    ),
    Measure(
        "distinct",
        "distinct words",
        "share",
        "Diversity",
        "Mean share of distinct words in a response.",
    ),
    Measure(
        "repetition",
        "repeated 3-grams",
        "share",
        "Diversity",
        "Mean share of a response's word 3-grams that repeat an earlier one.",
    ),
    Measure(
        "reference_logprob",
        "log π_ref per token",
        "nats/token",
        "Fluency",
        "Mean log-prob of the sampled responses' tokens under the reference: fluency that the "
        "reward does not see.",
    ),
)
_PASS = "Probability that at least one of {k} responses is right (unbiased estimator)."


def rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations in order of steps, with pass@k beside the rest; many are thinned."""
    ordered = by_step(records)
    kept = [ordered[i] for i in evenly(len(ordered), MOST_EVALUATIONS)]
    return [_flat(record) for record in kept]


def columns(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the evaluations measured: name, title, unit and meaning of each number."""
    passes = sorted(
        {name for row in evaluations for name in row if name.startswith("pass@")},
        key=lambda name: int(name.removeprefix("pass@")),
    )
    table = [*_TABLE, *(_passes(name) for name in passes)]
    return [vars(m) for m in table if any(is_number(row.get(m.name)) for row in evaluations)]


def panels(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the held-out curves by panel, with their intervals where they have one."""
    found: dict[str, dict[str, Any]] = {}
    for column in columns(evaluations):
        chart = {"panel": column["panel"], "unit": column["unit"], "series": []}
        found.setdefault(column["panel"], chart)["series"].append(_curve(evaluations, column))
    return list(found.values())


def _curve(evaluations: Sequence[dict[str, Any]], column: dict[str, Any]) -> dict[str, Any]:
    name = column["name"]
    measured = [row for row in evaluations if is_number(row.get(name))]
    curve = {key: column[key] for key in ("name", "title", "unit", "meaning")}
    curve |= {"source": "", "points": len(measured), "steps": [row["step"] for row in measured]}
    curve["values"] = [row[name] for row in measured]
    if any(is_number(row.get(f"{name}_low")) for row in measured):
        curve["low"] = [row.get(f"{name}_low") for row in measured]
        curve["high"] = [row.get(f"{name}_high") for row in measured]
    return curve


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat = {name: short(value) for name, value in record.items() if is_number(value)}
    passes = record.get("pass_at")
    if isinstance(passes, dict):
        flat |= {f"pass@{k}": short(p) for k, p in passes.items() if k.isdigit()}
    return flat


def _passes(name: str) -> Measure:
    meaning = _PASS.format(k=name.removeprefix("pass@"))
    return Measure(name, name, "share", "Pass at k", meaning)
