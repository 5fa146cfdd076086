"""Group Relative Policy Optimization (Shao et al. 2024): rewards compared within a group.

    J(θ) = E 1/G Σ_i 1/|o_i| Σ_t c { min(ρ Â, clip(ρ, 1−ε, 1+ε) Â) − β KL[π_θ‖π_ref] }
    c    = 1, or min(π_old/μ, C) if the sampler μ is not π_old but, say, one step behind it

Three nested loops, all visible in ``train``: iterations (the reference is refreshed, and optionally
the reward model is trained further), sampling steps (G responses per prompt, rewards, advantages),
and updates (epochs of minibatches over the fixed batch). Not in this file: sampling (``rollout``),
rewards (``rewards``), gradient accumulation (``training.micro_batch``).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.reward_update import RewardUpdate
from trivium.algorithms.rollout_step import RolloutBatches
from trivium.algorithms.sampler_correction import (
    SamplerCorrection,
    correct_for_sampler,
    importance_metrics,
)
from trivium.algorithms.supervision import Supervision, loss_mask
from trivium.data.batch import Batch
from trivium.data.oom import score_logprobs
from trivium.hf.loading import trained_parameters
from trivium.maths.aggregation import Aggregation, weighted_sum
from trivium.maths.kl import KLEstimator
from trivium.maths.objectives import Surrogate, importance_ratio
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rollout.rollouts import Rollouts
from trivium.serialization import serializable
from trivium.training.experience import (
    Experience,
    Minibatch,
    UpdateSchedule,
    first_epoch_micro_batches,
    old_logprobs,
)
from trivium.training.micro_batch import LossOutput, MicroBatch
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.options import (
    AGGREGATION,
    KL_ESTIMATOR,
    SURROGATE,
    load_option,
)
from trivium.training.policy_metrics import (
    clip_masks,
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
from trivium.training.startup import prepare_run


@serializable
@dataclass(frozen=True, kw_only=True)
class GRPOExperience(Experience):
    """Advantages, and the log-probs of sampler, π_old and π_ref, of one rollout batch."""

    sampler_logprobs_T: Tensor


@dataclass(frozen=True)
class Objective:
    """Functions and constants of J(θ)."""

    surrogate: Surrogate
    clip_low: float
    clip_high: float
    beta: float
    kl: KLEstimator
    kl_correction: bool
    correction: SamplerCorrection | None
    aggregation: Aggregation
    max_length: int

    @classmethod
    def of(cls, config: GRPOConfig) -> Objective:
        """Return the objective of a configuration; a user's own functions are checked here."""
        cap = config.importance_sampling_cap
        return cls(
            surrogate=load_option(SURROGATE, config.surrogate),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            beta=config.beta,
            kl=load_option(KL_ESTIMATOR, config.kl),
            kl_correction=config.kl_correction,
            correction=SamplerCorrection.of(config.importance_sampling, cap),
            aggregation=load_option(AGGREGATION, config.aggregation),
            max_length=config.sampling.max_tokens,
        )


def train(config: GRPOConfig) -> Path:
    """Run GRPO; return the run's directory, with the trained policy in ``final``."""
    prepared = prepare_run("grpo", config)
    objective, supervision = Objective.of(config), Supervision.of(config)
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
    per_iteration, extra = config.steps_per_iteration, config.dynamic_sampling
    reward_update = RewardUpdate.of(config.reward_update, components, seed=config.run.seed)
    size = config.prompts_per_step, config.responses_per_prompt
    batches = RolloutBatches(
        components, *size, config.sampling, config.run.seed, supervision.equal_groups
    )
    learner = Learner.of(config, objective, supervision, components)
    trained = [(config.optimizer, trained_parameters(learner.policy.model))]
    training = Training(prepared, config.total_steps, **components.for_training)
    ema = components.ema
    with training, closing(components):
        optimizer = Optimizer(trained, config.optimizer_steps, training.budget_spent, ema)
        training.track_state(**components.tracked, optimizer=optimizer, reward_update=reward_update)
        for iteration in training.iterations(per_iteration):
            if iteration > 0 and training.done == iteration * per_iteration:
                training.memoize("refresh", partial(refresh, components, reward_update, training))
            for step in training.steps(until=(iteration + 1) * per_iteration):
                # Stage 1: rollout and scoring.
                rollouts = training.rollouts(partial(batches.of_step, step, extra))
                if config.asynchronous and step % per_iteration:
                    batches.sample_ahead(step * (1 + extra))
                training.stages.begin()
                # Stage 2: advantages and old log-probs, fixed from here on.
                experience = training.memoize(
                    "experience", partial(learner.prepare, rollouts, step)
                )
                training.stages.lap("logprobs")
                # Stage 3: optimization.
                updates = training.updates(learner.plan(experience, step))
                learner.update(optimizer, experience, updates)
                training.stages.lap("update")
                if reward_update is not None:
                    reward_update.collect(rollouts)
                    training.stages.lap("reward_update")
                equal_G = supervision.equal_groups(rollouts)
                metrics = step_metrics(rollouts, experience, updates, equal_G)
                training.log(metrics, partial(first_group, learner.policy, rollouts, experience))
        training.save(final=learner.policy, ema=ema, reward_model=reward_update)
    return training.path


def refresh(
    components: OnPolicyComponents, reward_update: RewardUpdate | None, training: Training
) -> None:
    """Between two iterations: train the reward model further, and ``π_ref ← π_θ``."""
    if reward_update is not None:
        training.event("reward_update", **reward_update.train())
    components.reference.refresh()


@dataclass(frozen=True)
class Learner:
    """Stages 2 and 3 of a step.

    Attributes:
        policy: the policy that is trained.
        reference: the reference; None without a KL term.
        objective: J(θ).
        supervision: how rewards become advantages.
        schedule: epochs and minibatches over one rollout batch.
        mask_truncated: whether truncated responses are left out of the loss.
        sampler_tolerance: see ``experience.old_logprobs``.
    """

    policy: Policy
    reference: Reference | None
    objective: Objective
    supervision: Supervision
    schedule: UpdateSchedule
    mask_truncated: bool
    sampler_tolerance: float

    @classmethod
    def of(
        cls,
        config: GRPOConfig,
        objective: Objective,
        supervision: Supervision,
        components: OnPolicyComponents,
    ) -> Learner:
        # Only if π_old is scored like π_ref is the KL exactly 0 before the first update.
        exact = config.beta > 0 or config.asynchronous
        return cls(
            policy=components.policy,
            reference=components.reference if config.beta > 0 else None,
            objective=objective,
            supervision=supervision,
            schedule=UpdateSchedule(
                config.epochs,
                config.minibatches,
                config.tokens_per_micro_batch,
                config.run.seed,
            ),
            mask_truncated=config.mask_truncated,
            sampler_tolerance=0.0 if exact else config.sampler_tolerance,
        )

    def plan(self, experience: GRPOExperience, step: int) -> list[Minibatch]:
        """Plan the optimizer steps over one rollout batch: epochs of minibatches.

        Without a KL term, responses with Â = 0 have no gradient; their forward pass is skipped.
        """
        skipped = experience.without_gradient() if self.reference is None else ()
        return self.schedule.plan(experience, step, without_gradient=skipped)

    def prepare(self, rollouts: Rollouts, step: int) -> GRPOExperience:
        """Compute advantages, and the log-probs of π_old and π_ref, of one rollout batch."""
        experience = GRPOExperience(
            groups=rollouts.groups,
            advantages_T=self.supervision.advantages(rollouts, self.policy.tokenizer),
            loss_mask_T=loss_mask(rollouts, self.mask_truncated),
            sampler_logprobs_T=rollouts.sampler_logprobs_T,
        )
        minibatches = self.plan(experience, step)
        old_T, rescored_T = old_logprobs(
            experience,
            minibatches,
            rollouts.sampler_logprobs_T,
            self.policy,
            tolerance=self.sampler_tolerance,
        )
        ref_T = None
        if self.reference is not None:
            micro_batches = first_epoch_micro_batches(minibatches, len(rollouts.flat))
            ref_T = score_logprobs(self.reference, experience, micro_batches)
        return replace(
            experience, old_logprobs_T=old_T, rescored_mask_T=rescored_T, ref_logprobs_T=ref_T
        )

    def update(
        self, optimizer: Optimizer, experience: GRPOExperience, updates: Updates[Minibatch]
    ) -> list[StepResult]:
        """Run epochs of minibatches over one rollout batch."""
        aggregation, max_length = self.objective.aggregation, self.objective.max_length
        for minibatch in updates:
            if not experience.has_trained_tokens(minibatch):
                continue  # Every response of the minibatch was truncated and masked.
            data = experience.next_micro_batches(minibatch, updates, aggregation, max_length)
            updates.results.append(optimizer.step([MicroBatch(x, self.loss) for x in data]))
        return updates.results

    def loss(self, micro_batch: GRPOExperience) -> LossOutput:
        """``Σ_t w_t c { −min(ρ Â, clip(ρ) Â) + β KL }`` of one micro-batch."""
        scores = self.policy.score(Batch.of(micro_batch.groups))
        logprobs_T = scores.logprobs_T
        old_T = micro_batch.old_logprobs_or_current(logprobs_T)
        loss_T, observed = token_losses(self.objective, logprobs_T, old_T, micro_batch)
        observed["entropy_T"] = scores.entropy_T.detach()
        return weighted_sum(loss_T, micro_batch.weights(loss_T)), observed


def token_losses(
    objective: Objective, logprobs_T: Tensor, old_T: Tensor, micro_batch: GRPOExperience
) -> LossOutput:
    """``c { −min(ρ Â, clip(ρ) Â) + β KL }``, ``[T]``, and the observations for metrics."""
    advantages_T = micro_batch.advantages_T.to(logprobs_T.device)
    surrogate = objective.surrogate(
        logprobs_T,
        old_T,
        advantages_T,
        micro_batch.lengths_N.to(logprobs_T.device),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )
    loss_T = surrogate if isinstance(surrogate, Tensor) else surrogate.loss_T
    observed = {
        "logprobs_T": logprobs_T.detach(),
        "old_logprobs_T": old_T,
        "advantages_T": advantages_T,
        **clip_masks(surrogate),
    }
    ref_T = micro_batch.ref_logprobs_T
    if ref_T is not None:
        observed["ref_logprobs_T"] = ref_T
        kl_T = objective.kl(logprobs_T, ref_T)
        if objective.kl_correction:
            kl_T = importance_ratio(logprobs_T, old_T) * kl_T
        loss_T = loss_T + objective.beta * kl_T
    loss_T, importance = correct_for_sampler(objective.correction, loss_T, old_T, micro_batch)
    return loss_T, observed | importance


def step_metrics(
    rollouts: Rollouts, experience: GRPOExperience, updates: Updates[Minibatch], equal_G: Tensor
) -> dict[str, float]:
    """Return the metrics of one sampling step."""
    observed = join_observed(updates.results)
    metrics = rollouts.metrics() | update_metrics(updates.results)
    metrics |= policy_metrics(observed) | importance_metrics(observed)
    metrics |= group_metrics(rollouts, updates, equal_G)
    return metrics | old_policy_metrics(experience, rollouts, updates)
