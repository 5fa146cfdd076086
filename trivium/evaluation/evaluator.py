"""Evaluation on held-out prompts: quality, distance from the reference, length, fluency.

The same for every method: responses are generated greedily and sampled, scored by rewards, and the
sampled ones are scored by policy and reference for the KL divergence that no loss guarantees, and
for how likely the reference finds them, which no reward sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trivium.data.batch import Grouped
from trivium.data.chat import token_pieces
from trivium.data.prompts import Prompt
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.evaluation.samples import Rows, sample_rows
from trivium.evaluation.statistics import (
    Interval,
    distinct_words,
    mean_interval,
    pass_at_k,
    repetition,
    wins,
)
from trivium.maths.ragged import segment_sum
from trivium.models.oom import score_logprobs
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import Rewards
from trivium.rollout.engine import EVAL_STEP, Engine
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.rollout.sampling import Sampling


@dataclass(frozen=True)
class Distance:
    """What policy and reference say of sampled responses: log-ratios and π_ref's log-probs."""

    log_ratio_T: Tensor
    ref_logprobs_T: Tensor


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation measured, and the responses it rests on."""

    greedy: Rollouts
    sampled: Rollouts
    distance: Distance | None
    pieces: list[list[str]]
    base_totals_N: Tensor | None = None
    pass_threshold: float | None = None

    @property
    def greedy_reward(self) -> Interval:
        """Mean reward of the greedy responses."""
        return mean_interval(self.greedy.totals_N.tolist())

    @property
    def sampled_reward(self) -> Interval:
        """Mean reward of the sampled responses; a prompt's samples are one observation."""
        return mean_interval(self._by_prompt(self.sampled.totals_N).mean(1).tolist())

    @property
    def kl(self) -> Interval | None:
        """``Σ_t log π(o_t) − log π_ref(o_t)`` of a sampled response, averaged."""
        if self.distance is None:
            return None
        kl_N = segment_sum(self.distance.log_ratio_T, self.sampled.lengths_N)
        return mean_interval(self._by_prompt(kl_N).mean(1).tolist())

    @property
    def win_rate(self) -> Interval | None:
        """How often a sampled response beats the base's to the same prompt; ties count half."""
        if self.base_totals_N is None:
            return None
        mine, theirs = map(self._by_prompt, (self.sampled.totals_N, self.base_totals_N))
        return mean_interval(wins(mine.tolist(), theirs.tolist()))

    def record(self) -> dict[str, Any]:
        """Flat numbers for a JSON line or a table."""
        texts = [r.text for r in self.sampled.flat]
        tokens = int(self.sampled.lengths_N.sum())
        return {
            "n": len(self.sampled.prompts),
            **_flat("greedy", self.greedy_reward),
            **_flat("sampled", self.sampled_reward),
            **_flat("kl", self.kl),
            "length": float(self.sampled.lengths_N.float().mean()),
            "truncated": float(self.sampled.truncated_N.float().mean()),
            "distinct": distinct_words(texts),
            "repetition": repetition(texts),
            "reference_logprob": (
                None
                if self.distance is None
                else float(self.distance.ref_logprobs_T.sum()) / tokens
            ),
            "pass_at": self._pass_at(),
            **_flat("win_rate", self.win_rate),
        }

    def outcomes(self) -> dict[str, Any]:
        """The reward of every response, by prompt."""
        return {
            "index": [prompt.index for prompt in self.sampled.prompts],
            "greedy": self.greedy.totals_N.tolist(),
            "sampled": self._by_prompt(self.sampled.totals_N).tolist(),
        }

    def samples(self, prompts: int) -> Rows:
        """The responses to the first so many prompts, greedy and sampled, with what is known."""
        greedy = sample_rows(self.greedy, "greedy", prompts)
        ratios = None if self.distance is None else self.distance.log_ratio_T
        sampled = sample_rows(
            self.sampled, "sampled", prompts, pieces=self.pieces, log_ratio_T=ratios
        )
        return greedy + sampled

    def _by_prompt(self, values_N: Tensor) -> Tensor:
        return values_N.view(len(self.sampled.prompts), -1)

    def _pass_at(self) -> dict[str, float]:
        """pass@k for the powers of two up to the number of samples; {} where nothing passes."""
        totals = self._by_prompt(self.sampled.totals_N)
        limit = self.pass_threshold
        if limit is None:
            if not bool(((totals == 0) | (totals == 1)).all()):
                return {}
            limit = 1.0
        passed = (totals >= limit).sum(1).tolist()
        drawn = totals.shape[1]
        ks = [1 << i for i in range(drawn.bit_length()) if 1 << i <= drawn]
        return {str(k): sum(pass_at_k(drawn, c, k) for c in passed) / len(passed) for k in ks}


@dataclass(frozen=True)
class Measured:
    """Held-out numbers of a model that need no responses, beside those of responses if any."""

    numbers: Mapping[str, Any]
    responses: Evaluated | None = None

    def record(self) -> dict[str, Any]:
        """Flat numbers."""
        return {**({} if self.responses is None else self.responses.record()), **self.numbers}

    def samples(self, prompts: int) -> Rows:
        """The responses to the first so many prompts."""
        return [] if self.responses is None else self.responses.samples(prompts)

    def outcomes(self) -> dict[str, Any]:
        """The reward of every response, by prompt."""
        return {} if self.responses is None else self.responses.outcomes()


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
        training: Sampling | None = None,
        tokens_per_micro_batch: int = 16384,
    ) -> None:
        self.config = config
        self.prompts = list(prompts[: config.prompts])
        self.rewards = rewards
        self.engine = engine
        self.policy = policy
        self.reference = reference
        self.sampling = config.sampling(training)
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self._base_totals_N: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether to evaluate after training step ``step``; 0 is before the first."""
        if step == 0:
            return self.config.at_start
        return self.config.every > 0 and step % self.config.every == 0

    def evaluate(self) -> Evaluated:
        """Generate, score and measure; the same prompts and random numbers every time."""
        greedy = self._roll_out(1, temperature=0.0)
        sampled = self._roll_out(self.config.samples, temperature=self.policy.temperature)
        evaluated = Evaluated(
            greedy=greedy,
            sampled=sampled,
            distance=None if self.reference is None else self._distance(sampled, self.reference),
            pieces=[token_pieces(self.policy.tokenizer, r.tokens) for r in sampled.flat],
            base_totals_N=self._base_totals_N,
            pass_threshold=self.config.pass_threshold,
        )
        if self._base_totals_N is None:
            self._base_totals_N = sampled.totals_N
        return evaluated

    def state_dict(self) -> Tensor | None:
        """What later evaluations are compared with: the first one's rewards."""
        return self._base_totals_N

    def load_state_dict(self, state: Tensor | None) -> None:
        """Compare with what ``state`` gave."""
        self._base_totals_N = state

    def _roll_out(self, samples: int, temperature: float) -> Rollouts:
        return roll_out(
            self.engine,
            self.rewards,
            self.prompts,
            samples,
            self.sampling.model_copy(update={"temperature": temperature}),
            seed=self.config.seed,
            step=EVAL_STEP,
        )

    def _distance(self, rollouts: Rollouts, reference: Reference | Policy) -> Distance:
        data = Grouped(rollouts.groups)
        parts = data.split(self.tokens_per_micro_batch)

        def logprobs(model: Reference | Policy) -> Tensor:
            return score_logprobs(model, data, parts).double().cpu()

        ref_T = logprobs(reference)
        return Distance(logprobs(self.policy) - ref_T, ref_T)


def _flat(name: str, interval: Interval | None) -> Mapping[str, float | None]:
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
