"""Engines, prompts and caches that several tests of sampling share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.tiny_models import EOS, family, letters_tokenizer, random_lm
from trivium.data.prompts import Prompt
from trivium.models.policy import Policy
from trivium.rollout.engine import Response
from trivium.rollout.kv_cache import KVCache
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling

LENGTHS = (3, 1, 7, 2, 5, 4)


FREE = Sampling(max_tokens=12)


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
def rows_see_what_is_theirs(policy: Policy, cache: KVCache) -> None:
    """Let rows come and go, and hold their states to those of the backbone."""
    drawn = torch.Generator().manual_seed(3)
    rows: list[list[int]] = []
    for admitted in ([7, 3], [5, 5], [2]):
        prompts = [p.tokens for p in prompts_of(admitted)]
        found = cache.admit(prompts, 3)
        torch.testing.assert_close(found, last_states(policy, prompts), atol=1e-5, rtol=0)
        rows += [list(prompt) for prompt in prompts for _ in range(3)]
        for leaving in ((), (0, 1, 2), (), (1,), ()):
            tokens = torch.randint(1, 13, (len(rows),), generator=drawn)
            rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]
            found = cache.advance(tokens)
            torch.testing.assert_close(found, last_states(policy, rows), atol=1e-5, rtol=0)
            staying = [i for i in range(len(rows)) if i not in leaving]
            cache.keep(staying)
            rows = [rows[i] for i in staying]


def last_states(policy: Policy, rows: list[list[int]]) -> Tensor:
    """The final hidden state behind each row, one at a time by the backbone itself."""
    implementation = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("eager")
    try:
        states = [policy.backbone(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    finally:
        policy.model.set_attn_implementation(implementation)
    return torch.stack(states)
