"""Proximal Policy Optimization for language models (Schulman et al. 2017; Ouyang et al. 2022).

    r_t      = 1[t = T]·score − β·(log π_old(o_t) − log π_ref(o_t))
    δ_t      = r_t + γ V(s_{t+1}) − V(s_t),     Â_t = Σ_k (γλ)^k δ_{t+k}
    Target_t = V_old(s_t) + Â_t
    J(θ)     = E 1/|o| Σ_t min(ρ Â, clip(ρ, 1−ε, 1+ε) Â),     critic: (V − Target)²

Three stages per step, all below in ``train``: rollout and scoring; advantages and return targets,
computed once and then fixed; epochs of minibatches over the fixed batch. Left out: how tokens are
drawn (``rollout``), what a reward is (``rewards``), how gradients are accumulated (``update``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trivium.algorithms.actor_critic import CriticConfig, make_critic
from trivium.algorithms.experience import (
    Experience,
    MicroBatches,
    epoch_batch,
    first_epoch,
    plan_updates,
)
from trivium.algorithms.micro_batch import MicroBatch
from trivium.algorithms.observe import (
    first_group,
    join_observed,
    policy_metrics,
    reference_metrics,
    update_metrics,
    value_metrics,
)
from trivium.algorithms.parts import OnPolicyParts, assemble
from trivium.algorithms.pretraining import PretrainingMix, PretrainingMixConfig
from trivium.algorithms.reward_update import RewardUpdate, RewardUpdateConfig
from trivium.algorithms.update import Optimizer, OptimizerConfig, StepResult
from trivium.config import Configuration
from trivium.data.batch import Batch, Grouped
from trivium.data.prompts import PromptsConfig
from trivium.maths.advantages import gae, return_targets, whiten
from trivium.maths.kl import KL_ESTIMATORS, adapted_coefficient, kl_shaped_rewards
from trivium.maths.objectives import clipped_surrogate, value_loss
from trivium.maths.ragged import segment_starts, spread
from trivium.maths.weights import Aggregation, weighted_sum
from trivium.models.critic import Critic
from trivium.models.loading import ModelConfig, trained_parameters
from trivium.models.scoring import in_parts, score_all
from trivium.rewards.reward import RewardConfig
from trivium.rollout.engine import Sampling
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.runs.evaluate import EvaluationConfig
from trivium.runs.store import RunConfig
from trivium.runs.training import Training, begin


class AdaptiveKLConfig(Configuration):
    """Steers β so that the KL per response stays near a target (Ziegler et al. 2019)."""

    target: float = Field(gt=0)
    """KL per response, in nats."""
    horizon: int = Field(default=10000, gt=0)
    """Responses over which β adapts."""


class PPOConfig(Configuration):
    """Everything a PPO run depends on."""

    model: ModelConfig
    """The actor; the reference is a frozen copy of it."""
    data: PromptsConfig
    """Prompts to sample from."""
    rewards: tuple[RewardConfig, ...]
    """What is rewarded: a weighted sum."""
    critic: CriticConfig = CriticConfig()
    """The critic."""
    run: RunConfig = RunConfig()
    """Where the run is written, and its seed."""
    sampling: Sampling = Sampling()
    """How responses are drawn."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    """The actor's optimiser."""
    evaluation: EvaluationConfig | None = None
    """Held-out evaluation."""

    steps: int = Field(default=100, ge=1)
    """Rollout batches."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts per rollout batch."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses per prompt."""
    epochs: int = Field(default=2, ge=1)
    """How often a rollout batch is reused."""
    minibatches: int = Field(default=2, ge=1)
    """Optimiser steps per epoch."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""

    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL term in the reward."""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL term in the reward."""
    adaptive_kl: AdaptiveKLConfig | None = None
    """Adapt β while training."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount γ."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of GAE: 1 is Monte Carlo, 0 one step."""
    bootstrap_cut_off: bool = False
    """Let cut-off responses continue with the critic's value instead of 0."""
    whiten_advantages: bool = True
    """Bring advantages to mean 0 and variance 1 over the rollout batch."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """ε below 1."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε above 1."""
    aggregation: Aggregation = "sequence_mean"
    """How tokens are averaged."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy in the objective."""
    stop_at_kl: float | None = Field(default=None, gt=0)
    """End a batch's updates when KL(π_old‖π) per token exceeds this."""
    pretraining: PretrainingMixConfig | None = None
    """Add a language-modelling loss on demonstrations (PPO-ptx)."""
    reward_update: RewardUpdateConfig | None = None
    """Train the learned reward further on the policy's own responses while PPO runs."""

    @model_validator(mode="after")
    def _consistent(self) -> PPOConfig:
        if self.sampling.greedy:
            raise ValueError("sampling.temperature is 0: PPO learns from what it explores")
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches is {self.minibatches}, more than the {self.prompts_per_step} prompts "
                "of a step: lower it or raise prompts_per_step"
            )
        if self.adaptive_kl is not None and self.beta == 0:
            raise ValueError("adaptive_kl scales beta, which is 0: start it above 0")
        return self


@dataclass(frozen=True, kw_only=True)
class PPOExperience(Experience):
    """Advantages, return targets, and what π_old, π_ref and V_old said, of one rollout batch."""

    old_logprobs_T: Tensor
    old_values_T: Tensor
    targets_T: Tensor


def train(config: PPOConfig) -> Path:
    """Run PPO; returns the run's directory: the actor in ``final``, the critic in ``critic``."""
    begun = begin(config.run, config.model.device)
    parts = assemble(
        config.model,
        config.data,
        config.rewards,
        config.evaluation,
        config.sampling,
    )
    critic = make_critic(config.critic, config.model, parts.policy)
    mix = None
    if config.pretraining is not None:
        mix = PretrainingMix(config.pretraining, parts.policy, seed=config.run.seed)
    reward_update = None
    if config.reward_update is not None:
        reward_update = RewardUpdate(config.reward_update, parts, seed=config.run.seed)
    beta = config.beta
    with Training(begun, "ppo", config, config.steps, evaluator=parts.evaluator) as training:
        optimizer = make_optimizer(config, parts, critic, training)
        for step in training.steps():
            # Stage 1: rollout and scoring.
            rollouts = sample(config, parts, step)
            training.stages.begin()
            # Stage 2: advantages and return targets, fixed from here on.
            steps = plan(config, rollouts, step)
            experience = prepare(config, parts, critic, rollouts, steps, beta)
            training.stages.lap("logprobs")
            # Stage 3: optimisation.
            actor = step > config.critic.warmup_steps
            results = update(config, parts, critic, optimizer, experience, steps, actor, mix)
            training.stages.lap("update")
            if reward_update is not None:
                reward_update.remember(rollouts)
                if reward_update.due(step):
                    training.event("reward_update", **reward_update.train())
                training.stages.lap("reward_update")
            metrics = step_metrics(config, rollouts, experience, results) | {"kl/beta": beta}
            training.log(metrics, partial(first_group, parts, rollouts, experience))
            if config.adaptive_kl is not None:
                kl, responses = metrics["kl/response"], len(rollouts.flat)
                target, horizon = config.adaptive_kl.target, config.adaptive_kl.horizon
                beta = adapted_coefficient(beta, kl, target, responses, horizon)
    training.save("final", parts.policy)
    training.save("critic", critic)
    if reward_update is not None:
        training.save("reward_model", reward_update.model)
    return training.path


def make_optimizer(
    config: PPOConfig, parts: OnPolicyParts, critic: Critic, training: Training
) -> Optimizer:
    """One optimiser; actor and critic keep their own rates, decay and clipping."""
    actor = (config.optimizer, trained_parameters(parts.policy.model))
    updates = config.steps * config.epochs * config.minibatches
    sets = [actor, (config.critic.optimizer, critic.parameters())]
    return Optimizer(sets, updates, training.budget_spent)


def sample(config: PPOConfig, parts: OnPolicyParts, step: int) -> Rollouts:
    """Responses to the step's prompts, with their rewards."""
    index = epoch_batch(len(parts.prompts), config.prompts_per_step, step - 1, seed=config.run.seed)
    return roll_out(
        parts.engine,
        parts.rewards,
        [parts.prompts[i] for i in index],
        config.responses_per_prompt,
        config.sampling,
        seed=config.run.seed,
        step=step,
    )


def plan(config: PPOConfig, rollouts: Rollouts, step: int) -> list[MicroBatches]:
    """The optimiser steps over one rollout batch: epochs of minibatches."""
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
    parts: OnPolicyParts,
    critic: Critic,
    rollouts: Rollouts,
    steps: list[MicroBatches],
    beta: float,
) -> PPOExperience:
    """Rewards with KL → GAE → advantages and return targets, all detached."""
    data = Grouped(rollouts.groups)
    micro_batches = first_epoch(steps, len(rollouts.flat))

    def actor_critic(batch: Batch) -> tuple[Tensor, Tensor]:
        scores = critic.score(parts.policy, batch)
        return scores.logprobs_T, scores.values_T

    old_T, values_T = score_all(data, micro_batches, actor_critic)
    ref_T, kl_T = None, torch.zeros_like(old_T)
    if beta > 0:
        (ref_T,) = score_all(data, micro_batches, lambda b: (parts.reference.score(b).logprobs_T,))
        kl_T = KL_ESTIMATORS[config.kl](old_T, ref_T)
    lengths_N = rollouts.lengths_N.to(old_T.device)
    rewards_T = kl_shaped_rewards(
        rollouts.outcomes_N.to(old_T), kl_T, lengths_N, beta, step_rewards(parts, rollouts, old_T)
    )
    advantages_T = gae(
        rewards_T,
        values_T,
        lengths_N,
        gamma=config.gamma,
        lam=config.lam,
        bootstrap_N=final_values(config, parts, critic, rollouts, old_T),
    )
    targets_T = return_targets(values_T, advantages_T)
    return PPOExperience(
        groups=rollouts.groups,
        advantages_T=whiten(advantages_T) if config.whiten_advantages else advantages_T,
        trained_T=torch.ones_like(old_T, dtype=torch.bool),
        old_logprobs_T=old_T,
        ref_logprobs_T=ref_T,
        old_values_T=values_T,
        targets_T=targets_T,
    )


def step_rewards(parts: OnPolicyParts, rollouts: Rollouts, like_T: Tensor) -> Tensor | None:
    """Process rewards at the last token of their step, ``[T]``; None where no reward gives any."""
    if rollouts.scores.steps is None:
        return None
    steps = rollouts.steps(parts.policy.tokenizer)
    token_S = spread(segment_starts(rollouts.lengths_N), steps.counts_N) + steps.ends_S
    rewards_S = steps.rewards_S.to(like_T)
    return torch.zeros_like(like_T).index_add(0, token_S.to(like_T.device), rewards_S)


@torch.no_grad()
def final_values(
    config: PPOConfig, parts: OnPolicyParts, critic: Critic, rollouts: Rollouts, like_T: Tensor
) -> Tensor | None:
    """V after the last token of cut-off responses, 0 for those that ended, ``[N]``."""
    if not config.bootstrap_cut_off:
        return None
    data = Grouped(rollouts.groups)
    values_N = like_T.new_zeros(len(rollouts.flat))
    final = partial(critic.final_values, parts.policy)
    for whole in data.split(config.tokens_per_micro_batch):
        for responses, values in in_parts(data, whole, lambda d: final(Batch.of(d.groups))):
            values_N[responses] = values.to(values_N)
    return torch.where(rollouts.cut_off_N.to(values_N.device), values_N, 0.0)


def update(
    config: PPOConfig,
    parts: OnPolicyParts,
    critic: Critic,
    optimizer: Optimizer,
    experience: PPOExperience,
    steps: list[MicroBatches],
    actor: bool,
    mix: PretrainingMix | None,
) -> list[StepResult]:
    """Epochs of minibatches; ends early once π has moved ``stop_at_kl`` from π_old."""
    results = []
    for micro_batches in steps:
        work = [
            MicroBatch(part, partial(loss, config, parts, critic, actor=actor))
            for part in experience.for_step(
                micro_batches, config.aggregation, config.sampling.max_tokens
            )
        ]
        if mix is not None and actor:
            work += mix.next_step(config.tokens_per_micro_batch)
        results.append(optimizer.step(work))
        seen = results[-1].observed
        moved = float((seen["old_logprobs_T"] - seen["logprobs_T"]).mean())
        if config.stop_at_kl is not None and moved > config.stop_at_kl:
            break
    return results


def loss(
    config: PPOConfig, parts: OnPolicyParts, critic: Critic, part: PPOExperience, actor: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """``Σ_t w_t {−min(ρ Â, clip(ρ) Â) − c_H H + c_V (V − Target)²}`` of one micro-batch."""
    scores = critic.score(parts.policy, Batch.of(part.groups))
    weights_T = part.weights(scores.logprobs_T)
    value_T = value_loss(
        scores.values_T,
        part.targets_T,
        old_values_T=part.old_values_T,
        clip=config.critic.clip,
    )
    total = config.critic.coefficient * weighted_sum(value_T, weights_T)
    if actor:
        surrogate_T = clipped_surrogate(
            scores.logprobs_T,
            part.old_logprobs_T,
            part.advantages_T,
            part.lengths_N,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        bonus_T = config.entropy_bonus * scores.entropy_T
        total = total + weighted_sum(surrogate_T - bonus_T, weights_T)
    return total, {
        "logprobs_T": scores.logprobs_T.detach(),
        "old_logprobs_T": part.old_logprobs_T,
        "entropy_T": scores.entropy_T.detach(),
        "advantages_T": part.advantages_T,
        "value_loss_T": value_T.detach(),
    }


def step_metrics(
    config: PPOConfig, rollouts: Rollouts, experience: PPOExperience, results: list[StepResult]
) -> dict[str, float]:
    """Everything worth watching of one step."""
    observed = join_observed(results)
    metrics = rollouts.metrics() | update_metrics(results)
    metrics |= policy_metrics(observed, clip_low=config.clip_low, clip_high=config.clip_high)
    metrics |= value_metrics(experience.old_values_T, experience.targets_T)
    metrics["value/loss"] = float(observed["value_loss_T"].mean())
    if "pretraining_nll_T" in observed:
        metrics["pretraining/nll"] = float(observed["pretraining_nll_T"].mean())
    old_T = experience.old_logprobs_T
    if experience.ref_logprobs_T is not None:
        metrics |= reference_metrics(old_T, experience.ref_logprobs_T, len(rollouts.flat))
    difference_T = old_T.cpu() - rollouts.sampler_logprobs_T
    metrics["policy/sampler_difference"] = float(difference_T.abs().max())
    return metrics
