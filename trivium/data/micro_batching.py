"""How groups are cut into micro-batches: few, of even work, each within a bound of tokens.

A function of lengths alone. Work is what a transformer does: some for every token, and some for
every pair of a token and one that it attends to. Left out: whether the memory holds what was cut
(``models.oom`` halves what it does not).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from trivium.data.group import Group

PAIRS_PER_TOKEN = 4096
"""So many pairs cost what a token's matrix products cost: six times a width of about 700."""
_STEPS = 64

Cost = tuple[int, int]
"""Tokens and work."""


@dataclass(frozen=True)
class _Unit:
    """What is not divided: a group or, of one that does not fit by itself, a response.

    ``prompt`` is the cost of what a micro-batch holds once, however many of its responses.
    """

    group: int
    responses: Sequence[int]
    prompt: Cost
    own: Cost


def pack(
    groups: Sequence[Group], max_tokens: int, *, whole_groups: bool = False
) -> list[list[int]]:
    """The response indices of each micro-batch.

    As few micro-batches as hold the groups in the order of their lengths. Among the cuts into so
    many, one whose largest has the least work, but for 1/64 of what there is to gain.
    """
    if not groups:
        return []
    units = list(_units(groups, math.inf if whole_groups else max_tokens))
    fullest = _fill(units, max_tokens, math.inf)
    most = max(work for _, work in fullest)
    even = sum(work for _, work in fullest) // len(fullest)

    def filled(step: int) -> list[tuple[list[int], int]]:
        return _fill(units, max_tokens, even + (most - even) * step // _STEPS)

    least = bisect_left(range(_STEPS), True, key=lambda step: len(filled(step)) <= len(fullest))
    return [sorted(responses) for responses, _ in filled(least)]


def _units(groups: Sequence[Group], max_tokens: float) -> Iterator[_Unit]:
    """The units, short ones first."""
    first = [0, *accumulate(len(group.responses) for group in groups)]
    longest = [len(group.prompt) + max(map(len, group.responses)) for group in groups]
    for g in sorted(range(len(groups)), key=lambda g: (longest[g], g)):
        before = len(groups[g].prompt)
        prompt = _cost(before, 0)
        costs = [_cost(len(response), before) for response in groups[g].responses]
        whole = tuple(map(sum, zip(*costs, strict=True)))
        if prompt[0] + whole[0] <= max_tokens:
            yield _Unit(g, range(first[g], first[g + 1]), prompt, (whole[0], whole[1]))
        else:
            yield from (_Unit(g, [first[g] + j], prompt, own) for j, own in enumerate(costs))


def _cost(tokens: int, before: int) -> Cost:
    """Of tokens that attend to each other in turn, and to all ``before`` them."""
    pairs = tokens * before + tokens * (tokens + 1) // 2
    return tokens, tokens * PAIRS_PER_TOKEN + pairs


def _fill(units: Sequence[_Unit], max_tokens: int, max_work: float) -> list[tuple[list[int], int]]:
    """Micro-batches filled one after the other, each with its work.

    A single unit may exceed the limits.
    """
    filled: list[tuple[list[int], int]] = []
    responses: list[int] = []
    tokens = work = 0
    group = None
    for unit in units:
        more, harder = unit.own
        if unit.group != group:
            more, harder = more + unit.prompt[0], harder + unit.prompt[1]
        if responses and (tokens + more > max_tokens or work + harder > max_work):
            filled.append((responses, work))
            responses, tokens, work = [], 0, 0
            more, harder = (a + b for a, b in zip(unit.prompt, unit.own, strict=True))
        responses += unit.responses
        tokens, work, group = tokens + more, work + harder, unit.group
    return [*filled, (responses, work)]
