"""Evaluation on held-out prompts: quality, distance from the reference, length.

The same for every road: responses are generated greedily and sampled, scored by rewards, and the
sampled ones are scored by policy and reference for the KL divergence that no loss guarantees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from pydantic import Field

from trivium.config import Configuration
from trivium.data.batch import Batch, Grouped
from trivium.data.prompts import Prompt, PromptsConfig
from trivium.maths.ragged import segment_sum
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rollout.engine import Engine, Sampling
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.runs.statistics import Interval, mean_interval


class EvaluationConfig(Configuration):
    """Held-out evaluation while training and at its end."""

    data: PromptsConfig
    """Held-out prompts."""
    rewards: tuple[RewardConfig, ...] = ()
    """What quality is; the training rewards if empty."""
    every: int = Field(default=0, ge=0)
    """Evaluate after every so many training steps; 0: only at the start and at the end."""
    at_start: bool = True
    """Evaluate before the first step too."""
    prompts: int | None = Field(default=None, ge=1)
    """How many of the prompts are used; all by default."""
    samples: int = Field(default=1, ge=1)
    """Sampled responses per prompt, besides the greedy one."""
    max_tokens: int = Field(default=256, ge=1)
    """Length limit of the responses."""
    seed: int = 1
    """Seed of the sampled responses; the same at every evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation measured.

    ``greedy`` and ``sampled`` are the mean reward; ``kl`` is the mean over sampled responses of
    ``Σ_t log π(o_t) − log π_ref(o_t)``; ``distinct`` the mean share of distinct words in a sampled
    response (1: no word repeats).
    """

    n: int
    greedy: Interval
    sampled: Interval
    kl: float | None
    length: float
    cut_off: float
    distinct: float

    def record(self) -> dict[str, float | int | None]:
        """Flat numbers for a JSON line or a table."""
        flat = {k: v for k, v in asdict(self).items() if not isinstance(v, dict)}
        for name, interval in (("greedy", self.greedy), ("sampled", self.sampled)):
            flat |= {
                name: interval.mean,
                f"{name}_low": interval.low,
                f"{name}_high": interval.high,
            }
        return flat


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and the responses it rests on."""

    result: Evaluation
    greedy: Rollouts
    sampled: Rollouts


class Evaluator:
    """Holds the held-out prompts and rewards; called again and again while a run goes on."""

    def __init__(
        self,
        config: EvaluationConfig,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        engine: Engine,
        policy: Policy,
        reference: Reference | Policy | None,
        *,
        tokens_per_micro_batch: int = 16384,
    ) -> None:
        self.config = config
        self.prompts = list(prompts[: config.prompts])
        self.rewards = rewards
        self.engine = engine
        self.policy = policy
        self.reference = reference
        self.tokens_per_micro_batch = tokens_per_micro_batch

    def due(self, step: int) -> bool:
        """Whether to evaluate after training step ``step``; 0 is before the first."""
        if step == 0:
            return self.config.at_start
        return self.config.every > 0 and step % self.config.every == 0

    def evaluate(self) -> Evaluated:
        """Generate, score and measure; the same prompts and random numbers every time."""
        greedy = self._roll_out(1, temperature=0.0)
        sampled = self._roll_out(self.config.samples, temperature=self.policy.temperature)
        per_prompt = sampled.totals_N.view(len(self.prompts), -1).mean(1).tolist()
        result = Evaluation(
            n=len(self.prompts),
            greedy=mean_interval(greedy.totals_N.tolist()),
            sampled=mean_interval(per_prompt),
            kl=None if self.reference is None else self._kl(sampled, self.reference),
            length=float(sampled.lengths_N.float().mean()),
            cut_off=float(sampled.cut_off_N.float().mean()),
            distinct=distinct_words([r.text for r in sampled.flat]),
        )
        return Evaluated(result, greedy, sampled)

    def _roll_out(self, samples: int, temperature: float) -> Rollouts:
        sampling = Sampling(temperature=temperature, max_tokens=self.config.max_tokens)
        return roll_out(
            self.engine,
            self.rewards,
            self.prompts,
            samples,
            sampling,
            seed=self.config.seed,
            step=0,
        )

    @torch.no_grad()
    def _kl(self, rollouts: Rollouts, reference: Reference | Policy) -> float:
        data = Grouped(rollouts.groups)
        total = 0.0
        for responses in data.split(self.tokens_per_micro_batch):
            batch = Batch.of(data.select(responses).groups)
            log_ratio_T = self.policy.score(batch).logprobs_T - reference.score(batch).logprobs_T
            total += float(segment_sum(log_ratio_T.cpu().double(), batch.lengths_N).sum())
        return total / len(data.lengths_N)


def distinct_words(texts: Sequence[str]) -> float:
    """Mean share of distinct words in a text; texts without words are left out (1.0 if all are)."""
    shares = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        if words:
            shares.append(len(set(words)) / len(words))
    return sum(shares) / len(shares) if shares else 1.0
