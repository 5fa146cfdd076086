"""``trivium compare``: plan and run the jobs, collect the results, write verdict and report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trivium.compare.config import CompareConfig
from trivium.compare.plan import Plan, make_plan
from trivium.compare.result import gather
from trivium.compare.table import show
from trivium.compare.verdict import judge
from trivium.config.base import dump
from trivium.jobs.scheduler import run_jobs
from trivium.jobs.validation import validate_jobs
from trivium.pipelines.task import write_task_files
from trivium.preflight import preflight
from trivium.report import compare as report

logger = logging.getLogger("trivium")


def run(config: CompareConfig) -> Path:
    """Compare the methods and write ``comparison.json`` and ``report.html``; return the directory.

    Jobs that an earlier, interrupted call finished in the directory are not run again.
    """
    started = time.perf_counter()
    result = compare(config)
    written = write(config.directory, result)
    show(result, time.perf_counter() - started, written)
    return config.directory


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run all jobs and return the result with its verdict."""
    plan = make_plan(config)
    for settings in validate_jobs(plan.jobs):
        preflight(settings, skip_below=config.directory)
    # Imported late: these modules import torch, and configuration errors should come first.
    from trivium.compare import gradient_snr, memory, risk

    config.directory.mkdir(parents=True, exist_ok=True)
    write_task_files(config.task_directory, config.task, config.seeds[0], plan.jobs)
    (config.directory / "config.yaml").write_text(dump(config), encoding="utf-8")
    memory_jobs = memory.memory_jobs(plan) if config.memory else {}
    extra_jobs = {job.name: job for job in memory_jobs.values()}
    seconds = run_jobs(plan.jobs | extra_jobs, parallel=config.parallel)
    result = gather(config, plan, seconds)
    for stage in (stage for method in result["methods"] for stage in method["stages"]):
        if stage["job"] in memory_jobs:
            stage["memory"] = memory.memory_record(memory_jobs[stage["job"]])
    if config.credit:
        result["credit"] = _measure_cached(config, plan, "credit", gradient_snr.measure)
    if config.risk:
        result["risk"] = _measure_cached(config, plan, "risk", risk.measure)
    result["verdict"] = judge(result)
    return result


def _measure_cached(
    config: CompareConfig, plan: Plan, name: str, measure: Callable[[CompareConfig, Plan], Any]
) -> Any:
    """Measure the trained models; reuse the result of an earlier call if no job has changed."""
    cache = config.directory / f"{name}.json"
    inputs = {"credit": config.credit, "jobs": [job.settings for job in plan.jobs.values()]}
    inputs = json.loads(json.dumps(inputs))
    if cache.is_file():
        record = json.loads(cache.read_text(encoding="utf-8"))
        if record.get("inputs") == inputs:
            return record["measured"]
    logger.info("measuring %s", name)
    measured = measure(config, plan)
    cache.write_text(json.dumps({"inputs": inputs, "measured": measured}) + "\n", encoding="utf-8")
    return measured


def write(directory: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write the numbers and the report; return both paths."""
    numbers = directory / report.NUMBERS
    numbers.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return [report.write(directory, result), numbers]
