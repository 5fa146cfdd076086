"""Rollout engine that samples from a policy in the same process.

Each prompt is prefilled once, and all its samples share its key-value cache. A prompt that is the
beginning of the next one shares that cache too. Finished rows leave the batch, and waiting prompts
take their place. The engine uses the policy's own weights, so no weights are copied after an
update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from trivium.data.chat import decode_response
from trivium.data.prompts import Prompt
from trivium.data.response import FinishReason, Response
from trivium.errors import ModelError
from trivium.models import flops
from trivium.models.logprobs import Head
from trivium.models.policy import Policy
from trivium.rollout.cuda_graphs import CudaGraphs, GraphedCache, graphs_work
from trivium.rollout.engine import Finished, draw, number_samples, row_key, uniforms
from trivium.rollout.frequency_cache import FrequencyCache
from trivium.rollout.kv_cache import KVCache
from trivium.rollout.padded_cache import PaddedCache
from trivium.rollout.sampling import Sampling

Cache = KVCache | PaddedCache | FrequencyCache
UNIFORMS_PER_CALL = 64
"""Number of tokens of a row whose random numbers are computed in one call."""


class Row:
    """State of one response during sampling."""

    def __init__(self, prompt: int, key: int) -> None:
        self.prompt = prompt
        self.key = key
        self.uniforms: list[float] = []
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None


class LocalEngine:
    """Engine that samples from a policy in this process.

    Args:
        policy: model and tokenizer.
        end_tokens: token ids that end a response (EOS).
        max_rows: maximum number of responses that are sampled at the same time.
    """

    def __init__(self, policy: Policy, end_tokens: Collection[int], *, max_rows: int = 512) -> None:
        self.policy = policy
        self.end_tokens = end_tokens
        self.max_rows = max_rows

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        first_samples: Sequence[int] | None = None,
        finished: Finished | None = None,
    ) -> list[list[Response]]:
        """Return ``samples`` responses for each prompt, in order (see ``rollout.engine``)."""
        self._check_context_length(prompts, sampling)
        if first_samples is None:
            first_samples = number_samples(prompts, samples)
        rows = [
            [Row(i, row_key(seed, step, prompt.index, first + j)) for j in range(samples)]
            for i, (prompt, first) in enumerate(zip(prompts, first_samples, strict=True))
        ]
        waiting = deque(self._chains(prompts, samples))
        head = self.policy.head
        cache = self._cache()
        responses: list[list[Response]] = [[] for _ in prompts]
        active: list[Row] = []
        while waiting or active:
            admitted = self._admit(waiting, len(active), samples)
            if admitted:
                new_rows = [row for chain in admitted for i in chain for row in rows[i]]
                hidden_BD = _prefill(cache, prompts, admitted, samples)
                self._sample_tokens(
                    new_rows, head, hidden_BD.repeat_interleave(samples, 0), sampling
                )
                active += new_rows
            unfinished = self._evict_finished(active, cache)
            for i in _finished_prompts(active, unfinished):
                responses[i] = [self._response(row) for row in rows[i]]
                if finished is not None:
                    _notify(finished, i, responses[i])
            active = unfinished
            if active:
                tokens_R = torch.tensor([row.tokens[-1] for row in active])
                self._sample_tokens(active, head, cache.advance(tokens_R), sampling)
        return responses

    def _cache(self) -> Cache:
        key = self.policy.frequency_key
        return self._plain_cache() if key is None else FrequencyCache(key, self._plain_cache)

    def _plain_cache(self) -> KVCache | PaddedCache:
        if not self.policy.shared:
            return PaddedCache(self.policy)
        if self._use_cuda_graphs:
            return GraphedCache(self.policy, CudaGraphs(self.policy.device))
        return KVCache(self.policy)

    @cached_property
    def _use_cuda_graphs(self) -> bool:
        return self.policy.cuda_graphs and graphs_work(self.policy)

    def _chains(self, prompts: Sequence[Prompt], samples: int) -> list[list[int]]:
        """Return the prompts in chains, each prompt of which is the beginning of the next one.

        One pass over the last prompt of a chain computes them all. A chain has at most a quarter of
        the rows, so that it can start while others are active. Caches that cannot share a prompt
        get every prompt in a chain of its own.
        """
        shared = self.policy.shared and self.policy.frequency_key is None
        longest = self._min_admitted(samples) if shared else 1
        chains: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            previous = prompts[i - 1].tokens if i else prompt.tokens
            extends = prompt.tokens[: len(previous)] == previous
            if chains and extends and len(chains[-1]) < longest:
                chains[-1].append(i)
            else:
                chains.append([i])
        return chains

    def _admit(self, waiting: deque[list[int]], active: int, samples: int) -> list[list[int]]:
        """Return the chains to start now, as many as the batch has free rows for.

        While rows are active, no prompt starts before a quarter of the rows (or enough rows for
        all waiting chains) is free.
        """
        capacity = max(1 if not active else 0, (self.max_rows - active) // samples)
        if active and capacity < min(self._min_admitted(samples), len(waiting)):
            return []
        admitted: list[list[int]] = []
        while waiting and len(waiting[0]) <= capacity:
            capacity -= len(waiting[0])
            admitted.append(waiting.popleft())
        return admitted

    def _min_admitted(self, samples: int) -> int:
        """Return how many prompts' rows are a quarter of all rows, at least one prompt's."""
        return max(1, self.max_rows // (4 * samples))

    def _sample_tokens(
        self, rows: list[Row], head: Head, hidden_RD: Tensor, sampling: Sampling
    ) -> None:
        """Sample the next token of every row from its hidden state."""
        temperature = 1.0 if sampling.greedy else sampling.temperature
        flops.count_head(len(rows), head.weight_VD)
        logits_RV = head.logits(hidden_RD, temperature)
        token_R, logprob_R = draw(logits_RV, _uniforms(rows).to(logits_RV.device), sampling)
        for row, token, logprob in zip(rows, token_R.tolist(), logprob_R.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.finish_reason = self._finish_reason(row, sampling)

    def _finish_reason(self, row: Row, sampling: Sampling) -> FinishReason | None:
        token = row.tokens[-1]
        if token in self.end_tokens or token in sampling.stop_tokens:
            return "eos"
        if sampling.stop and self._has_stop_text(row, sampling):
            return "stop"
        return "length" if len(row.tokens) >= sampling.max_tokens else None

    def _has_stop_text(self, row: Row, sampling: Sampling) -> bool:
        """Return whether the last token completed a stop text; decode only the end of the text."""
        recent_tokens = row.tokens[-(max(len(text.encode()) for text in sampling.stop) + 8) :]
        tail = decode_response(self.policy.tokenizer, recent_tokens)
        return any(text in tail for text in sampling.stop)

    def _evict_finished(self, active: list[Row], cache: Cache) -> list[Row]:
        """Remove finished rows from the cache and return the others."""
        unfinished = [i for i, row in enumerate(active) if row.finish_reason is None]
        if len(unfinished) < len(active):
            cache.keep(unfinished)
        return [active[i] for i in unfinished]

    def _response(self, row: Row) -> Response:
        assert row.finish_reason is not None, "a row left the batch before it finished"
        text = decode_response(self.policy.tokenizer, row.tokens)
        return Response(row.tokens, row.logprobs, row.finish_reason, text)

    def _check_context_length(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        longest = max((len(p.tokens) for p in prompts), default=0)
        if longest + sampling.max_tokens > self.policy.context_length:
            raise ModelError(
                f"a prompt of {longest} tokens and a response of up to {sampling.max_tokens} do "
                f"not fit the model's context of {self.policy.context_length} tokens: lower "
                "sampling.max_tokens or data.max_prompt_tokens"
            )


def _uniforms(rows: Sequence[Row]) -> Tensor:
    """Return the random number of each row's next token; compute them for many tokens at once."""
    exhausted = [row for row in rows if len(row.tokens) >= len(row.uniforms)]
    if exhausted:
        keys_R1 = torch.tensor([row.key for row in exhausted])[:, None]
        positions_R1 = torch.tensor([len(row.uniforms) for row in exhausted])[:, None]
        uniforms_RP = uniforms(keys_R1, positions_R1 + torch.arange(UNIFORMS_PER_CALL))
        for row, numbers in zip(exhausted, uniforms_RP.tolist(), strict=True):
            row.uniforms += numbers
    return torch.tensor([row.uniforms[len(row.tokens)] for row in rows], dtype=torch.float64)


def _prefill(
    cache: Cache, prompts: Sequence[Prompt], chains: Sequence[Sequence[int]], samples: int
) -> Tensor:
    """Start the rows of these chains; return the last state of each of their prompts."""
    last = [prompts[chain[-1]].tokens for chain in chains]
    if not isinstance(cache, KVCache):
        return cache.admit(last, samples)  # Its chains have one prompt each.
    return cache.admit(last, samples, [[len(prompts[i].tokens) for i in chain] for chain in chains])


def _notify(finished: Finished, prompt: int, responses: list[Response]) -> None:
    """Call ``finished`` outside of inference mode, so that training can use tensors made in it."""
    with torch.inference_mode(False), torch.no_grad():
        finished(prompt, responses)


def _finished_prompts(active: Sequence[Row], unfinished: Sequence[Row]) -> list[int]:
    """Return the prompts whose rows have all finished, in order."""
    if len(unfinished) == len(active):
        return []
    return sorted({row.prompt for row in active} - {row.prompt for row in unfinished})
