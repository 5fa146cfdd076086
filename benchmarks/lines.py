"""Measure what padding matrices to few row counts saves: oneDNN kernels and their memory.

    python benchmarks/lines.py [--batches N]

A process trains by oneDNN's product on batches whose response lengths always differ, as in a run:
once without padding and once with it (``trivium.models.cpu.linear.pad_rows``). The
script prints the growth of memory and the processor time per batch after the first twenty batches.
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
from trivium.hf.model_config import ModelConfig
from trivium.models.cpu import linear
from trivium.models.policy import Policy

WARM_UP_BATCHES = 20


def train(batches: int, padded: bool) -> None:
    """Train in this process, and print the growth of memory in MiB and the ms per batch."""
    torch.set_num_threads(1)
    linear.matmul_backend.use("onednn")
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder) / "world", SIZES["S"], prompt_tokens=32)
        policy = Policy.load(ModelConfig(path=f"{folder}/world/model", device="cpu"))
    before, began = 0, 0.0
    with ExitStack() as patches:
        if not padded:
            patches.enter_context(mock.patch.object(linear, "pad_rows", lambda x: x))
        for i in range(WARM_UP_BATCHES + batches):
            if i == WARM_UP_BATCHES:
                before, began = psutil.Process().memory_info().rss, time.process_time()
            lengths = [[rng.randint(1, 57) for _ in range(8)] for _ in range(8)]
            groups = [Group([3] * 32, [[5] * n for n in group]) for group in lengths]
            policy.score(Batch.of(groups)).logprobs_T.sum().backward()
            policy.model.zero_grad(set_to_none=True)
    milliseconds = (time.process_time() - began) / batches * 1e3
    print(f"{(psutil.Process().memory_info().rss - before) / 2**20:,.0f} | {milliseconds:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--child", choices=("unpadded", "padded"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        train(options.batches, options.child == "padded")
        return
    print(
        f"| matrices of {options.batches} batches | memory growth, MiB | ms per batch |\n"
        "|---|---|---|"
    )
    for kind in ("unpadded", "padded"):
        command = [sys.executable, __file__, "--child", kind, "--batches", str(options.batches)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {kind} | {result.stdout.strip()} |")


if __name__ == "__main__":
    main()
