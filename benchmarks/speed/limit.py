"""How fast this core multiplies matrices: what arithmetic alone would take is measured by it."""

from __future__ import annotations

import time

import torch

SIZES = (1024, 1536, 2048)


@torch.no_grad()
def peak_flops(repetitions: int = 4) -> float:
    """The most float32 operations per second of processor time, over squares of these sizes."""
    best = 0.0
    for size in SIZES:
        left, right, product = (torch.rand(size, size) for _ in range(3))
        torch.mm(left, right, out=product)
        for _ in range(repetitions):
            began = time.process_time()
            torch.mm(left, right, out=product)
            best = max(best, 2 * size**3 / (time.process_time() - began))
    return best
