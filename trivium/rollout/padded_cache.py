"""Key-value cache for model families that cannot share a prompt, with left padding.

It has the interface of ``rollout.kv_cache.KVCache`` and uses the cache of ``transformers``. Rows
that are admitted together share one left-padded cache. Each prompt is prefilled once, and its cache
is repeated for each sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from trivium.models.policy import Policy


@dataclass
class CacheBatch:
    """Rows that were admitted together: their cache and the mask of its non-padding columns."""

    cache: DynamicCache
    token_mask_RL: Tensor


class PaddedCache:
    """Key-value cache in which each row holds its own copy of the prompt."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.batches: list[CacheBatch] = []

    def admit(self, prompts: list[list[int]], samples: int) -> Tensor:
        """Prefill ``prompts``, add ``samples`` rows for each; return last states ``[G, D]``."""
        max_length = max(map(len, prompts))
        device = self.policy.device
        tokens = torch.tensor([[0] * (max_length - len(p)) + p for p in prompts], device=device)
        length_G = torch.tensor([len(p) for p in prompts], device=device)
        token_mask = torch.arange(max_length, device=device) >= max_length - length_G[:, None]
        batch = CacheBatch(DynamicCache(config=self.policy.backbone.config), token_mask)
        hidden_GD = self._forward(batch, tokens)
        batch.cache.batch_repeat_interleave(samples)
        batch.token_mask_RL = batch.token_mask_RL.repeat_interleave(samples, 0)
        self.batches.append(batch)
        return hidden_GD

    def advance(self, tokens_R: Tensor) -> Tensor:
        """Append one token to every row and return the final hidden states ``[R, D]``."""
        tokens_per_batch = tokens_R.to(self.policy.device).split(
            [len(batch.token_mask_RL) for batch in self.batches]
        )
        states = []
        for batch, tokens in zip(self.batches, tokens_per_batch, strict=True):
            batch.token_mask_RL = torch.nn.functional.pad(batch.token_mask_RL, (0, 1), value=True)
            states.append(self._forward(batch, tokens[:, None]))
        return torch.cat(states)

    def keep(self, rows: list[int]) -> None:
        """Remove all rows except ``rows`` (ascending indices)."""
        start, kept_batches = 0, []
        for batch in self.batches:
            end = start + len(batch.token_mask_RL)
            kept_rows = torch.tensor(
                [r - start for r in rows if start <= r < end], device=self.policy.device
            )
            if len(kept_rows):
                batch.cache.batch_select_indices(kept_rows)
                batch.token_mask_RL = batch.token_mask_RL[kept_rows]
                kept_batches.append(batch)
            start = end
        self.batches = kept_batches

    def _forward(self, batch: CacheBatch, tokens: Tensor) -> Tensor:
        position = (batch.token_mask_RL.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.policy.backbone(
            input_ids=tokens,
            attention_mask=batch.token_mask_RL.long(),
            position_ids=position,
            past_key_values=batch.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]
