"""Proximal Policy Optimization for language models (Schulman et al. 2017; Ouyang et al. 2022).

    r_t      = 1[t = T]·score − β·(log π_old(o_t) − log π_ref(o_t))
    δ_t      = r_t + γ V(s_{t+1}) − V(s_t),     Â_t = Σ_k (γλ)^k δ_{t+k}
    Target_t = V_old(s_t) + Â_t
    J(θ)     = E 1/|o| Σ_t c min(ρ Â, clip(ρ, 1−ε, 1+ε) Â),   critic: (V − Target)²
    c        = 1, or min(π_old/μ, C) if the sampler μ is not π_old but, say, one step behind it

Three stages per step, all visible in ``train``: rollout and scoring; advantages and return targets,
computed once and then fixed; epochs of minibatches over the fixed batch. Not in this file:
sampling (``rollout``), rewards (``rewards``), gradient accumulation (``training.micro_batch``).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trivium.algorithms.actor_critic import final_values, make_critic, old_scores, parameter_sets
from trivium.algorithms.kl_coefficient import KLCoefficient
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.ppo_equations import Objective, Returns
from trivium.algorithms.pretraining import PretrainingMix
from trivium.algorithms.reward_update import RewardUpdate
from trivium.algorithms.rollout_step import RolloutBatches
from trivium.algorithms.sampler_correction import correct_for_sampler, importance_metrics
from trivium.data.batch import Batch, Grouped
from trivium.data.oom import score_logprobs
from trivium.maths.advantages import return_targets, whiten
from trivium.maths.aggregation import weighted_sum
from trivium.maths.objectives import clipped_surrogate, value_loss
from trivium.models.critic import ActorCriticScores, Critic, SeparateCritic
from trivium.models.policy import Policy, TokenScores
from trivium.models.reference import Reference
from trivium.rollout.rollouts import Rollouts
from trivium.serialization import serializable
from trivium.training.experience import (
    Experience,
    Minibatch,
    UpdateSchedule,
    WeightedGroups,
    first_epoch_micro_batches,
)
from trivium.training.micro_batch import Loss, LossOutput, MicroBatch
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.policy_metrics import (
    clip_masks,
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
from trivium.training.startup import prepare_run


@serializable
@dataclass(frozen=True, kw_only=True)
class PPOExperience(Experience):
    """Advantages, return targets, and the scores of π_old, π_ref and V_old of one rollout batch."""

    sampler_logprobs_T: Tensor
    old_values_T: Tensor
    targets_T: Tensor


def train(config: PPOConfig) -> Path:
    """Run PPO; return the run's directory: the actor in ``final``, the critic in ``critic``."""
    prepared = prepare_run("ppo", config)
    objective, returns = Objective.of(config), Returns.of(config)
    components = build_components(
        config.model,
        config.data,
        config.rewards,
        config.evaluation,
        config.sampling,
        with_reference=config.beta > 0,
        asynchronous=config.asynchronous,
        ema_decay=config.ema_decay,
    )
    critic = make_critic(config.critic, config.model, components.policy)
    mix = PretrainingMix.of(config.pretraining, components.policy, seed=config.run.seed)
    reward_update = RewardUpdate.of(config.reward_update, components, seed=config.run.seed)
    beta = KLCoefficient(config.beta, config.adaptive_kl)
    size = config.prompts_per_step, config.responses_per_prompt
    batches = RolloutBatches(components, *size, config.sampling, config.run.seed)
    learner = Learner.of(config, objective, returns, components, critic)
    trained = parameter_sets(config, learner.policy, critic)
    training = Training(prepared, config.steps, **components.for_training)
    ema = components.ema
    with training, closing(components):
        optimizer = Optimizer(trained, config.optimizer_steps, training.budget_spent, ema)
        training.track_state(
            **components.tracked,
            optimizer=optimizer,
            critic=critic,
            beta=beta,
            mix=mix,
            reward_update=reward_update,
        )
        for step in training.steps():
            # Stage 1: rollout and scoring.
            rollouts = training.rollouts(partial(batches.roll_out, step - 1))
            if config.asynchronous and step < config.steps:
                batches.sample_ahead(step)
            training.stages.begin()
            # Stage 2: advantages and return targets, fixed from here on.
            minibatches = learner.schedule.plan(Grouped(rollouts.groups), step)
            prepare = partial(learner.prepare, rollouts, minibatches, beta.value)
            experience = training.memoize("experience", prepare)
            training.stages.lap("logprobs")
            # Stage 3: optimization.
            updates = training.updates(minibatches)
            learner.update(optimizer, experience, updates, step > config.critic.warmup_steps, mix)
            training.stages.lap("update")
            if reward_update is not None:
                reward_update.collect(rollouts)
                if reward_update.due(step):
                    training.event("reward_update", **reward_update.train())
                training.stages.lap("reward_update")
            metrics = step_metrics(rollouts, experience, updates, beta.value)
            training.log(metrics, partial(first_group, learner.policy, rollouts, experience))
            beta.adapt(metrics, len(rollouts.flat))
        training.save(final=learner.policy, ema=ema, critic=critic, reward_model=reward_update)
    return training.path


@dataclass(frozen=True)
class Learner:
    """Stages 2 and 3 of a step.

    Attributes:
        policy, critic, reference: the models; the reference is frozen.
        objective, returns: functions and constants of the equations.
        schedule, sampler_tolerance: see ``training.experience``.
        target_kl: KL(π_old‖π) per token at which a batch's updates end; None: never.
    """

    policy: Policy
    critic: Critic
    reference: Reference
    objective: Objective
    returns: Returns
    schedule: UpdateSchedule
    sampler_tolerance: float
    target_kl: float | None

    @classmethod
    def of(
        cls,
        config: PPOConfig,
        objective: Objective,
        returns: Returns,
        components: OnPolicyComponents,
        critic: Critic,
    ) -> Learner:
        return cls(
            policy=components.policy,
            critic=critic,
            reference=components.reference,
            objective=objective,
            returns=returns,
            schedule=UpdateSchedule(
                config.epochs, config.minibatches, config.tokens_per_micro_batch, config.run.seed
            ),
            sampler_tolerance=0.0 if config.asynchronous else config.sampler_tolerance,
            target_kl=config.target_kl,
        )

    def prepare(
        self, rollouts: Rollouts, minibatches: list[Minibatch], beta: float
    ) -> PPOExperience:
        """Compute advantages and return targets by GAE; the rewards include the KL. No gradient."""
        loss_mask_T = torch.ones(int(rollouts.lengths_N.sum()), dtype=torch.bool)
        data = WeightedGroups(rollouts.groups, loss_mask_T=loss_mask_T)
        sampler_T = rollouts.sampler_logprobs_T
        # Only if π_old is scored like π_ref is the KL exactly 0 before the first update.
        tolerance = 0.0 if beta else self.sampler_tolerance
        old = old_scores(
            self.policy, self.critic, data, minibatches, sampler_T, tolerance=tolerance
        )
        ref_T, kl_T = None, torch.zeros_like(old.logprobs_T)
        if beta > 0:
            micro_batches = first_epoch_micro_batches(minibatches, len(rollouts.flat))
            ref_T = score_logprobs(self.reference, data, micro_batches)
            kl_T = self.returns.kl(old.logprobs_T, ref_T)
        bootstrap_N = None
        if self.returns.bootstrap_truncated:
            bootstrap_N = final_values(
                self.policy, self.critic, rollouts, old.values_T, self.schedule.max_tokens
            )
        advantages_T = self.returns.advantages(
            rollouts, self.policy.tokenizer, kl_T, old.values_T, beta, bootstrap_N
        )
        targets_T = return_targets(old.values_T, advantages_T)
        return PPOExperience(
            groups=rollouts.groups,
            advantages_T=whiten(advantages_T) if self.returns.whiten_advantages else advantages_T,
            loss_mask_T=loss_mask_T,
            sampler_logprobs_T=sampler_T,
            old_logprobs_T=old.logprobs_T,
            rescored_mask_T=old.rescored_mask_T,
            ref_logprobs_T=ref_T,
            old_values_T=old.values_T,
            targets_T=targets_T,
        )

    def update(
        self,
        optimizer: Optimizer,
        experience: PPOExperience,
        updates: Updates[Minibatch],
        with_actor: bool,
        mix: PretrainingMix | None,
    ) -> list[StepResult]:
        """Run epochs of minibatches; stop early once π has moved ``target_kl`` from π_old."""
        aggregation, max_length = self.objective.aggregation, self.objective.max_length
        for minibatch in updates:
            data = experience.next_micro_batches(minibatch, updates, aggregation, max_length)
            micro_batches = [MicroBatch(x, loss) for x in data for loss in self.losses(with_actor)]
            if mix is not None and with_actor:
                micro_batches += mix.next_step(self.schedule.max_tokens)
            updates.results.append(optimizer.step(micro_batches))
            observed = updates.results[-1].observed
            kl = float((observed["old_logprobs_T"] - observed["logprobs_T"]).mean())
            if self.target_kl is not None and kl > self.target_kl:
                break
        return updates.results

    def losses(self, with_actor: bool) -> list[Loss]:
        """Return a micro-batch's losses; separate models take turns, so only one graph exists."""
        if with_actor and isinstance(self.critic, SeparateCritic):
            return [self.actor_loss, self.critic_loss]
        return [partial(self.joint_loss, with_actor=with_actor)]

    def joint_loss(self, micro_batch: PPOExperience, with_actor: bool) -> LossOutput:
        """``Σ_t w_t {−c min(ρ Â, clip(ρ) Â) − c_H H + c_V (V − Target)²}`` of one micro-batch."""
        scores = self.critic.score(self.policy, Batch.of(micro_batch.groups))
        actor, observed = surrogate_loss(self.objective, scores, micro_batch)
        critic, critic_observed = regression_loss(self.objective, scores.values_T, micro_batch)
        return actor + critic if with_actor else critic, observed | critic_observed

    def actor_loss(self, micro_batch: PPOExperience) -> LossOutput:
        """Score one micro-batch with the actor; return its ``surrogate_loss``."""
        scores = self.policy.score(Batch.of(micro_batch.groups))
        return surrogate_loss(self.objective, scores, micro_batch)

    def critic_loss(self, micro_batch: PPOExperience) -> LossOutput:
        """Score one micro-batch with the critic; return its ``regression_loss``."""
        assert isinstance(self.critic, SeparateCritic), "a shared critic is scored with the actor"
        values_T = self.critic.values(Batch.of(micro_batch.groups))
        return regression_loss(self.objective, values_T, micro_batch)


def surrogate_loss(
    objective: Objective, scores: TokenScores | ActorCriticScores, micro_batch: PPOExperience
) -> LossOutput:
    """``Σ_t w_t {−c min(ρ Â, clip(ρ) Â) − c_H H}``, and the observations for metrics."""
    weights_T = micro_batch.weights(scores.logprobs_T)
    old_T = micro_batch.old_logprobs_or_current(scores.logprobs_T)
    surrogate = clipped_surrogate(
        scores.logprobs_T,
        old_T,
        micro_batch.advantages_T,
        micro_batch.lengths_N,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )
    loss_T, importance = correct_for_sampler(
        objective.correction, surrogate.loss_T, old_T, micro_batch
    )
    entropy_bonus_T = objective.entropy_coef * scores.entropy_T
    return weighted_sum(loss_T - entropy_bonus_T, weights_T), {
        "logprobs_T": scores.logprobs_T.detach(),
        "old_logprobs_T": old_T,
        "entropy_T": scores.entropy_T.detach(),
        "advantages_T": micro_batch.advantages_T,
        **clip_masks(surrogate),
        **importance,
    }


def regression_loss(
    objective: Objective, values_T: Tensor, micro_batch: PPOExperience
) -> LossOutput:
    """``Σ_t w_t c_V (V − Target)²``; the values are clipped around V_old if so configured."""
    error_T = value_loss(
        values_T,
        micro_batch.targets_T,
        old_values_T=micro_batch.old_values_T,
        clip=objective.value_clip,
    )
    total = objective.value_coef * weighted_sum(error_T, micro_batch.weights(values_T))
    return total, {"value_loss_T": error_T.detach()}


def step_metrics(
    rollouts: Rollouts, experience: PPOExperience, updates: Updates[Minibatch], beta: float
) -> dict[str, float]:
    """Return the metrics of one step."""
    observed = join_observed(updates.results)
    metrics = rollouts.metrics() | update_metrics(updates.results) | {"kl/beta": beta}
    metrics |= policy_metrics(observed) | importance_metrics(observed)
    metrics |= value_metrics(experience.old_values_T, experience.targets_T)
    metrics["value/loss"] = float(observed["value_loss_T"].mean())
    if "pretraining_nll_T" in observed:
        metrics["pretraining/nll"] = float(observed["pretraining_nll_T"].mean())
    return metrics | old_policy_metrics(experience, rollouts, updates)
