"""Credit assignment: how much of each method's gradient is signal, on the same responses.

The base answers the same prompts K times over. From each of these batches every method computes the
gradient that its first update would take: the same tokens, judged in its own way. With ḡ the mean
of the K gradients and tr Σ their total variance,

    signal² = ‖ḡ‖² − tr Σ / K  (unbiased),     SNR = signal² / tr Σ     of one batch.

A method with twice the SNR needs half the responses for a gradient as certain. Scale cancels, so
losses of different sizes compare. PPO is judged with the critic that its run ended with.
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
from trivium.compare.config import CompareConfig
from trivium.compare.plan import Job, Plan, for_seed
from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.data.prompts import Prompt, load_prompts
from trivium.models.loading import load_tokenizer, trained_parameters
from trivium.models.model_config import ModelConfig
from trivium.models.oom import score_logprobs
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import RewardConfig
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.training.experience import WeightedGroups, plan_updates
from trivium.training.micro_batch import MicroBatch
from trivium.training.protocols import Updates
from trivium.training.setup import OnPolicyComponents, load_rewards, local_engine

PROMPTS = 32
RESPONSES = 8
TOKENS = 16384
Record = dict[str, Any]


@dataclass(frozen=True)
class Fixture:
    """The base, and the batches of its responses that every method is judged on."""

    policy: Policy
    reference: Reference
    batches: list[Rollouts]
    prompts: list[Prompt]


def measure(config: CompareConfig, plan: Plan) -> list[Record]:
    """The signal-to-noise ratio of every method that trains a policy from the base."""
    seed = config.seeds[0]
    config = for_seed(config, seed)
    base = ModelConfig.model_validate(plan.jobs[plan.bases[seed]].settings["model"])
    bench = _bench(config, base)
    found = []
    for route in plan.routes:
        if route.seed != seed or route.varied is not None or route.method.best_of is not None:
            continue
        final = plan.jobs[route.jobs[-1]]
        if final.settings["model"]["path"] == base.path:
            work = STEPS[final.command](final, bench)
            gradients = [_gradient(bench, work(batch)) for batch in bench.batches]
            found.append({"method": route.method.name, **signal_to_noise(gradients)})
    return found


def signal_to_noise(gradients: Sequence[Tensor | None]) -> Record:
    """SNR of one batch's gradient, with a jackknife interval, and the mean cosine of two batches.

    A batch that teaches nothing (None) is a gradient of zero, and is counted.
    """
    size = next((len(g) for g in gradients if g is not None), 1)
    rows = torch.stack([torch.zeros(size) if g is None else g for g in gradients]).double()
    gram = rows @ rows.T
    values = [_snr(_without(gram, k)) for k in range(len(rows))]
    snr, count = _snr(gram), len(rows)
    mean = math.fsum(values) / count
    error = math.sqrt((count - 1) / count * math.fsum((v - mean) ** 2 for v in values))
    norms = gram.diagonal().sqrt().clamp(min=1e-300)
    cosines = gram / norms[:, None] / norms
    off = float(cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    return {
        "snr": snr,
        "snr_low": snr - 1.96 * error,
        "snr_high": snr + 1.96 * error,
        "cosine": off,
        "batches": count,
        "empty": sum(g is None for g in gradients),
    }


def _snr(gram: Tensor) -> float:
    """From the gradients' inner products: ``(‖ḡ‖² − tr Σ/K) / tr Σ``."""
    count = len(gram)
    mean = float(gram.sum()) / count**2
    variance = (float(gram.diagonal().sum()) - count * mean) / max(1, count - 1)
    return (mean - variance / count) / variance if variance > 0 else 0.0


def _without(gram: Tensor, k: int) -> Tensor:
    kept = [i for i in range(len(gram)) if i != k]
    return gram[kept][:, kept]


def _bench(config: CompareConfig, base: ModelConfig) -> Fixture:
    tokenizer = load_tokenizer(base)
    prompts = load_prompts(config.data, tokenizer)[:PROMPTS]
    policy = Policy.load(base, tokenizer, temperature=config.sampling.temperature)
    rewards, _ = load_rewards(config.rewards, prompts, tokenizer)
    engine = local_engine(policy)
    batches = [
        roll_out(engine, rewards, prompts, RESPONSES, config.sampling, seed=1, step=-2 - k)
        for k in range(config.credit)
    ]
    return Fixture(policy, Reference(policy), batches, prompts)


def _gradient(bench: Fixture, work: Sequence[MicroBatch]) -> Tensor | None:
    """The policy's gradient, flat; None where there is nothing to learn."""
    if not work:
        return None
    parameters = trained_parameters(bench.policy.model)
    for parameter in parameters:
        parameter.grad = None
    for micro_batch in work:
        micro_batch()[0].backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten().float().cpu() for g in grads])


def _parts(settings: Mapping[str, Any], bench: Fixture) -> OnPolicyComponents:
    """The bench as a loop's parts, with the method's own rewards."""
    configs = [RewardConfig.model_validate(r) for r in settings["rewards"]]
    rewards, learned = load_rewards(configs, bench.prompts, bench.policy.tokenizer)
    engine = local_engine(bench.policy)
    return OnPolicyComponents(
        bench.prompts, rewards, bench.policy, bench.reference, engine, None, learned
    )


def _judged(parts: OnPolicyComponents, batch: Rollouts) -> Rollouts:
    """The same responses with the method's own rewards."""
    repeated = [p for p, group in zip(batch.prompts, batch.responses, strict=True) for _ in group]
    scores = parts.rewards.score(repeated, batch.flat)
    return Rollouts(batch.prompts, batch.responses, scores, {})


def _grpo(job: Job, bench: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    config = GRPOConfig.model_validate(job.settings)
    one_update = {"epochs": 1, "minibatches": 1, "tokens_per_micro_batch": TOKENS}
    config = config.model_copy(update=one_update)
    parts = _parts(job.settings, bench)

    def work(batch: Rollouts) -> list[MicroBatch]:
        rollouts = _judged(parts, batch)
        experience = grpo.prepare(config, parts, rollouts, 0)
        updates = Updates(grpo.plan(config, experience, 0))
        made = experience.for_update(
            updates.planned[0], updates, config.aggregation, config.sampling.max_tokens
        )
        return [MicroBatch(part, partial(grpo.loss, config, parts)) for part in made]

    return work


def _ppo(job: Job, bench: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    config = PPOConfig.model_validate(job.settings)
    parts = _parts(job.settings, bench)
    critic_config = config.critic
    if critic_config.kind == "separate":
        trained = config.critic.model or config.model
        trained = trained.model_copy(update={"path": str(job.directory / "critic")})
        critic_config = CriticConfig(model=trained)
    critic = make_critic(critic_config, config.model, bench.policy)

    def work(batch: Rollouts) -> list[MicroBatch]:
        rollouts = _judged(parts, batch)
        data = Grouped(rollouts.groups)
        steps = plan_updates(data, epochs=1, minibatches=1, max_tokens=TOKENS, seed=0, step=0)
        experience = ppo.prepare(config, parts, critic, rollouts, steps, config.beta)
        made = experience.for_update(
            steps[0], Updates(steps), config.aggregation, config.sampling.max_tokens
        )
        return [MicroBatch(p, partial(ppo.loss, config, parts, critic, actor=True)) for p in made]

    return work


def _dpo(job: Job, bench: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    config = DPOConfig.model_validate(job.settings)

    def work(batch: Rollouts) -> list[MicroBatch]:
        groups = dpo.best_and_worst(batch)
        if not groups:
            return []
        pairs = dpo.with_reference(
            config, PairData(groups), partial(score_logprobs, bench.reference)
        )
        return dpo.work(config, bench.policy, pairs)

    return work


def _sft(job: Job, bench: Fixture) -> Callable[[Rollouts], list[MicroBatch]]:
    """Imitation of the batch's best responses, one or several per prompt, all else left out."""
    config = SFTConfig.model_validate(job.settings)

    def work(batch: Rollouts) -> list[MicroBatch]:
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
        made = data.split_with_token_weights(
            data.split(TOKENS), config.aggregation, config.data.max_response_tokens
        )
        return [MicroBatch(part, partial(sft.loss, bench.policy)) for part in made]

    return work


STEPS = {"grpo": _grpo, "ppo": _ppo, "dpo": _dpo, "sft": _sft}
"""For each command, what makes the first update's work from a batch."""
