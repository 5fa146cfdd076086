"""GRPO's advantages, from rewards of whole responses or of their reasoning steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.rollout_step import equal_totals
from trivium.errors import ConfigurationError, TrainingError
from trivium.maths.advantages import (
    AdvantageEstimator,
    decoupled_advantages,
    equal_groups,
    normalize_over_batch,
    step_advantages,
)
from trivium.maths.options import Scale
from trivium.maths.ragged import repeat_per_segment, segment_sum
from trivium.rollout.rollouts import Rollouts
from trivium.training.options import ADVANTAGE, load_option


@dataclass(frozen=True)
class Supervision:
    """How rewards become advantages: by whole responses (outcome) or by their steps (process).

    Attributes:
        kind: outcome or process.
        estimator: baseline and deviation of outcome rewards.
        scale: the deviation that divides.
        decoupled: weight of each reward by its name, if each is normalized by itself (GDPO).
    """

    kind: Literal["outcome", "process"]
    estimator: AdvantageEstimator
    scale: Scale
    decoupled: Mapping[str, float] | None = None

    @classmethod
    def of(cls, config: GRPOConfig) -> Supervision:
        """Return the supervision of a configuration; a user's own function is checked here."""
        estimator, decoupled = load_option(ADVANTAGE, config.advantage), None
        if config.reward_aggregation == "normalize_then_sum":
            decoupled = {r.label: r.weight for r in config.rewards if r.weight}
        return cls(config.supervision, estimator, config.scale, decoupled)

    def advantages(self, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return ``Â_{i,t}`` of every response token, ``[T]``.

        Raises:
            ConfigurationError: supervision is by steps, and no reward scores steps.
        """
        if self.kind == "outcome":
            return repeat_per_segment(self._of_responses(rollouts), rollouts.lengths_N)
        if rollouts.scores.steps is None:
            raise ConfigurationError(
                "supervision is process, but no reward scores steps: add one that returns "
                "((start, end), number) pairs, or set supervision: outcome"
            )
        steps = rollouts.steps_with_outcomes(tokenizer)
        return step_advantages(
            steps.rewards_S,
            steps.ends_S,
            steps.counts_N,
            rollouts.lengths_N,
            rollouts.sizes_G,
            scale=self.scale,
        )

    def equal_groups(self, rollouts: Rollouts) -> Tensor:
        """Return which groups have equal rewards, in sum or one by one as normalized, ``[G]``."""
        if self.decoupled is None:
            return equal_totals(rollouts)
        equal_RG = [
            equal_groups(rewards_N[applies_N], segment_sum(applies_N.long(), rollouts.sizes_G))
            for rewards_N, applies_N in zip(*self._rewards(rollouts), strict=True)
        ]
        return torch.stack(equal_RG).all(0)

    def _of_responses(self, rollouts: Rollouts) -> Tensor:
        """Return the advantage of each response, ``[N]``."""
        if self.decoupled is None:
            return self.estimator(rollouts.totals_N, rollouts.sizes_G, scale=self.scale)
        rewards_RN, applies_RN = self._rewards(rollouts)
        summed_N = decoupled_advantages(
            rewards_RN,
            torch.tensor(list(self.decoupled.values())),
            rollouts.sizes_G,
            applies_RN=applies_RN,
            estimator=self.estimator,
            scale=self.scale,
        )
        return normalize_over_batch(summed_N)

    def _rewards(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Return the rewards that have a weight, and where they apply, both ``[R, N]``."""
        assert self.decoupled is not None, "rewards are kept apart"
        if rollouts.scores.steps is not None:
            raise ConfigurationError(
                "reward_aggregation is normalize_then_sum, which normalizes rewards of whole "
                "responses, and a reward scores steps: use sum_then_normalize, or rewards that "
                "return one number"
            )
        rows = [rollouts.scores.components[name] for name in self.decoupled]
        return (
            torch.tensor([[0.0 if x is None else x for x in row] for row in rows]),
            torch.tensor([[x is not None for x in row] for row in rows]),
        )


def loss_mask(rollouts: Rollouts, mask_truncated: bool) -> Tensor:
    """Return a mask of the response tokens in the loss, ``[T]`` bool."""
    if not mask_truncated:
        return torch.ones(int(rollouts.lengths_N.sum()), dtype=torch.bool)
    if bool(rollouts.truncated_N.all()):
        raise TrainingError(
            f"every response was truncated, at {int(rollouts.lengths_N.max())} tokens, and "
            "mask_truncated leaves none of them in the loss: raise sampling.max_tokens"
        )
    return repeat_per_segment(~rollouts.truncated_N, rollouts.lengths_N)
