"""Micro-batches: the unit of forward and backward passes, and how their gradients are added up.

A micro-batch whose passes do not fit the memory is done in halves. Weights are given to tokens for
the whole optimizer step before it is cut (``maths.aggregation``), so the halves' losses and gradients
add up to the same. A backward pass that fails may have added a part of its gradient already: the
step is then prepared anew, which costs the time of what was done but, unlike a copy of the gradients
kept for the case, no memory.

What did not fit is not tried again in the same step, nor is what is as large; the next step starts
from the configured size, so that its bits depend on itself alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trivium.data.batch import Grouped
from trivium.models import flops
from trivium.models.oom import OutOfMemory, free_memory, run_with_oom_split

LossOutput = tuple[Tensor, dict[str, Tensor]]
"""The loss of a part, and what was observed on the way (flat tensors, detached)."""
Loss = Callable[[Any], LossOutput]
"""Computes that of a part."""


@dataclass(frozen=True)
class MicroBatch:
    """A part of an optimizer step, the loss that is taken of it, and whether groups stay whole."""

    part: Grouped
    loss: Loss
    whole_groups: bool = False

    def __call__(self) -> LossOutput:
        return self.loss(self.part)

    def halves(self) -> list[MicroBatch]:
        """Two micro-batches instead of this one; none where it cannot be cut."""
        halves = self.part.halves(whole_groups=self.whole_groups) or ()
        return [replace(self, part=self.part.select(half)) for half in halves]


@dataclass(frozen=True)
class MicroBatchResult:
    """A micro-batch whose gradient was added, its loss, and what was observed."""

    micro_batch: MicroBatch
    loss: float
    observed: dict[str, Tensor]


def accumulate(
    work: Sequence[MicroBatch], zero_grad: Callable[[], None]
) -> tuple[list[MicroBatchResult], int]:
    """Add up the gradients of all micro-batches; return what they saw, and how many were divided.

    ``zero_grad`` drops all gradients.

    Raises:
        TrainingError: memory runs out on a micro-batch that cannot be divided.
    """
    zero_grad()
    counted = flops.total()
    waiting, done = list(reversed(work)), list[MicroBatchResult]()
    splits, limit = 0, math.inf
    while waiting:
        micro_batch, before = waiting.pop(), flops.total()
        if micro_batch.part.tokens >= limit and (halves := micro_batch.halves()):
            waiting += reversed(halves)
            splits += 1
            continue
        found = _learn(micro_batch)
        if isinstance(found, MicroBatchResult):
            done.append(found)
            continue
        again: list[MicroBatchResult] = []
        if found.grads_corrupted:
            zero_grad()
            before, again, done = counted, done, []
        flops.add(before - flops.total())
        free_memory(micro_batch.part, found, whole_groups=micro_batch.whole_groups)
        limit = micro_batch.part.tokens
        waiting += [micro_batch, *(learned.micro_batch for learned in reversed(again))]
    return done, splits


def _learn(micro_batch: MicroBatch) -> MicroBatchResult | OutOfMemory:
    """One forward and backward pass; returning drops its graph and, if it failed, its tensors."""
    began = False
    try:
        loss, observed = micro_batch()
        began = True
        loss.backward()
        return MicroBatchResult(micro_batch, float(loss.detach()), observed)
    except (RuntimeError, MemoryError) as error:
        return OutOfMemory.of(error, grads_corrupted=began)


@torch.no_grad()
def measure(work: Sequence[MicroBatch]) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Losses and observations without gradients, of micro-batches or what they had to be cut to."""
    for micro_batch in work:
        everything = range(len(micro_batch.part.lengths_N))
        for _, (loss, observed) in run_with_oom_split(
            micro_batch.part, everything, micro_batch.loss, whole_groups=micro_batch.whole_groups
        ):
            yield float(loss), observed
