"""Micro-batches: the unit of forward and backward passes, and how their gradients are added up.

If a micro-batch does not fit in memory, it is split in half. Token weights are fixed for the
whole optimizer step before it is split (``maths.aggregation``), so the halves' losses and gradients
add up to the same. A failed backward pass may already have added part of its gradient; the step is
then started again, which costs time but, unlike a spare copy of the gradients, no memory.

A size that did not fit is not tried again in the same step. The next step starts from the
configured size, so that its result does not depend on earlier failures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from trivium import distributed
from trivium.data.batch import Grouped
from trivium.data.oom import OutOfMemory, free_memory, run_with_oom_split
from trivium.models import flops

LossOutput = tuple[Tensor, dict[str, Tensor]]
"""The loss of a micro-batch, and its observations (flat tensors, detached)."""
Loss = Callable[[Any], LossOutput]
"""Computes the loss of a micro-batch's data."""


@dataclass(frozen=True)
class MicroBatch:
    """One part of an optimizer step, with its loss function.

    Attributes:
        data: the groups, with their token weights.
        loss: the loss function.
        whole_groups: whether groups must stay whole, as preference pairs must.
        index: place in the optimizer step, which halves keep.
    """

    data: Grouped
    loss: Loss
    whole_groups: bool = False
    index: int = 0

    def __call__(self) -> LossOutput:
        return self.loss(self.data)

    def halves(self) -> list[MicroBatch]:
        """Return two micro-batches that replace this one; none if it cannot be split."""
        halves = self.data.halves(whole_groups=self.whole_groups) or ()
        return [replace(self, data=self.data.select(half)) for half in halves]


@dataclass(frozen=True)
class MicroBatchResult:
    """Loss and observations of a micro-batch whose gradient has been accumulated."""

    micro_batch: MicroBatch
    loss: float
    observed: dict[str, Tensor]


def accumulate(
    micro_batches: Sequence[MicroBatch], zero_grad: Callable[[], None]
) -> tuple[list[MicroBatchResult], int]:
    """Add up the gradients of all micro-batches; return their results and the number of splits.

    Raises:
        TrainingError: memory runs out on a micro-batch that cannot be split.
    """
    zero_grad()
    flops_at_start = flops.total()
    waiting, results = list(reversed(micro_batches)), list[MicroBatchResult]()
    splits, limit = 0, math.inf
    while waiting:
        micro_batch, flops_before = waiting.pop(), flops.total()
        if micro_batch.data.tokens >= limit and (halves := micro_batch.halves()):
            waiting += reversed(halves)
            splits += 1
            continue
        result = _backward(micro_batch)
        if isinstance(result, MicroBatchResult):
            results.append(result)
            continue
        repeated: list[MicroBatchResult] = []
        if result.grads_corrupted:
            zero_grad()
            flops_before, repeated, results = flops_at_start, results, []
        flops.add(flops_before - flops.total())
        free_memory(micro_batch.data, result, whole_groups=micro_batch.whole_groups)
        limit = micro_batch.data.tokens
        waiting += [micro_batch, *(result.micro_batch for result in reversed(repeated))]
    return results, splits


def _backward(micro_batch: MicroBatch) -> MicroBatchResult | OutOfMemory:
    """Run one forward and backward pass.

    Returning drops the graph and, after a failure, the tensors that the exception held.
    """
    in_backward = False
    try:
        loss, observed = micro_batch()
        in_backward = True
        loss.backward()
        return MicroBatchResult(micro_batch, float(loss.detach()), observed)
    except (RuntimeError, MemoryError) as error:
        return OutOfMemory.of(error, grads_corrupted=in_backward)


def accumulate_on_all_ranks(
    micro_batches: Sequence[MicroBatch],
    zero_grad: Callable[[], None],
    parameters: Sequence[nn.Parameter],
) -> tuple[list[MicroBatchResult], int]:
    """``accumulate``, with the micro-batches divided over the processes and the gradients summed.

    Every process gets all results, in order, one per micro-batch. One without a micro-batch of its
    own adds a gradient of zero.
    """
    if distributed.size() == 1:
        return accumulate(micro_batches, zero_grad)
    rounds = in_rounds(micro_batches)

    def accumulate_own() -> tuple[list[tuple[float, dict[str, Tensor]]], int]:
        results, splits = accumulate(distributed.own(rounds), zero_grad)
        return joined_halves(results), splits

    plan = [(m.data.tokens, m.data.lengths_N.tolist()) for m in micro_batches]
    shares = distributed.gather("an optimizer step", accumulate_own, plan)
    distributed.sum_gradients(parameters)
    found = distributed.in_order([results for results, _ in shares], len(rounds))
    results = [MicroBatchResult(m, *x) for m, x in zip(rounds, found, strict=True)]
    results.sort(key=lambda result: result.micro_batch.index)
    return results, sum(splits for _, splits in shares)


def in_rounds(micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return micro-batches ordered by loss, numbered by their place in the optimizer step.

    Dealt out in this order, every process gets about the same number of each loss: PPO's list
    alternates between actor and critic, and every second entry of it is all actor.
    """
    numbered = [replace(m, index=index) for index, m in enumerate(micro_batches)]
    kinds = list(dict.fromkeys(_loss_kind(m.loss) for m in micro_batches))
    return sorted(numbered, key=lambda m: kinds.index(_loss_kind(m.loss)))


def _loss_kind(loss: Any) -> object:
    """Return the function behind partial applications and bound methods."""
    while isinstance(loss, partial):
        loss = loss.func
    return getattr(loss, "__func__", loss)


def joined_halves(results: Sequence[MicroBatchResult]) -> list[tuple[float, dict[str, Tensor]]]:
    """Return loss and observations of whole micro-batches from those of their parts, in order."""
    joined: list[tuple[float, dict[str, Tensor]]] = []
    for _, group in groupby(results, key=lambda result: result.micro_batch.index):
        parts = list(group)
        names = parts[0].observed
        observed = {name: torch.cat([p.observed[name] for p in parts]) for name in names}
        joined.append((sum(p.loss for p in parts), observed))
    return joined


@torch.no_grad()
def measure(micro_batches: Sequence[MicroBatch]) -> list[tuple[float, dict[str, Tensor]]]:
    """Return the loss and observations of each micro-batch, or of its parts, without gradients.

    Each process measures its share.
    """

    def measure_own() -> list[list[tuple[float, dict[str, Tensor]]]]:
        return [_measure(micro_batch) for micro_batch in distributed.own(micro_batches)]

    by_rank = distributed.gather("held-out losses", measure_own, plan=len(micro_batches))
    return list(chain(*distributed.in_order(by_rank, len(micro_batches))))


def _measure(micro_batch: MicroBatch) -> list[tuple[float, dict[str, Tensor]]]:
    responses = range(len(micro_batch.data.lengths_N))
    parts = run_with_oom_split(
        micro_batch.data, responses, micro_batch.loss, whole_groups=micro_batch.whole_groups
    )
    return [(float(loss), observed) for _, (loss, observed) in parts]
