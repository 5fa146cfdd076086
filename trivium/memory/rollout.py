"""Memory of a rollout: KV caches, the forward pass over prompts, and sampling a token.

The engine's own cache and sampling code run on tensors without data, but only at the steps where
memory grows: the prompt pass, every growth of the response KV, and the last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.memory.dry_run import CACHE, DryRun
from trivium.models.policy import Policy
from trivium.rollout.engine import draw, uniforms
from trivium.rollout.kv_cache import BLOCK_TOKENS, KVCache, PromptLayout
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.padded_cache import PaddedCache
from trivium.rollout.sampling import Sampling


class CountedCache(KVCache):
    """The engine's KV cache, whose tensors are counted in the ledger."""

    def __init__(self, policy: Policy, run: DryRun, role: str) -> None:
        super().__init__(policy)
        self.run, self.role = run, role

    def _store(self, layout: PromptLayout, rows: int) -> None:
        super()._store(layout, rows)
        self._count()

    def _lengthen(self, longest: int) -> None:
        super()._lengthen(longest)
        self._count()

    def _count(self) -> None:
        for layer in self.layers.values():
            self.run.ledger.tag(vars(layer).values(), self.role, CACHE)


@torch.no_grad()
def dry_rollout(
    run: DryRun,
    policy: Policy,
    role: str,
    prompt_lengths: Sequence[int],
    samples: int,
    max_tokens: int,
    sampling: Sampling,
) -> None:
    """Simulate a rollout of ``samples`` responses of ``max_tokens`` tokens to each prompt.

    The number of concurrent prompts is the engine's maximum. All responses have the maximum length,
    which is an upper bound.
    """
    prompt_capacity = max(1, LocalEngine(policy, ()).max_rows // samples)
    prompts = [[0] * length for length in sorted(prompt_lengths, reverse=True)[:prompt_capacity]]
    grow = _grow_shared if policy.shared else _grow_separate
    with run:
        for hidden_RD in grow(run, policy, role, prompts, samples, max_tokens):
            _sample_token(policy, hidden_RD, sampling)


def _grow_shared(
    run: DryRun,
    policy: Policy,
    role: str,
    prompts: list[list[int]],
    samples: int,
    max_tokens: int,
) -> Iterator[Tensor]:
    cache = CountedCache(policy, run, role)
    yield cache.admit(prompts, samples).repeat_interleave(samples, 0)
    tokens_R = torch.zeros(len(prompts) * samples, dtype=torch.long)
    for length in growing_lengths(max_tokens):
        cache.length_S.fill_(length)
        yield cache.advance(tokens_R)


def growing_lengths(max_tokens: int) -> list[int]:
    """Return the response lengths at which the response KV doubles, and that before the last
    token."""
    lengths, capacity = [], BLOCK_TOKENS
    while capacity < max_tokens - 2:
        lengths.append(capacity)
        capacity *= 2
    return [*lengths, max_tokens - 2] if max_tokens > 1 else []


def _grow_separate(
    run: DryRun,
    policy: Policy,
    role: str,
    prompts: list[list[int]],
    samples: int,
    max_tokens: int,
) -> Iterator[Tensor]:
    cache = PaddedCache(policy)
    yield cache.admit(prompts, samples).repeat_interleave(samples, 0)
    (batch,) = cache.batches
    extra = max(0, max_tokens - 2)
    batch.token_mask_RL = F.pad(batch.token_mask_RL, (0, extra), value=True)
    for layer in cast(list[Any], batch.cache.layers):
        layer.keys, layer.values = (F.pad(x, (0, 0, 0, extra)) for x in (layer.keys, layer.values))
        run.ledger.tag([layer.keys, layer.values], role, CACHE)
    if max_tokens > 1:
        yield cache.advance(torch.zeros(len(prompts) * samples, dtype=torch.long))


def _sample_token(policy: Policy, hidden_RD: Tensor, sampling: Sampling) -> None:
    logits_RV = policy.head.logits(hidden_RD, sampling.temperature or 1.0)
    keys_R = torch.zeros(len(hidden_RD), dtype=torch.long)
    draw(logits_RV, uniforms(keys_R, keys_R), sampling)
