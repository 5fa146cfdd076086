"""How fast this core multiplies: the best rate of float32 products, in FLOPs per second.

    python limit.py

Prints a number. Both of PyTorch's libraries are tried, so that the limit is that of the core.
"""

from __future__ import annotations

import time

import torch

SIZE, TRIES = 1024, 12


def main() -> None:
    torch.set_num_threads(1)
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    ways = [
        lambda: torch.mm(a, b),
        lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    ]
    best = 0.0
    with torch.no_grad():
        for way in ways:
            way()
            for _ in range(TRIES):
                start = time.process_time()
                way()
                best = max(best, 2 * SIZE**3 / (time.process_time() - start))
    print(best)


if __name__ == "__main__":
    main()
