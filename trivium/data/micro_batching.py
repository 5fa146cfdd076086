"""Packing of groups into micro-batches: few, of about equal cost, each within a token limit.

The result depends on lengths and the number of processes alone. The cost is that of a transformer's
forward pass: a part for every token, and a part for every pair of a token and a token it attends
to. Whether a micro-batch fits into memory is not checked here: ``data.oom`` splits a micro-batch
that does not fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from trivium import distributed
from trivium.data.group import Group

PAIRS_PER_TOKEN = 4096
"""Number of attention pairs that cost as much as the matrix products of one token.

It is six times a model width of about 700.
"""
_SEARCH_STEPS = 64

TokensAndCost = tuple[int, int]
"""Number of tokens, and their cost in attention pairs."""


@dataclass(frozen=True)
class _Item:
    """Indivisible unit of packing: a group, or one response of a group that exceeds the limit.

    A micro-batch pays ``prompt`` once per group, for any number of the group's responses.
    """

    group: int
    responses: Sequence[int]
    prompt: TokensAndCost
    response: TokensAndCost


def pack(
    groups: Sequence[Group], max_tokens: int, *, whole_groups: bool = False
) -> list[list[int]]:
    """Return the response indices of each micro-batch.

    The number of micro-batches is the smallest with which groups, sorted by length, can be packed
    in order; with several processes, the next multiple of their number. Among the packings of that
    size, the highest cost of a micro-batch is the smallest possible, up to 1/64 of the possible
    reduction.
    """
    if not groups:
        return []
    items = list(_items(groups, math.inf if whole_groups else max_tokens))
    fewest = _pack_in_order(items, max_tokens, math.inf)
    highest = max(cost for _, cost in fewest)
    ranks = distributed.size()
    count = -(-len(fewest) // ranks) * ranks
    mean = sum(cost for _, cost in fewest) // count

    def packed(step: int) -> list[tuple[list[int], int]]:
        return _pack_in_order(items, max_tokens, mean + (highest - mean) * step // _SEARCH_STEPS)

    def is_few(step: int) -> bool:
        return len(packed(step)) <= count

    first = bisect_left(range(_SEARCH_STEPS), True, key=is_few)
    return [sorted(responses) for responses, _ in packed(first)]


def _items(groups: Sequence[Group], max_tokens: float) -> Iterator[_Item]:
    """Yield the items, short groups first."""
    first = [0, *accumulate(len(group.responses) for group in groups)]
    longest = [len(group.prompt) + max(map(len, group.responses)) for group in groups]
    for g in sorted(range(len(groups)), key=lambda g: (longest[g], g)):
        prompt_length = len(groups[g].prompt)
        prompt = _cost(prompt_length, 0)
        costs = [_cost(len(response), prompt_length) for response in groups[g].responses]
        tokens, cost = map(sum, zip(*costs, strict=True))
        if prompt[0] + tokens <= max_tokens:
            yield _Item(g, range(first[g], first[g + 1]), prompt, (tokens, cost))
        else:
            yield from (_Item(g, [first[g] + j], prompt, one) for j, one in enumerate(costs))


def _cost(tokens: int, prefix: int) -> TokensAndCost:
    """Return the cost of ``tokens`` with causal attention to each other and to the prefix."""
    pairs = tokens * prefix + tokens * (tokens + 1) // 2
    return tokens, tokens * PAIRS_PER_TOKEN + pairs


def _pack_in_order(
    items: Sequence[_Item], max_tokens: int, max_cost: float
) -> list[tuple[list[int], int]]:
    """Fill one micro-batch after the other; return the responses and the cost of each.

    A single item may exceed the limits.
    """
    packed: list[tuple[list[int], int]] = []
    responses: list[int] = []
    tokens = cost = 0
    group = None
    for item in items:
        added_tokens, added_cost = item.response
        if item.group != group:
            added_tokens, added_cost = added_tokens + item.prompt[0], added_cost + item.prompt[1]
        if responses and (tokens + added_tokens > max_tokens or cost + added_cost > max_cost):
            packed.append((responses, cost))
            responses, tokens, cost = [], 0, 0
            added_tokens, added_cost = (
                a + b for a, b in zip(item.prompt, item.response, strict=True)
            )
        responses += item.responses
        tokens, cost, group = tokens + added_tokens, cost + added_cost, item.group
    return [*packed, (responses, cost)]
