"""Results of a comparison, read from the files of its jobs.

``gather`` returns the content of ``comparison.json``, except for what ``compare.run`` adds. The
report (``report.compare``) shows it, and the verdict (``verdict``) is derived from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trivium.compare.config import CompareConfig
from trivium.compare.plan import MethodRun, Plan, base_paths
from trivium.compare.pooling import (
    differences,
    gains,
    pool_decodings,
    quality_unit,
    reward_bounds,
)
from trivium.evaluation.statistics import wins
from trivium.jobs.job import Job
from trivium.jobs.scheduler import spent
from trivium.jobs.stages import stage_record
from trivium.maths.intervals import SHARE, mean_interval
from trivium.runs.budget import CURRENCIES
from trivium.runs.store import read_evaluations, read_events, read_metrics, read_outcomes

Record = dict[str, Any]


def gather(config: CompareConfig, plan: Plan, seconds: Mapping[str, float]) -> Record:
    """Collect everything that was measured, by method."""
    bases = {seed: _read_evaluation(plan.jobs[name]) for seed, name in plan.base_jobs.items()}
    methods = []
    for method in config.methods:
        planned = [run for run in plan.runs if run.method is method]
        main = [run for run in planned if run.varied is None]
        runs = [_run_record(config, plan, run, bases[run.seed], seconds) for run in main]
        varied = [
            {"setting": run.varied[0], "value": run.varied[1]}
            | _run_record(config, plan, run, bases[run.seed], seconds)
            for run in planned
            if run.varied is not None
        ]
        stages = [stage_record(plan.jobs[name], spent(plan.jobs[name])) for name in main[0].jobs]
        methods.append(
            {
                "name": method.name,
                "command": None if method.best_of else stages[-1]["command"],
                "best_of": method.best_of,
                "stages": [] if method.best_of else stages,
                "runs": runs,
                "varied": varied,
            }
        )
    base_runs = list(bases.values())
    bounds = reward_bounds([*base_runs, *(run for method in methods for run in method["runs"])])
    for method in methods:
        method |= pool_decodings(method["runs"], bounds)
    trained = [run for method in methods if not method["best_of"] for run in method["runs"]]
    return {
        "title": config.title,
        "base": base_paths(config),
        "unit": quality_unit([*base_runs, *trained]),
        "budget": None if config.budget is None else config.budget.model_dump(),
        "seeds": list(config.seeds),
        "n": len(bases[config.seeds[0]]["outcomes"]["index"]),
        "bases": {str(seed): _without_outcomes(record) for seed, record in bases.items()},
        "base_quality": pool_decodings(base_runs, bounds),
        "methods": methods,
        "differences": differences(methods, bounds),
        "gains": gains(methods, bases, bounds),
    }


def _read_evaluation(job: Job) -> Record:
    return json.loads((job.directory / "evaluation.json").read_text(encoding="utf-8"))


def _without_outcomes(record: Mapping[str, Any]) -> Record:
    return {k: v for k, v in record.items() if k not in ("outcomes", "config", "rewards")}


def _run_record(
    config: CompareConfig,
    plan: Plan,
    run: MethodRun,
    base: Record,
    seconds: Mapping[str, float],
) -> Record:
    """Return the record of one run: its final evaluation, cost, curve and alarms."""
    if run.method.best_of is not None:
        return _best_of_record(plan, run, base)
    jobs = [plan.jobs[name] for name in run.jobs]
    final, before = jobs[-1], jobs[:-1]
    costs = [spent(job) for job in jobs]
    evaluation = read_evaluations(final.directory)[-1]
    outcomes = read_outcomes(final.directory)[-1]
    earlier = {c: sum(cost[c] for cost in costs[: len(before)]) for c in CURRENCIES}
    return {
        "seed": run.seed,
        "path": str(final.directory.relative_to(config.directory)),
        "final": evaluation,
        "win_rate": _win_rate(outcomes, base["outcomes"]),
        "outcomes": outcomes,
        "spent": {c: sum(cost[c] for cost in costs) for c in CURRENCIES},
        "total_seconds": sum(seconds[job.name] for job in jobs),
        "curve": _curve(final, earlier, base),
        "alarms": _alarms(jobs),
        "training": _training(final),
    }


def _win_rate(policy: Mapping[str, Any], base: Mapping[str, Any]) -> Record:
    assert policy["index"] == base["index"], "both must have the same prompts"
    interval = mean_interval(wins(policy["sampled"], base["sampled"]), bounds=SHARE)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _curve(job: Job, earlier: Mapping[str, float], base: Record) -> list[Record]:
    """Return the held-out evaluations over cumulative cost.

    During the earlier stages the method's quality is that of the base.
    """
    metrics = read_metrics(job.directory)
    start = {
        "step": 0,
        **dict.fromkeys(CURRENCIES, 0.0),
        "reward": None,
        **_evaluation_values(base),
    }
    points = [start | {"kl": 0.0}]
    if any(earlier.values()):
        points.append({**points[0], **earlier})
    for evaluation in read_evaluations(job.directory):
        done = [line for line in metrics if line["step"] <= evaluation["step"]]
        cost = {
            c: earlier[c] + sum(line.get(name, 0.0) for line in done)
            for c, name in CURRENCIES.items()
        }
        recent = [line["reward/mean"] for line in done[-5:] if "reward/mean" in line]
        reward = sum(recent) / len(recent) if recent else None
        points.append(
            {"step": evaluation["step"], **cost, "reward": reward, **_evaluation_values(evaluation)}
        )
    return points


_EVALUATION_KEYS = (
    "greedy", "greedy_low", "greedy_high", "sampled", "sampled_low", "sampled_high", "kl",
    "length", "truncated", "distinct", "repetition", "reference_logprob",
)  # fmt: skip


def _evaluation_values(record: Mapping[str, Any]) -> Record:
    return {name: record.get(name) for name in _EVALUATION_KEYS}


def _alarms(jobs: Sequence[Job]) -> list[Record]:
    alarms = []
    for job in jobs:
        if (job.directory / "run.json").is_file():
            events = read_events(job.directory)
            alarms += [{**e, "stage": job.name} for e in events if e["kind"] == "alarm"]
    return alarms


_WATCHED = (
    "advantage/std", "group/equal_rewards", "value/explained_variance", "policy/entropy",
    "policy/clip_high", "policy/clip_low", "implicit_reward/gradient_weight",
    "implicit_reward/accuracy", "logprobs/chosen", "length/truncated",
)  # fmt: skip


def _training(job: Job) -> Record:
    """Return the means of key metrics over the first and the last tenth of the steps."""
    lines = read_metrics(job.directory)
    tenth = max(1, len(lines) // 10)
    means: Record = {"steps": len(lines)}
    for name in _WATCHED:
        values = [line[name] for line in lines if name in line and math.isfinite(line[name])]
        if values:
            first, last = values[:tenth], values[-tenth:]
            means[name] = {"first": sum(first) / len(first), "last": sum(last) / len(last)}
    return means


def _best_of_record(plan: Plan, run: MethodRun, base: Record) -> Record:
    """Return the record of best-of-n, where the highest training reward selects the response."""
    quality, reward = (_read_evaluation(plan.jobs[name]) for name in (*run.jobs, *run.jobs)[:2])
    chosen = []
    pairs = zip(quality["outcomes"]["sampled"], reward["outcomes"]["sampled"], strict=True)
    for qualities, rewards in pairs:
        best = max(rewards)
        ties = [q for q, r in zip(qualities, rewards, strict=True) if r == best]
        chosen.append(sum(ties) / len(ties))
    interval = mean_interval(chosen)
    low, high = interval.ends()
    n = int(run.method.best_of or 0)
    outcomes = {
        "index": quality["outcomes"]["index"],
        "greedy": chosen,
        "sampled": [[q] for q in chosen],
    }
    final = {
        "sampled": interval.mean,
        "sampled_low": low,
        "sampled_high": high,
        "greedy": interval.mean,
        "greedy_low": low,
        "greedy_high": high,
        "kl": math.log(n) - (n - 1) / n,
        "kl_is_bound": True,
        "length": quality["length"],
        "n": quality["n"],
    }
    return {
        "seed": run.seed,
        "path": None,
        "final": final,
        "win_rate": _win_rate(outcomes, base["outcomes"]),
        "outcomes": outcomes,
        "spent": dict.fromkeys(CURRENCIES, 0.0),
        "tokens_per_prompt": n * quality["length"],
        "total_seconds": 0.0,
        "curve": [],
        "alarms": [],
        "training": {},
    }
