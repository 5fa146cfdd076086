"""Rollout batches of PPO and GRPO: the prompts of each step, and responses, also sampled ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivium.maths.advantages import equal_groups
from trivium.rollout.rollouts import Rollouts, chosen_groups, joined, own_request, roll_out
from trivium.rollout.sampling import Sampling
from trivium.training.experience import epoch_batch
from trivium.training.setup import OnPolicyComponents


def equal_totals(rollouts: Rollouts) -> Tensor:
    """Return which groups have equal total rewards, ``[G]`` bool."""
    return equal_groups(rollouts.totals_N, rollouts.sizes_G)


@dataclass(frozen=True)
class RolloutBatches:
    """Rollout batches by number (from 0).

    Attributes:
        components: engine, rewards and prompts.
        prompts_per_step: prompts of a batch.
        responses_per_prompt: responses to each of them.
        sampling: how responses are sampled.
        seed: the run's seed.
        equal: which groups of a batch have equal rewards, ``[G]`` bool.
    """

    components: OnPolicyComponents
    prompts_per_step: int
    responses_per_prompt: int
    sampling: Sampling
    seed: int
    equal: Callable[[Rollouts], Tensor] = equal_totals

    def roll_out(self, number: int) -> Rollouts:
        """Return the responses to a batch of prompts, with their rewards."""
        return roll_out(self.components.engine, self.components.rewards, **self._request(number))

    def of_step(self, step: int, extra_batches: int) -> Rollouts:
        """Return GRPO's rollout batch of step number ``step`` (from 1).

        With dynamic sampling (``extra_batches > 0``; DAPO, Yu et al. 2025), groups of equal rewards
        are replaced by groups of further prompts, as far as the extra batches yield them.
        """
        per_step = 1 + extra_batches
        first = (step - 1) * per_step
        batch = self.roll_out(first)
        if extra_batches == 0:
            return batch
        useful_parts, missing = [], self.prompts_per_step
        for number in range(first, first + per_step):
            batch = batch if number == first else self.roll_out(number)
            useful = torch.nonzero(~self.equal(batch))[:, 0].tolist()
            useful_parts.append(chosen_groups(batch, useful[:missing]))
            missing -= len(useful_parts[-1].prompts)
            if missing == 0:
                break
        kept = [part for part in useful_parts if part.prompts]
        return joined(kept) if kept else batch

    def sample_ahead(self, number: int) -> None:
        """Start sampling the responses of a later ``roll_out`` from the policy as it is now."""
        engine = self.components.async_engine
        assert engine is not None, "an asynchronous run has an engine that samples ahead"
        engine.begin(**own_request(**self._request(number)))

    def _request(self, number: int) -> dict[str, Any]:
        prompts = self.components.prompts
        index = epoch_batch(len(prompts), self.prompts_per_step, number, seed=self.seed)
        return {
            "prompts": [prompts[i] for i in index],
            "samples": self.responses_per_prompt,
            "sampling": self.sampling,
            "seed": self.seed,
            "step": number,
        }
