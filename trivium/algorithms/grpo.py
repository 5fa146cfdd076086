"""Group Relative Policy Optimization (Shao et al. 2024): rewards compared within a group.

    J(θ) = E 1/G Σ_i 1/|o_i| Σ_t w { min(ρ Â, clip(ρ, 1−ε, 1+ε) Â) − β KL[π_θ‖π_ref] }
    w    = 1, or min(π_old/μ, C) where the sampler μ is not π_old, as one step behind it

Three nested loops, all below in ``train``: iterations (the reference is refreshed, and optionally
the reward model trained further), sampling steps (G responses per prompt, rewards, advantages),
and updates (μ epochs of minibatches over the fixed batch). Left out: how tokens are drawn
(``rollout``), what a reward is (``rewards``), how gradients are accumulated (``update``).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.reward_update import RewardUpdate
from trivium.algorithms.rollout_step import roll_out_batch, sample_ahead
from trivium.data.batch import Batch
from trivium.errors import ConfigurationError, TrainingError
from trivium.maths.advantages import equal_groups, group_advantages, step_advantages
from trivium.maths.aggregation import weighted_sum
from trivium.maths.kl import KL_ESTIMATORS
from trivium.maths.objectives import SURROGATES, importance_ratio, truncated_importance
from trivium.maths.ragged import repeat_per_segment
from trivium.models.loading import trained_parameters
from trivium.models.oom import score_logprobs
from trivium.rollout.rollouts import Rollouts, chosen_groups, joined
from trivium.runs.startup import prepare_run
from trivium.serialization import serializable
from trivium.training.experience import (
    Experience,
    Minibatch,
    first_epoch,
    old_logprobs,
    plan_updates,
)
from trivium.training.micro_batch import MicroBatch
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.policy_metrics import (
    first_group,
    group_metrics,
    join_observed,
    old_policy_metrics,
    policy_metrics,
    update_metrics,
)
from trivium.training.protocols import Updates
from trivium.training.run_loop import Training
from trivium.training.setup import OnPolicyComponents, build_components


@serializable
@dataclass(frozen=True, kw_only=True)
class GRPOExperience(Experience):
    """Advantages, and the log-probs of sampler, π_old and π_ref, of one rollout batch."""

    sampler_logprobs_T: Tensor


def train(config: GRPOConfig) -> Path:
    """Run GRPO; returns the run's directory, with the trained policy in ``final``."""
    prepared = prepare_run("grpo", config)
    parts = build_components(
        config.model,
        config.data,
        config.rewards,
        config.evaluation,
        config.sampling,
        compared=config.beta > 0,
        asynchronous=config.asynchronous,
    )
    reward_update = RewardUpdate.of(config.reward_update, parts, seed=config.run.seed)
    updates = config.total_steps * config.epochs * config.minibatches
    trained = [(config.optimizer, trained_parameters(parts.policy.model))]
    total, prompts = config.total_steps, parts.prompts
    training = Training(prepared, total, evaluator=parts.evaluator, shared_objects=prompts)
    with training, closing(parts):
        optimizer = Optimizer(trained, updates, training.budget_spent)
        training.track_state(
            policy=parts.policy,
            optimizer=optimizer,
            reference=parts.reference,
            ahead=parts.ahead,
            reward_update=reward_update,
        )
        for iteration in training.iterations(config.steps_per_iteration):
            if iteration > 0 and training.done == iteration * config.steps_per_iteration:
                training.memoize("refresh", partial(refresh, parts, reward_update, training))
            for step in training.steps(until=(iteration + 1) * config.steps_per_iteration):
                # Stage 1: rollout and scoring.
                rollouts = training.rollouts(partial(sample, config, parts, step))
                if config.asynchronous and step % config.steps_per_iteration:
                    sample_ahead(config, parts, step * (1 + config.dynamic_sampling))
                training.stages.begin()
                # Stage 2: advantages and old log-probs, fixed from here on.
                fix = partial(prepare, config, parts, rollouts, step)
                experience = training.memoize("experience", fix)
                training.stages.lap("logprobs")
                # Stage 3: optimization.
                updates = training.updates(plan(config, experience, step))
                update(config, parts, optimizer, experience, updates)
                training.stages.lap("update")
                if reward_update is not None:
                    reward_update.collect(rollouts)
                    training.stages.lap("reward_update")
                metrics = step_metrics(config, rollouts, experience, updates)
                training.log(metrics, partial(first_group, parts, rollouts, experience))
        training.save("final", parts.policy)
        if reward_update is not None:
            training.save("reward_model", reward_update.model)
    return training.path


def refresh(
    parts: OnPolicyComponents, reward_update: RewardUpdate | None, training: Training
) -> None:
    """Between two iterations: train the reward model further, and ``π_ref ← π_θ``."""
    if reward_update is not None:
        training.event("reward_update", **reward_update.train())
    parts.reference.refresh()


def sample(config: GRPOConfig, parts: OnPolicyComponents, step: int) -> Rollouts:
    """G responses for each of the prompts of step number ``step`` (from 1), with their rewards.

    With dynamic sampling, groups of equal rewards are replaced by groups of further prompts, as
    far as ``config.dynamic_sampling`` extra batches yield them.
    """
    rounds = 1 + config.dynamic_sampling
    batches, wanted = [], config.prompts_per_step
    for extra in range(rounds):
        number = (step - 1) * rounds + extra
        batch = roll_out_batch(config, parts, number)
        if rounds == 1:
            return batch
        useful = torch.nonzero(~equal_groups(batch.totals_N, batch.sizes_G))[:, 0].tolist()
        batches.append(chosen_groups(batch, useful[:wanted]))
        wanted -= len(batches[-1].prompts)
        if wanted == 0:
            break
    kept = [batch for batch in batches if batch.prompts]
    return joined(kept) if kept else batch


def plan(config: GRPOConfig, experience: Experience, step: int) -> list[Minibatch]:
    """The optimizer steps over one rollout batch: μ epochs of minibatches.

    Where Â is 0 and there is no KL term, there is no gradient, and no pass is made to find none.
    """
    return plan_updates(
        experience,
        epochs=config.epochs,
        minibatches=config.minibatches,
        max_tokens=config.tokens_per_micro_batch,
        seed=config.run.seed,
        step=step,
        left_out=experience.without_gradient() if config.beta == 0 else (),
    )


def prepare(
    config: GRPOConfig, parts: OnPolicyComponents, rollouts: Rollouts, step: int
) -> GRPOExperience:
    """Advantages, and the log-probs of π_old and π_ref, of one rollout batch."""
    experience = GRPOExperience(
        groups=rollouts.groups,
        advantages_T=advantages(config, parts, rollouts),
        loss_mask_T=loss_mask(config, rollouts),
        sampler_logprobs_T=rollouts.sampler_logprobs_T,
    )
    steps = plan(config, experience, step)
    # A KL to the reference is exactly 0 before the first update: π_old is then scored as π_ref is.
    tolerance = 0.0 if config.beta or config.asynchronous else config.sampler_tolerance
    sampler_T = rollouts.sampler_logprobs_T
    old_T, rescored_mask_T = old_logprobs(
        experience, steps, sampler_T, parts.policy, tolerance=tolerance
    )
    ref_T = None
    if config.beta > 0:
        micro_batches = first_epoch(steps, len(rollouts.flat))
        ref_T = score_logprobs(parts.reference, experience, micro_batches)
    return replace(
        experience, old_logprobs_T=old_T, rescored_mask_T=rescored_mask_T, ref_logprobs_T=ref_T
    )


def loss_mask(config: GRPOConfig, rollouts: Rollouts) -> Tensor:
    """Which response tokens are learned from, ``[T]``."""
    if not config.mask_truncated:
        return torch.ones(int(rollouts.lengths_N.sum()), dtype=torch.bool)
    if bool(rollouts.truncated_N.all()):
        raise TrainingError(
            f"every response was cut off at {config.sampling.max_tokens} tokens and mask_truncated "
            "leaves none of them: raise sampling.max_tokens"
        )
    return repeat_per_segment(~rollouts.truncated_N, rollouts.lengths_N)


def advantages(config: GRPOConfig, parts: OnPolicyComponents, rollouts: Rollouts) -> Tensor:
    """``Â_{i,t}`` of every response token, ``[T]``."""
    if config.supervision == "outcome":
        per_response_N = group_advantages(
            rollouts.totals_N, rollouts.sizes_G, baseline=config.baseline, scale=config.scale
        )
        return repeat_per_segment(per_response_N, rollouts.lengths_N)
    if rollouts.scores.steps is None:
        raise ConfigurationError(
            "supervision is process, but no reward scores steps: add one that returns "
            "((start, end), number) pairs, or set supervision: outcome"
        )
    steps = rollouts.steps_with_outcomes(parts.policy.tokenizer)
    return step_advantages(
        steps.rewards_S,
        steps.ends_S,
        steps.counts_N,
        rollouts.lengths_N,
        rollouts.sizes_G,
        scale=config.scale,
    )


def update(
    config: GRPOConfig,
    parts: OnPolicyComponents,
    optimizer: Optimizer,
    experience: GRPOExperience,
    steps: Updates[Minibatch],
) -> list[StepResult]:
    """μ epochs of minibatches over one rollout batch."""
    for minibatch in steps:
        if not experience.has_trained_tokens(minibatch):
            continue  # Every response of the minibatch was cut off and dropped.
        works = experience.for_update(
            minibatch, steps, config.aggregation, config.sampling.max_tokens
        )
        of_part = partial(loss, config, parts)
        steps.results.append(optimizer.step([MicroBatch(part, of_part) for part in works]))
    return steps.results


def loss(
    config: GRPOConfig, parts: OnPolicyComponents, part: GRPOExperience
) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ_t w_t { −min(ρ Â, clip(ρ) Â) + β KL }`` of one micro-batch."""
    scores = parts.policy.score(Batch.of(part.groups))
    logprobs_T = scores.logprobs_T
    device = logprobs_T.device
    old_T = part.old_logprobs_or_current(logprobs_T)
    advantages_T = part.advantages_T.to(device)
    loss_T = SURROGATES[config.surrogate](
        logprobs_T,
        old_T,
        advantages_T,
        part.lengths_N.to(device),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    observed = {
        "logprobs_T": logprobs_T.detach(),
        "old_logprobs_T": old_T,
        "entropy_T": scores.entropy_T.detach(),
        "advantages_T": advantages_T,
    }
    if part.ref_logprobs_T is not None:
        observed["ref_logprobs_T"] = part.ref_logprobs_T
        kl_T = KL_ESTIMATORS[config.kl](logprobs_T, part.ref_logprobs_T)
        if config.kl_correction:
            kl_T = importance_ratio(logprobs_T, old_T) * kl_T
        loss_T = loss_T + config.beta * kl_T
    if config.importance_sampling_cap is not None:
        sampler_T = part.sampler_logprobs_T.to(device)
        loss_T = loss_T * truncated_importance(
            old_T, sampler_T, limit=config.importance_sampling_cap
        )
    return weighted_sum(loss_T, part.weights(loss_T)), observed


def step_metrics(
    config: GRPOConfig,
    rollouts: Rollouts,
    experience: GRPOExperience,
    updates: Updates[Minibatch],
) -> dict[str, float]:
    """Everything worth watching of one sampling step."""
    observed = join_observed(updates.results)
    metrics = rollouts.metrics() | update_metrics(updates.results)
    metrics |= policy_metrics(observed, clip_low=config.clip_low, clip_high=config.clip_high)
    metrics |= group_metrics(rollouts, updates)
    return metrics | old_policy_metrics(experience, rollouts, updates)
