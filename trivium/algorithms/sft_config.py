"""Configuration of a supervised fine-tuning run; the loop is ``sft``."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.data.demonstrations import DemonstrationsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.hf.model_config import ModelConfig
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig
from trivium.training.options import AggregationName


class SFTConfig(Configuration):
    """Everything a supervised fine-tuning run depends on."""

    model: ModelConfig
    """The model to fine-tune."""
    data: DemonstrationsConfig
    """Demonstrations."""
    run: RunConfig = RunConfig()
    """The run's directory, seed, checkpoints and budget."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5, schedule="cosine")
    """The optimizer."""
    validation: DemonstrationsConfig | None = None
    """Held-out demonstrations, whose loss is measured."""
    evaluation: EvaluationConfig | None = None
    """Held-out evaluation on generated responses; needs evaluation.rewards."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay, per optimizer step, of an exponential moving average of the model's weights, which is
    evaluated beside them and saved in ema/; null: none."""
    measure_kl: bool = False
    """Measure the KL to the initial model in evaluations; keeps a frozen copy of that model."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; an alternative to epochs."""
    examples_per_step: int = Field(default=32, ge=1)
    """Demonstrations per optimizer step."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""
    aggregation: AggregationName = "token_mean"
    """How tokens are averaged: per response, over all tokens, or by fixed length."""
    sort_by_length: bool = False
    """Curriculum: take demonstrations from short to long responses in the first epoch."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.aggregation == "fixed_length" and self.data.max_response_tokens is None:
            yield "aggregation", "it divides by data.max_response_tokens, which is not set: set it"
        if self.evaluation is not None and not self.evaluation.rewards:
            yield (
                "evaluation.rewards",
                "it is empty, and demonstrations carry no reward: name what measures quality",
            )
        if self.measure_kl and self.evaluation is None:
            yield "measure_kl", "it needs held-out prompts: give evaluation, or leave it out"
        if self.steps is not None and self.epochs != 1.0:
            yield "steps", f"epochs is set too, to {self.epochs:g}: give one of them"
