"""Experience: a rollout batch made ready for its update epochs, and how it is cut.

Shared by the loops that reuse a rollout batch (PPO, GRPO). The cutting is planned before anything
is scored, so that old log-probs are computed in the very micro-batches that will be trained on,
where they are computed at all: the first optimizer step finds its own on the way, and for later
minibatches the sampler's may do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from trivium.data.batch import Grouped, token_index
from trivium.maths.aggregation import token_weights
from trivium.maths.options import Aggregation
from trivium.maths.ragged import segment_sum
from trivium.models.oom import Scores, score_logprobs
from trivium.training.protocols import Updates

MicroBatches = list[list[int]]
"""The response indices of each micro-batch."""


@dataclass(frozen=True)
class Minibatch:
    """One optimizer step: the responses that its loss is an average over, and the micro-batches of
    those that have a gradient."""

    responses: list[int]
    parts: MicroBatches


@dataclass(frozen=True, kw_only=True)
class WeightedGroups(Grouped):
    """Groups whose tokens carry a weight in the loss.

    ``loss_mask_T`` marks the tokens that are learned from, ``weights_T`` their weight in the loss of
    one optimizer step (set by ``split_with_token_weights``).
    """

    loss_mask_T: Tensor
    weights_T: Tensor | None = None

    def split_with_token_weights(
        self,
        micro_batches: MicroBatches,
        aggregation: Aggregation,
        max_length: int | None = None,
        *,
        over: Sequence[int] | None = None,
    ) -> list[Self]:
        """The micro-batches of one optimizer step, weighted by the step as a whole.

        The step is made of the responses ``over``, by default those of the micro-batches.
        """
        chosen = sorted(response for part in micro_batches for response in part)
        chosen = chosen if over is None else list(over)
        minibatch = self.select(chosen)
        weights_T = token_weights(
            minibatch.lengths_N,
            aggregation,
            loss_mask_T=minibatch.loss_mask_T,
            max_length=max_length,
        )
        minibatch = replace(minibatch, weights_T=weights_T)
        place = {response: i for i, response in enumerate(chosen)}
        return [minibatch.select([place[r] for r in part]) for part in micro_batches]

    def has_trained_tokens(self, minibatch: Minibatch) -> bool:
        """Whether any token of an optimizer step is learned from."""
        return bool(self.loss_mask_T[tokens_of(self, [minibatch.responses])].any())

    def weights(self, like_T: Tensor) -> Tensor:
        """The weights, on the device and in the type of a per-token loss."""
        assert self.weights_T is not None, "a micro-batch needs the weights of its optimizer step"
        return self.weights_T.to(like_T)


@dataclass(frozen=True, kw_only=True)
class Experience(WeightedGroups):
    """What stays fixed while a rollout batch is reused.

    ``old_logprobs_T`` are π_old's, as far as ``old_logprobs`` had to know them (``rescored_mask_T``: by a
    pass of its own, elsewhere they are the sampler's), or None where π_old is the policy that is
    being updated.
    """

    advantages_T: Tensor
    ref_logprobs_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    rescored_mask_T: Tensor | None = None

    def without_gradient(self) -> list[int]:
        """The responses of which no token is learned from, or only tokens with Â = 0."""
        signal_T = self.loss_mask_T & (self.advantages_T != 0)
        signals_N = segment_sum(signal_T.float(), self.lengths_N)
        return torch.nonzero(signals_N == 0)[:, 0].tolist()

    def with_first_step_logprobs(self, updates: Updates[Minibatch]) -> Self:
        """The experience as the optimizer steps that were taken leave it.

        Before the first, the policy is π_old itself. So the log-probs that the first step saw are
        π_old's, for all steps to come.
        """
        if not updates.results:
            return replace(self, old_logprobs_T=None)
        assert self.old_logprobs_T is not None, "an experience is prepared before it is updated on"
        seen_T = updates.results[0].observed["logprobs_T"]
        first = next(step for step in updates.planned if self.has_trained_tokens(step))
        at = tokens_of(self, first.parts).to(seen_T.device)
        return replace(
            self, old_logprobs_T=self.old_logprobs_T.to(seen_T).index_copy(0, at, seen_T)
        )

    def for_update(
        self,
        minibatch: Minibatch,
        updates: Updates[Minibatch],
        aggregation: Aggregation,
        max_length: int,
    ) -> list[Self]:
        """The micro-batches of the optimizer step that comes after those that were taken."""
        now, over = self.with_first_step_logprobs(updates), minibatch.responses
        return now.split_with_token_weights(minibatch.parts, aggregation, max_length, over=over)

    def old_logprobs_or_current(self, logprobs_T: Tensor) -> Tensor:
        """π_old's log-probs, where the policy's are these."""
        return logprobs_T.detach() if self.old_logprobs_T is None else self.old_logprobs_T


def old_logprobs(
    data: WeightedGroups,
    steps: Sequence[Minibatch],
    sampler_T: Tensor,
    policy: Scores,
    *,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """π_old's log-probs, and which were scored, ``[T]``; elsewhere they are the sampler's.

    Only what a later minibatch of the first epoch meets must be known before its own pass. Its
    longest micro-batch is scored; where the sampler's log-probs are within ``tolerance`` of that on
    every token, they do for the others. A tolerance of 0 scores them all.
    """
    lengths = data.lengths_N.tolist()
    first = next(step for step in steps if data.has_trained_tokens(step))
    later = [part for part in first_epoch(steps, len(lengths)) if part not in first.parts]
    later.sort(key=lambda part: max(lengths[response] for response in part), reverse=True)
    old_T, rescored_mask_T = sampler_T, torch.zeros(len(sampler_T), dtype=torch.bool)
    for parts in filter(None, (later[:1], later[1:])):
        at = tokens_of(data, parts).sort().values
        found_T = score_logprobs(policy, data, parts)
        old_T = old_T.to(found_T).index_copy(0, at.to(found_T.device), found_T)
        rescored_mask_T[at] = True
        difference = float((found_T.cpu() - sampler_T[at]).abs().max())
        if tolerance > 0 and difference <= tolerance:
            break
    return old_T, rescored_mask_T


def tokens_of(data: Grouped, micro_batches: MicroBatches) -> Tensor:
    """The flat token positions of micro-batches, one after the other."""
    responses = [response for part in micro_batches for response in part]
    return token_index(data.lengths_N, torch.tensor(responses))


def plan_updates(
    data: Grouped,
    *,
    epochs: int,
    minibatches: int,
    max_tokens: int,
    seed: int,
    step: int,
    left_out: Collection[int] = (),
) -> list[Minibatch]:
    """The optimizer steps over one rollout batch: epochs of minibatches, groups reshuffled in each.

    Responses that are ``left_out`` count in their minibatch and are in none of its micro-batches;
    where that leaves none, the cheapest stays, so that moments and weights decay as they would.

    A function of the data's lengths, ``seed``, ``step`` and ``left_out`` alone.
    """
    idle = frozenset(left_out)
    costs = [len(g.prompt) + len(r) for g in data.groups for r in g.responses]
    steps = []
    for epoch in range(epochs):
        order_G = shuffled(len(data.groups), seed=seed, epoch=step * epochs + epoch)
        for responses in group_minibatches(data.sizes_G, order_G, minibatches):
            kept = [response for response in responses if response not in idle]
            kept = kept or [min(responses, key=costs.__getitem__)]
            parts = data.select(kept).split(max_tokens)
            steps.append(Minibatch(responses, [[kept[i] for i in part] for part in parts]))
    return steps


def first_epoch(steps: Sequence[Minibatch], responses: int) -> MicroBatches:
    """All micro-batches of the first epoch over so many responses.

    An epoch has fewer optimizer steps than were asked for where there are fewer groups.
    """
    ends = accumulate(len(step.responses) for step in steps)
    pairs = zip(steps, ends, strict=True)
    return [part for step, end in pairs if end <= responses for part in step.parts]


def num_steps(epochs: float, count: int, size: int) -> int:
    """Optimizer steps in so many passes over ``count`` items, ``size`` of them at a time."""
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
