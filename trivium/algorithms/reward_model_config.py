"""Configuration of a reward-model run; the loop is ``reward_model``."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.data.demonstrations import DemonstrationsConfig
from trivium.data.preferences import StepLabelsConfig
from trivium.data.rankings import RankingsConfig, RewardPairsConfig
from trivium.hf.model_config import ModelConfig, scoring_model_conflicts
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig


class RewardModelConfig(Configuration):
    """Everything a reward-model run depends on."""

    model: ModelConfig
    """A language model, which gets a new head, or a reward model."""
    pairs: RewardPairsConfig | None = None
    """Preference pairs: trains an outcome reward model."""
    rankings: RankingsConfig | None = None
    """Rankings of K responses: trains an outcome reward model on all C(K, 2) comparisons."""
    steps: StepLabelsConfig | None = None
    """Labeled steps: trains a process reward model."""
    validation_pairs: RewardPairsConfig | None = None
    """Held-out pairs; by default a share of the pairs is held out."""
    validation_rankings: RankingsConfig | None = None
    """Held-out rankings; by default a share of the rankings is held out."""
    validation_steps: StepLabelsConfig | None = None
    """Held-out labeled steps; by default a share of the steps is held out."""
    held_out_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the data that is held out if no validation data is named."""
    demonstrations: DemonstrationsConfig | None = None
    """Demonstrations whose mean score becomes 0 by a bias, which is saved in the model's
    config.json (Ouyang et al. 2022, section 3.5)."""
    run: RunConfig = RunConfig()
    """The run's directory, seed, checkpoints and budget."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="cosine")
    """The optimizer."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    examples_per_step: int = Field(default=64, ge=1)
    """Pairs, rankings or labeled responses per optimizer step."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""
    center: float = Field(default=0.01, ge=0)
    """Weight of (s_w + s_l)², which keeps outcome scores around 0 (Eisenstein et al. 2024)."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between measurements of held-out accuracy; 0: only at the end."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from scoring_model_conflicts("model", self.model)
        kinds = ("pairs", "rankings", "steps")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            yield (
                "",
                "give either pairs or rankings (an outcome model), or steps (a process model), and "
                "only one of them",
            )
        for kind in kinds if len(given) == 1 else ():
            if kind not in given and getattr(self, f"validation_{kind}") is not None:
                yield (
                    f"validation_{kind}",
                    f"it goes with {kind}; for {given[0]} write validation_{given[0]}",
                )
        if self.demonstrations is not None and self.steps is not None:
            yield (
                "demonstrations",
                "a process model's scores are logits of steps, whose zero is a probability of one "
                "half: leave it out",
            )
        named = self.validation_pairs or self.validation_rankings or self.validation_steps
        if self.evaluate_every and self.held_out_share == 0 and named is None:
            yield (
                "evaluate_every",
                "nothing is held out: set held_out_share above 0 or name validation data",
            )

    @property
    def outcomes(self) -> RewardPairsConfig | RankingsConfig | None:
        """The data of an outcome model."""
        return self.pairs or self.rankings
