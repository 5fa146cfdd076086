"""Cache for models whose rotary frequencies depend on a sequence's length (``models.rotary``).

Rows of equal frequencies grow together in a cache of their own. A row whose frequencies change with
its next token is computed again, as ``transformers`` does for one sequence: with LongRoPE once,
beyond the original context of dynamic NTK at every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivium.models.rotary import FrequencyKey
from trivium.rollout.kv_cache import KVCache
from trivium.rollout.padded_cache import PaddedCache


@dataclass
class _Part:
    """Rows of equal frequencies, in the order of ``cache``."""

    cache: KVCache | PaddedCache
    rows: list[int] = field(default_factory=list)


class FrequencyCache:
    """Key-value cache in which every row is computed as if it were alone.

    It has the interface of ``rollout.kv_cache.KVCache``.

    Args:
        key: the policy's ``frequency_key``.
        make: returns an empty cache of the policy.
    """

    def __init__(self, key: FrequencyKey, make: Callable[[], KVCache | PaddedCache]) -> None:
        self.key, self.make = key, make
        self.tokens: dict[int, list[int]] = {}
        self.parts: dict[tuple[int, ...], _Part] = {}
        self._opened = 0

    def admit(self, prompts: list[list[int]], samples: int) -> Tensor:
        """Process ``prompts``, open ``samples`` rows for each; return last states ``[G, D]``."""
        opened = [[self._open(prompt) for _ in range(samples)] for prompt in prompts]
        states: dict[int, Tensor] = {}
        self._admit(opened, states)
        return torch.stack([states[rows[0]] for rows in opened])

    def advance(self, tokens_R: Tensor) -> Tensor:
        """Append one token to every row and return the final hidden states ``[R, D]``."""
        for row, token in zip(self.tokens, tokens_R.tolist(), strict=True):
            self.tokens[row].append(token)
        changed = [
            row
            for key, part in self.parts.items()
            for row in part.rows
            if self.key(len(self.tokens[row])) != key
        ]
        self._keep(set(self.tokens) - set(changed))
        states: dict[int, Tensor] = {}
        for part in self.parts.values():
            last_R = torch.tensor([self.tokens[row][-1] for row in part.rows])
            states.update(zip(part.rows, part.cache.advance(last_R), strict=True))
        self._admit([[row] for row in changed], states)
        return torch.stack([states[row] for row in self.tokens])

    def keep(self, rows: list[int]) -> None:
        """Remove all rows except ``rows`` (ascending indices)."""
        names = list(self.tokens)
        self.tokens = {names[i]: self.tokens[names[i]] for i in rows}
        self._keep(set(self.tokens))

    def _open(self, prompt: list[int]) -> int:
        self._opened += 1
        self.tokens[self._opened] = list(prompt)
        return self._opened

    def _admit(self, opened: list[list[int]], states: dict[int, Tensor]) -> None:
        """Compute rows, of which those of one list have the same tokens, and add their states."""
        keys = [self.key(len(self.tokens[rows[0]])) for rows in opened]
        for key in dict.fromkeys(keys):
            new = [rows for rows, found in zip(opened, keys, strict=True) if found == key]
            part = self.parts.setdefault(key, _Part(self.make()))
            hidden_GD = part.cache.admit([self.tokens[rows[0]] for rows in new], len(new[0]))
            states |= {row: h_D for rows, h_D in zip(new, hidden_GD, strict=True) for row in rows}
            part.rows += [row for rows in new for row in rows]

    def _keep(self, kept: set[int]) -> None:
        for key, part in list(self.parts.items()):
            stay = [i for i, row in enumerate(part.rows) if row in kept]
            if not stay:
                del self.parts[key]
            elif len(stay) < len(part.rows):
                part.cache.keep(stay)
                part.rows = [part.rows[i] for i in stay]
