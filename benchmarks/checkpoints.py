"""Measure the cost of saving a run's state: time relative to training, memory, and disk space.

    python benchmarks/checkpoints.py [--sizes small,medium] [--methods sft,ppo]

The script trains the runs of ``benchmarks/memory.py`` with the default checkpoint settings for some
minutes. Each run is trained once without interruption, and once for the same number of steps with a
SIGTERM halfway and a resume. For each size and method the script prints the time of one save, the
share of the run's time spent on saving, the size of a checkpoint relative to the model, and the
peak memory of the fresh and the resumed run (resident memory above that of the process before the
models are loaded).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import memory
import yaml

from trivium.runs.store import read_events, read_metrics

UNLIMITED_STEPS = 100_000
COLUMNS = (
    "model", "method", "saves", "one save, s", "share of time", "checkpoint / model",
    "fresh peak, MiB", "resumed peak, MiB",
)  # fmt: skip


def main() -> int:
    """Return 0 if saving takes below 5 % of every run and resuming needs no more memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="small,medium")
    parser.add_argument("--methods", default=",".join(memory.METHODS))
    parser.add_argument("--seconds", type=float, default=90.0, help="training time per run")
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    passed = True
    for size in options.sizes.split(","):
        for method in options.methods.split(","):
            passed &= measure(size, method, options.seconds)
    return 0 if passed else 1


def measure(size: str, method: str, seconds: float) -> bool:
    """Measure and print one row of the table; return whether it is within the limits."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        memory.write_data(directory)
        memory.write_model(directory / "model", memory.SIZES[size])
        fresh = directory / "fresh"
        train(configuration(method, directory, UNLIMITED_STEPS, {"seconds": seconds}), fresh)
        steps = int(read_metrics(fresh)[-1]["step"])
        resumed = directory / "resumed"
        config = configuration(method, directory, steps, None)
        process = start(config, resumed)
        wait_for_step(resumed, max(1, steps // 2))
        process.send_signal(signal.SIGTERM)
        process.wait()
        train(config, resumed)
        return show(size, method, fresh, resumed)


def configuration(
    method: str, directory: Path, steps: int, budget: dict[str, float] | None
) -> dict[str, Any]:
    """Return a run's settings, limited by its steps or by a time budget."""
    settings = memory.configuration(method, directory, directory / "model")
    settings["run"] = {"budget": budget, "measure_memory": True}
    for name in ("steps", "steps_per_iteration"):
        if name in settings:
            settings[name] = steps
    if "epochs" in settings and method != "ppo":
        per_step = settings.get("pairs_per_step", settings.get("examples_per_step"))
        settings["epochs"] = steps * per_step / memory.EXAMPLES
    return {"command": method, **settings}


def start(config: dict[str, Any], run: Path) -> subprocess.Popen[bytes]:
    """Start the training command in its own process, on one thread."""
    settings = dict(config)
    command = settings.pop("command")
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    arguments = [sys.executable, "-m", "trivium", command, str(file), f"run.directory={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)


def train(config: dict[str, Any], run: Path) -> None:
    """Run the training command to its end."""
    if start(config, run).wait() != 0:
        raise SystemExit(run.with_suffix(".log").read_text())


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    while True:
        time.sleep(0.2)
        if (run / "run.json").exists():
            lines = read_metrics(run)
            if lines and lines[-1]["step"] >= step:
                return


def show(size: str, method: str, fresh: Path, resumed: Path) -> bool:
    """Print the row and return whether it is within the limits."""
    events = {run: {e["kind"]: e for e in read_events(run)} for run in (fresh, resumed)}
    finished = events[fresh]["finished"]
    training = sum(line["time/total"] for line in read_metrics(fresh))
    share = finished["saving_seconds"] / (training + finished["saving_seconds"])
    peaks = [events[run]["memory"]["measured_bytes"] / 2**20 for run in (fresh, resumed)]
    checkpoint = size_of(sorted((fresh / "checkpoints").iterdir())[-1])
    model = size_of(fresh / "final")
    print(
        f"| {size} | {method} | {finished['saves']} "
        f"| {finished['saving_seconds'] / finished['saves']:.2f} | {100 * share:.1f} % "
        f"| {checkpoint / model:.1f} | {peaks[0]:,.0f} | {peaks[1]:,.0f} |",
        flush=True,
    )
    return share < 0.05 and peaks[1] <= peaks[0] * 1.01


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
