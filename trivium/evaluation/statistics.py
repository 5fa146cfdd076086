"""Statistics of an evaluation's responses: win rates, pass@k, repetition."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def wins(rewards: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each prompt, the share of comparisons won against the base; ties count half.

    All pairs of the prompt's responses are compared, so a prompt is one observation in [0, 1].
    """
    shares = []
    for a, b in zip(rewards, base, strict=True):
        points = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
        shares.append(points / (len(a) * len(b)))
    return shares


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n ≥ k responses, ``passed`` of which pass.

    ``1 − C(n − passed, k)/C(n, k)`` (Chen et al. 2021, eq. 1).
    """
    if not 0 <= passed <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} of {n} responses, {passed} of which pass, is not defined: give "
            "0 <= passed <= n and 1 <= k <= n"
        )
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def distinct_words(texts: Sequence[str]) -> float:
    """Return the mean share of distinct words in a text.

    Texts without words are left out; the result is 1.0 if no text has words.
    """
    shares = [len(set(words)) / len(words) for words in map(_words, texts) if words]
    return sum(shares) / len(shares) if shares else 1.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Return the mean share of a text's word n-grams that occur earlier in it; 0.0 if none."""
    shares = []
    for words in map(_words, texts):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
