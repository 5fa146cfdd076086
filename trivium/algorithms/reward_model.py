"""Reward models: from preference pairs or rankings (outcome), or labeled steps (process).

    outcome:  L(φ) = 1/C(K, 2) Σ −log σ(r_φ(x, y_w) − r_φ(x, y_l) − m)   over all comparisons
    process:  L(φ) = BCE(r_φ(x, y_≤step), label of the step)

Ouyang et al. 2022, eq. 1, with the margin m of Touvron et al. 2023, eq. 2; a pair is a ranking of
K = 2. The process model is that of Lightman et al. 2024. The model starts from a language model,
with a new head that scores 0, or from a reward model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from trivium.algorithms.bias_shift import ShiftedRewardModel
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.data.batch import Grouped
from trivium.data.preferences import StepLabelsConfig, load_preferences, load_step_labels
from trivium.data.prompt_forms import with_arguments_of
from trivium.data.rankings import RankingsConfig, RewardPairsConfig, load_rankings
from trivium.evaluation.evaluator import Measured
from trivium.hf.loading import context_length, load_tokenizer, trained_parameters
from trivium.maths.intervals import SHARE, mean_interval
from trivium.models.reward_model import RewardModel
from trivium.training.experience import epoch_batch, num_steps
from trivium.training.micro_batch import MicroBatch, measure
from trivium.training.optimizer import Optimizer
from trivium.training.policy_metrics import update_metrics
from trivium.training.reward_losses import (
    LabeledSteps,
    Pairs,
    Rankings,
    pair_accuracy,
    reward_loss,
    step_accuracy,
)
from trivium.training.run_loop import Training
from trivium.training.startup import prepare_run


def train(config: RewardModelConfig) -> Path:
    """Train a reward model; return the run's directory, with the model in ``final``."""
    prepared = prepare_run("reward-model", config)
    data, held_out = load_data(config)
    model = RewardModel.load(config.model, new_head=True)
    examples = len(data.groups)
    steps = num_steps(config.epochs, examples, config.examples_per_step)
    trained = [(config.optimizer, trained_parameters(model.model))]
    max_tokens = config.tokens_per_micro_batch
    evaluator = None
    if held_out is not None:
        evaluator = HeldOut(model, held_out, config.evaluate_every, max_tokens, config.center)
    shown = config.demonstrations and with_arguments_of(config.demonstrations, config.outcomes)
    shifted = ShiftedRewardModel.of(model, shown, max_tokens)
    with Training(prepared, steps, evaluator=evaluator) as training:
        optimizer = Optimizer(trained, steps, training.budget_spent)
        training.track_state(model=shifted, optimizer=optimizer)
        for step in training.steps():
            index = epoch_batch(examples, config.examples_per_step, step - 1, seed=config.run.seed)
            batch = select_groups(data, sorted(set(index)))
            training.stages.begin()
            result = optimizer.step(micro_batches(model, batch, max_tokens, config.center))
            training.stages.lap("update")
            metrics = update_metrics([result]) | {
                "tokens/trained": float(batch.lengths_N.sum()),
            }
            if len(right := accuracy(result.observed)):
                metrics["accuracy"] = float(right.mean())
            training.log(metrics)
        training.save(final=shifted)
        if config.demonstrations is not None:
            training.event("bias_shift", bias=shifted.bias())
    return training.path


@dataclass(frozen=True)
class HeldOut:
    """Held-out data, measured after every ``every`` steps and at the end."""

    model: RewardModel
    data: Grouped
    every: int
    max_tokens: int
    center: float

    def due(self, step: int) -> bool:
        """Return whether to measure after this step."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def evaluate(self) -> Measured:
        """Measure the loss, and the accuracy with its 95 % interval."""
        return Measured(validate(self.model, self.data, self.max_tokens, self.center))

    def state_dict(self) -> None:
        """Return nothing: every evaluation stands alone."""

    def load_state_dict(self, state: None) -> None:
        """Do nothing: there is no state."""


def load_data(config: RewardModelConfig) -> tuple[Grouped, Grouped | None]:
    """Load training and held-out data; by default the seed chooses a share to hold out."""
    tokenizer, context = load_tokenizer(config.model), context_length(config.model)

    def pairs(source: RewardPairsConfig) -> Grouped:
        rows = load_preferences(source, tokenizer, context)
        margins = [row.margin or 0.0 for row in rows] if source.margins else None
        return Pairs.of([row.group for row in rows], margins)

    def rankings(source: RankingsConfig) -> Grouped:
        rows = load_rankings(source, tokenizer, context)
        return Rankings.of(
            [row.group for row in rows],
            [row.scores for row in rows],
            counts_ties=source.ties == "half",
            margin_scale=source.margin_scale,
        )

    def steps(source: StepLabelsConfig) -> Grouped:
        rows = load_step_labels(source, tokenizer, context)
        return LabeledSteps.of(
            [r.group for r in rows], [r.ends for r in rows], [r.labels for r in rows]
        )

    if config.pairs is not None:
        data = pairs(config.pairs)
        named = config.validation_pairs and pairs(
            with_arguments_of(config.validation_pairs, config.pairs)
        )
    elif config.rankings is not None:
        data = rankings(config.rankings)
        named = config.validation_rankings and rankings(
            with_arguments_of(config.validation_rankings, config.rankings)
        )
    else:
        assert config.steps is not None, "checked by the configuration"
        data = steps(config.steps)
        named = config.validation_steps and steps(
            with_arguments_of(config.validation_steps, config.steps)
        )
    if named is not None or config.held_out_share == 0:
        return data, named
    count = len(data.groups)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    kept = max(1, count - math.ceil(config.held_out_share * count))
    training, held_out = (sorted(part) for part in (order[:kept], order[kept:]))
    return select_groups(data, training), select_groups(data, held_out)


def select_groups(data: Grouped, groups: list[int]) -> Grouped:
    """Return only these groups (ascending), with all their responses."""
    sizes = data.sizes_G.tolist()
    starts = list(accumulate(sizes, initial=0))
    return data.select([starts[g] + j for g in groups for j in range(sizes[g])])


def micro_batches(
    model: RewardModel, data: Grouped, max_tokens: int, center: float
) -> list[MicroBatch]:
    """Return the micro-batches of one optimizer step."""
    total = data.count if isinstance(data, LabeledSteps) else len(data.groups)
    loss = partial(reward_loss, model, total=total, center=center)
    parts = data.split(max_tokens, whole_groups=True)
    return [MicroBatch(data.select(part), loss, whole_groups=True) for part in parts]


def accuracy(observed: dict[str, Tensor]) -> Tensor:
    """Return the accuracy of each pair or labeled step, or of each ranking's comparisons, 0 to 1.

    A ranking whose responses are all tied has none.
    """
    if "accuracy_G" in observed:
        return observed["accuracy_G"]
    if "margin_P" in observed:
        return pair_accuracy(observed["margin_P"])
    return step_accuracy(observed["logit_S"], observed["label_S"])


def validate(
    model: RewardModel, held_out: Grouped, max_tokens: int, center: float
) -> dict[str, float]:
    """Return held-out loss, and accuracy with its 95 % interval."""
    losses, accuracies = [], []
    for part_loss, observed in measure(micro_batches(model, held_out, max_tokens, center)):
        losses.append(part_loss)
        accuracies.append(accuracy(observed))
    values = torch.cat(accuracies)
    if not len(values):
        return {"n": 0, "loss": sum(losses)}
    interval = mean_interval(values.tolist(), bounds=SHARE)
    return {
        "n": len(values),
        "loss": sum(losses),
        "accuracy": interval.mean,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
    }
