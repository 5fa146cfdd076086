"""The conductor: runs jobs side by side, each an ordinary command in a process of its own.

Nothing here trains: what can be seen here, a user can do by hand with the configurations that are
written. Jobs that a stopped comparison had finished are kept as long as they would be the same, and
one that was stopped in its middle goes on from its last saved state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml

from trivium.compare.board import Board
from trivium.compare.plan import Job, with_budget
from trivium.errors import TrainingError
from trivium.runs.budget import CURRENCIES
from trivium.runs.provenance import source_digest
from trivium.runs.store import is_finished, read_metrics, read_run


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def conduct(jobs: Mapping[str, Job], *, parallel: int = 0) -> dict[str, float]:
    """Run every job once what it builds on is there; seconds of each.

    Jobs side by side share the cores evenly. A job that fails stops the rest: those that run are
    ended, and a later call goes on from what is finished.
    """
    at_once = parallel or cores()
    seconds: dict[str, float] = {}
    waiting = list(jobs.values())
    running: dict[Future[float], Job] = {}
    crew = ProcessPool()
    with Board(list(jobs)) as board, ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                ready = [job for job in waiting if all(name in seconds for name in job.after)]
                for job in ready[: at_once - len(running)]:
                    waiting.remove(job)
                    resolved = with_budget(job, _spent_before(jobs, job))
                    alone = not running and len(ready) == 1
                    threads = max(1, cores() // (1 if alone else at_once))
                    running[pool.submit(crew.run, resolved, threads, board)] = job
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    seconds[running.pop(future).name] = future.result()
        except BaseException:
            crew.stop()
            raise
    return seconds


def _spent_before(jobs: Mapping[str, Job], job: Job) -> float:
    if job.budget is None:
        return 0.0
    return sum(spent(jobs[name])[job.budget.currency] for name in job.chain)


def spent(job: Job) -> dict[str, float]:
    """What a finished job spent, in every currency."""
    counts = job.directory / "rows.counts.json"
    if counts.is_file():
        record = json.loads(counts.read_text(encoding="utf-8"))
        return {currency: float(record.get(currency, 0.0)) for currency in CURRENCIES}
    if not (job.directory / "metrics.jsonl").is_file():
        return dict.fromkeys(CURRENCIES, 0.0)
    lines = read_metrics(job.directory)
    return {c: sum(line.get(name, 0.0) for line in lines) for c, name in CURRENCIES.items()}


class ProcessPool:
    """Processes at work, which can all be ended at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._processes: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        """End all processes, and let no other start."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()

    def run(self, job: Job, threads: int, board: Board) -> float:
        """One command in a process of its own, its output in a log; how long it took."""
        done = job.beside(".done.json")
        text = yaml.safe_dump(job.settings, sort_keys=False, allow_unicode=True)
        taken = _kept(job, done, text)
        if taken is not None:
            board.finish(job.name, taken, "kept from an earlier run")
            return taken
        further = ["run.overwrite=false"] if _can_go_on(job, text) else []
        job.config.parent.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        job.config.write_text(text, encoding="utf-8")
        board.start(job.name)
        started = time.perf_counter()
        self._execute(job, further, threads, board)
        taken = time.perf_counter() - started
        done.write_text(json.dumps({"seconds": taken}) + "\n", encoding="utf-8")
        board.finish(job.name, taken)
        return taken

    def _execute(self, job: Job, further: list[str], threads: int, board: Board) -> None:
        log = job.beside(".log")
        process = self._start(job, further, threads)
        last: list[str] = []
        with process, log.open("w", encoding="utf-8") as file:
            assert process.stdout is not None, "asked for by PIPE"
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = [*last[-14:], line.rstrip()]
                board.tell(job.name, line.strip())
        with self._lock:
            self._processes.discard(process)
        if process.returncode != 0:
            raise TrainingError(f"{job.name} failed; {log} ends with:\n" + "\n".join(last))

    def _start(self, job: Job, further: list[str], threads: int) -> subprocess.Popen[str]:
        count = str(threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "trivium", job.command, str(job.config), *further]
        with self._lock:
            if self._stopped:
                raise TrainingError(f"{job.name} was not started: another job had failed")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
                process_group=0,  # Ctrl-C is the conductor's, who tells each process once.
            )
            self._processes.add(process)
        return process


def _can_go_on(job: Job, text: str) -> bool:
    """Whether the job's run was stopped in its middle, and would be the same again."""
    directory = job.directory
    if not (directory / "run.json").is_file() or is_finished(directory):
        return False
    same = job.config.is_file() and job.config.read_text(encoding="utf-8") == text
    return same and read_run(directory).get("source") == source_digest()


def _kept(job: Job, done: Path, text: str) -> float | None:
    """How long a finished job took that would be the same again; None if there is none."""
    if not done.is_file() or not job.config.is_file():
        return None
    if job.config.read_text(encoding="utf-8") != text:
        return None
    record: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return float(record["seconds"])
