"""Rollouts: responses sampled from the policy, with what the rewards say of them.

The one form in which PPO, GRPO, online DPO, evaluation and the ``pairs`` command meet sampled text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.data.chat import step_ends
from trivium.data.group import Group
from trivium.data.prompts import Prompt
from trivium.maths.ragged import repeat_per_segment, segment_starts
from trivium.rewards.overlap import OverlappedScoring
from trivium.rewards.reward import Rewards, Scores
from trivium.rollout.engine import Engine, Response
from trivium.rollout.sampling import Sampling
from trivium.serialization import serializable


@dataclass(frozen=True)
class Steps:
    """Process rewards on tokens: value and last token (inside its response) of every step."""

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
        """Weighted outcome rewards."""
        return torch.tensor(self.scores.outcomes)

    @cached_property
    def totals_N(self) -> Tensor:
        """The whole reward of each response: its outcome and the sum of its steps."""
        steps = self.scores.steps or [[] for _ in self.flat]
        return self.outcomes_N + torch.tensor([sum(v for _, v in s) for s in steps])

    @cached_property
    def sampler_logprobs_T(self) -> Tensor:
        return torch.tensor([p for r in self.flat for p in r.logprobs])

    @cached_property
    def truncated_N(self) -> Tensor:
        """Which responses ran into the length limit."""
        return torch.tensor([r.finish_reason == "length" for r in self.flat])

    def steps(self, tokenizer: PreTrainedTokenizerBase, *, closing: bool = True) -> Steps:
        """Process rewards at their tokens, outcome rewards left aside.

        Steps that end in the same token are one step, with the sum of their rewards. What follows
        the text's end, such as the EOS, belongs to the step that ends there (ending is part of it,
        and would otherwise never be learned), unless ``closing`` is false.
        """
        assert self.scores.steps is not None, "no reward gave steps"
        placed = [
            _place(tokenizer, response, steps, closing)
            for response, steps in zip(self.flat, self.scores.steps, strict=True)
        ]
        return _as_steps(placed)

    def steps_with_outcomes(self, tokenizer: PreTrainedTokenizerBase) -> Steps:
        """Process rewards with each response's outcome reward added to its last step.

        A response without steps counts as one step, at its last token, with its outcome reward.
        """
        assert self.scores.steps is not None, "no reward gave steps"
        placed = []
        rows = zip(self.flat, self.scores.steps, self.scores.outcomes, strict=True)
        for response, steps, outcome in rows:
            at = _place(tokenizer, response, steps)
            last = max(at, default=len(response.tokens) - 1)
            placed.append({**at, last: at.get(last, 0.0) + outcome})
        return _as_steps(placed)

    def step_rewards(self, tokenizer: PreTrainedTokenizerBase, like_T: Tensor) -> Tensor | None:
        """Process rewards at the last token of their step, ``[T]``; None where there are none."""
        if self.scores.steps is None:
            return None
        steps = self.steps(tokenizer)
        token_S = repeat_per_segment(segment_starts(self.lengths_N), steps.counts_N) + steps.ends_S
        rewards_S = steps.rewards_S.to(like_T)
        return torch.zeros_like(like_T).index_add(0, token_S.to(like_T.device), rewards_S)

    def metrics(self) -> dict[str, float]:
        """Rewards and lengths by their standard names."""
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
            result[f"rewards/{name}/mean"] = statistics.fmean(values)
            result[f"rewards/{name}/std"] = statistics.pstdev(values)
        for name, count in self.scores.fallbacks.items():
            result[f"rewards/{name}/fallbacks"] = float(count)
        for stage, seconds in self.seconds.items():
            result[f"time/{stage}"] = seconds
        return result


def _place(
    tokenizer: PreTrainedTokenizerBase,
    response: Response,
    steps: list[tuple[int, float]],
    closing: bool = True,
) -> dict[int, float]:
    """Step values by the token in which the step ends."""
    placed: dict[int, float] = {}
    tokens = step_ends(tokenizer, response.tokens, [end for end, _ in steps])
    if closing and steps and steps[-1][0] >= len(response.text.rstrip()):
        tokens[-1] = len(response.tokens) - 1
    for token, (_, value) in zip(tokens, steps, strict=True):
        placed[token] = placed.get(token, 0.0) + value
    return placed


def _as_steps(placed: list[dict[int, float]]) -> Steps:
    ordered = [sorted(at.items()) for at in placed]
    return Steps(
        rewards_S=torch.tensor([value for at in ordered for _, value in at]),
        ends_S=torch.tensor([token for at in ordered for token, _ in at], dtype=torch.long),
        counts_N=torch.tensor([len(at) for at in ordered]),
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
    """Sample ``samples`` responses per prompt and score them, some while others are sampled."""
    start = time.perf_counter()
    with OverlappedScoring(rewards.while_sampling, prompts) as early:
        responses = engine.generate(
            prompts, samples, sampling, seed=seed, step=step, finished=early.add
        )
        sampled = time.perf_counter()
        repeated = [p for p, group in zip(prompts, responses, strict=True) for _ in group]
        flat = [r for group in responses for r in group]
        scores = rewards.score(repeated, flat, early.found(responses))
    seconds = {"rollout": sampled - start, "scoring": time.perf_counter() - sampled}
    return Rollouts(list(prompts), responses, scores, seconds)


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Several rollout batches as one."""
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
    """Only these groups of a rollout batch."""
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
