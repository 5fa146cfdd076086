"""Credit assignment: the signal-to-noise ratio of each method's gradient on the same responses.

The base samples K independent batches of responses to the same prompts. For each batch, every
method computes the gradient of its first optimizer step, with its own rewards and loss. With ḡ the
mean of the K gradients and tr Σ their total variance,

    signal² = ‖ḡ‖² − tr Σ / K  (unbiased),     SNR = signal² / tr Σ     of one batch.

A method with twice the SNR needs half the responses for the same certainty. The ratio does not
depend on the scale of the loss. PPO uses the critic from the end of its run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trivium.algorithms import dpo, grpo, ppo, sft
from trivium.algorithms.actor_critic import make_critic
from trivium.algorithms.critic_config import CriticConfig
from trivium.algorithms.dpo import PairData
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.algorithms.supervision import Supervision
from trivium.compare.config import CompareConfig
from trivium.compare.plan import Plan, with_seed
from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.data.oom import score_logprobs
from trivium.data.prompts import Prompt, load_prompts
from trivium.hf.loading import load_tokenizer, trained_parameters
from trivium.hf.model_config import ModelConfig
from trivium.jobs.job import Job
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import RewardConfig
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.training.experience import WeightedGroups, plan_updates
from trivium.training.micro_batch import MicroBatch
from trivium.training.options import AGGREGATION, load_option
from trivium.training.protocols import Updates
from trivium.training.setup import OnPolicyComponents, load_rewards, local_engine

PROMPTS = 32
RESPONSES_PER_PROMPT = 8
TOKENS_PER_MICRO_BATCH = 16384
Record = dict[str, Any]


@dataclass(frozen=True)
class Fixture:
    """Base model, and batches of its responses, shared by all methods."""

    policy: Policy
    reference: Reference
    batches: list[Rollouts]
    prompts: list[Prompt]


def measure(config: CompareConfig, plan: Plan) -> list[Record]:
    """Measure the gradient SNR of every method whose last stage starts from the base."""
    seed = config.seeds[0]
    config = with_seed(config, seed)
    base = ModelConfig.model_validate(plan.jobs[plan.base_jobs[seed]].settings["model"])
    fixture = _make_fixture(config, base)
    records = []
    for run in plan.runs:
        if run.seed != seed or run.varied is not None or run.method.best_of is not None:
            continue
        final = plan.jobs[run.jobs[-1]]
        if final.settings["model"]["path"] == base.path:
            first_update = FIRST_UPDATES[final.command](final, fixture)
            gradients = [_gradient(fixture, first_update(batch)) for batch in fixture.batches]
            records.append({"method": run.method.name, **signal_to_noise(gradients)})
    return records


def signal_to_noise(gradients: Sequence[Tensor | None]) -> Record:
    """Return the SNR of one batch with a jackknife interval, and the mean cosine of two batches.

    A batch without a training signal (None) has a gradient of zero; such batches are counted.
    """
    size = next((len(g) for g in gradients if g is not None), 1)
    rows = torch.stack([torch.zeros(size) if g is None else g for g in gradients]).double()
    gram = rows @ rows.T
    values = [_snr(_without_row(gram, k)) for k in range(len(rows))]
    snr, count = _snr(gram), len(rows)
    mean = math.fsum(values) / count
    error = math.sqrt((count - 1) / count * math.fsum((v - mean) ** 2 for v in values))
    norms = gram.diagonal().sqrt().clamp(min=1e-300)
    cosines = gram / norms[:, None] / norms
    cosine = float(cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    return {
        "snr": snr,
        "snr_low": snr - 1.96 * error,
        "snr_high": snr + 1.96 * error,
        "cosine": cosine,
        "batches": count,
        "empty": sum(g is None for g in gradients),
    }


def _snr(gram: Tensor) -> float:
    """Compute ``(‖ḡ‖² − tr Σ/K) / tr Σ`` from the gradients' inner products, ``[K, K]``."""
    count = len(gram)
    mean = float(gram.sum()) / count**2
    variance = (float(gram.diagonal().sum()) - count * mean) / max(1, count - 1)
    return (mean - variance / count) / variance if variance > 0 else 0.0


def _without_row(gram: Tensor, k: int) -> Tensor:
    rest = [i for i in range(len(gram)) if i != k]
    return gram[rest][:, rest]


def _make_fixture(config: CompareConfig, base: ModelConfig) -> Fixture:
    tokenizer = load_tokenizer(base)
    prompts = load_prompts(config.data, tokenizer)[:PROMPTS]
    policy = Policy.load(base, tokenizer, temperature=config.sampling.temperature)
    rewards, _ = load_rewards(config.rewards, prompts, tokenizer)
    engine = local_engine(policy)
    batches = [
        roll_out(
            engine, rewards, prompts, RESPONSES_PER_PROMPT, config.sampling, seed=1, step=-2 - k
        )
        for k in range(config.credit)
    ]
    return Fixture(policy, Reference(policy), batches, prompts)


def _gradient(fixture: Fixture, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
    """Return the policy's gradient as one vector; None if there are no micro-batches."""
    if not micro_batches:
        return None
    parameters = trained_parameters(fixture.policy.model)
    for parameter in parameters:
        parameter.grad = None
    for micro_batch in micro_batches:
        micro_batch()[0].backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten().float().cpu() for g in grads])


def _components(settings: Mapping[str, Any], fixture: Fixture) -> OnPolicyComponents:
    """Return the fixture as components of a training loop, with the method's own rewards."""
    configs = [RewardConfig.model_validate(r) for r in settings["rewards"]]
    rewards, learned = load_rewards(configs, fixture.prompts, fixture.policy.tokenizer)
    engine = local_engine(fixture.policy)
    return OnPolicyComponents(
        fixture.prompts, rewards, fixture.policy, fixture.reference, engine, None, learned
    )


def _rescored(components: OnPolicyComponents, batch: Rollouts) -> Rollouts:
    """Return the same responses with the method's own rewards."""
    repeated = [p for p, group in zip(batch.prompts, batch.responses, strict=True) for _ in group]
    scores = components.rewards.score(repeated, batch.flat)
    return Rollouts(batch.prompts, batch.responses, scores, {})


def _grpo(job: Job, fixture: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    config = GRPOConfig.model_validate(job.settings)
    one_update = {"epochs": 1, "minibatches": 1, "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH}
    config = config.model_copy(update=one_update)
    components = _components(job.settings, fixture)
    objective, supervision = grpo.Objective.of(config), Supervision.of(config)
    learner = grpo.Learner.of(config, objective, supervision, components)

    def micro_batches(batch: Rollouts) -> list[MicroBatch]:
        experience = learner.prepare(_rescored(components, batch), 0)
        updates = Updates(learner.plan(experience, 0))
        weighted = experience.next_micro_batches(
            updates.planned[0], updates, objective.aggregation, objective.max_length
        )
        return [MicroBatch(part, learner.loss) for part in weighted]

    return micro_batches


def _ppo(job: Job, fixture: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    config = PPOConfig.model_validate(job.settings)
    components = _components(job.settings, fixture)
    critic_config = config.critic
    if critic_config.kind == "separate":
        trained = config.critic.model or config.model
        trained = trained.model_copy(update={"path": str(job.directory / "critic")})
        critic_config = CriticConfig(model=trained)
    critic = make_critic(critic_config, config.model, fixture.policy)
    objective, returns = ppo.Objective.of(config), ppo.Returns.of(config)
    learner = ppo.Learner.of(config, objective, returns, components, critic)

    def micro_batches(batch: Rollouts) -> list[MicroBatch]:
        rollouts = _rescored(components, batch)
        data = Grouped(rollouts.groups)
        minibatches = plan_updates(
            data, epochs=1, minibatches=1, max_tokens=TOKENS_PER_MICRO_BATCH, seed=0, step=0
        )
        experience = learner.prepare(rollouts, minibatches, config.beta)
        weighted = experience.next_micro_batches(
            minibatches[0], Updates(minibatches), objective.aggregation, objective.max_length
        )
        return [MicroBatch(part, partial(learner.joint_loss, with_actor=True)) for part in weighted]

    return micro_batches


def _dpo(job: Job, fixture: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    config = DPOConfig.model_validate(job.settings)
    objective = dpo.Objective.of(config)

    def micro_batches(batch: Rollouts) -> list[MicroBatch]:
        groups = dpo.best_and_worst(batch)
        if not groups:
            return []
        pairs = dpo.with_reference(
            config, PairData(groups), partial(score_logprobs, fixture.reference)
        )
        return dpo.micro_batches(objective, fixture.policy, pairs, config.tokens_per_micro_batch)

    return micro_batches


def _sft(job: Job, fixture: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    """Train on the responses of the batch with the highest reward, one or several per prompt."""
    config = SFTConfig.model_validate(job.settings)
    aggregation = load_option(AGGREGATION, config.aggregation)

    def micro_batches(batch: Rollouts) -> list[MicroBatch]:
        totals_G = batch.totals_N.split(batch.sizes_G.tolist())
        groups = [
            Group(group.prompt, [response])
            for group, totals in zip(batch.groups, totals_G, strict=True)
            for response, total in zip(group.responses, totals.tolist(), strict=True)
            if total == float(totals.max()) > float(totals.min())
        ]
        if not groups:
            return []
        trained = torch.ones(sum(len(g.responses[0]) for g in groups), dtype=torch.bool)
        data = WeightedGroups(groups, loss_mask_T=trained)
        weighted = data.split_with_token_weights(
            data.split(TOKENS_PER_MICRO_BATCH), aggregation, config.data.max_response_tokens
        )
        return [MicroBatch(part, partial(sft.loss, fixture.policy)) for part in weighted]

    return micro_batches


FIRST_UPDATES = {"grpo": _grpo, "ppo": _ppo, "dpo": _dpo, "sft": _sft}
"""For each command, a function that makes the first update's micro-batches from a batch."""
