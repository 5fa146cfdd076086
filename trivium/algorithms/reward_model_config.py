"""Configuration of a reward-model run; the loop is ``reward_model``."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.data.preferences import PreferencesConfig, StepLabelsConfig
from trivium.hf.model_config import ModelConfig, scoring_model_conflicts
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig


class RewardModelConfig(Configuration):
    """Everything a reward-model run depends on."""

    model: ModelConfig
    """A language model, which gets a new head, or a reward model."""
    pairs: PreferencesConfig | None = None
    """Preference pairs: trains an outcome reward model."""
    steps: StepLabelsConfig | None = None
    """Labeled steps: trains a process reward model."""
    validation_pairs: PreferencesConfig | None = None
    """Held-out pairs; by default a share of the pairs is held out."""
    validation_steps: StepLabelsConfig | None = None
    """Held-out labeled steps; by default a share of the steps is held out."""
    held_out_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the data that is held out if no validation data is named."""
    run: RunConfig = RunConfig()
    """The run's directory, seed, checkpoints and budget."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="cosine")
    """The optimizer."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    examples_per_step: int = Field(default=64, ge=1)
    """Pairs or labeled responses per optimizer step."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""
    center: float = Field(default=0.01, ge=0)
    """Weight of (s_w + s_l)², which keeps outcome scores around 0 (Eisenstein et al. 2024)."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between measurements of held-out accuracy; 0: only at the end."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from scoring_model_conflicts("model", self.model)
        if (self.pairs is None) == (self.steps is None):
            yield "", "give either pairs (an outcome model) or steps (a process model)"
        if self.pairs is None and self.validation_pairs is not None:
            yield "validation_pairs", "it goes with pairs; for steps write validation_steps"
        if self.steps is None and self.validation_steps is not None:
            yield "validation_steps", "it goes with steps; for pairs write validation_pairs"
        named = self.validation_pairs or self.validation_steps
        if self.evaluate_every and self.held_out_share == 0 and named is None:
            yield (
                "evaluate_every",
                "nothing is held out: set held_out_share above 0 or name validation data",
            )
