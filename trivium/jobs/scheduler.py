"""Run jobs in parallel, each as an ordinary ``trivium`` command in its own process.

A user can run the same commands by hand with the configurations that are written here. Finished
jobs are reused if nothing that they depend on has changed (``record``); a job that was interrupted
resumes from its last saved loop state.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType

import yaml

from trivium.errors import TrainingError
from trivium.jobs.board import Board
from trivium.jobs.job import Job, with_budget
from trivium.jobs.record import inputs_of, status_of, write_done
from trivium.runs.budget import CURRENCIES
from trivium.runs.signals import SIGNALS, Interrupted, signal_name
from trivium.runs.store import read_metrics


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    jobs: Mapping[str, Job],
    *,
    parallel: int = 0,
    finished: Callable[[Job], object] = lambda job: None,
) -> dict[str, float]:
    """Run every job once its dependencies are finished; return the seconds of each job.

    Parallel jobs share the cores evenly. If a job fails, running jobs are terminated and no other
    job starts; a later call reuses the finished jobs. ``finished`` is called after each job.
    """
    max_parallel = parallel or available_cores()
    seconds: dict[str, float] = {}
    pending = list(jobs.values())
    running: dict[Future[float], Job] = {}
    processes = ProcessPool()
    board, executor = Board(list(jobs)), ThreadPoolExecutor(max_parallel)
    with signals_interrupt(), board, executor:
        try:
            while pending or running:
                ready = [
                    job for job in pending if all(name in seconds for name in job.dependencies)
                ]
                for job in ready[: max_parallel - len(running)]:
                    pending.remove(job)
                    resolved = with_budget(job, _spent_before(jobs, job))
                    alone = not running and len(ready) == 1
                    threads = max(1, available_cores() // (1 if alone else max_parallel))
                    running[executor.submit(processes.run, resolved, threads, board)] = job
                completed, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in completed:
                    job = running.pop(future)
                    seconds[job.name] = future.result()
                    finished(job)
        except BaseException:
            processes.stop()
            raise
    return seconds


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Turn every signal that ends the process into an interruption, so that jobs can stop."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        reason = f"{signal_name(number)}: stopped; rerun the command to resume"
        raise Interrupted(reason, number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _spent_before(jobs: Mapping[str, Job], job: Job) -> float:
    if job.budget is None:
        return 0.0
    return sum(spent(jobs[name])[job.budget.currency] for name in job.previous_stages)


def spent(job: Job) -> dict[str, float]:
    """Return what a finished job spent, in every currency."""
    counts = job.product.with_suffix(".counts.json")
    if counts.is_file():
        record = json.loads(counts.read_text(encoding="utf-8"))
        return {currency: float(record.get(currency, 0.0)) for currency in CURRENCIES}
    if not (job.directory / "metrics.jsonl").is_file():
        return dict.fromkeys(CURRENCIES, 0.0)
    lines = read_metrics(job.directory)
    return {c: sum(line.get(name, 0.0) for line in lines) for c, name in CURRENCIES.items()}


class ProcessPool:
    """Running processes, which can be terminated together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._processes: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        """Terminate all processes and refuse to start others."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()

    def run(self, job: Job, threads: int, board: Board) -> float:
        """Run one command in its own process, with its output in a log; return its seconds."""
        status = status_of(job)
        if status.state == "finished":
            board.finish(job.name, status.seconds, "reused from an earlier run")
            return status.seconds
        overrides = ["run.overwrite=false"] if status.state == "stopped" else []
        inputs = inputs_of(job)
        job.config.parent.mkdir(parents=True, exist_ok=True)
        job.sibling(".done.json").unlink(missing_ok=True)
        text = yaml.safe_dump(job.settings, sort_keys=False, allow_unicode=True)
        job.config.write_text(text, encoding="utf-8")
        board.start(job.name)
        started = time.perf_counter()
        self._execute(job, overrides, threads, board)
        seconds = time.perf_counter() - started
        write_done(job, inputs, seconds)
        board.finish(job.name, seconds)
        return seconds

    def _execute(self, job: Job, overrides: list[str], threads: int, board: Board) -> None:
        log = job.sibling(".log")
        process = self._start(job, overrides, threads)
        tail: list[str] = []
        with process, log.open("w", encoding="utf-8") as file:
            assert process.stdout is not None, "Popen opens a pipe for stdout"
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail = [*tail[-14:], line.rstrip()]
                board.update(job.name, line.strip())
        with self._lock:
            self._processes.discard(process)
        if process.returncode != 0:
            raise TrainingError(f"{job.name} failed; {log} ends with:\n" + "\n".join(tail))

    def _start(self, job: Job, overrides: list[str], threads: int) -> subprocess.Popen[str]:
        count = str(threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "trivium", job.command, str(job.config), *overrides]
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
                process_group=0,  # Ctrl-C reaches only this process, which terminates the others.
            )
            self._processes.add(process)
        return process
