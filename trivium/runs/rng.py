"""The random numbers that belong to the process: those of Python, NumPy and torch.

Nothing in Trivium draws from them, but a reward function may; so they are part of a run's state.
"""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def seed(number: int) -> None:
    """Start them all from a number."""
    random.seed(number)
    np.random.seed(number % (1 << 32))
    torch.manual_seed(number)


def state() -> dict[str, Any]:
    """Where they all stand."""
    kind, keys, position, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Let them go on from where they stood."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
