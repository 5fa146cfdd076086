"""Every number that a run logs: its name, unit, meaning and source, in this one place.

The docs' table, the report's panels and tooltips, and the check that nothing unnamed is logged all
come from ``METRICS`` (``monitoring.metric_table``). A name with ``<reward>`` in it stands for one name
per reward function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from trivium.monitoring.evaluation_table import EVALUATION
from trivium.monitoring.metric import Metric
from trivium.monitoring.metric_table import TABLE

METRICS = {metric.name: metric for metric in TABLE}
"""All metrics of training steps by name, in the order in which they are shown."""
EVALUATIONS = {metric.name: metric for metric in EVALUATION}
"""All numbers of held-out evaluations by name."""

_REWARD = re.compile(r"rewards/(?P<reward>.+)/(?P<what>mean|std|fallbacks)")


def metric(name: str) -> Metric | None:
    """The metric that a logged name belongs to, with the reward's name filled in; None if none."""
    if name in METRICS:
        return METRICS[name]
    found = _REWARD.fullmatch(name)
    if found is None:
        return None
    general = METRICS[f"rewards/<reward>/{found['what']}"]
    return Metric(
        name,
        general.title.format(reward=found["reward"]),
        general.unit,
        general.panel,
        general.meaning,
        general.source,
    )


def table(metrics: Iterable[Metric]) -> str:
    """Metrics as a Markdown table, for the docs."""
    rows = ["| name | unit | meaning | source |", "|---|---|---|---|"]
    for m in metrics:
        rows.append(f"| `{m.name}` | {m.unit} | {_cell(m.meaning)} | {_cell(m.source)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Text in a Markdown table, where a bare bar would begin a new cell."""
    return text.replace("|", "\\|")


_STAGES = ("rollout", "scoring", "logprobs", "update", "reward_update")


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers that follow from a step's others: rates, and shares of time."""
    found = {}
    total, trained = metrics["time/total"], metrics.get("tokens/trained")
    for stage in _STAGES:
        if f"time/{stage}" in metrics and total > 0:
            found[f"time_share/{stage}"] = metrics[f"time/{stage}"] / total
    if trained is not None and total > 0:
        found["tokens/per_second"] = trained / total
    rates = {"rollout": metrics.get("tokens/generated"), "update": trained}
    for stage, tokens in rates.items():
        seconds = metrics.get(f"time/{stage}", 0.0)
        if tokens is not None and seconds > 0:
            found[f"tokens/per_second/{stage}"] = tokens / seconds
    return found
