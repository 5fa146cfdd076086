"""GRPO's advantages, from rewards of whole responses or of their reasoning steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.algorithms.grpo_config import GRPOConfig
from trivium.errors import ConfigurationError, TrainingError
from trivium.maths.advantages import AdvantageEstimator, step_advantages
from trivium.maths.options import Scale
from trivium.maths.ragged import repeat_per_segment
from trivium.rollout.rollouts import Rollouts
from trivium.training.options import ADVANTAGE, load_option


@dataclass(frozen=True)
class Supervision:
    """How rewards become advantages: by whole responses (outcome) or by their steps (process)."""

    kind: Literal["outcome", "process"]
    estimator: AdvantageEstimator
    scale: Scale

    @classmethod
    def of(cls, config: GRPOConfig) -> Supervision:
        """Return the supervision of a configuration; a user's own function is checked here."""
        estimator = load_option(ADVANTAGE, config.advantage)
        return cls(config.supervision, estimator, config.scale)

    def advantages(self, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return ``Â_{i,t}`` of every response token, ``[T]``.

        Raises:
            ConfigurationError: supervision is by steps, and no reward scores steps.
        """
        if self.kind == "outcome":
            per_response_N = self.estimator(rollouts.totals_N, rollouts.sizes_G, scale=self.scale)
            return repeat_per_segment(per_response_N, rollouts.lengths_N)
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
