"""Experience: a rollout batch made ready for its update epochs, and how it is cut.

Shared by the loops that reuse a rollout batch (PPO, GRPO). The cutting is planned before anything
is scored, so that old log-probs are computed in the very micro-batches that will be trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from trivium.choices import Aggregation
from trivium.data.batch import Grouped
from trivium.maths.weights import token_weights

MicroBatches = list[list[int]]
"""One optimiser step: the response indices of each of its micro-batches."""


@dataclass(frozen=True, kw_only=True)
class Weighted(Grouped):
    """Groups whose tokens carry a weight in the loss.

    ``trained_T`` marks the tokens that are learned from, ``weights_T`` their weight in the loss of
    one optimiser step (set by ``for_step``).
    """

    trained_T: Tensor
    weights_T: Tensor | None = None

    def for_step(
        self, micro_batches: MicroBatches, aggregation: Aggregation, max_length: int | None = None
    ) -> list[Self]:
        """The micro-batches of one optimiser step, weighted by the step as a whole."""
        chosen = sorted(response for part in micro_batches for response in part)
        minibatch = self.select(chosen)
        weights_T = token_weights(
            minibatch.lengths_N, aggregation, trained_T=minibatch.trained_T, max_length=max_length
        )
        minibatch = replace(minibatch, weights_T=weights_T)
        place = {response: i for i, response in enumerate(chosen)}
        return [minibatch.select([place[r] for r in part]) for part in micro_batches]

    def weights(self, like_T: Tensor) -> Tensor:
        """The weights, on the device and in the type of a per-token loss."""
        assert self.weights_T is not None, "a micro-batch needs the weights of its optimiser step"
        return self.weights_T.to(like_T)


@dataclass(frozen=True, kw_only=True)
class Experience(Weighted):
    """What stays fixed while a rollout batch is reused."""

    advantages_T: Tensor
    ref_logprobs_T: Tensor | None = None


def plan_updates(
    data: Grouped, *, epochs: int, minibatches: int, max_tokens: int, seed: int, step: int
) -> list[MicroBatches]:
    """The optimiser steps over one rollout batch: epochs of minibatches, groups reshuffled in each.

    A function of the data's lengths, ``seed`` and ``step`` alone.
    """
    steps = []
    for epoch in range(epochs):
        order_G = shuffled(len(data.groups), seed=seed, epoch=step * epochs + epoch)
        for minibatch in group_minibatches(data.sizes_G, order_G, minibatches):
            parts = data.select(minibatch).split(max_tokens)
            steps.append([[minibatch[i] for i in part] for part in parts])
    return steps


def first_epoch(steps: Sequence[MicroBatches], responses: int) -> MicroBatches:
    """All micro-batches of the first epoch: each of the ``responses`` once.

    An epoch has fewer optimiser steps than were asked for where there are fewer groups.
    """
    parts = [part for step in steps for part in step]
    ends = accumulate(map(len, parts))
    return [part for part, end in zip(parts, ends, strict=True) if end <= responses]


def steps_of(epochs: float, count: int, size: int) -> int:
    """Optimiser steps in so many passes over ``count`` items, ``size`` of them at a time."""
    return math.ceil(epochs * count / min(size, count))


def shuffled(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(count)`` that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(count, generator=generator).tolist()


def epoch_batch(count: int, size: int, step: int, *, seed: int) -> list[int]:
    """The indices of batch number ``step`` when epochs of ``count`` items are cut into batches.

    Every item comes once per epoch, in a new order each time; a batch may straddle two epochs. A
    batch larger than the data is the data.
    """
    size = min(size, count)
    first = step * size
    picked = []
    orders: dict[int, list[int]] = {}
    for position in range(first, first + size):
        epoch = position // count
        if epoch not in orders:
            orders[epoch] = shuffled(count, seed=seed, epoch=epoch)
        picked.append(orders[epoch][position % count])
    return picked


def group_minibatches(sizes_G: Tensor, order_G: Sequence[int], count: int) -> list[list[int]]:
    """Cut groups, in ``order_G``, into ``count`` minibatches: the response indices of each."""
    start_G = (torch.cumsum(sizes_G, 0) - sizes_G).tolist()
    cuts = [round(len(order_G) * k / count) for k in range(count + 1)]
    return [
        sorted(start_G[g] + j for g in order_G[a:b] for j in range(int(sizes_G[g])))
        for a, b in pairwise(cuts)
        if b > a
    ]
