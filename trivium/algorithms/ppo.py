"""Proximal Policy Optimization for language models (Schulman et al. 2017; Ouyang et al. 2022).

    r_t      = 1[t = T]·score − β·(log π_old(o_t) − log π_ref(o_t))
    δ_t      = r_t + γ V(s_{t+1}) − V(s_t),     Â_t = Σ_k (γλ)^k δ_{t+k}
    Target_t = V_old(s_t) + Â_t
    J(θ)     = E 1/|o| Σ_t w min(ρ Â, clip(ρ, 1−ε, 1+ε) Â),   critic: (V − Target)²
    w        = 1, or min(π_old/μ, C) where the sampler μ is not π_old, as one step behind it

Three stages per step, all below in ``train``: rollout and scoring; advantages and return targets,
computed once and then fixed; epochs of minibatches over the fixed batch. Left out: how tokens are
drawn (``rollout``), what a reward is (``rewards``), how gradients are accumulated (``update``).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trivium.algorithms.actor_critic import final_values, make_critic, old_scores
from trivium.algorithms.kl_coefficient import KLCoefficient
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.pretraining import PretrainingMix
from trivium.algorithms.reward_update import RewardUpdate
from trivium.algorithms.rollout_step import roll_out_batch, sample_ahead
from trivium.data.batch import Batch, Grouped
from trivium.maths.advantages import gae, return_targets, whiten
from trivium.maths.aggregation import weighted_sum
from trivium.maths.kl import KL_ESTIMATORS, kl_shaped_rewards
from trivium.maths.objectives import clipped_surrogate, truncated_importance, value_loss
from trivium.models.critic import ActorCriticScores, Critic, SeparateCritic
from trivium.models.loading import trained_parameters
from trivium.models.oom import score_logprobs
from trivium.models.policy import TokenScores
from trivium.rollout.rollouts import Rollouts
from trivium.runs.startup import prepare_run
from trivium.serialization import serializable
from trivium.training.experience import (
    Experience,
    Minibatch,
    WeightedGroups,
    first_epoch,
    plan_updates,
)
from trivium.training.micro_batch import Loss, LossOutput, MicroBatch
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.policy_metrics import (
    first_group,
    join_observed,
    old_policy_metrics,
    policy_metrics,
    update_metrics,
    value_metrics,
)
from trivium.training.protocols import Updates
from trivium.training.run_loop import Training
from trivium.training.setup import OnPolicyComponents, build_components


@serializable
@dataclass(frozen=True, kw_only=True)
class PPOExperience(Experience):
    """Advantages, return targets, and what π_old, π_ref and V_old said, of one rollout batch."""

    sampler_logprobs_T: Tensor
    old_values_T: Tensor
    targets_T: Tensor


def train(config: PPOConfig) -> Path:
    """Run PPO; returns the run's directory: the actor in ``final``, the critic in ``critic``."""
    prepared = prepare_run("ppo", config)
    parts = build_components(
        config.model,
        config.data,
        config.rewards,
        config.evaluation,
        config.sampling,
        compared=config.beta > 0,
        asynchronous=config.asynchronous,
    )
    critic = make_critic(config.critic, config.model, parts.policy)
    mix = None
    if config.pretraining is not None:
        mix = PretrainingMix(config.pretraining, parts.policy, seed=config.run.seed)
    reward_update = RewardUpdate.of(config.reward_update, parts, seed=config.run.seed)
    beta = KLCoefficient(config.beta, config.adaptive_kl)
    total, prompts = config.steps, parts.prompts
    training = Training(prepared, total, evaluator=parts.evaluator, shared_objects=prompts)
    with training, closing(parts):
        optimizer = make_optimizer(config, parts, critic, training)
        training.track_state(
            policy=parts.policy,
            optimizer=optimizer,
            critic=critic,
            ahead=parts.ahead,
            beta=beta,
            mix=mix,
            reward_update=reward_update,
        )
        for step in training.steps():
            # Stage 1: rollout and scoring.
            rollouts = training.rollouts(partial(sample, config, parts, step))
            if config.asynchronous and step < config.steps:
                sample_ahead(config, parts, step)
            training.stages.begin()
            # Stage 2: advantages and return targets, fixed from here on.
            steps = plan(config, rollouts, step)
            fix = partial(prepare, config, parts, critic, rollouts, steps, beta.value)
            experience = training.memoize("experience", fix)
            training.stages.lap("logprobs")
            # Stage 3: optimization.
            actor = step > config.critic.warmup_steps
            updates = training.updates(steps)
            update(config, parts, critic, optimizer, experience, updates, actor, mix)
            training.stages.lap("update")
            if reward_update is not None:
                reward_update.collect(rollouts)
                if reward_update.due(step):
                    training.event("reward_update", **reward_update.train())
                training.stages.lap("reward_update")
            metrics = step_metrics(config, rollouts, experience, updates) | {"kl/beta": beta.value}
            training.log(metrics, partial(first_group, parts, rollouts, experience))
            beta.adapt(metrics, len(rollouts.flat))
        training.save("final", parts.policy)
        training.save("critic", critic)
        if reward_update is not None:
            training.save("reward_model", reward_update.model)
    return training.path


def make_optimizer(
    config: PPOConfig, parts: OnPolicyComponents, critic: Critic, training: Training
) -> Optimizer:
    """One optimizer; actor and critic keep their own rates, decay and clipping."""
    actor = (config.optimizer, trained_parameters(parts.policy.model))
    updates = config.steps * config.epochs * config.minibatches
    sets = [actor, (config.critic.optimizer, critic.parameters())]
    return Optimizer(sets, updates, training.budget_spent)


def sample(config: PPOConfig, parts: OnPolicyComponents, step: int) -> Rollouts:
    """Responses to the step's prompts, with their rewards."""
    return roll_out_batch(config, parts, step - 1)


def plan(config: PPOConfig, rollouts: Rollouts, step: int) -> list[Minibatch]:
    """The optimizer steps over one rollout batch: epochs of minibatches."""
    return plan_updates(
        Grouped(rollouts.groups),
        epochs=config.epochs,
        minibatches=config.minibatches,
        max_tokens=config.tokens_per_micro_batch,
        seed=config.run.seed,
        step=step,
    )


def prepare(
    config: PPOConfig,
    parts: OnPolicyComponents,
    critic: Critic,
    rollouts: Rollouts,
    steps: list[Minibatch],
    beta: float,
) -> PPOExperience:
    """Rewards with KL → GAE → advantages and return targets, all detached."""
    loss_mask_T = torch.ones(int(rollouts.lengths_N.sum()), dtype=torch.bool)
    data = WeightedGroups(rollouts.groups, loss_mask_T=loss_mask_T)
    # A KL in the reward is exactly 0 before the first update: π_old is then scored as π_ref is.
    tolerance = 0.0 if beta or config.asynchronous else config.sampler_tolerance
    sampler_T = rollouts.sampler_logprobs_T
    old = old_scores(parts.policy, critic, data, steps, sampler_T, tolerance=tolerance)
    old_T, values_T = old.logprobs_T, old.values_T
    ref_T, kl_T = None, torch.zeros_like(old_T)
    if beta > 0:
        micro_batches = first_epoch(steps, len(rollouts.flat))
        ref_T = score_logprobs(parts.reference, data, micro_batches)
        kl_T = KL_ESTIMATORS[config.kl](old_T, ref_T)
    lengths_N = rollouts.lengths_N.to(old_T.device)
    step_rewards_T = rollouts.step_rewards(parts.policy.tokenizer, old_T)
    rewards_T = kl_shaped_rewards(
        rollouts.outcomes_N.to(old_T), kl_T, lengths_N, beta, step_rewards_T
    )
    final_N = None
    if config.bootstrap_truncated:
        most = config.tokens_per_micro_batch
        final_N = final_values(parts.policy, critic, rollouts, values_T, max_tokens=most)
    advantages_T = gae(
        rewards_T,
        values_T,
        lengths_N,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        bootstrap_N=final_N,
    )
    targets_T = return_targets(values_T, advantages_T)
    return PPOExperience(
        groups=rollouts.groups,
        advantages_T=whiten(advantages_T) if config.whiten_advantages else advantages_T,
        loss_mask_T=loss_mask_T,
        sampler_logprobs_T=sampler_T,
        old_logprobs_T=old_T,
        rescored_mask_T=old.rescored_mask_T,
        ref_logprobs_T=ref_T,
        old_values_T=values_T,
        targets_T=targets_T,
    )


def update(
    config: PPOConfig,
    parts: OnPolicyComponents,
    critic: Critic,
    optimizer: Optimizer,
    experience: PPOExperience,
    steps: Updates[Minibatch],
    actor: bool,
    mix: PretrainingMix | None,
) -> list[StepResult]:
    """Epochs of minibatches; ends early once π has moved ``target_kl`` from π_old."""
    for minibatch in steps:
        works = experience.for_update(
            minibatch, steps, config.aggregation, config.sampling.max_tokens
        )
        learned = losses(config, parts, critic, actor)
        work = [MicroBatch(part, of_part) for part in works for of_part in learned]
        if mix is not None and actor:
            work += mix.next_step(config.tokens_per_micro_batch)
        steps.results.append(optimizer.step(work))
        seen = steps.results[-1].observed
        moved = float((seen["old_logprobs_T"] - seen["logprobs_T"]).mean())
        if config.target_kl is not None and moved > config.target_kl:
            break
    return steps.results


def losses(config: PPOConfig, parts: OnPolicyComponents, critic: Critic, actor: bool) -> list[Loss]:
    """What is learned of a micro-batch: actor and critic, where they share no weight, one after the
    other, so that one graph is in memory at a time."""
    if not (actor and isinstance(critic, SeparateCritic)):
        return [partial(loss, config, parts, critic, actor=actor)]

    def of_actor(part: PPOExperience) -> LossOutput:
        return actor_loss(config, parts.policy.score(Batch.of(part.groups)), part)

    def of_critic(part: PPOExperience) -> LossOutput:
        return critic_loss(config, critic.values(Batch.of(part.groups)), part)

    return [of_actor, of_critic]


def loss(
    config: PPOConfig, parts: OnPolicyComponents, critic: Critic, part: PPOExperience, actor: bool
) -> LossOutput:
    """``Σ_t w_t {−min(ρ Â, clip(ρ) Â) − c_H H + c_V (V − Target)²}`` of one micro-batch."""
    scores = critic.score(parts.policy, Batch.of(part.groups))
    of_actor, seen = actor_loss(config, scores, part)
    of_critic, seen_of_critic = critic_loss(config, scores.values_T, part)
    return of_actor + of_critic if actor else of_critic, seen | seen_of_critic


def actor_loss(
    config: PPOConfig, scores: TokenScores | ActorCriticScores, part: PPOExperience
) -> LossOutput:
    """``Σ_t w_t {−min(ρ Â, clip(ρ) Â) − c_H H}``."""
    weights_T, old_T = (
        part.weights(scores.logprobs_T),
        part.old_logprobs_or_current(scores.logprobs_T),
    )
    surrogate_T = clipped_surrogate(
        scores.logprobs_T,
        old_T,
        part.advantages_T,
        part.lengths_N,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    if config.importance_sampling_cap is not None:
        sampler_T = part.sampler_logprobs_T.to(old_T)
        weight_T = truncated_importance(old_T, sampler_T, limit=config.importance_sampling_cap)
        surrogate_T = weight_T * surrogate_T
    bonus_T = config.entropy_coef * scores.entropy_T
    return weighted_sum(surrogate_T - bonus_T, weights_T), {
        "logprobs_T": scores.logprobs_T.detach(),
        "old_logprobs_T": old_T,
        "entropy_T": scores.entropy_T.detach(),
        "advantages_T": part.advantages_T,
    }


def critic_loss(config: PPOConfig, values_T: Tensor, part: PPOExperience) -> LossOutput:
    """``Σ_t w_t c_V (V − Target)²``, the values clipped where the critic is."""
    error_T = value_loss(
        values_T, part.targets_T, old_values_T=part.old_values_T, clip=config.critic.clip
    )
    total = config.critic.coefficient * weighted_sum(error_T, part.weights(values_T))
    return total, {"value_loss_T": error_T.detach()}


def step_metrics(
    config: PPOConfig, rollouts: Rollouts, experience: PPOExperience, updates: Updates[Minibatch]
) -> dict[str, float]:
    """Everything worth watching of one step."""
    observed = join_observed(updates.results)
    metrics = rollouts.metrics() | update_metrics(updates.results)
    metrics |= policy_metrics(observed, clip_low=config.clip_low, clip_high=config.clip_high)
    metrics |= value_metrics(experience.old_values_T, experience.targets_T)
    metrics["value/loss"] = float(observed["value_loss_T"].mean())
    if "pretraining_nll_T" in observed:
        metrics["pretraining/nll"] = float(observed["pretraining_nll_T"].mean())
    return metrics | old_policy_metrics(experience, rollouts, updates)
