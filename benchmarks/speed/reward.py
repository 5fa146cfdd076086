"""The reward of both sides: a plain function whose values differ within every group."""

from __future__ import annotations

from typing import Any


def share_of_a(responses: list[str], **columns: Any) -> list[float]:
    """The share of each response's vowels that are an a, from 0 to 1."""
    vowels = [[letter for letter in text if letter in "aeiou"] for text in responses]
    return [found.count("a") / max(1, len(found)) for found in vowels]
