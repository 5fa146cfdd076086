"""Reward models: from preference pairs (outcome) or labeled steps (process).

    outcome:  L(φ) = −log σ(r_φ(x, y_w) − r_φ(x, y_l))            (Ouyang et al. 2022, eq. 1)
    process:  L(φ) = BCE(r_φ(x, y_≤step), label of the step)      (Lightman et al. 2024)

The model starts as a language model with a new head that scores 0, or as another reward model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.data.batch import Grouped
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    load_preferences,
    load_step_labels,
)
from trivium.evaluation.evaluator import Measured
from trivium.evaluation.statistics import Interval, mean_interval
from trivium.models.loading import context_length, load_tokenizer, trained_parameters
from trivium.models.reward_model import RewardModel
from trivium.runs.startup import prepare_run
from trivium.training.experience import epoch_batch, num_steps
from trivium.training.micro_batch import MicroBatch, measure
from trivium.training.optimizer import Optimizer
from trivium.training.policy_metrics import update_metrics
from trivium.training.reward_losses import (
    LabeledSteps,
    Pairs,
    labeled_step_loss,
    pair_accuracy,
    pair_loss,
    step_accuracy,
)
from trivium.training.run_loop import Training


def train(config: RewardModelConfig) -> Path:
    """Train a reward model; returns the run's directory, with the model in ``final``."""
    prepared = prepare_run("reward-model", config)
    data, held_out = load_data(config)
    model = RewardModel.load(config.model)
    examples = len(data.groups)
    steps = num_steps(config.epochs, examples, config.examples_per_step)
    trained = [(config.optimizer, trained_parameters(model.model))]
    measured = None if held_out is None else HeldOut(config, model, held_out)
    with Training(prepared, steps, evaluator=measured) as training:
        optimizer = Optimizer(trained, steps, training.budget_spent)
        training.track_state(model=model, optimizer=optimizer)
        for step in training.steps():
            index = epoch_batch(examples, config.examples_per_step, step - 1, seed=config.run.seed)
            batch = take(data, sorted(set(index)))
            training.stages.begin()
            result = optimizer.step(work(config, model, batch))
            training.stages.lap("update")
            metrics = update_metrics([result]) | {
                "accuracy": float(accuracy(result.observed).mean()),
                "tokens/trained": float(batch.lengths_N.sum()),
            }
            training.log(metrics)
        training.save("final", model)
    return training.path


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs or labeled steps, measured while training."""

    config: RewardModelConfig
    model: RewardModel
    data: Grouped

    def due(self, step: int) -> bool:
        every = self.config.evaluate_every
        return every > 0 and step > 0 and step % every == 0

    def evaluate(self) -> Measured:
        """Loss, and accuracy with its 95 % interval."""
        return Measured(validate(self.config, self.model, self.data))

    def state_dict(self) -> None:
        """Nothing: every evaluation stands alone."""

    def load_state_dict(self, state: None) -> None:
        """Nothing to restore."""


def load_data(config: RewardModelConfig) -> tuple[Grouped, Grouped | None]:
    """Training data, and held-out data: named, or a share of the data chosen by the run's seed."""
    tokenizer, context = load_tokenizer(config.model), context_length(config.model)

    def pairs(source: PreferencesConfig) -> Grouped:
        return Pairs.of([p.group for p in load_preferences(source, tokenizer, context)])

    def steps(source: StepLabelsConfig) -> Grouped:
        rows = load_step_labels(source, tokenizer, context)
        return LabeledSteps.of(
            [r.group for r in rows], [r.ends for r in rows], [r.labels for r in rows]
        )

    if config.pairs is not None:
        data = pairs(config.pairs)
        named = config.validation_pairs and pairs(config.validation_pairs)
    else:
        assert config.steps is not None, "checked by the configuration"
        data = steps(config.steps)
        named = config.validation_steps and steps(config.validation_steps)
    if named is not None or config.held_out_share == 0:
        return data, named
    count = len(data.groups)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    kept = max(1, count - math.ceil(config.held_out_share * count))
    return take(data, sorted(order[:kept])), take(data, sorted(order[kept:]))


def take(data: Grouped, groups: list[int]) -> Grouped:
    """Only these groups (ascending), with all their responses."""
    size = len(data.groups[0].responses)
    return data.select([g * size + j for g in groups for j in range(size)])


def work(config: RewardModelConfig, model: RewardModel, data: Grouped) -> list[MicroBatch]:
    """The micro-batches of one optimizer step."""
    parts = data.split(config.tokens_per_micro_batch, whole_groups=True)
    if isinstance(data, LabeledSteps):
        of_part = partial(labeled_step_loss, model, total=data.count)
    else:
        of_part = partial(pair_loss, model, total=len(data.groups), center=config.center)
    return [MicroBatch(data.select(part), of_part, whole_groups=True) for part in parts]


def accuracy(observed: dict[str, Tensor]) -> Tensor:
    """Per pair or per step: is it judged right?"""
    if "margin_P" in observed:
        return pair_accuracy(observed["margin_P"])
    return step_accuracy(observed["logit_S"], observed["label_S"])


def validate(config: RewardModelConfig, model: RewardModel, held_out: Grouped) -> dict[str, float]:
    """Held-out loss and accuracy with its 95 % interval."""
    losses, seen = [], []
    for part_loss, observed in measure(work(config, model, held_out)):
        losses.append(part_loss)
        seen.append(accuracy(observed))
    values = torch.cat(seen)
    interval: Interval = mean_interval(values.tolist())
    return {
        "n": len(values),
        "loss": sum(losses),
        "accuracy": interval.mean,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
    }
