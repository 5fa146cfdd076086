"""Rewards for stories: how happy one sounds (VADER, Hutto & Gilbert 2014), and how repetitive.

Plain functions, as a user writes them: named in a recipe as `sentiment.py:function`.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

WORD = re.compile(r"[\w']+")


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    """VADER, with its lexicon read once."""
    return SentimentIntensityAnalyzer()


def sentiment(
    prompts: list[str], responses: list[str], cap: float = 1.0, **columns: list[Any]
) -> list[float]:
    """VADER's compound score, from −1 (all bad) to 1 (all good).

    More than ``cap`` earns nothing: a story may be happy enough.
    """
    return [min(cap, analyzer().polarity_scores(text)["compound"]) for text in responses]


def repetition(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
    """The share of a story's word pairs that occurred in it before, from 0 to 1."""
    return [repeated_pairs(WORD.findall(text.lower())) for text in responses]


def distinct(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
    """The share of a story's words that are different ones, from 0 to 1."""
    split = [WORD.findall(text.lower()) for text in responses]
    return [len(set(words)) / len(words) if words else 0.0 for words in split]


def repeated_pairs(words: list[str]) -> float:
    """1 − (different neighbors) / (neighbors); a text of fewer than two words repeats nothing."""
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
