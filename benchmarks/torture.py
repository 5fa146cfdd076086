"""Kill runs at random times, resume them, and compare every bit with an uninterrupted run.

    python benchmarks/torture.py [--kills 40] [--seed 0] [--only grpo,ppo] [--jobs 2]

For each algorithm a small run of ``tests/helpers/stoppable_runs.py`` is trained once without
interruption. Then the run is repeated: a process trains it, is killed with SIGKILL after a random
time, and a new process resumes it in the same directory, until the run finishes. It must produce
the same weights, optimizer state, metrics, evaluations and samples, bit for bit. In every second
run saving is slowed down, so that kills often happen during a save. The last line of output is

    KILLS kills, SAME bit-identical, LOST lost

The last two numbers count the kills by the result of their run. The exit status is 1 unless every
kill is bit-identical.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from helpers.stoppable_runs import RUNS, outcome, same
from helpers.tiny_models import World
from tqdm import tqdm

from trivium.runs import checkpointing, files
from trivium.runs.store import is_finished

MAX_RUN_SECONDS = 120.0
"""Time after which a run that has not finished counts as lost."""


@dataclass
class Tally:
    """Results of the runs of one algorithm."""

    name: str
    kills: int = 0
    runs: int = 0
    same: int = 0
    lost: int = 0
    """Number of kills whose run was lost; ``same`` counts those whose run was bit-identical."""
    killed: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)


def main() -> int:
    """Test every algorithm; return 0 if every run is bit-identical."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="minimum kills per algorithm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(RUNS), help="names of runs, separated by commas")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    names = options.only.split(",")
    tasks = [(name, options.kills, options.seed) for name in names]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        tallies = []
        for tally in pool.map(torture, *zip(*tasks, strict=True)):
            tallies.append(tally)
            show(tally)
    kills, identical, lost = (
        sum(getattr(t, x) for t in tallies) for x in ("kills", "same", "lost")
    )
    print(f"{kills} kills, {identical} bit-identical, {lost} lost")
    return 0 if identical == kills else 1


def show(tally: Tally) -> None:
    """Print the results of one algorithm and when its runs were killed."""
    phases = ", ".join(f"{phase} {count}" for phase, count in sorted(tally.killed.items()))
    print(
        f"{tally.name:14} {tally.kills:3} kills in {tally.runs} runs ({phases}): "
        f"{tally.same} bit-identical, {tally.lost} lost",
        flush=True,
    )
    for reason in tally.reasons:
        print(f"    {reason}", flush=True)


def torture(name: str, kills: int, seed: int) -> Tally:
    """Train one algorithm's run until it has been killed `kills` times; compare every result."""
    torch.set_num_threads(1)
    rng = random.Random(f"{seed}/{name}")
    tally = Tally(name)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        train, configure = RUNS[name]
        os.environ["TRIVIUM_CACHE"] = str(directory / "cache")
        world = World(directory)
        config = configure(world, directory / "uninterrupted")
        log = directory / "uninterrupted.log"
        duration = run_in_child(lambda: train(config), log, None)[1]
        expected = outcome(directory / "uninterrupted")
        while tally.kills < kills:
            run = directory / f"run-{tally.runs}"
            slow = tally.runs % 2 == 1
            repeated = configure(world, run)
            before = tally.kills
            train_with_kills(tally, lambda: train(repeated), run, rng, duration, slow)  # noqa: B023
            check(tally, expected, run, tally.kills - before)
            shutil.rmtree(run)
    return tally


def train_with_kills(
    tally: Tally,
    train: Callable[[], object],
    run: Path,
    rng: random.Random,
    duration: float,
    slow: bool,
) -> None:
    """Train to the end, with up to three kills on the way."""
    began = time.monotonic()
    kills_left = 3
    while time.monotonic() - began < MAX_RUN_SECONDS:
        kill_after = rng.uniform(0, duration * 1.1) if kills_left > 0 else None
        status, _ = run_in_child(train, run.with_suffix(".log"), kill_after, slow=slow)
        if status == 0:
            return
        if status != -signal.SIGKILL:
            tally.reasons.append(
                f"ended with {status}: {run.with_suffix('.log').read_text()[-500:]}"
            )
            return
        kills_left -= 1
        tally.kills += 1
        tally.killed[phase_of(run)] += 1
        if (run / "run.json").exists() and is_finished(run):
            return


def run_in_child(
    train: Callable[[], object], log: Path, kill_after: float | None, *, slow: bool = False
) -> tuple[int, float]:
    """Train in a child process, and return its exit status and duration.

    The process is killed after `kill_after` seconds, or after MAX_RUN_SECONDS if that is None.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_child(train, log, slow)
    while time.monotonic() - began < (MAX_RUN_SECONDS if kill_after is None else kill_after):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def _become_child(train: Callable[[], object], log: Path, slow: bool) -> None:
    """Train with output to a log file, and exit the process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Progress bars of forked processes share a lock, which a killed process may still hold.
    tqdm.set_lock(threading.RLock())
    checkpointing._SHARE = 0  # Save at every opportunity.
    if slow:
        _slow_down_saving()
    status = 1
    try:
        train()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _slow_down_saving() -> None:
    """Slow down every flush to disk, so that kills often happen during a save."""
    fsync = files.os.fsync

    def slow_fsync(descriptor: int) -> None:
        fsync(descriptor)
        time.sleep(0.004)

    files.os.fsync = slow_fsync


def phase_of(run: Path) -> str:
    """Return what a killed run was doing, judged by the files in its directory."""
    if not (run / "run.json").exists():
        return "before it began"
    if any(run.rglob(".*.partial")) or any(run.rglob(".*.previous")):
        return "while saving"
    names = sorted(p.name for p in (run / "checkpoints").glob("[0-9]*"))
    if not names:
        return "before its first checkpoint"
    return "inside a step" if "-p" in names[-1] else "between steps"


def check(tally: Tally, expected: object, run: Path, kills: int) -> None:
    """Compare a run that was killed `kills` times with the uninterrupted run."""
    tally.runs += 1
    try:
        differences = same(expected, outcome(run))
    except Exception as error:  # A damaged run may raise any error; it is lost.
        tally.lost += kills
        tally.reasons.append(f"lost: {type(error).__name__}: {error}")
        return
    if differences:
        tally.reasons += differences[:5]
    else:
        tally.same += kills


if __name__ == "__main__":
    sys.exit(main())
