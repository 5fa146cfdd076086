"""Evaluation on held-out prompts: quality, distance from the reference, length, fluency.

Every method is evaluated in the same way. Greedy and sampled responses are generated and scored by
the rewards. The policy and the reference score the sampled responses, which gives the KL divergence
and the responses' log-probs under the reference; no loss or reward controls these directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trivium.data.batch import Grouped
from trivium.data.chat import token_pieces
from trivium.data.oom import score_logprobs
from trivium.data.prompts import Prompt
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.evaluation.samples import Rows, sample_rows
from trivium.evaluation.statistics import distinct_words, pass_at_k, repetition, wins
from trivium.maths.intervals import SHARE, UNBOUNDED, Interval, mean_interval
from trivium.maths.ragged import segment_sum
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import Rewards
from trivium.rollout.engine import EVAL_STEP, Engine
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.rollout.sampling import Sampling


@dataclass(frozen=True)
class ReferenceScores:
    """Log-ratios log π − log π_ref and log-probs under π_ref of the sampled tokens."""

    log_ratio_T: Tensor
    ref_logprobs_T: Tensor


@dataclass(frozen=True)
class Evaluated:
    """Responses of one evaluation, with the metrics that follow from them.

    Attributes:
        greedy: one greedy response per prompt.
        sampled: sampled responses per prompt.
        reference_scores: scores of the sampled responses; None without a reference.
        pieces: text of every token of each sampled response.
        base_totals_N: rewards of the first evaluation's sampled responses; None in the first.
        pass_threshold: smallest reward that passes; None for rewards of 0 and 1.
    """

    greedy: Rollouts
    sampled: Rollouts
    reference_scores: ReferenceScores | None
    pieces: list[list[str]]
    base_totals_N: Tensor | None = None
    pass_threshold: float | None = None

    @property
    def greedy_reward(self) -> Interval:
        """Mean reward of the greedy responses."""
        return mean_interval(self.greedy.totals_N.tolist())

    @property
    def sampled_reward(self) -> Interval:
        """Mean reward of the sampled responses; the samples of a prompt are one observation."""
        return mean_interval(self._by_prompt(self.sampled.totals_N).mean(1).tolist())

    @property
    def kl(self) -> Interval | None:
        """``Σ_t log π(o_t) − log π_ref(o_t)``, averaged over sampled responses."""
        if self.reference_scores is None:
            return None
        kl_N = segment_sum(self.reference_scores.log_ratio_T, self.sampled.lengths_N)
        return mean_interval(self._by_prompt(kl_N).mean(1).tolist(), bounds=UNBOUNDED)

    @property
    def win_rate(self) -> Interval | None:
        """Share of comparisons that a sampled response wins against the base; ties count half."""
        if self.base_totals_N is None:
            return None
        rewards, base = map(self._by_prompt, (self.sampled.totals_N, self.base_totals_N))
        return mean_interval(wins(rewards.tolist(), base.tolist()), bounds=SHARE)

    def record(self) -> dict[str, Any]:
        """Return the metrics as flat numbers for a JSON line or a table."""
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
                if self.reference_scores is None
                else float(self.reference_scores.ref_logprobs_T.sum()) / tokens
            ),
            "pass_at": self._pass_at(),
            **_flat("win_rate", self.win_rate),
        }

    def outcomes(self) -> dict[str, Any]:
        """Return the reward of every response, by prompt."""
        return {
            "index": [prompt.index for prompt in self.sampled.prompts],
            "greedy": self.greedy.totals_N.tolist(),
            "sampled": self._by_prompt(self.sampled.totals_N).tolist(),
        }

    def samples(self, prompts: int) -> Rows:
        """Return records of the greedy and sampled responses to the first `prompts` prompts."""
        greedy = sample_rows(self.greedy, "greedy", prompts)
        scores = self.reference_scores
        ratios = None if scores is None else scores.log_ratio_T
        sampled = sample_rows(
            self.sampled, "sampled", prompts, pieces=self.pieces, log_ratio_T=ratios
        )
        return greedy + sampled

    def _by_prompt(self, values_N: Tensor) -> Tensor:
        return values_N.view(len(self.sampled.prompts), -1)

    def _pass_at(self) -> dict[str, float]:
        """Return pass@k for powers of two up to the number of samples; {} if it is undefined."""
        totals = self._by_prompt(self.sampled.totals_N)
        limit = self.pass_threshold
        if limit is None:
            if not bool(((totals == 0) | (totals == 1)).all()):
                return {}
            limit = 1.0
        passed = (totals >= limit).sum(1).tolist()
        n = totals.shape[1]
        ks = [1 << i for i in range(n.bit_length()) if 1 << i <= n]
        return {str(k): sum(pass_at_k(n, c, k) for c in passed) / len(passed) for k in ks}


@dataclass(frozen=True)
class Measured:
    """Held-out metrics that need no responses, with an evaluation of responses if there is one."""

    numbers: Mapping[str, Any]
    responses: Evaluated | None = None

    def record(self) -> dict[str, Any]:
        """Return the metrics as flat numbers."""
        return {**({} if self.responses is None else self.responses.record()), **self.numbers}

    def samples(self, prompts: int) -> Rows:
        """Return records of the responses to the first `prompts` prompts."""
        return [] if self.responses is None else self.responses.samples(prompts)

    def outcomes(self) -> dict[str, Any]:
        """Return the reward of every response, by prompt."""
        return {} if self.responses is None else self.responses.outcomes()


class Evaluator:
    """Evaluator of a policy on held-out prompts, called repeatedly during a run."""

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
        """Return whether to evaluate after training step ``step``; 0 is before the first."""
        if step == 0:
            return self.config.at_start
        return self.config.every > 0 and step % self.config.every == 0

    def evaluate(self) -> Evaluated:
        """Generate, score and measure, with the same prompts and random numbers every time."""
        greedy = self._roll_out(1, temperature=0.0)
        sampled = self._roll_out(self.config.samples, temperature=self.policy.temperature)
        evaluated = Evaluated(
            greedy=greedy,
            sampled=sampled,
            reference_scores=self._reference_scores(sampled),
            pieces=[token_pieces(self.policy.tokenizer, r.tokens) for r in sampled.flat],
            base_totals_N=self._base_totals_N,
            pass_threshold=self.config.pass_threshold,
        )
        if self._base_totals_N is None:
            self._base_totals_N = sampled.totals_N
        return evaluated

    def state_dict(self) -> Tensor | None:
        """Return the first evaluation's rewards, which win rates compare with."""
        return self._base_totals_N

    def load_state_dict(self, state: Tensor | None) -> None:
        """Restore the rewards that ``state_dict`` returned."""
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

    def _reference_scores(self, rollouts: Rollouts) -> ReferenceScores | None:
        if self.reference is None:
            return None
        data = Grouped(rollouts.groups)
        micro_batches = data.split(self.tokens_per_micro_batch)

        def logprobs(model: Reference | Policy) -> Tensor:
            return score_logprobs(model, data, micro_batches).double().cpu()

        ref_T = logprobs(self.reference)
        return ReferenceScores(logprobs(self.policy) - ref_T, ref_T)


def _flat(name: str, interval: Interval | None) -> Mapping[str, float | None]:
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = interval.ends()
    return {name: interval.mean, f"{name}_low": low, f"{name}_high": high}
