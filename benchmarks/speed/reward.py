"""Reward function of both sides; its values differ within every group."""

from __future__ import annotations

from typing import Any


def share_of_a(responses: list[str], **columns: Any) -> list[float]:
    """Return the share of each response's vowels that are an a."""
    vowels = [[letter for letter in text if letter in "aeiou"] for text in responses]
    return [letters.count("a") / max(1, len(letters)) for letters in vowels]
