"""How fast this core multiplies matrices: what arithmetic alone would take is measured by it.

Both of the libraries that PyTorch comes with are tried, for on some processors one of them reaches
less than half of what the core can do.
"""

from __future__ import annotations

import time

import torch

SIZE = 1024


@torch.no_grad()
def rates(repetitions: int = 2) -> dict[str, float]:
    """The most float32 operations per second of processor time now, by library: PyTorch's own
    product, and oneDNN's."""
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
