"""Matrix-product speed of this core, which gives a lower bound on a step's time.

Both libraries that PyTorch includes are measured, because on some processors one of them reaches
less than half of the core's peak.
"""

from __future__ import annotations

import time

import torch

SIZE = 1024


@torch.no_grad()
def rates(repetitions: int = 2) -> dict[str, float]:
    """Return the current peak of float32 operations per second of processor time, by library:
    PyTorch's own product and oneDNN's."""
    left, right = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE)
    best = {}
    for name, multiply in (("torch", torch.mm), ("onednn", _onednn)):
        seconds = []
        for _ in range(repetitions):
            began = time.process_time()
            multiply(left, right)
            seconds.append(time.process_time() - began)
        best[name] = 2 * SIZE**3 / min(seconds)
    return best


def _onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
