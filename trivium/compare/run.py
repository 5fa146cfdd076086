"""``trivium compare``: plan, run what is missing, gather, judge, write."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trivium.commands import COMMANDS
from trivium.compare.config import CompareConfig
from trivium.compare.plan import Plan, make_plan
from trivium.compare.result import gather
from trivium.compare.scheduler import conduct
from trivium.compare.table import show
from trivium.compare.verdict import judge
from trivium.config.base import Configuration, dump
from trivium.errors import ConfigurationError
from trivium.preflight import preflight
from trivium.report import compare as report

logger = logging.getLogger("trivium")


def run(config: CompareConfig) -> Path:
    """Compare the methods; returns the directory, with ``comparison.json`` and ``report.html``.

    What an earlier, stopped call has finished in the directory is not run again.
    """
    started = time.perf_counter()
    result = compare(config)
    written = write(config.directory, result)
    show(result, time.perf_counter() - started, written)
    return config.directory


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run all jobs and return what was found, with the verdict."""
    plan = make_plan(config)
    for settings in check(plan):
        preflight(settings, skip_below=config.directory)
    # These import torch, which a mistake in a stage's settings must not wait for.
    from trivium.compare import gradient_snr, memory, risk

    config.directory.mkdir(parents=True, exist_ok=True)
    (config.directory / "config.yaml").write_text(dump(config), encoding="utf-8")
    measuring = memory.memory_jobs(plan) if config.memory else {}
    apart = {job.name: job for job in measuring.values()}
    seconds = conduct(plan.jobs | apart, parallel=config.parallel)
    result = gather(config, plan, seconds)
    for stage in (stage for method in result["methods"] for stage in method["stages"]):
        if stage["job"] in measuring:
            stage["memory"] = memory.memory_record(measuring[stage["job"]])
    if config.credit:
        result["credit"] = _measured(config, plan, "credit", gradient_snr.measure)
    if config.risk:
        result["risk"] = _measured(config, plan, "risk", risk.measure)
    result["verdict"] = judge(result)
    return result


def _measured(
    config: CompareConfig, plan: Plan, name: str, measure: Callable[[CompareConfig, Plan], Any]
) -> Any:
    """What is measured on the finished methods, once: kept while their jobs are the same."""
    kept = config.directory / f"{name}.json"
    asked = {"credit": config.credit, "jobs": [job.settings for job in plan.jobs.values()]}
    asked = json.loads(json.dumps(asked))
    if kept.is_file():
        record = json.loads(kept.read_text(encoding="utf-8"))
        if record["asked"] == asked:
            return record["found"]
    logger.info("measuring %s", name)
    found = measure(config, plan)
    kept.write_text(json.dumps({"asked": asked, "found": found}) + "\n", encoding="utf-8")
    return found


def write(directory: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write the numbers and the report; returns both paths."""
    numbers = directory / report.NUMBERS
    numbers.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return [report.write(directory, result), numbers]


def check(plan: Plan) -> list[Configuration]:
    """Validate every job's settings before the first is run; raises with all faults."""
    faults, configs = [], []
    for job in plan.jobs.values():
        config_class = COMMANDS[job.command].config_class()
        try:
            configs.append(config_class.model_validate(job.settings))
        except ValidationError as error:
            for fault in error.errors():
                place = ".".join(map(str, fault["loc"])) or job.command
                faults.append(f"{job.name}: {place}: {fault['msg']}")
    if faults:
        raise ConfigurationError("\n  - ".join([f"found {len(faults)} faults:", *faults]))
    return configs
