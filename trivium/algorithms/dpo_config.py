"""What a DPO run depends on; the loop is ``dpo``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.data.preferences import PreferencesConfig
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.models.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig


class OnlinePairsConfig(Configuration):
    """Pairs sampled from the current policy and ranked by a reward (Guo et al. 2024)."""

    data: PromptsConfig
    """Prompts to sample from."""
    rewards: RewardConfigs = Field(min_length=1)
    """What ranks the responses: the best of a group is chosen, the worst rejected."""
    responses_per_prompt: int = Field(default=4, ge=2)
    """Responses per prompt."""
    sampling: Sampling = Sampling()
    """How responses are drawn."""
    steps: int = Field(default=100, ge=1)
    """Optimizer steps, each on fresh pairs."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.sampling.greedy:
            yield "sampling.temperature", "equal responses make no pairs: raise it, 1 is usual"


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
    """The optimizer."""
    evaluation: EvaluationConfig | None = None
    """Held-out sampled evaluation: KL, length and quality."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs of data."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs (online: prompts) per optimizer step."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""

    beta: float = Field(default=0.1, gt=0)
    """β: scales the margin."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """What is made of the margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of flipped labels that is assumed (cDPO with sigmoid; robust)."""
    length_normalized: bool = False
    """Use mean instead of summed log-probs of a response."""
    reference_cache: bool = True
    """Keep the reference's log-probs of data on disk for further runs over the same model and pairs
    (docs/passes.md)."""
    reference_free: bool = False
    """Leave the reference out of the margin (SimPO, with length_normalized and target_margin)."""
    target_margin: float = Field(default=0.0, ge=0)
    """γ of SimPO: how far the chosen response must be ahead, after β."""
    sft_coefficient: float = Field(default=0.0, ge=0)
    """Weight of an added −log π(y_w|x)/|y_w|, which keeps the chosen response likely."""

    def conflicts(self) -> Iterator[Conflict]:
        if (self.data is None) == (self.online is None):
            yield "", "give either data (preference pairs) or online (sampled pairs)"
        if self.target_margin and self.loss != "sigmoid":
            yield "target_margin", f"it goes with loss: sigmoid, not {self.loss}: leave it out"
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            yield (
                "label_smoothing",
                f"it goes with loss: sigmoid or robust, not {self.loss}: leave it out",
            )
        if self.loss == "robust" and self.label_smoothing == 0:
            yield "loss", "robust needs label_smoothing above 0, the share of flipped labels"
        if self.online is not None and self.epochs != 1.0:
            yield "epochs", "it counts passes over data: online runs have online.steps, set these"
        if self.data is not None and self.evaluation is not None and not self.evaluation.rewards:
            yield (
                "evaluation.rewards",
                "it is empty, and pairs have no reward of their own: say what quality is",
            )

    @property
    def asks_reference(self) -> bool:
        """Whether the reference is asked once training has prepared."""
        compared = self.online is not None and not self.reference_free
        return compared or self.evaluation is not None

    @property
    def temperature(self) -> float:
        return self.online.sampling.temperature if self.online is not None else 1.0
