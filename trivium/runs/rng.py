"""Global random number generators of Python, NumPy and torch.

Trivium itself draws nothing from these generators, but a reward function may. Their state is
therefore part of a checkpoint.
"""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed all generators."""
    random.seed(number)
    np.random.seed(number % (1 << 32))
    torch.manual_seed(number)


def state() -> dict[str, Any]:
    """Return the state of all generators."""
    name, keys, position, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def load_state(state: dict[str, Any]) -> None:
    """Set all generators to a state that ``state`` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
