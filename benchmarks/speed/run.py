"""Compare Trivium with TRL on one core, with alternating runs: the command of ``make bench``.

    python benchmarks/speed/run.py [--only CASE,CASE] [--quick] [--resume] [--core N]

Every run is a separate process with one thread, pinned to the core. A pair of runs, Trivium's and
then TRL's with the same seed, gives one ratio. The script reports the median ratio of all pairs,
with the lowest and the highest. Each case is written to benchmarks/results.json and results.md as
soon as it is done. With ``--resume`` the cases that the file has for the current code are skipped.
If a run fails, the benchmark stops and prints the end of the run's error output.

The workers are in ``ours`` and ``theirs``, the cases in ``cases``, and the format of the results in
``results``.
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
from results import Pair, Side, code, digest, peer, read, summary, table, write
from worlds import SIZES, S, Size, write_world

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results.json"
ENVIRONMENTS = HERE / ".environments"
WORLDS = HERE / ".worlds"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 26),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Settings that keep freed blocks of up to 64 MiB in glibc: faster, but not for memory cases."""


def main() -> None:
    options = arguments()
    os.sched_setaffinity(0, {options.core})
    print(f"core {options.core}; results go to {options.results}", flush=True)
    for case in selected_cases(options):
        pairs = []
        for repetition in range(options.repetitions or case.repetitions):
            pairs.append(pair(case, repetition))
            print(f"  {case.name} {repetition + 1}: {pairs[-1]}", flush=True)
        write(options.results, summary(case, pairs, quick=options.quick))
    print(table(read(options.results)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of cases or patterns, separated by commas")
    parser.add_argument("--quick", action="store_true", help="run the main cases with fewer steps")
    parser.add_argument(
        "--resume", action="store_true", help="skip cases that this code has measured"
    )
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, help="number of pairs of runs of every case")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def selected_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases to measure."""
    cases = chosen(options.only) if options.only else list(CASES.values())
    if options.quick:
        cases = [hurried(case) for case in cases if case.quick or options.only]
    if not options.resume:
        return cases
    measured = [r["task"] for r in read(options.results) if r["code"] == code()]
    return [case for case in cases if asdict(case) not in measured]


def pair(case: Case, seed: int) -> Pair:
    """Run both sides with the same seed."""
    world = write_case_world(case)
    trl = ENVIRONMENTS / peer(case) / "bin" / "python"
    if not trl.exists():
        raise SystemExit(f"{trl} is missing: run make bench, which installs it")
    sides = {"ours": Path(sys.executable), "theirs": trl}
    reports = [run(case, side, python, world, seed) for side, python in sides.items()]
    return Pair(case, *(Side.of(case.warm_up, report) for report in reports))


def run(case: Case, side: str, python: Path, world: Path, seed: int) -> dict[str, Any]:
    """Run a worker in a separate process and return its report."""
    steps = case.steps if side == "ours" else case.their_steps
    task = json.dumps(asdict(case) | {"steps": steps, "seed": seed})
    output = Path(tempfile.mkdtemp(prefix="trivium-speed-"))
    try:
        result = subprocess.run(
            [python, HERE / f"{side}.py", task, world, output],
            env=environment(case, side, output),
            cwd=output,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise SystemExit(
                f"{case.name}: {side}.py exited with {result.returncode}:\n{result.stderr[-4000:]}"
            )
        return json.loads((output / "report.json").read_text())
    finally:
        shutil.rmtree(output)


def environment(case: Case, side: str, output: Path) -> dict[str, str]:
    """Return the environment: one thread, no network, and the allocator settings."""
    own = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(output / "hub"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    inherited = {k: v for k, v in os.environ.items() if side == "ours" or k != "PYTHONPATH"}
    return inherited | own | ({} if case.memory else KEEP_MEMORY)


def write_case_world(case: Case) -> Path:
    """Return the directory of a case's models and data; write them if they are missing."""
    name = f"{case.size}-{case.prompt}-{case.response}-{digest(HERE / 'worlds.py')}"
    world = WORLDS / name
    if not world.exists():
        vocabulary = case.size.removeprefix("S-")
        size = SIZES.get(case.size) or Size(S.width, S.layers, int(vocabulary))
        WORLDS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORLDS) as folder:
            written = Path(folder) / name
            write_world(written, size, prompt_tokens=case.prompt, response_tokens=case.response)
            written.rename(world)
    return world


if __name__ == "__main__":
    main()
