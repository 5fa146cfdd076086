"""The demo's conductor: writes data and configurations, runs the roads side by side, tells.

Every road is an ordinary ``trivium`` command in a process of its own. Once the base is trained,
roads run one per core. Nothing here trains: what can be seen here, a user can do by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from trivium.demo.board import Board
from trivium.demo.roads import FULL, QUICK, Budget, Road, roads
from trivium.demo.table import print_table, summary_row
from trivium.errors import TrainingError


def run(directory: Path, quick: bool = False, seeds: tuple[int, ...] = (0,)) -> Path:
    """Run the whole demo for every seed; returns the path of ``summary.json``.

    Roads that a stopped demo had finished in ``directory`` are not run again.
    """
    budget = QUICK if quick else FULL
    started = time.perf_counter()
    rows = []
    for seed in seeds:
        place = directory if len(seeds) == 1 else directory / f"seed-{seed}"
        rows += run_seed(place, budget, seed)
    summary = directory / "summary.json"
    summary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_table(rows, time.perf_counter() - started, summary)
    return summary


def run_seed(directory: Path, budget: Budget, seed: int) -> list[dict[str, Any]]:
    """Data, base and all roads of one seed; the rows of its table."""
    prepare(directory, budget, seed)
    planned = roads(directory, budget, seed)
    seconds = run_all(directory, planned)
    return [summary_row(directory, road, planned, seconds, seed) for road in planned if road.title]


def prepare(directory: Path, budget: Budget, seed: int) -> None:
    """Write the data files, the tokenizer and the untrained base, unless they are there."""
    done = directory / "data" / "done.json"
    asked = json.loads(json.dumps({**asdict(budget), "seed": seed, "version": version("trivium")}))
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == asked:
        return
    # Heavy imports wait until there is something to do.
    import torch
    from transformers import AutoModelForCausalLM

    from trivium.models.loading import save_checkpoint
    from trivium.tasks.tokenizer import small_model_config, train_tokenizer
    from trivium.tasks.writer import Sizes, write_files

    sizes = Sizes(budget.demonstrations, budget.problems, budget.held_out, budget.labels)
    paths = write_files(directory / "data", seed, sizes, operations=budget.operations)
    with paths["demonstrations"].open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = train_tokenizer(row["prompt"] + row["completion"] for row in rows)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small_model_config(tokenizer))
    save_checkpoint(directory / "base", model, tokenizer)
    done.write_text(json.dumps(asked), encoding="utf-8")


def run_all(directory: Path, planned: list[Road]) -> dict[str, float]:
    """Run every road once what it builds on is there; seconds of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seconds: dict[str, float] = {}
    waiting = list(planned)
    running: dict[Future[float], Road] = {}
    with Board([road.name for road in planned]) as board, ThreadPoolExecutor(cores) as pool:
        while waiting or running:
            for road in [r for r in waiting if all(name in seconds for name in r.after)]:
                if len(running) >= (cores or 1):
                    break
                waiting.remove(road)
                threads = 1 if road.after else (cores or 1)
                running[pool.submit(run_road, directory, road, threads, board)] = road
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                seconds[running.pop(future).name] = future.result()
    return seconds


def run_road(directory: Path, road: Road, threads: int, board: Board) -> float:
    """One command in a process of its own, its output in ``logs``; how long it took."""
    config = directory / "configs" / f"{road.name}.yaml"
    log = directory / "logs" / f"{road.name}.log"
    done = directory / "logs" / f"{road.name}.done.json"
    text = yaml.safe_dump(dict(road.settings), sort_keys=False)
    if done.is_file() and config.is_file() and config.read_text(encoding="utf-8") == text:
        taken = float(json.loads(done.read_text(encoding="utf-8"))["seconds"])
        board.finish(road.name, taken, "kept from an earlier run")
        return taken
    for path in (config, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text, encoding="utf-8")
    board.start(road.name)
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "trivium", road.command, str(config)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None, "asked for by PIPE"
        for line in process.stdout:
            file.write(line)
            file.flush()
            board.tell(road.name, line.strip())
    if process.wait() != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise TrainingError(f"the demo's {road.name} failed; {log} ends with:\n{tail}")
    taken = time.perf_counter() - started
    done.write_text(json.dumps({"seconds": taken}), encoding="utf-8")
    board.finish(road.name, taken)
    return taken
