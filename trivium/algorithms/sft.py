"""Supervised fine-tuning: the negative log-likelihood of demonstrated responses.

L(θ) = Σ_t w_t · −log π_θ(o_t | q, o_<t)     over tokens that the assistant wrote
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.algorithms.sft_config import SFTConfig
from trivium.data.batch import Batch
from trivium.data.demonstrations import Demonstration, load_demonstrations
from trivium.data.prompts import load_prompts
from trivium.evaluation.evaluator import Evaluator, Measured
from trivium.maths.aggregation import weighted_sum
from trivium.maths.objectives import token_nll
from trivium.models.loading import context_length, load_tokenizer, trained_parameters
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.runs.startup import prepare_run
from trivium.training.experience import WeightedGroups, epoch_batch, num_steps
from trivium.training.micro_batch import MicroBatch, measure
from trivium.training.optimizer import Optimizer
from trivium.training.policy_metrics import update_metrics
from trivium.training.run_loop import Training
from trivium.training.setup import load_rewards, local_engine, max_prompt_length


def train(config: SFTConfig) -> Path:
    """Fine-tune; returns the run's directory, with the model in ``final``."""
    prepared = prepare_run("sft", config)
    tokenizer = load_tokenizer(config.model)
    context = context_length(config.model)
    demonstrations = load_demonstrations(config.data, tokenizer, context)
    held_out = None
    if config.validation is not None:
        held_out = to_groups(load_demonstrations(config.validation, tokenizer, context))
    prompts, rewards = [], None
    if config.evaluation is not None:
        room = max_prompt_length(context, config.evaluation.sampling(None).max_tokens)
        prompts = load_prompts(config.evaluation.data, tokenizer, room)
        rewards, _ = load_rewards(config.evaluation.rewards, prompts, tokenizer)
    policy = Policy.load(config.model, tokenizer)
    evaluator = None
    if config.evaluation is not None and rewards is not None:
        engine = local_engine(policy)
        reference = Reference(policy) if config.measure_kl else None
        evaluator = Evaluator(config.evaluation, prompts, rewards, engine, policy, reference)

    if config.sort_by_length:
        demonstrations = sorted(demonstrations, key=lambda d: len(d.trained))
    steps = config.steps or num_steps(config.epochs, len(demonstrations), config.examples_per_step)
    trained = [(config.optimizer, trained_parameters(policy.model))]
    measured = None
    if held_out is not None or evaluator is not None:
        measured = HeldOut(config, policy, held_out, evaluator)
    with Training(prepared, steps, evaluator=measured) as training:
        optimizer = Optimizer(trained, steps, training.budget_spent)
        training.track_state(policy=policy, optimizer=optimizer)
        for step in training.steps():
            batch = to_groups(
                [demonstrations[i] for i in batch_indices(config, len(demonstrations), step)]
            )
            parts = batch.split_with_token_weights(
                batch.split(config.tokens_per_micro_batch),
                config.aggregation,
                config.data.max_response_tokens,
            )
            training.stages.begin()
            result = optimizer.step([MicroBatch(part, partial(loss, policy)) for part in parts])
            training.stages.lap("update")
            metrics = update_metrics([result]) | {
                "nll": -float(result.observed["logprobs_T"].mean()),
                "tokens/trained": float(batch.loss_mask_T.sum()),
            }
            training.log(metrics)
        training.save("final", policy)
    return training.path


@dataclass(frozen=True)
class HeldOut:
    """What is measured while fine-tuning: the loss of held-out demonstrations, and responses."""

    config: SFTConfig
    policy: Policy
    demonstrations: WeightedGroups | None
    responses: Evaluator | None

    def due(self, step: int) -> bool:
        return self.responses is not None and self.responses.due(step)

    def evaluate(self) -> Measured:
        """The loss of held-out demonstrations, if there are any, beside the responses' quality."""
        numbers = {}
        if self.demonstrations is not None:
            numbers["nll"] = validation_loss(self.config, self.policy, self.demonstrations)
        return Measured(numbers, None if self.responses is None else self.responses.evaluate())

    def state_dict(self) -> Any:
        """What later evaluations of responses are compared with."""
        return None if self.responses is None else self.responses.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Compare with what ``state`` gave."""
        if self.responses is not None:
            self.responses.load_state_dict(state)


def to_groups(demonstrations: list[Demonstration]) -> WeightedGroups:
    """Demonstrations as groups, with the tokens that are learned marked."""
    trained = [t for d in demonstrations for t in d.trained]
    return WeightedGroups([d.group for d in demonstrations], loss_mask_T=torch.tensor(trained))


def batch_indices(config: SFTConfig, count: int, step: int) -> list[int]:
    """The demonstrations of one optimizer step; with a curriculum the first pass is in order."""
    first = (step - 1) * config.examples_per_step
    if config.sort_by_length and first + config.examples_per_step <= count:
        return list(range(first, first + config.examples_per_step))
    return epoch_batch(count, config.examples_per_step, step - 1, seed=config.run.seed)


def loss(policy: Policy, part: WeightedGroups) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ_t w_t · −log π_θ(o_t)`` of one micro-batch."""
    logprobs_T = policy.logprobs(Batch.of(part.groups))
    weights_T = part.weights(logprobs_T)
    learned_T = logprobs_T.detach()[weights_T > 0]
    return weighted_sum(token_nll(logprobs_T), weights_T), {"logprobs_T": learned_T}


def validation_loss(config: SFTConfig, policy: Policy, held_out: WeightedGroups) -> float:
    """Mean negative log-likelihood per trained token of held-out demonstrations."""
    parts = held_out.split_with_token_weights(
        held_out.split(config.tokens_per_micro_batch), "token_mean"
    )
    work = [MicroBatch(part, partial(loss, policy)) for part in parts]
    return sum(part_loss for part_loss, _ in measure(work))
