"""Experience: a rollout batch prepared for its update epochs, and how it is split.

PPO and GRPO share this file. The micro-batches are planned before anything is scored, so that old
log-probs are computed in the same micro-batches that are trained on later. The first optimizer step
needs no old log-probs beforehand, since it runs on the weights that sampled; for later minibatches
the sampler's log-probs may serve.
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
from trivium.data.oom import LogprobModel, score_logprobs
from trivium.maths.aggregation import Aggregation, token_weights
from trivium.maths.ragged import segment_sum
from trivium.training.protocols import Updates

MicroBatches = list[list[int]]
"""The response indices of each micro-batch."""


@dataclass(frozen=True)
class Minibatch:
    """One optimizer step.

    Attributes:
        responses: indices of the responses that the loss is averaged over.
        micro_batches: the responses that may have a gradient, split into micro-batches.
    """

    responses: list[int]
    micro_batches: MicroBatches


@dataclass(frozen=True)
class UpdateSchedule:
    """Epochs, minibatches and micro-batches of the updates on one rollout batch.

    Attributes:
        epochs: passes over the batch.
        minibatches: optimizer steps per epoch.
        max_tokens: tokens per micro-batch, at most.
        seed: the run's seed.
    """

    epochs: int
    minibatches: int
    max_tokens: int
    seed: int

    def plan(
        self, data: Grouped, step: int, *, without_gradient: Collection[int] = ()
    ) -> list[Minibatch]:
        """Plan the optimizer steps of training step ``step`` (see ``plan_updates``)."""
        return plan_updates(
            data,
            epochs=self.epochs,
            minibatches=self.minibatches,
            max_tokens=self.max_tokens,
            seed=self.seed,
            step=step,
            without_gradient=without_gradient,
        )


@dataclass(frozen=True, kw_only=True)
class WeightedGroups(Grouped):
    """Groups whose tokens carry a weight in the loss.

    Attributes:
        loss_mask_T: the tokens that are trained on.
        weights_T: their weights in the loss of one optimizer step, set by
            ``split_with_token_weights``.
    """

    loss_mask_T: Tensor
    weights_T: Tensor | None = None

    def split_with_token_weights(
        self,
        micro_batches: MicroBatches,
        aggregation: Aggregation,
        max_length: int | None = None,
        *,
        responses: Sequence[int] | None = None,
    ) -> list[Self]:
        """Return the micro-batches of one optimizer step, weighted over the step as a whole.

        The step consists of ``responses``, by default those of the micro-batches.
        """
        if responses is None:
            responses = sorted(response for part in micro_batches for response in part)
        minibatch = self.select(responses)
        weights_T = token_weights(
            minibatch.lengths_N,
            aggregation,
            loss_mask_T=minibatch.loss_mask_T,
            max_length=max_length,
        )
        minibatch = replace(minibatch, weights_T=weights_T)
        position = {response: i for i, response in enumerate(responses)}
        return [minibatch.select([position[r] for r in part]) for part in micro_batches]

    def has_trained_tokens(self, minibatch: Minibatch) -> bool:
        """Return whether any token of an optimizer step is trained on."""
        return bool(self.loss_mask_T[token_positions(self, [minibatch.responses])].any())

    def weights(self, like_T: Tensor) -> Tensor:
        """Return the weights on the device and in the dtype of a per-token loss."""
        assert self.weights_T is not None, "a micro-batch needs the weights of its optimizer step"
        return self.weights_T.to(like_T)


@dataclass(frozen=True, kw_only=True)
class Experience(WeightedGroups):
    """Values that stay fixed while a rollout batch is reused.

    Attributes:
        advantages_T: advantages.
        ref_logprobs_T: log-probs under the reference; None without a KL term.
        old_logprobs_T: log-probs under π_old; None in the first optimizer step, where π_old is the
            current policy.
        rescored_mask_T: tokens whose π_old log-probs come from a forward pass of the trainer;
            elsewhere they are the sampler's.
    """

    advantages_T: Tensor
    ref_logprobs_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    rescored_mask_T: Tensor | None = None

    def without_gradient(self) -> list[int]:
        """Return the responses without a token that is in the loss and has a nonzero advantage."""
        signal_T = self.loss_mask_T & (self.advantages_T != 0)
        signals_N = segment_sum(signal_T.float(), self.lengths_N)
        return torch.nonzero(signals_N == 0)[:, 0].tolist()

    def with_first_step_logprobs(self, updates: Updates[Minibatch]) -> Self:
        """Return the experience with π_old's log-probs as the first optimizer step computed them.

        Before the first step the policy is π_old itself, so the log-probs that the first step
        computes are π_old's, for all later steps.
        """
        if not updates.results:
            return replace(self, old_logprobs_T=None)
        assert self.old_logprobs_T is not None, "an experience is prepared before it is updated on"
        logprobs_T = updates.results[0].observed["logprobs_T"]
        first = next(step for step in updates.planned if self.has_trained_tokens(step))
        at = token_positions(self, first.micro_batches).to(logprobs_T.device)
        old_T = self.old_logprobs_T.to(logprobs_T).index_copy(0, at, logprobs_T)
        return replace(self, old_logprobs_T=old_T)

    def next_micro_batches(
        self,
        minibatch: Minibatch,
        updates: Updates[Minibatch],
        aggregation: Aggregation,
        max_length: int,
    ) -> list[Self]:
        """Return the micro-batches of the optimizer step that follows those already taken."""
        experience = self.with_first_step_logprobs(updates)
        return experience.split_with_token_weights(
            minibatch.micro_batches, aggregation, max_length, responses=minibatch.responses
        )

    def old_logprobs_or_current(self, logprobs_T: Tensor) -> Tensor:
        """Return π_old's log-probs; in the first optimizer step they are the policy's, detached."""
        return logprobs_T.detach() if self.old_logprobs_T is None else self.old_logprobs_T


def old_logprobs(
    data: WeightedGroups,
    minibatches: Sequence[Minibatch],
    sampler_logprobs_T: Tensor,
    policy: LogprobModel,
    *,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Return π_old's log-probs, and which of them were scored by the policy, both ``[T]``.

    Only the later minibatches of the first epoch need log-probs before their own pass. Their
    longest micro-batch is scored; if the sampler's log-probs are within ``tolerance`` of the scores
    on every token, the sampler's serve for all other tokens. A tolerance of 0 scores them all.
    """
    lengths = data.lengths_N.tolist()
    first = next(step for step in minibatches if data.has_trained_tokens(step))
    first_epoch = first_epoch_micro_batches(minibatches, len(lengths))
    later = [part for part in first_epoch if part not in first.micro_batches]
    later.sort(key=lambda part: max(lengths[response] for response in part), reverse=True)
    old_T = sampler_logprobs_T
    rescored_T = torch.zeros(len(old_T), dtype=torch.bool)
    for micro_batches in filter(None, (later[:1], later[1:])):
        at = token_positions(data, micro_batches).sort().values
        scored_T = score_logprobs(policy, data, micro_batches)
        old_T = old_T.to(scored_T).index_copy(0, at.to(scored_T.device), scored_T)
        rescored_T[at] = True
        difference = float((scored_T.cpu() - sampler_logprobs_T[at]).abs().max())
        if tolerance > 0 and difference <= tolerance:
            break
    return old_T, rescored_T


def token_positions(data: Grouped, micro_batches: MicroBatches) -> Tensor:
    """Return the flat token positions of micro-batches, in their order."""
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
    without_gradient: Collection[int] = (),
) -> list[Minibatch]:
    """Plan the optimizer steps over one rollout batch: epochs of minibatches of reshuffled groups.

    Responses ``without_gradient`` count in their minibatch but are in none of its micro-batches. If
    that leaves a minibatch empty, its cheapest response stays, so that the optimizer still takes
    its step: moments and weights decay as if nothing were skipped. The plan is a function of the
    data's lengths and the arguments alone.
    """
    skipped = frozenset(without_gradient)
    costs = [len(g.prompt) + len(r) for g in data.groups for r in g.responses]
    planned = []
    for epoch in range(epochs):
        order_G = shuffled(len(data.groups), seed=seed, epoch=step * epochs + epoch)
        for responses in group_minibatches(data.sizes_G, order_G, minibatches):
            kept = [response for response in responses if response not in skipped]
            kept = kept or [min(responses, key=costs.__getitem__)]
            parts = data.select(kept).split(max_tokens)
            planned.append(Minibatch(responses, [[kept[i] for i in part] for part in parts]))
    return planned


def first_epoch_micro_batches(minibatches: Sequence[Minibatch], responses: int) -> MicroBatches:
    """Return all micro-batches of the first epoch over this number of responses.

    An epoch has fewer optimizer steps than configured if there are fewer groups than minibatches.
    """
    ends = accumulate(len(step.responses) for step in minibatches)
    pairs = zip(minibatches, ends, strict=True)
    return [part for step, end in pairs if end <= responses for part in step.micro_batches]


def num_steps(epochs: float, count: int, size: int) -> int:
    """Return the number of optimizer steps in ``epochs`` passes over ``count`` items."""
    return math.ceil(epochs * count / min(size, count))


def shuffled(count: int, *, seed: int, epoch: int) -> list[int]:
    """Return a permutation of ``range(count)`` that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(count, generator=generator).tolist()


def epoch_batch(count: int, size: int, step: int, *, seed: int) -> list[int]:
    """Return the indices of batch number ``step`` of epochs of ``count`` items.

    Every item comes once per epoch, in a new order each epoch; a batch may span two epochs. A batch
    larger than the data is the data.
    """
    size = min(size, count)
    first = step * size
    indices = []
    orders: dict[int, list[int]] = {}
    for position in range(first, first + size):
        epoch = position // count
        if epoch not in orders:
            orders[epoch] = shuffled(count, seed=seed, epoch=epoch)
        indices.append(orders[epoch][position % count])
    return indices


def group_minibatches(sizes_G: Tensor, order_G: Sequence[int], count: int) -> list[list[int]]:
    """Cut groups, in ``order_G``, into ``count`` minibatches: the response indices of each."""
    start_G = (torch.cumsum(sizes_G, 0) - sizes_G).tolist()
    cuts = [round(len(order_G) * k / count) for k in range(count + 1)]
    return [
        sorted(start_G[g] + j for g in order_G[a:b] for j in range(int(sizes_G[g])))
        for a, b in pairwise(cuts)
        if b > a
    ]
