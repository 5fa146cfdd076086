"""Rollouts: responses sampled from the policy, with their rewards.

PPO, GRPO, online DPO, evaluation and the ``pairs`` command all use this form of sampled text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium import distributed
from trivium.data.chat import step_ends
from trivium.data.group import Group
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.maths.ragged import repeat_per_segment, segment_starts
from trivium.rewards.component import CheckedValue, columns_of
from trivium.rewards.overlap import OverlappedScoring
from trivium.rewards.reward import Rewards, Scores
from trivium.rollout.engine import Engine, number_samples
from trivium.rollout.sampling import Sampling
from trivium.serialization import serializable


@dataclass(frozen=True)
class Steps:
    """Process rewards on tokens: value and last token (index in its response) of every step."""

    rewards_S: Tensor
    ends_S: Tensor
    counts_N: Tensor


@serializable
@dataclass(frozen=True)
class Rollouts:
    """G prompts, their responses, and the scores of the flattened N responses."""

    prompts: list[Prompt]
    responses: list[list[Response]]
    scores: Scores
    seconds: dict[str, float]

    @cached_property
    def flat(self) -> list[Response]:
        return [r for group in self.responses for r in group]

    @cached_property
    def groups(self) -> list[Group]:
        return [
            Group(prompt.tokens, [r.tokens for r in group])
            for prompt, group in zip(self.prompts, self.responses, strict=True)
        ]

    @cached_property
    def sizes_G(self) -> Tensor:
        return torch.tensor([len(group) for group in self.responses])

    @cached_property
    def lengths_N(self) -> Tensor:
        return torch.tensor([len(r.tokens) for r in self.flat])

    @cached_property
    def outcomes_N(self) -> Tensor:
        """Weighted outcome reward of each response."""
        return torch.tensor(self.scores.outcomes)

    @cached_property
    def totals_N(self) -> Tensor:
        """Total reward of each response: its outcome reward plus the sum of its step rewards."""
        steps = self.scores.steps or [[] for _ in self.flat]
        return self.outcomes_N + torch.tensor([sum(v for _, v in s) for s in steps])

    @cached_property
    def sampler_logprobs_T(self) -> Tensor:
        return torch.tensor([p for r in self.flat for p in r.logprobs])

    @cached_property
    def truncated_N(self) -> Tensor:
        """Whether the length limit truncated each response."""
        return torch.tensor([r.finish_reason == "length" for r in self.flat])

    def steps(self, tokenizer: PreTrainedTokenizerBase, *, closing: bool = True) -> Steps:
        """Return process rewards at their tokens, without outcome rewards.

        Steps that end in the same token become one step with the sum of their rewards. Tokens after
        the end of the text, such as the EOS, belong to the step that ends there, because ending the
        response would otherwise get no reward. With ``closing=False`` they belong to no step.
        """
        assert self.scores.steps is not None, "no reward returned steps"
        values_by_token = [
            _step_values_by_token(tokenizer, response, steps, closing)
            for response, steps in zip(self.flat, self.scores.steps, strict=True)
        ]
        return _to_steps(values_by_token)

    def steps_with_outcomes(self, tokenizer: PreTrainedTokenizerBase) -> Steps:
        """Return process rewards with each response's outcome reward added to its last step.

        A response without steps counts as one step, at its last token, with its outcome reward.
        """
        assert self.scores.steps is not None, "no reward returned steps"
        values_by_token = []
        rows = zip(self.flat, self.scores.steps, self.scores.outcomes, strict=True)
        for response, steps, outcome in rows:
            step_values = _step_values_by_token(tokenizer, response, steps)
            last = max(step_values, default=len(response.tokens) - 1)
            values_by_token.append({**step_values, last: step_values.get(last, 0.0) + outcome})
        return _to_steps(values_by_token)

    def step_rewards(self, tokenizer: PreTrainedTokenizerBase, like_T: Tensor) -> Tensor | None:
        """Return process rewards at the last token of their step, ``[T]``, or None without any."""
        if self.scores.steps is None:
            return None
        steps = self.steps(tokenizer)
        token_S = repeat_per_segment(segment_starts(self.lengths_N), steps.counts_N) + steps.ends_S
        rewards_S = steps.rewards_S.to(like_T)
        return torch.zeros_like(like_T).index_add(0, token_S.to(like_T.device), rewards_S)

    def metrics(self) -> dict[str, float]:
        """Return reward and length metrics by name."""
        lengths = self.lengths_N.float()
        result = {
            "reward/mean": float(self.totals_N.mean()),
            "reward/std": float(self.totals_N.std(correction=0)),
            "length/empty": sum(not r.text.strip() for r in self.flat) / len(self.flat),
            "length/mean": float(lengths.mean()),
            "length/min": float(lengths.min()),
            "length/max": float(lengths.max()),
            "length/truncated": float(self.truncated_N.float().mean()),
            "tokens/generated": float(lengths.sum()),
        }
        for name, values in self.scores.components.items():
            applied = [value for value in values if value is not None]
            if applied:
                result[f"rewards/{name}/mean"] = statistics.fmean(applied)
                result[f"rewards/{name}/std"] = statistics.pstdev(applied)
            if len(applied) < len(values):
                result[f"rewards/{name}/applied"] = len(applied) / len(values)
        for name, count in self.scores.fallbacks.items():
            result[f"rewards/{name}/fallbacks"] = float(count)
        for stage, seconds in self.seconds.items():
            result[f"time/{stage}"] = seconds
        return result


def _step_values_by_token(
    tokenizer: PreTrainedTokenizerBase,
    response: Response,
    steps: list[tuple[int, float]],
    closing: bool = True,
) -> dict[int, float]:
    """Return step values by the index of the token in which the step ends."""
    values_by_token: dict[int, float] = {}
    tokens = step_ends(tokenizer, response.tokens, [end for end, _ in steps])
    if closing and steps and steps[-1][0] >= len(response.text.rstrip()):
        tokens[-1] = len(response.tokens) - 1
    for token, (_, value) in zip(tokens, steps, strict=True):
        values_by_token[token] = values_by_token.get(token, 0.0) + value
    return values_by_token


def _to_steps(values_by_token: list[dict[int, float]]) -> Steps:
    ordered = [sorted(step_values.items()) for step_values in values_by_token]
    return Steps(
        rewards_S=torch.tensor([value for step_values in ordered for _, value in step_values]),
        ends_S=torch.tensor(
            [token for step_values in ordered for token, _ in step_values], dtype=torch.long
        ),
        counts_N=torch.tensor([len(step_values) for step_values in ordered]),
    )


def roll_out(
    engine: Engine,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    *,
    seed: int,
    step: int,
) -> Rollouts:
    """Sample ``samples`` responses per prompt and score them; scoring may overlap sampling.

    Each process samples and scores the responses to its share of the prompts.
    """
    request = own_request(prompts, samples, sampling=sampling, seed=seed, step=step)
    columns = columns_of(prompts)

    def sample_and_score() -> tuple[list[list[Response]], CheckedGroups, dict[str, float]]:
        mine, start = request["prompts"], time.perf_counter()
        with OverlappedScoring(rewards.while_sampling, mine, columns) as scoring:
            groups = engine.generate(**request, finished=scoring.add)
            sampling_end = time.perf_counter()
            checked = _check_groups(rewards, mine, groups, columns, scoring.results(groups))
        end = time.perf_counter()
        return groups, checked, {"rollout": sampling_end - start, "scoring": end - sampling_end}

    shares = distributed.gather("rollouts", sample_and_score, plan=[p.index for p in prompts])
    responses = distributed.in_order([groups for groups, _, _ in shares], len(prompts))
    scores = _combine(rewards, prompts, responses, [checked for _, checked, _ in shares])
    seconds = {k: max(share[2][k] for share in shares) for k in ("rollout", "scoring")}
    return Rollouts(list(prompts), responses, scores, seconds)


def own_request(prompts: Sequence[Prompt], samples: int, **how: Any) -> dict[str, Any]:
    """Return this process's share of a request, with the keys that the prompts have in all of it.

    ``how`` are the other arguments of ``Engine.generate``.
    """
    first_samples = number_samples(prompts, samples)
    return {
        "prompts": distributed.own(prompts),
        "samples": samples,
        "first_samples": distributed.own(first_samples),
        **how,
    }


def score_groups(
    rewards: Rewards, prompts: Sequence[Prompt], responses: Sequence[list[Response]]
) -> Scores:
    """Score responses that all processes hold; each process scores those to its prompts."""
    mine, groups = distributed.own(prompts), distributed.own(responses)
    columns = columns_of(prompts)
    shares = distributed.gather(
        "rewards", lambda: _check_groups(rewards, mine, groups, columns), plan=len(prompts)
    )
    return _combine(rewards, prompts, responses, shares)


CheckedGroups = dict[str, list[list[CheckedValue]]]
"""Per reward, the checked values of each group's responses."""


def _check_groups(
    rewards: Rewards,
    prompts: Sequence[Prompt],
    groups: Sequence[list[Response]],
    columns: Collection[str],
    precomputed: Mapping[str, list[CheckedValue]] = MappingProxyType({}),
) -> CheckedGroups:
    """Return the values of rewards that need not see the whole batch."""
    repeated = [p for p, group in zip(prompts, groups, strict=True) for _ in group]
    flat = [r for group in groups for r in group]
    checked = rewards.check_values(repeated, flat, columns, precomputed)
    ends = [0, *accumulate(len(group) for group in groups)]
    return {name: [v[a:b] for a, b in pairwise(ends)] for name, v in checked.items()}


def _combine(
    rewards: Rewards,
    prompts: Sequence[Prompt],
    responses: Sequence[list[Response]],
    shares: Sequence[CheckedGroups],
) -> Scores:
    """Return the scores of a batch from the values that each process computed."""
    repeated = [p for p, group in zip(prompts, responses, strict=True) for _ in group]
    flat = [r for group in responses for r in group]
    checked = {
        name: list(chain(*distributed.in_order([share[name] for share in shares], len(prompts))))
        for name in shares[0]
        if all(name in share for share in shares)
    }
    if rewards.need_whole_batch:
        checked |= distributed.from_rank_0(
            "rewards of the whole batch", lambda: rewards.check_whole_batch(repeated, flat)
        )
    return rewards.score(repeated, flat, checked)


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Concatenate rollout batches."""
    steps = [part.scores.steps for part in parts]
    scores = Scores(
        outcomes=[x for part in parts for x in part.scores.outcomes],
        steps=None if steps[0] is None else [s for part in steps for s in part or []],
        components={
            name: [x for part in parts for x in part.scores.components[name]]
            for name in parts[0].scores.components
        },
        fallbacks={
            name: sum(part.scores.fallbacks.get(name, 0) for part in parts)
            for name in parts[0].scores.fallbacks
        },
    )
    return Rollouts(
        prompts=[p for part in parts for p in part.prompts],
        responses=[g for part in parts for g in part.responses],
        scores=scores,
        seconds={k: sum(part.seconds[k] for part in parts) for k in parts[0].seconds},
    )


def chosen_groups(rollouts: Rollouts, keep_G: Sequence[int]) -> Rollouts:
    """Return a rollout batch with only the groups ``keep_G``."""
    starts = (torch.cumsum(rollouts.sizes_G, 0) - rollouts.sizes_G).tolist()
    flat = [starts[g] + j for g in keep_G for j in range(int(rollouts.sizes_G[g]))]
    scores = rollouts.scores
    kept = Scores(
        outcomes=[scores.outcomes[i] for i in flat],
        steps=None if scores.steps is None else [scores.steps[i] for i in flat],
        components={name: [xs[i] for i in flat] for name, xs in scores.components.items()},
        fallbacks=scores.fallbacks,
    )
    prompts = [rollouts.prompts[g] for g in keep_G]
    return Rollouts(prompts, [rollouts.responses[g] for g in keep_G], kept, rollouts.seconds)
