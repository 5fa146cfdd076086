"""Choices between implementations that decide the last bits of results.

A choice that is measured, such as the fastest matrix product, may differ between two processes on
one machine. A resumed run must repeat it, and cached results depend on it. Code that makes
such a choice registers it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_choices: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
_pending: dict[str, Any] = {}


def register_choice(name: str, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
    """Make a choice part of the state; a value that was loaded before takes effect now."""
    _choices[name] = read, write
    if name in _pending:
        write(_pending.pop(name))


def numerics_state() -> dict[str, Any]:
    """Return every registered choice by name, for ``trivium.serialization``."""
    return {name: read() for name, (read, _) in sorted(_choices.items())}


def load_numerics_state(state: Mapping[str, Any]) -> None:
    """Repeat the choices of ``state``, including those that are registered later."""
    _pending.clear()
    _pending.update(state)
    for name in _choices.keys() & state.keys():
        _choices[name][1](_pending.pop(name))
