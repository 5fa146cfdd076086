"""Reward functions for stories: sentiment (VADER, Hutto & Gilbert 2014) and repetition.

They are plain functions such as a user writes; a recipe names them as `sentiment.py:function`.
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
    """Return VADER's analyzer; its lexicon is read once."""
    return SentimentIntensityAnalyzer()


def sentiment(
    prompts: list[str], responses: list[str], cap: float = 1.0, **columns: list[Any]
) -> list[float]:
    """Return VADER's compound score, from −1 (most negative) to 1 (most positive).

    ``cap`` is the maximum reward.
    """
    return [min(cap, analyzer().polarity_scores(text)["compound"]) for text in responses]


def repetition(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
    """Return the share of a story's adjacent word pairs that are repetitions, from 0 to 1."""
    return [repeated_pairs(WORD.findall(text.lower())) for text in responses]


def distinct(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
    """Return the number of distinct words divided by the number of words, from 0 to 1."""
    word_lists = [WORD.findall(text.lower()) for text in responses]
    return [len(set(words)) / len(words) if words else 0.0 for words in word_lists]


def repeated_pairs(words: list[str]) -> float:
    """Return 1 − (distinct adjacent pairs) / (adjacent pairs), or 0 for fewer than two words."""
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
