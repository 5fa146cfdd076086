"""What lines of few lengths spare: kernels that are made for a length, and the memory they keep.

    python benchmarks/lines.py [--batches N]

A process learns from batches whose responses have ever new lengths, as the steps of a run do, once
with lines as long as their tokens and once with lines filled up (``trivium.models.cpu.linear.pad_rows``).
Prints what memory grew by and the processor time of a batch, after the first twenty.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from worlds import SIZES, write_world

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.models.cpu import linear
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy

FIRST = 20


def learn(batches: int, filled: bool) -> None:
    """One process's work; prints MiB and milliseconds."""
    torch.set_num_threads(1)
    drawn = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder) / "world", SIZES["S"], prompt_tokens=32)
        policy = Policy.load(ModelConfig(path=f"{folder}/world/model", device="cpu"))
    before, began = 0, 0.0
    with ExitStack() as bare:
        if not filled:
            bare.enter_context(mock.patch.object(linear, "pad_rows", return_value=0))
        for i in range(FIRST + batches):
            if i == FIRST:
                before, began = psutil.Process().memory_info().rss, time.process_time()
            lengths = [[drawn.randint(1, 57) for _ in range(8)] for _ in range(8)]
            groups = [Group([3] * 32, [[5] * n for n in group]) for group in lengths]
            policy.score(Batch.of(groups)).logprobs_T.sum().backward()
            policy.model.zero_grad(set_to_none=True)
    milliseconds = (time.process_time() - began) / batches * 1e3
    print(f"{(psutil.Process().memory_info().rss - before) / 2**20:,.0f} | {milliseconds:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--alone", choices=("bare", "filled"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone is not None:
        learn(given.batches, given.alone == "filled")
        return
    print(
        f"| lines of {given.batches} batches | memory grew by, MiB | ms per batch |\n|---|---|---|"
    )
    for kind in ("bare", "filled"):
        command = [sys.executable, __file__, "--alone", kind, "--batches", str(given.batches)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {kind} | {found.stdout.strip()} |")


if __name__ == "__main__":
    main()
