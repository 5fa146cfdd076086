"""What a DPO run depends on; the loop is ``dpo``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trivium.algorithms.optimizer_config import OptimizerConfig
from trivium.config import Configuration
from trivium.data.preferences import PreferencesConfig
from trivium.data.prompts import PromptsConfig
from trivium.models.model_config import ModelConfig
from trivium.rewards.reward import RewardConfig
from trivium.rollout.sampling import Sampling
from trivium.runs.evaluation_config import EvaluationConfig
from trivium.runs.store import RunConfig


class OnlinePairsConfig(Configuration):
    """Pairs sampled from the current policy and ranked by a reward (Guo et al. 2024)."""

    data: PromptsConfig
    """Prompts to sample from."""
    rewards: tuple[RewardConfig, ...]
    """What ranks the responses: the best of a group is chosen, the worst rejected."""
    responses_per_prompt: int = Field(default=4, ge=2)
    """Responses per prompt."""
    sampling: Sampling = Sampling()
    """How responses are drawn."""
    steps: int = Field(default=100, ge=1)
    """Optimiser steps, each on fresh pairs."""


class DPOConfig(Configuration):
    """Everything a DPO run depends on."""

    model: ModelConfig
    """The policy; the reference is a frozen copy of it."""
    data: PreferencesConfig | None = None
    """Preference pairs."""
    online: OnlinePairsConfig | None = None
    """Instead of data: sample the pairs while training."""
    run: RunConfig = RunConfig()
    """Where the run is written, and its seed."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-7, schedule="linear")
    """The optimiser."""
    evaluation: EvaluationConfig | None = None
    """Held-out sampled evaluation: KL, length and quality."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs of data."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs (online: prompts) per optimiser step."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""

    beta: float = Field(default=0.1, gt=0)
    """β: scales the margin."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """What is made of the margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of flipped labels that is assumed (cDPO with sigmoid; robust)."""
    length_normalised: bool = False
    """Use mean instead of summed log-probs of a response."""
    reference_free: bool = False
    """Leave the reference out of the margin (SimPO, with length_normalised and target_margin)."""
    target_margin: float = Field(default=0.0, ge=0)
    """γ of SimPO: how far the chosen response must be ahead, after β."""
    sft_coefficient: float = Field(default=0.0, ge=0)
    """Weight of an added −log π(y_w|x)/|y_w|, which keeps the chosen response likely."""

    @model_validator(mode="after")
    def _consistent(self) -> DPOConfig:
        if (self.data is None) == (self.online is None):
            raise ValueError("give either data (preference pairs) or online (sampled pairs)")
        if self.target_margin and self.loss != "sigmoid":
            raise ValueError(f"target_margin goes with loss: sigmoid, not {self.loss}")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing goes with loss: sigmoid or robust, not {self.loss}")
        if self.loss == "robust" and self.label_smoothing == 0:
            raise ValueError(
                "loss: robust needs label_smoothing above 0, the share of flipped labels"
            )
        if self.online is not None and self.epochs != 1.0:
            raise ValueError("epochs counts passes over data: online runs have online.steps")
        if self.data is not None and self.evaluation is not None and not self.evaluation.rewards:
            raise ValueError(
                "evaluation.rewards is empty: say what quality is on sampled responses"
            )
        if self.online is not None and self.online.sampling.greedy:
            raise ValueError("online.sampling.temperature is 0: equal responses make no pairs")
        return self

    @property
    def temperature(self) -> float:
        return self.online.sampling.temperature if self.online is not None else 1.0
