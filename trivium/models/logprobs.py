"""Log-probabilities and entropy of response tokens, without logits for the whole vocabulary.

The head is applied to the hidden states that predict response tokens only, a chunk at a time;
nothing of size [tokens, vocabulary] outlives its chunk, in the forward or the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Head:
    """A language-model head: ``logits = cap·tanh(scale·(h Wᵀ + b)/cap)``, cap optional."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_TD: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits divided by the temperature, in float32 or better, ``[T, V]``."""
        raw_TV = nn.functional.linear(hidden_TD, self.weight_VD, self.bias_V)
        raw_TV = raw_TV.to(torch.promote_types(raw_TV.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            raw_TV = self.softcap * torch.tanh(raw_TV / self.softcap)
        return raw_TV / temperature


def token_logprobs(
    hidden_TD: Tensor, head: Head, targets_T: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``log π(o_t | …)`` and the entropy of ``π(· | …)`` in nats, both ``[T]``.

    ``π = softmax(logits / temperature)``. Gradient flows through both results into the hidden
    states and the head.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _TokenLogprobs.apply(
        hidden_TD, head.weight_VD, head.bias_V, targets_T, head.scale, head.softcap, temperature
    )


class _TokenLogprobs(torch.autograd.Function):
    """Recomputes each chunk's logits in the backward pass instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight_VD, bias_V, scale, softcap)
        logprobs, entropies = [], []
        for at in _chunks(len(targets_T), len(weight_VD)):
            log_p_TV = head.logits(hidden_TD[at], temperature).log_softmax(-1)
            logprobs.append(log_p_TV.gather(1, targets_T[at, None])[:, 0])
            entropies.append(-(log_p_TV.exp() * log_p_TV).sum(-1))
        entropy_T = torch.cat(entropies)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, entropy_T)
        ctx.shape = (scale, softcap, temperature)
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), entropy_T

    @staticmethod
    def backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None) -> Any:
        hidden_TD, weight_VD, bias_V, targets_T, entropy_T = ctx.saved_tensors
        scale, softcap, temperature = ctx.shape
        head = Head(weight_VD, bias_V, scale, softcap)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        for at in _chunks(len(targets_T), len(weight_VD)):
            logits_TV = head.logits(hidden_TD[at], temperature)
            log_p_TV = logits_TV.log_softmax(-1)
            grad_TV = torch.zeros_like(log_p_TV)
            if grad_logprobs_T is not None:
                grad_TV -= log_p_TV.exp() * grad_logprobs_T[at, None]
                grad_TV.scatter_add_(1, targets_T[at, None], grad_logprobs_T[at, None])
            if grad_entropy_T is not None:
                surprise_TV = log_p_TV + entropy_T[at, None]
                grad_TV -= log_p_TV.exp() * surprise_TV * grad_entropy_T[at, None]
            grad_TV *= scale / temperature
            if softcap is not None:
                grad_TV *= 1 - (logits_TV * temperature / softcap).square()
            grad_hidden_TD[at] = (grad_TV.to(weight_VD.dtype) @ weight_VD).to(hidden_TD.dtype)
            grad_weight_VD += grad_TV.t() @ hidden_TD[at].to(wide)
            if grad_bias_V is not None:
                grad_bias_V += grad_TV.sum(0)
        if bias_V is not None and grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(bias_V.dtype)
        return grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype), grad_bias_V, *[None] * 4


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(16, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]
