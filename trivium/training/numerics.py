"""Numerics of the process that a resumed run must share with the run that was saved.

The CPU matmul backend is chosen by a measurement, so a second process may choose another one. Its
sums round differently, and a resumed run would not be bit-identical.
"""

from __future__ import annotations

from typing import Any

from trivium.models.cpu.linear import matmul_backend


def numerics_state() -> dict[str, Any]:
    """Return the settings that decide how matrix products are rounded."""
    return {"matmul_backend": matmul_backend.name}


def load_numerics_state(state: dict[str, Any]) -> None:
    """Use the settings that ``numerics_state`` returned. Call this before models are loaded."""
    matmul_backend.use(state["matmul_backend"])
