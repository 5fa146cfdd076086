"""Configuration of a DPO run; the loop is ``dpo``."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.data.preferences import PreferencesConfig
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.hf.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig
from trivium.training.options import PreferenceLossName


class OnlinePairsConfig(Configuration):
    """Pairs sampled from the current policy and ranked by a reward (Guo et al. 2024)."""

    data: PromptsConfig
    """Prompts to sample from."""
    rewards: RewardConfigs = Field(min_length=1)
    """Rewards that rank the responses: the best of a group is chosen, the worst rejected."""
    responses_per_prompt: int = Field(default=4, ge=2)
    """Responses per prompt."""
    sampling: Sampling = Sampling()
    """How responses are sampled."""
    steps: int = Field(default=100, ge=1)
    """Optimizer steps, each on fresh pairs."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.sampling.greedy:
            yield (
                "sampling.temperature",
                "all responses of a prompt would be equal and make no pair: raise it, 1 is usual",
            )


class DPOConfig(Configuration):
    """Everything a DPO run depends on."""

    model: ModelConfig
    """The policy; the reference is a frozen copy of it."""
    data: PreferencesConfig | None = None
    """Preference pairs."""
    online: OnlinePairsConfig | None = None
    """Sample the pairs while training, instead of reading data."""
    run: RunConfig = RunConfig()
    """The run's directory, seed, checkpoints and budget."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-7, schedule="linear")
    """The optimizer."""
    evaluation: EvaluationConfig | None = None
    """Held-out sampled evaluation: KL, length and quality."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay, per optimizer step, of an exponential moving average of the policy's weights, which is
    evaluated beside them and saved in ema/; null: none."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs of data."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs (online: prompts) per optimizer step."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""

    beta: float = Field(default=0.1, gt=0)
    """β: scales the margin."""
    loss: PreferenceLossName = "sigmoid"
    """Loss of the margin, or your own."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (cDPO with sigmoid; robust)."""
    length_normalized: bool = False
    """Use the mean instead of the sum of a response's log-probs."""
    reference_cache: bool = True
    """Keep the reference's log-probs on disk for further runs over the same model and pairs."""
    reference_free: bool = False
    """Leave the reference out of the margin (SimPO, with length_normalized and target_margin)."""
    target_margin: float = Field(default=0.0, ge=0)
    """γ of SimPO: margin, after β, that the chosen response must exceed."""
    sft_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the added loss −log π(y_w|x)/|y_w|, which keeps the chosen response likely."""

    def conflicts(self) -> Iterator[Conflict]:
        if (self.data is None) == (self.online is None):
            yield "", "give either data (preference pairs) or online (sampled pairs)"
        if self.target_margin and self.loss in ("ipo", "hinge", "robust"):
            yield "target_margin", f"it goes with loss: sigmoid, not {self.loss}: leave it out"
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
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
                "it is empty, and pairs carry no reward: name what measures quality",
            )

    @property
    def needs_reference(self) -> bool:
        """Whether a copy of the initial policy is needed during training."""
        scores_online_pairs = self.online is not None and not self.reference_free
        return scores_online_pairs or self.evaluation is not None

    @property
    def temperature(self) -> float:
        """Temperature of π, which online pairs are sampled at."""
        return self.online.sampling.temperature if self.online is not None else 1.0
