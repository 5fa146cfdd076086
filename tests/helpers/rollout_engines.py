"""Engines, prompts and cache checks that several tests of sampling share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.tiny_models import EOS, family, letters_tokenizer, random_lm
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.models.policy import Policy
from trivium.rollout.kv_cache import KVCache
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling

LENGTHS = (3, 1, 7, 2, 5, 4)


SAMPLING = Sampling(max_tokens=12)


def prompts_of(lengths: Sequence[int] = LENGTHS, vocabulary: int = 13) -> list[Prompt]:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [Prompt(tokens, "", {}, index) for index, tokens in enumerate(rows)]


def policy_of(name: str = "llama", temperature: float = 1.0, **options: object) -> Policy:
    model = random_lm(family(name, 13, **options), spread=0.2)
    return Policy(model, letters_tokenizer(), temperature=temperature)


def engine_of(policy: Policy, max_rows: int = 512) -> LocalEngine:
    return LocalEngine(policy, {EOS}, max_rows=max_rows)


def tokens_of(responses: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[r.tokens for r in group] for group in responses]


@torch.no_grad()
def check_rows_against_backbone(policy: Policy, cache: KVCache) -> None:
    """Admit and remove rows, and compare their hidden states with those of the backbone."""
    generator = torch.Generator().manual_seed(3)
    rows: list[list[int]] = []
    for admitted in ([7, 3], [5, 5], [2]):
        prompts = [p.tokens for p in prompts_of(admitted)]
        hidden = cache.admit(prompts, 3)
        torch.testing.assert_close(hidden, last_states(policy, prompts), atol=1e-5, rtol=0)
        rows += [list(prompt) for prompt in prompts for _ in range(3)]
        for removed in ((), (0, 1, 2), (), (1,), ()):
            tokens = torch.randint(1, 13, (len(rows),), generator=generator)
            rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]
            hidden = cache.advance(tokens)
            torch.testing.assert_close(hidden, last_states(policy, rows), atol=1e-5, rtol=0)
            kept = [i for i in range(len(rows)) if i not in removed]
            cache.keep(kept)
            rows = [rows[i] for i in kept]


def last_states(policy: Policy, rows: list[list[int]]) -> Tensor:
    """Return the final hidden state of each row, computed one row at a time by the backbone."""
    implementation = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("eager")
    try:
        states = [policy.backbone(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    finally:
        policy.model.set_attn_implementation(implementation)
    return torch.stack(states)
