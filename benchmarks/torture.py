"""Kill runs at random times, resume them, and compare every bit with an uninterrupted run.

    python benchmarks/torture.py [--kills 40] [--seed 0] [--only grpo,ppo] [--jobs 2]

For each algorithm a small run (from ``tests/helpers/stoppable_runs.py``) is trained once without
interruption. Then it is trained repeatedly in processes that are killed with SIGKILL after a random
time, and resumed until it finishes. Weights, optimizer, metrics, evaluations and samples must be
bit-identical to those of the first run. Every second run writes its checkpoints slowly, so that
kills hit it while it saves. The last line is

    KILLS kills, SAME bit-identical, LOST lost

SAME and LOST count the kills of runs that ended with the same bits and of runs that were lost. The
exit status is 1 unless SAME equals KILLS.
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
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from helpers.stoppable_runs import RUNS, different_values, run_results
from helpers.tiny_models import World
from tqdm import tqdm

from trivium.runs import checkpointing, files
from trivium.runs.store import is_finished

MAX_RUN_SECONDS = 120.0
"""A run that takes longer counts as lost."""


@dataclass
class Tally:
    """Results of the runs of one algorithm."""

    name: str
    kills: int = 0
    runs: int = 0
    same: int = 0
    lost: int = 0
    """Kills of runs that ended with the same bits, and kills of runs that were lost."""
    kill_points: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)


def main() -> int:
    """Test every algorithm. Return 0 if all runs were bit-identical."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="least number of kills per algorithm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default=",".join(RUNS), help="names of the runs, separated by commas"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    tasks = [(name, options.kills, options.seed) for name in options.only.split(",")]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        tallies = []
        for tally in pool.map(torture, *zip(*tasks, strict=True)):
            tallies.append(tally)
            show(tally)
    kills, same, lost = (sum(getattr(t, x) for t in tallies) for x in ("kills", "same", "lost"))
    print(f"{kills} kills, {same} bit-identical, {lost} lost")
    return 0 if same == kills else 1


def show(tally: Tally) -> None:
    """Print the results of one algorithm, and at which points its runs were killed."""
    points = ", ".join(f"{point} {count}" for point, count in sorted(tally.kill_points.items()))
    print(
        f"{tally.name:14} {tally.kills:3} kills in {tally.runs} runs ({points}): "
        f"{tally.same} bit-identical, {tally.lost} lost",
        flush=True,
    )
    for reason in tally.reasons:
        print(f"    {reason}", flush=True)


def torture(name: str, kills: int, seed: int) -> Tally:
    """Train and kill runs of one algorithm until there are enough kills, and compare each run."""
    torch.set_num_threads(1)
    rng = random.Random(f"{seed}/{name}")
    tally = Tally(name)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        train, make_config = RUNS[name]
        os.environ["TRIVIUM_CACHE"] = str(directory / "cache")
        world = World(directory)
        config = make_config(world, directory / "uninterrupted")
        log = directory / "uninterrupted.log"
        run_seconds = in_child(partial(train, config), log, None)[1]
        expected = run_results(directory / "uninterrupted")
        while tally.kills < kills:
            run = directory / f"run-{tally.runs}"
            slow = tally.runs % 2 == 1
            killed_config = make_config(world, run)
            before = tally.kills
            train_with_kills(tally, partial(train, killed_config), run, rng, run_seconds, slow)
            compare(tally, expected, run, tally.kills - before)
            shutil.rmtree(run)
    return tally


def train_with_kills(
    tally: Tally,
    train: Callable[[], object],
    run: Path,
    rng: random.Random,
    run_seconds: float,
    slow: bool,
) -> None:
    """Train a run to the end, with up to three kills at random times."""
    start = time.monotonic()
    kills_left = 3
    while time.monotonic() - start < MAX_RUN_SECONDS:
        kill_after = rng.uniform(0, run_seconds * 1.1) if kills_left > 0 else None
        status, _ = in_child(train, run.with_suffix(".log"), kill_after, slow=slow)
        if status == 0:
            return
        if status != -signal.SIGKILL:
            output = run.with_suffix(".log").read_text()[-500:]
            tally.reasons.append(f"ended with {status}: {output}")
            return
        kills_left -= 1
        tally.kills += 1
        tally.kill_points[kill_point(run)] += 1
        if (run / "run.json").exists() and is_finished(run):
            return


def in_child(
    train: Callable[[], object], log: Path, kill_after: float | None, *, slow: bool = False
) -> tuple[int, float]:
    """Train in a child process, killed after ``kill_after`` seconds (None: MAX_RUN_SECONDS).

    Return the exit status and the duration.
    """
    start = time.monotonic()
    limit = MAX_RUN_SECONDS if kill_after is None else kill_after
    child = os.fork()
    if child == 0:
        _become_child(train, log, slow)
    while time.monotonic() - start < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


def _become_child(train: Callable[[], object], log: Path, slow: bool) -> None:
    """Train with output to a log file, then exit the process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # PyTorch replaces its pool of threads at its first use after a fork, and of two threads of
    # transformers' loader that come first together, one finds none.
    torch.set_num_threads(1)
    # Forked processes share the lock of tqdm's progress bars, which a killed process may hold.
    tqdm.set_lock(threading.RLock())
    checkpointing.MIN_INTERVAL_PER_SAVE = 0  # Save at every save point.
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
    """Slow down every flush to the disk, so that kills come during a save."""
    fsync = files.os.fsync

    def slow_fsync(descriptor: int) -> None:
        fsync(descriptor)
        time.sleep(0.004)

    files.os.fsync = slow_fsync


def kill_point(run: Path) -> str:
    """Return what a run was doing when it was killed, as its directory shows."""
    if not (run / "run.json").exists():
        return "before its start"
    if any(run.rglob(".*.partial")) or any(run.rglob(".*.previous")):
        return "while saving"
    names = sorted(p.name for p in (run / "checkpoints").glob("[0-9]*"))
    if not names:
        return "before its first checkpoint"
    return "inside a step" if "-p" in names[-1] else "between steps"


def compare(tally: Tally, expected: object, run: Path, kills: int) -> None:
    """Compare a run that was killed ``kills`` times with the uninterrupted run."""
    tally.runs += 1
    try:
        differences = different_values(expected, run_results(run))
    except Exception as error:  # A damaged run may raise anything. It is lost.
        tally.lost += kills
        tally.reasons.append(f"lost: {type(error).__name__}: {error}")
        return
    if differences:
        tally.reasons += differences[:5]
    else:
        tally.same += kills


if __name__ == "__main__":
    sys.exit(main())
