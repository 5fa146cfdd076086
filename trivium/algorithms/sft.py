"""Supervised fine-tuning: the negative log-likelihood of demonstrated responses.

L(θ) = Σ_t w_t · −log π_θ(o_t | q, o_<t)     over the tokens that the assistant wrote
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trivium.algorithms.sft_config import SFTConfig
from trivium.data.batch import Batch
from trivium.data.demonstrations import Demonstration, load_demonstrations
from trivium.data.prompt_forms import with_arguments_of
from trivium.data.prompts import Prompt, load_prompts
from trivium.evaluation.evaluator import Evaluator, Measured
from trivium.hf.loading import context_length, load_tokenizer, trained_parameters
from trivium.maths.aggregation import token_mean, weighted_sum
from trivium.maths.objectives import token_nll
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import Rewards
from trivium.training.ema import WeightAverage, evaluated_with
from trivium.training.experience import WeightedGroups, epoch_batch, num_steps
from trivium.training.micro_batch import LossOutput, MicroBatch, measure
from trivium.training.optimizer import Optimizer
from trivium.training.options import AGGREGATION, load_option
from trivium.training.policy_metrics import update_metrics
from trivium.training.run_loop import Training
from trivium.training.setup import load_rewards, local_engine, max_prompt_length
from trivium.training.startup import prepare_run


def train(config: SFTConfig) -> Path:
    """Fine-tune; return the run's directory, with the model in ``final``."""
    prepared = prepare_run("sft", config)
    aggregation = load_option(AGGREGATION, config.aggregation)
    tokenizer, context = load_tokenizer(config.model), context_length(config.model)
    demonstrations = load_demonstrations(config.data, tokenizer, context)
    validation = None
    if config.validation is not None:
        held_out_data = with_arguments_of(config.validation, config.data)
        validation = to_groups(load_demonstrations(held_out_data, tokenizer, context))
    prompts, rewards = load_evaluation(config, tokenizer, context)
    policy = Policy.load(config.model, tokenizer)
    evaluator = make_evaluator(config, policy, prompts, rewards)
    held_out = HeldOut(policy, validation, evaluator, config.tokens_per_micro_batch)

    if config.sort_by_length:
        demonstrations = sorted(demonstrations, key=lambda d: len(d.loss_mask))
    count, size, seed = len(demonstrations), config.examples_per_step, config.run.seed
    steps = config.steps or num_steps(config.epochs, count, size)
    trained = [(config.optimizer, trained_parameters(policy.model))]
    ema = WeightAverage.of(policy, config.ema_decay)
    evaluated = evaluated_with(held_out if held_out else None, ema)
    with Training(prepared, steps, evaluator=evaluated) as training:
        optimizer = Optimizer(trained, steps, training.budget_spent, ema)
        training.track_state(policy=policy, optimizer=optimizer, ema=ema)
        for step in training.steps():
            index = batch_indices(count, size, step, seed, in_order=config.sort_by_length)
            batch = to_groups([demonstrations[i] for i in index])
            micro_batches = batch.split_with_token_weights(
                batch.split(config.tokens_per_micro_batch),
                aggregation,
                config.data.max_response_tokens,
            )
            training.stages.begin()
            result = optimizer.step([MicroBatch(x, partial(loss, policy)) for x in micro_batches])
            training.stages.lap("update")
            metrics = update_metrics([result]) | {
                "nll": -float(result.observed["logprobs_T"].mean()),
                "tokens/trained": float(batch.loss_mask_T.sum()),
            }
            training.log(metrics)
        training.save(final=policy, ema=ema)
    return training.path


def load_evaluation(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[list[Prompt], Rewards | None]:
    """Load held-out prompts and their rewards; nothing without an evaluation."""
    if config.evaluation is None:
        return [], None
    limit = max_prompt_length(context, config.evaluation.sampling(None).max_tokens)
    prompts = load_prompts(with_arguments_of(config.evaluation.data, config.data), tokenizer, limit)
    rewards, _ = load_rewards(config.evaluation.rewards, prompts, tokenizer)
    return prompts, rewards


def make_evaluator(
    config: SFTConfig, policy: Policy, prompts: list[Prompt], rewards: Rewards | None
) -> Evaluator | None:
    """Return the evaluator of sampled responses; None without an evaluation."""
    if config.evaluation is None or rewards is None:
        return None
    engine = local_engine(policy)
    reference = Reference(policy) if config.measure_kl else None
    return Evaluator(config.evaluation, prompts, rewards, engine, policy, reference)


@dataclass(frozen=True)
class HeldOut:
    """Held-out measurements: the loss of demonstrations, and the quality of sampled responses."""

    policy: Policy
    demonstrations: WeightedGroups | None
    responses: Evaluator | None
    max_tokens: int

    def __bool__(self) -> bool:
        return self.demonstrations is not None or self.responses is not None

    def due(self, step: int) -> bool:
        """Return whether to measure after this step."""
        return self.responses is not None and self.responses.due(step)

    def evaluate(self) -> Measured:
        """Measure the loss of demonstrations, if there are any, and the responses' quality."""
        numbers = {}
        if self.demonstrations is not None:
            numbers["nll"] = validation_loss(self.policy, self.demonstrations, self.max_tokens)
        return Measured(numbers, None if self.responses is None else self.responses.evaluate())

    def state_dict(self) -> Any:
        """Return what later evaluations of responses are compared with."""
        return None if self.responses is None else self.responses.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Compare later evaluations with a saved state."""
        if self.responses is not None:
            self.responses.load_state_dict(state)


def to_groups(demonstrations: list[Demonstration]) -> WeightedGroups:
    """Return demonstrations as groups, with the trained tokens marked."""
    mask = [t for d in demonstrations for t in d.loss_mask]
    return WeightedGroups([d.group for d in demonstrations], loss_mask_T=torch.tensor(mask))


def batch_indices(count: int, size: int, step: int, seed: int, *, in_order: bool) -> list[int]:
    """Return the demonstrations of one optimizer step.

    With ``in_order`` (a curriculum) the first epoch takes them in order.
    """
    first = (step - 1) * size
    if in_order and first + size <= count:
        return list(range(first, first + size))
    return epoch_batch(count, size, step - 1, seed=seed)


def loss(policy: Policy, micro_batch: WeightedGroups) -> LossOutput:
    """``Σ_t w_t · −log π_θ(o_t)`` of one micro-batch."""
    logprobs_T = policy.logprobs(Batch.of(micro_batch.groups))
    weights_T = micro_batch.weights(logprobs_T)
    trained_T = logprobs_T.detach()[weights_T > 0]
    return weighted_sum(token_nll(logprobs_T), weights_T), {"logprobs_T": trained_T}


def validation_loss(policy: Policy, held_out: WeightedGroups, max_tokens: int) -> float:
    """Return the mean negative log-likelihood per trained token of held-out demonstrations."""
    parts = held_out.split_with_token_weights(held_out.split(max_tokens), token_mean)
    micro_batches = [MicroBatch(part, partial(loss, policy)) for part in parts]
    return sum(part_loss for part_loss, _ in measure(micro_batches))
