"""What saving a run's state costs: time beside that of the steps, memory, and disk.

    python benchmarks/checkpoints.py [--sizes small,medium] [--methods sft,ppo]

Trains the runs of ``benchmarks/memory.py`` with the defaults for checkpoints, but for minutes; each
once untouched, and once for as many steps, stopped in their middle by SIGTERM and resumed. Prints,
per size and method, how long one save took, the share of the run's time that saving took, a
checkpoint's size beside that of the model, and the peak memory of the fresh and of the resumed run
(resident memory above the process's before models are loaded).
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

MANY = 100_000
COLUMNS = (
    "model", "method", "saves", "one save, s", "share of time", "checkpoint / model",
    "fresh peak, MiB", "resumed peak, MiB",
)  # fmt: skip


def main() -> int:
    """Measure; 0 if no saving took 5 % of a run's time and no resumed run needed more memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="small,medium")
    parser.add_argument("--methods", default=",".join(memory.METHODS))
    parser.add_argument("--seconds", type=float, default=90.0, help="of training per run")
    asked = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    fine = True
    for size in asked.sizes.split(","):
        for method in asked.methods.split(","):
            fine &= measure(size, method, asked.seconds)
    return 0 if fine else 1


def measure(size: str, method: str, seconds: float) -> bool:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        memory.write_data(place)
        memory.write_model(place / "model", memory.SIZES[size])
        fresh = place / "fresh"
        train(configuration(method, place, MANY, {"seconds": seconds}), fresh)
        steps = int(read_metrics(fresh)[-1]["step"])
        resumed = place / "resumed"
        same = configuration(method, place, steps, None)
        process = start(same, resumed)
        wait_for_step(resumed, max(1, steps // 2))
        process.send_signal(signal.SIGTERM)
        process.wait()
        train(same, resumed)
        return show(size, method, fresh, resumed)


def configuration(
    method: str, place: Path, steps: int, budget: dict[str, float] | None
) -> dict[str, Any]:
    """A run's settings, ended by its steps or by the clock."""
    settings = memory.configuration(method, place, place / "model")
    settings["run"] = {"budget": budget, "measure_memory": True}
    for name in ("steps", "steps_per_iteration"):
        if name in settings:
            settings[name] = steps
    if "epochs" in settings and method != "ppo":
        per_step = settings.get("pairs_per_step", settings.get("examples_per_step"))
        settings["epochs"] = steps * per_step / memory.EXAMPLES
    return {"command": method, **settings}


def start(config: dict[str, Any], run: Path) -> subprocess.Popen[bytes]:
    """The command, in a process of its own, on one thread."""
    settings = dict(config)
    command = settings.pop("command")
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    call = [sys.executable, "-m", "trivium", command, str(file), f"run.directory={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(call, stdout=log, stderr=log, env=environment)


def train(config: dict[str, Any], run: Path) -> None:
    """The command, to its end."""
    if start(config, run).wait() != 0:
        raise SystemExit(run.with_suffix(".log").read_text())


def wait_for_step(run: Path, step: int) -> None:
    """Until a run has logged a step."""
    while True:
        time.sleep(0.2)
        if (run / "run.json").exists():
            lines = read_metrics(run)
            if lines and lines[-1]["step"] >= step:
                return


def show(size: str, method: str, fresh: Path, resumed: Path) -> bool:
    """Print the row, and say whether it keeps the promises."""
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
