"""How fast this core multiplies matrices: what arithmetic alone would take is measured by it.

Both of the libraries that PyTorch comes with are tried, for on some processors one of them reaches
less than half of what the core can do.
"""

from __future__ import annotations

import time

import torch

SIZES = (1024, 1536, 2048)


@torch.no_grad()
def rates(repetitions: int = 4) -> dict[str, float]:
    """The most float32 operations per second of processor time, over squares of these sizes, by
    library: PyTorch's own product, and oneDNN's."""
    best = {"torch": 0.0, "onednn": 0.0}
    for size in SIZES:
        left, right = torch.rand(size, size), torch.rand(size, size)
        for name, multiply in (("torch", torch.mm), ("onednn", _onednn)):
            multiply(left, right)
            for _ in range(repetitions):
                began = time.process_time()
                multiply(left, right)
                rate = 2 * size**3 / (time.process_time() - began)
                best[name] = max(best[name], rate)
    return best


def _onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
