"""Prediction of the model FLOPs of a command, from its configuration and the lengths of its data.

A group of one prompt and its responses costs one forward pass to sample or to score, and three to
train on. The products and attention are those that ``models.flops`` counts while the models run.
Sampled responses count with their largest length, so the prediction is an upper bound for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trivium.config.base import Configuration
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.hf.model_config import ModelConfig
from trivium.memory.dry_run import DryRun
from trivium.memory.report import Lengths
from trivium.memory.shapes import weightless
from trivium.models.flops import ForwardCost
from trivium.rewards.learned import OUTCOME, PROCESS, reward_model_config
from trivium.rewards.reward_config import RewardConfig
from trivium.rollout.sampling import Sampling

TRAIN = 3
"""Forward passes that a forward and a backward pass cost together."""


@dataclass(frozen=True)
class Work:
    """Optimizer steps or rollout batches of a command (0: it trains nothing), and its FLOPs."""

    steps: int
    flops: float


def predict_flops(kind: str, config: Configuration, lengths: Lengths) -> Work:
    """Return the steps and FLOPs of a command.

    Raises:
        ModelError: a checkpoint's configuration cannot be read.
    """
    return _PREDICTORS[kind](config, lengths)


def _model_cost(config: ModelConfig, *, scorer: bool = False) -> ForwardCost:
    return ForwardCost.of(weightless(DryRun(), config, scorer=scorer))


def _group(cost: ForwardCost, lengths: Lengths, responses: int) -> float:
    """Return the mean FLOPs of one forward pass over a prompt with ``responses`` responses."""
    mean_response = sum(lengths.responses) / len(lengths.responses)
    total = sum(cost.group(prompt, [mean_response] * responses) for prompt in lengths.prompts)
    return total / len(lengths.prompts)


def _learned(rewards: Sequence[RewardConfig], lengths: Lengths) -> float:
    """Return the FLOPs of scoring one response with all learned rewards."""
    paths = {
        reward.arguments["path"]: reward_model_config(reward)
        for reward in rewards
        if reward.function in (OUTCOME, PROCESS)
    }
    costs = [_model_cost(config, scorer=True) for config in paths.values()]
    return sum(_group(cost, lengths, 1) for cost in costs)


def _evaluations(
    config: EvaluationConfig | None,
    training: Sampling | None,
    policy: ForwardCost,
    lengths: Lengths,
    steps: int,
    *,
    reference: bool = True,
    rewards: Sequence[RewardConfig] = (),
) -> float:
    """Return the FLOPs of all evaluations of a run.

    Held-out prompts count with the lengths of the training prompts.
    """
    if config is None:
        return 0.0
    tokens = config.sampling(training).max_tokens
    prompts = config.prompts or config.data.limit or lengths.held_out or lengths.count
    times = 1 + config.at_start + (steps // config.every if config.every else 0)
    held_out = replace(lengths, responses=(tokens,))
    passes = _group(policy, held_out, 1 + config.samples)
    passes += 2 * reference * _group(policy, held_out, config.samples)
    scoring = (1 + config.samples) * _learned(config.rewards or rewards, held_out)
    return times * prompts * (passes + scoring)


def _sft(config: Any, lengths: Lengths) -> Work:
    cost = _model_cost(config.model)
    steps = config.steps or math.ceil(config.epochs * lengths.count / config.examples_per_step)
    flops = TRAIN * steps * config.examples_per_step * _group(cost, lengths, 1)
    flops += lengths.held_out * _group(cost, lengths, 1)
    flops += _evaluations(
        config.evaluation, None, cost, lengths, steps, reference=config.measure_kl
    )
    return Work(steps, flops)


def _reward_model(config: Any, lengths: Lengths) -> Work:
    cost = _model_cost(config.model, scorer=True)
    split_off = config.validation_pairs is None and config.validation_steps is None
    trained = lengths.count - lengths.held_out * split_off
    steps = math.ceil(config.epochs * trained / config.examples_per_step)
    group = _group(cost, lengths, 2 if config.pairs is not None else 1)
    return Work(steps, group * (TRAIN * config.epochs * trained + lengths.held_out))


def _dpo(config: Any, lengths: Lengths) -> Work:
    cost = _model_cost(config.model)
    pair = _group(cost, lengths, 2)
    scored = 0 if config.reference_free else pair
    online = config.online
    if online is None:
        steps = math.ceil(config.epochs * lengths.count / config.pairs_per_step)
        flops = TRAIN * config.epochs * lengths.count * pair + lengths.count * scored
        sampling, rewards = None, ()
    else:
        steps, sampling, rewards = online.steps, online.sampling, online.rewards
        sampled = _group(cost, lengths, online.responses_per_prompt)
        sampled += online.responses_per_prompt * _learned(rewards, lengths)
        flops = steps * config.pairs_per_step * (sampled + TRAIN * pair + scored)
    flops += _evaluations(config.evaluation, sampling, cost, lengths, steps, rewards=rewards)
    return Work(steps, flops)


def _grpo(config: Any, lengths: Lengths) -> Work:
    cost, count = _model_cost(config.model), config.responses_per_prompt
    passes = _rollout_passes(config, passes_before=config.minibatches > 1)
    group = passes * _group(cost, lengths, count) + count * _learned(config.rewards, lengths)
    return _with_evaluations(config, cost, lengths, config.total_steps, group)


def _ppo(config: Any, lengths: Lengths) -> Work:
    cost, count = _model_cost(config.model), config.responses_per_prompt
    passes = _rollout_passes(config, passes_before=True)
    group = passes * _group(cost, lengths, count) + count * _learned(config.rewards, lengths)
    if config.critic.kind == "separate":
        critic = _model_cost(config.critic.model or config.model, scorer=True)
        group += (1 + TRAIN * config.epochs) * _group(critic, lengths, count)
    work = _with_evaluations(config, cost, lengths, config.steps, group)
    if config.pretraining is None:
        return work
    texts = config.pretraining.examples_per_step * config.optimizer_steps
    return replace(work, flops=work.flops + TRAIN * texts * _group(cost, lengths, 1))


def _rollout_passes(config: Any, *, passes_before: bool) -> int:
    """Return the policy-sized passes over a rollout batch: sampling, scoring, KL and updates."""
    sampler_serves = config.beta == 0 < config.sampler_tolerance and not config.asynchronous
    scored = passes_before and not sampler_serves
    return 1 + scored + (config.beta > 0) + TRAIN * config.epochs


def _with_evaluations(
    config: Any, cost: ForwardCost, lengths: Lengths, steps: int, group: float
) -> Work:
    flops = steps * config.prompts_per_step * group
    flops += _evaluations(
        config.evaluation, config.sampling, cost, lengths, steps, rewards=config.rewards
    )
    return Work(steps, flops)


def _sample(config: Any, lengths: Lengths) -> Work:
    if config.model is None:
        return Work(0, 0.0)
    group = _group(_model_cost(config.model), lengths, config.samples)
    return Work(0, lengths.count * (group + config.samples * _learned(config.rewards, lengths)))


def _evaluate(config: Any, lengths: Lengths) -> Work:
    cost, samples = _model_cost(config.model), config.samples
    group = _group(cost, lengths, 1 + samples)
    if config.reference is not None:
        group += _group(cost, lengths, samples)
        group += _group(_model_cost(config.reference), lengths, samples)
    return Work(0, lengths.count * (group + (1 + samples) * _learned(config.rewards, lengths)))


_PREDICTORS = {
    "sft": _sft,
    "reward-model": _reward_model,
    "ppo": _ppo,
    "dpo": _dpo,
    "grpo": _grpo,
    "sample": _sample,
    "pairs": _sample,
    "evaluate": _evaluate,
}
