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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
    """

    data: Grouped
    loss: Loss
    whole_groups: bool = False

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


@torch.no_grad()
def measure(micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Yield the loss and observations of each micro-batch, or of its parts, without gradients."""
    for micro_batch in micro_batches:
        responses = range(len(micro_batch.data.lengths_N))
        for _, (loss, observed) in run_with_oom_split(
            micro_batch.data, responses, micro_batch.loss, whole_groups=micro_batch.whole_groups
        ):
            yield float(loss), observed
