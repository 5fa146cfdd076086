"""The reward of both sides: how many of a response's words are different ones."""

from __future__ import annotations

from typing import Any


def distinct(responses: list[str], **columns: Any) -> list[float]:
    """The share of each response's words that are different ones, from 0 to 1."""
    words = [text.split() for text in responses]
    return [len(set(found)) / max(1, len(found)) for found in words]
