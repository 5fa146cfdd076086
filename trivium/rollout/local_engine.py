"""Trivium's own rollout engine: shared prompt caches and hardly an idle row.

Each prompt is read once; its key-value cache is shared by all its samples. Rows that finish leave
the batch, and waiting prompts take their place. Weights are the policy's own, so there is nothing
to copy after an update.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from trivium.data.chat import decode_response
from trivium.data.prompts import Prompt
from trivium.errors import ModelError
from trivium.models import flops
from trivium.models.logprobs import Head
from trivium.models.policy import Policy
from trivium.rollout.cuda_graphs import CudaGraphs, GraphedCache, graphs_work
from trivium.rollout.engine import Finished, FinishReason, Response, draw, row_key, uniforms
from trivium.rollout.kv_cache import MAX_COPIED_PREFIX, KVCache
from trivium.rollout.padded_cache import PaddedCache
from trivium.rollout.sampling import Sampling

AHEAD = 64
"""Tokens of a row for which random numbers are made together."""


class Row:
    """One response while it grows."""

    def __init__(self, prompt: int, key: int) -> None:
        self.prompt = prompt
        self.key = key
        self.uniforms: list[float] = []
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None


class LocalEngine:
    """Samples from a policy that lives in this process.

    Args:
        policy: the model and its tokenizer.
        end_tokens: token ids that end a response (EOS).
        max_rows: responses that grow at the same time.
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
        finished: Finished | None = None,
    ) -> list[list[Response]]:
        """``samples`` responses for each prompt, in order (see ``rollout.engine``)."""
        self._require_room(prompts, sampling)
        rows: list[list[Row]] = []
        met: Counter[int] = Counter()
        for i, prompt in enumerate(prompts):
            # A prompt that comes twice, as where a batch straddles two epochs, has new samples.
            first = met[prompt.index] * samples
            met[prompt.index] += 1
            keys = [row_key(seed, step, prompt.index, first + j) for j in range(samples)]
            rows.append([Row(i, key) for key in keys])
        waiting = deque(range(len(prompts)))
        head = self.policy.head.packed()
        cache = self._cache(prompts, samples)
        responses: list[list[Response]] = [[] for _ in prompts]
        active: list[Row] = []
        while waiting or active:
            admitted = self._admit(waiting, len(active), samples)
            if admitted:
                fresh = [row for i in admitted for row in rows[i]]
                hidden_GD = cache.admit([prompts[i].tokens for i in admitted], samples)
                self._sample_tokens(fresh, head, hidden_GD.repeat_interleave(samples, 0), sampling)
                active += fresh
            growing = self._evict_finished(active, cache)
            for i in _ended(active, growing):
                responses[i] = [self._response(row) for row in rows[i]]
                if finished is not None:
                    _notify(finished, i, responses[i])
            active = growing
            if active:
                tokens_R = torch.tensor([row.tokens[-1] for row in active])
                self._sample_tokens(active, head, cache.advance(tokens_R), sampling)
        return responses

    def _cache(self, prompts: Sequence[Prompt], samples: int) -> KVCache | PaddedCache:
        if not self.policy.shared:
            return PaddedCache(self.policy)
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        shared_prefix = samples > 1 and longest > MAX_COPIED_PREFIX
        if self._graphed:
            return GraphedCache(
                self.policy, shared_prefix=shared_prefix, record=CudaGraphs(self.policy.device)
            )
        return KVCache(self.policy, shared_prefix=shared_prefix)

    @cached_property
    def _graphed(self) -> bool:
        return self.policy.cuda_graphs and graphs_work(self.policy)

    def _admit(self, waiting: deque[int], active: int, samples: int) -> list[int]:
        """The prompts that start now: as many as there is room for, in sizeable helpings."""
        room = max(1 if not active else 0, (self.max_rows - active) // samples)
        helping = max(1, self.max_rows // (4 * samples))
        if active and room < min(helping, len(waiting)):
            return []
        return [waiting.popleft() for _ in range(min(room, len(waiting)))]

    def _sample_tokens(
        self, rows: list[Row], head: Head, hidden_RD: Tensor, sampling: Sampling
    ) -> None:
        """Draw the next token of every row from its hidden state."""
        temperature = 1.0 if sampling.greedy else sampling.temperature
        flops.count_head(len(rows), head.weight_VD)
        logits_RV = head.logits(hidden_RD, temperature)
        token_R, logprob_R = draw(logits_RV, _uniforms(rows).to(logits_RV.device), sampling)
        for row, token, logprob in zip(rows, token_R.tolist(), logprob_R.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.finish_reason = self._ending(row, sampling)

    def _ending(self, row: Row, sampling: Sampling) -> FinishReason | None:
        token = row.tokens[-1]
        if token in self.end_tokens or token in sampling.stop_tokens:
            return "eos"
        if sampling.stop and self._stopped(row, sampling):
            return "stop"
        return "length" if len(row.tokens) >= sampling.max_tokens else None

    def _stopped(self, row: Row, sampling: Sampling) -> bool:
        """Whether the last token completed a stop text; only the end of the text is decoded."""
        recent = row.tokens[-(max(len(text.encode()) for text in sampling.stop) + 8) :]
        tail = decode_response(self.policy.tokenizer, recent)
        return any(text in tail for text in sampling.stop)

    def _evict_finished(self, active: list[Row], cache: KVCache | PaddedCache) -> list[Row]:
        """Drop finished rows."""
        growing = [i for i, row in enumerate(active) if row.finish_reason is None]
        if len(growing) < len(active):
            cache.keep(growing)
        return [active[i] for i in growing]

    def _response(self, row: Row) -> Response:
        assert row.finish_reason is not None, "a row left the batch before it ended"
        text = decode_response(self.policy.tokenizer, row.tokens)
        return Response(row.tokens, row.logprobs, row.finish_reason, text)

    def _require_room(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        longest = max((len(p.tokens) for p in prompts), default=0)
        if longest + sampling.max_tokens > self.policy.context_length:
            raise ModelError(
                f"a prompt of {longest} tokens and a response of up to {sampling.max_tokens} do "
                f"not fit the model's context of {self.policy.context_length} tokens: lower "
                "sampling.max_tokens or data.max_prompt_tokens"
            )


def _uniforms(rows: Sequence[Row]) -> Tensor:
    """The random number of each row's next token, made for many tokens at a time."""
    short = [row for row in rows if len(row.tokens) >= len(row.uniforms)]
    if short:
        keys_R1 = torch.tensor([row.key for row in short])[:, None]
        made_R1 = torch.tensor([len(row.uniforms) for row in short])[:, None]
        more_RP = uniforms(keys_R1, made_R1 + torch.arange(AHEAD))
        for row, more in zip(short, more_RP.tolist(), strict=True):
            row.uniforms += more
    return torch.tensor([row.uniforms[len(row.tokens)] for row in rows], dtype=torch.float64)


def _notify(finished: Finished, prompt: int, responses: list[Response]) -> None:
    """Call back outside of inference mode: what is made there may be learned from."""
    with torch.inference_mode(False), torch.no_grad():
        finished(prompt, responses)


def _ended(active: Sequence[Row], growing: Sequence[Row]) -> list[int]:
    """The prompts of which no row grows any more, in order."""
    if len(growing) == len(active):
        return []
    return sorted({row.prompt for row in active} - {row.prompt for row in growing})
