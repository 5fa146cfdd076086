"""Importance sampling between the sampler of a rollout batch and π_old, for PPO and GRPO.

Responses come from a sampler μ that is π_old up to rounding or, if they were sampled ahead, an
older policy. The weight of a token or of a whole response corrects the loss for it
(``docs/asynchronous.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trivium.errors import TrainingError
from trivium.maths.objectives import ImportanceWeight
from trivium.training.micro_batch import LossOutput
from trivium.training.options import IMPORTANCE_WEIGHT, load_option


class Sampled(Protocol):
    """Responses with the log-probs of their sampler."""

    @property
    def sampler_logprobs_T(self) -> Tensor: ...
    @property
    def lengths_N(self) -> Tensor: ...


@dataclass(frozen=True)
class SamplerCorrection:
    """A weight per token, and its bound C."""

    weight: ImportanceWeight
    cap: float

    @classmethod
    def of(cls, kind: str, cap: float | None) -> SamplerCorrection | None:
        """Return the correction of a kind; None without a cap."""
        return None if cap is None else cls(load_option(IMPORTANCE_WEIGHT, kind), cap)


def correct_for_sampler(
    correction: SamplerCorrection | None, loss_T: Tensor, old_T: Tensor, samples: Sampled
) -> LossOutput:
    """Return ``c ℓ``, ``[T]``, and the weights c for metrics; the loss itself without a correction.

    ``old_T`` are π_old's log-probs, and ``samples`` has those of the sampler.
    """
    if correction is None:
        return loss_T, {}
    given = old_T, samples.sampler_logprobs_T.to(old_T), samples.lengths_N.to(old_T.device)
    weights_T = correction.weight(*given, cap=correction.cap)
    return weights_T * loss_T, {
        "importance_T": weights_T,
        "importance_capped_T": weights_T != correction.weight(*given, cap=math.inf),
    }


def importance_metrics(observed: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean weight and the share of weights that the cap changed; {} without weights.

    Raises:
        TrainingError: every weight is 0, so that nothing was learned.
    """
    if "importance_T" not in observed:
        return {}
    weights_T = observed["importance_T"]
    if not bool(weights_T.any()):
        raise TrainingError(
            "every response was masked, because its importance weight is above "
            "importance_sampling_cap, so nothing was learned: raise the cap, set "
            "importance_sampling: sequence_truncate or token_truncate, or lower "
            "optimizer.learning_rate"
        )
    return {
        "policy/importance_mean": float(weights_T.mean()),
        "policy/importance_capped": float(observed["importance_capped_T"].float().mean()),
    }
