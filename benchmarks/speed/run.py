"""Trivium beside TRL, on one core, alternating: the command behind ``make bench``.

    python benchmarks/speed/run.py [--only CASE,CASE] [--quick] [--resume] [--core N]

Every run is a process of its own, pinned to the core, with one thread. A pair of runs, Trivium's
and then TRL's with the same seed, gives one ratio; of all pairs' ratios the median is reported,
with the lowest and the highest. Each case is written to benchmarks/results.json and results.md as
soon as it is done; with ``--resume`` those that the file has of this very code are left as they
are. A run that fails ends the benchmark with what it wrote last.

Left out: what the two sides do (``ours``, ``theirs``), the cases (``cases``), and the numbers' form
(``results``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import CASES, Case, chosen, hurried
from helpers.tiny_models import SIZES, S, Size, write_world
from results import Pair, Side, code, digest, peer, read, summary, table, write

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results.json"
ENVIRONMENTS = HERE / ".environments"
WORLDS = HERE / ".worlds"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 26),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""glibc keeps freed blocks of up to 64 MiB, which is faster for both; not where memory counts."""


def main() -> None:
    asked = arguments()
    os.sched_setaffinity(0, {asked.core})
    print(f"core {asked.core}; results go to {asked.results}", flush=True)
    for case in wanted(asked):
        pairs = []
        for repetition in range(asked.repetitions or case.repetitions):
            pairs.append(pair(case, repetition))
            print(f"  {case.name} {repetition + 1}: {pairs[-1]}", flush=True)
        write(asked.results, summary(case, pairs, quick=asked.quick))
    print(table(read(asked.results)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of cases, or patterns, between commas")
    parser.add_argument("--quick", action="store_true", help="the main cases, with fewer steps")
    parser.add_argument("--resume", action="store_true", help="leave what this code has measured")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, help="pairs of runs, for every case")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def wanted(asked: argparse.Namespace) -> list[Case]:
    """The cases that are to be measured, as often as they are to be."""
    cases = chosen(asked.only) if asked.only else list(CASES.values())
    if asked.quick:
        cases = [hurried(case) for case in cases if case.quick or asked.only]
    if not asked.resume:
        return cases
    done = [r["task"] for r in read(asked.results) if r["code"] == code()]
    return [case for case in cases if asdict(case) not in done]


def pair(case: Case, seed: int) -> Pair:
    """One run of each side with the same seed."""
    world = world_of(case)
    trl = ENVIRONMENTS / peer(case) / "bin" / "python"
    if not trl.exists():
        raise SystemExit(f"{trl} is missing: run make bench, which makes it")
    sides = {"ours": Path(sys.executable), "theirs": trl}
    reports = [run(case, side, python, world, seed) for side, python in sides.items()]
    return Pair(case, *(Side.of(case.warm_up, report) for report in reports))


def run(case: Case, side: str, python: Path, world: Path, seed: int) -> dict[str, Any]:
    """The report of a worker, in a process of its own."""
    steps = case.steps if side == "ours" else case.their_steps
    task = json.dumps(asdict(case) | {"steps": steps, "seed": seed})
    place = Path(tempfile.mkdtemp(prefix="trivium-speed-"))
    try:
        done = subprocess.run(
            [python, HERE / f"{side}.py", task, world, place],
            env=environment(case, side, place),
            cwd=place,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(
                f"{case.name}: {side}.py ended with {done.returncode}:\n{done.stderr[-4000:]}"
            )
        return json.loads((place / "report.json").read_text())
    finally:
        shutil.rmtree(place)


def environment(case: Case, side: str, place: Path) -> dict[str, str]:
    """One thread, nothing from the network, and the allocator as the measurement wants it."""
    own = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(place / "hub"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    inherited = {k: v for k, v in os.environ.items() if side == "ours" or k != "PYTHONPATH"}
    return inherited | own | ({} if case.memory else KEEP_MEMORY)


def world_of(case: Case) -> Path:
    """The models and data of a case, written where they are not there yet."""
    name = f"{case.size}-{case.prompt}-{case.response}-{digest(HERE / 'worlds.py')}"
    world = WORLDS / name
    if not world.exists():
        vocabulary = case.size.removeprefix("S-")
        size = SIZES.get(case.size) or Size(S.width, S.layers, int(vocabulary))
        WORLDS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORLDS) as folder:
            made = Path(folder) / name
            write_world(made, size, prompt_tokens=case.prompt, response_tokens=case.response)
            made.rename(world)
    return world


if __name__ == "__main__":
    main()
