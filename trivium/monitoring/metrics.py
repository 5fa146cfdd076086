"""Look up the metrics that runs log: name, unit, meaning and source.

The table in the docs, the report's panels and tooltips, and the check that every logged metric is
defined all read ``METRICS`` and ``EVALUATIONS``. A name that contains ``<reward>`` stands for one
metric per reward function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from trivium.monitoring.cost_table import COST_METRICS
from trivium.monitoring.evaluation_table import EVALUATION_METRICS
from trivium.monitoring.metric import Metric
from trivium.monitoring.metric_table import LEARNING_METRICS

METRICS = {metric.name: metric for metric in (*LEARNING_METRICS, *COST_METRICS)}
"""Metrics of training steps by name, in display order."""
EVALUATIONS = {metric.name: metric for metric in EVALUATION_METRICS}
"""Metrics of held-out evaluations by name, in display order."""

_REWARD = re.compile(r"rewards/(?P<reward>.+)/(?P<statistic>mean|std|applied|fallbacks)")


def metric(name: str) -> Metric | None:
    """Return the training metric of a logged name, with the reward's name filled in.

    Return None if the name is not defined.
    """
    if name in METRICS:
        return METRICS[name]
    match = _REWARD.fullmatch(name)
    if match is None:
        return None
    template = METRICS[f"rewards/<reward>/{match['statistic']}"]
    return Metric(
        name,
        template.title.format(reward=match["reward"]),
        template.unit,
        template.panel,
        template.meaning,
        template.source,
    )


def table(metrics: Iterable[Metric]) -> str:
    """Return the metrics as a Markdown table for the docs."""
    rows = ["| name | unit | meaning | source |", "|---|---|---|---|"]
    for m in metrics:
        rows.append(f"| `{m.name}` | {m.unit} | {_cell(m.meaning)} | {_cell(m.source)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Escape the bars in a Markdown table cell, where a bare bar begins a new cell."""
    return text.replace("|", "\\|")


_STAGES = ("rollout", "scoring", "logprobs", "update", "reward_update")


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that follow from a step's others: throughputs and shares of time."""
    result = {}
    total, trained = metrics["time/total"], metrics.get("tokens/trained")
    for stage in _STAGES:
        if f"time/{stage}" in metrics and total > 0:
            result[f"time_share/{stage}"] = metrics[f"time/{stage}"] / total
    if trained is not None and total > 0:
        result["tokens/per_second"] = trained / total
    stage_tokens = {"rollout": metrics.get("tokens/generated"), "update": trained}
    for stage, tokens in stage_tokens.items():
        seconds = metrics.get(f"time/{stage}", 0.0)
        if tokens is not None and seconds > 0:
            result[f"tokens/per_second/{stage}"] = tokens / seconds
    return result
