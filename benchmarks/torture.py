"""Kill runs at random instants, resume them, and compare every bit with a run never killed.

    python benchmarks/torture.py [--kills 40] [--seed 0] [--only grpo,ppo] [--jobs 2]

For each algorithm a small run (of ``tests/helpers/stoppable_runs.py``) is trained once, untouched. Then it
is trained again and again, each time in a process of its own that is killed with SIGKILL after a
random time, and prepared anew in the same directory until it comes to its end; it must leave the same
weights, optimizer, metrics, evaluations and samples, to the last bit. Every second run is hit
while it is saving a checkpoint, where it is slowed down to be hit more often. Ends with

    KILLS kills, SAME bit-identical, LOST lost

where the last two count the kills whose run came to such an end, and exit status 1 unless all did.
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

LONGEST_RUN = 120.0
"""Seconds after which a run that does not end counts as lost."""


@dataclass
class Tally:
    """What became of the runs of one algorithm."""

    name: str
    kills: int = 0
    runs: int = 0
    same: int = 0
    lost: int = 0
    """Kills after which the run ended with the same bits, and those after which it was lost."""
    hit: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)


def main() -> int:
    """Torture every algorithm; 0 if no bit was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="at least so many per algorithm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(RUNS), help="which runs, between commas")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    names = asked.only.split(",")
    tasks = [(name, asked.kills, asked.seed) for name in names]
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("fork")) as pool:
        tallies = []
        for tally in pool.map(torture, *zip(*tasks, strict=True)):
            tallies.append(tally)
            show(tally)
    kills, fine, lost = (sum(getattr(t, x) for t in tallies) for x in ("kills", "same", "lost"))
    print(f"{kills} kills, {fine} bit-identical, {lost} lost")
    return 0 if fine == kills else 1


def show(tally: Tally) -> None:
    """One algorithm's line, and where its runs were hit."""
    places = ", ".join(f"{place} {count}" for place, count in sorted(tally.hit.items()))
    print(
        f"{tally.name:14} {tally.kills:3} kills in {tally.runs} runs ({places}): "
        f"{tally.same} bit-identical, {tally.lost} lost",
        flush=True,
    )
    for reason in tally.reasons:
        print(f"    {reason}", flush=True)


def torture(name: str, kills: int, seed: int) -> Tally:
    """Train one algorithm's run until it was killed so often, and compare each that ended."""
    torch.set_num_threads(1)
    chance = random.Random(f"{seed}/{name}")
    tally = Tally(name)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        train, configured = RUNS[name]
        os.environ["TRIVIUM_CACHE"] = str(place / "cache")
        world = World(place)
        config = configured(world, place / "whole")
        took = in_child(lambda: train(config), place / "whole.log", None)[1]
        expected = outcome(place / "whole")
        while tally.kills < kills:
            run = place / f"run-{tally.runs}"
            slow = tally.runs % 2 == 1
            again = configured(world, run)
            before = tally.kills
            one_run(tally, lambda: train(again), run, chance, took, slow)  # noqa: B023
            judge(tally, expected, run, tally.kills - before)
            shutil.rmtree(run)
    return tally


def one_run(
    tally: Tally,
    train: Callable[[], object],
    run: Path,
    chance: random.Random,
    took: float,
    slow: bool,
) -> None:
    """Train to the end, killed several times on the way."""
    began = time.monotonic()
    left = 3
    while time.monotonic() - began < LONGEST_RUN:
        instant = chance.uniform(0, took * 1.1) if left > 0 else None
        status, _ = in_child(train, run.with_suffix(".log"), instant, slow=slow)
        if status == 0:
            return
        if status != -signal.SIGKILL:
            tally.reasons.append(
                f"ended with {status}: {run.with_suffix('.log').read_text()[-500:]}"
            )
            return
        left -= 1
        tally.kills += 1
        tally.hit[where_hit(run)] += 1
        if (run / "run.json").exists() and is_finished(run):
            return


def in_child(
    train: Callable[[], object], log: Path, instant: float | None, *, slow: bool = False
) -> tuple[int, float]:
    """Call in a process of its own, killed after so many seconds; exit status and duration.

    Without an instant it has the time of the longest run.
    """
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_child(train, log, slow)
    while time.monotonic() - began < (LONGEST_RUN if instant is None else instant):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def _become_child(train: Callable[[], object], log: Path, slow: bool) -> None:
    """Train with output to a log, and never return."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Bars for writing weights share a lock between forked processes, which a killed one may hold.
    tqdm.set_lock(threading.RLock())
    checkpointing._SHARE = 0  # Save at every pause.
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
    """Make every flush to the disk take a while, so that kills come in the middle of a save."""
    flush = files.os.fsync

    def slowly(descriptor: int) -> None:
        flush(descriptor)
        time.sleep(0.004)

    files.os.fsync = slowly


def where_hit(run: Path) -> str:
    """What a killed run was doing, as its directory tells."""
    if not (run / "run.json").exists():
        return "before it began"
    if any(run.rglob(".*.partial")) or any(run.rglob(".*.previous")):
        return "while saving"
    names = sorted(p.name for p in (run / "checkpoints").glob("[0-9]*"))
    if not names:
        return "before its first checkpoint"
    return "inside a step" if "-p" in names[-1] else "between steps"


def judge(tally: Tally, expected: object, run: Path, kills: int) -> None:
    """Compare a run that ended, after so many kills, with the one that was never killed."""
    tally.runs += 1
    try:
        differences = same(expected, outcome(run))
    except Exception as error:  # Whatever a damaged run raises: it is lost.
        tally.lost += kills
        tally.reasons.append(f"lost: {type(error).__name__}: {error}")
        return
    if differences:
        tally.reasons += differences[:5]
    else:
        tally.same += kills


if __name__ == "__main__":
    sys.exit(main())
