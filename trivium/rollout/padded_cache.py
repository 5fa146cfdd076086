"""Growing rows for model families that cannot share a prompt: ``transformers``' own cache.

Same interface as ``rollout.kv_cache.KVCache``. Rows admitted together form a cohort with one cache,
left-padded; prompts are read once and their cache repeated for each sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from trivium.models.policy import Policy


@dataclass
class CacheBatch:
    """Rows that were admitted together: their cache, and which of its columns hold tokens."""

    cache: DynamicCache
    held_RL: Tensor


class PaddedCache:
    """Rows that grow one token at a time, each with a cache of its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.batches: list[CacheBatch] = []

    def admit(self, prompts: list[list[int]], samples: int) -> Tensor:
        """Read ``prompts``, open ``samples`` rows for each, return their last states ``[G, D]``."""
        longest = max(map(len, prompts))
        device = self.policy.device
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        length_G = torch.tensor([len(p) for p in prompts], device=device)
        held = torch.arange(longest, device=device) >= longest - length_G[:, None]
        batch = CacheBatch(DynamicCache(config=self.policy.backbone.config), held)
        hidden_GD = self._forward(batch, tokens)
        batch.cache.batch_repeat_interleave(samples)
        batch.held_RL = batch.held_RL.repeat_interleave(samples, 0)
        self.batches.append(batch)
        return hidden_GD

    def advance(self, tokens_R: Tensor) -> Tensor:
        """Feed every row its next token; final hidden states ``[R, D]``."""
        parts = tokens_R.to(self.policy.device).split([len(c.held_RL) for c in self.batches])
        states = []
        for batch, tokens in zip(self.batches, parts, strict=True):
            batch.held_RL = torch.nn.functional.pad(batch.held_RL, (0, 1), value=True)
            states.append(self._forward(batch, tokens[:, None]))
        return torch.cat(states)

    def keep(self, rows: list[int]) -> None:
        """Let all rows but these (indices, ascending) go."""
        start, kept = 0, []
        for batch in self.batches:
            end = start + len(batch.held_RL)
            mine = torch.tensor(
                [r - start for r in rows if start <= r < end], device=self.policy.device
            )
            if len(mine):
                batch.cache.batch_select_indices(mine)
                batch.held_RL = batch.held_RL[mine]
                kept.append(batch)
            start = end
        self.batches = kept

    def _forward(self, batch: CacheBatch, tokens: Tensor) -> Tensor:
        position = (batch.held_RL.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.policy.backbone(
            input_ids=tokens,
            attention_mask=batch.held_RL.long(),
            position_ids=position,
            past_key_values=batch.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]
