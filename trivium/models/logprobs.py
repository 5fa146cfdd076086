"""Log-probabilities and entropy of response tokens, without logits for the whole vocabulary.

The head is applied to the hidden states that predict response tokens only, a chunk at a time;
nothing of size [tokens, vocabulary] outlives its chunk, in the forward or the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trivium.models.linear import Packed, multiply

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Head:
    """A language-model head: ``logits = cap·tanh(scale·(h Wᵀ + b)/cap)``, cap optional."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    product: Packed | None = None

    def packed(self) -> Head:
        """The same head for sampling: its weights as they are now, in the order of the product."""
        return replace(self, product=Packed((self.weight_VD, self.bias_V)))

    def logits(self, hidden_TD: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits divided by the temperature, in float32 or better, ``[T, V]``."""
        if self.product is not None:
            logits_TV = self.product(hidden_TD)
        else:
            logits_TV = multiply(hidden_TD, self.weight_VD, self.bias_V)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        if self.softcap is not None:
            logits_TV = self.softcap * torch.tanh(logits_TV * (self.scale / self.softcap))
            return logits_TV.div_(temperature)
        factor = self.scale / temperature
        return logits_TV if factor == 1 else logits_TV.mul_(factor)


def token_logprobs(
    hidden_TD: Tensor,
    head: Head,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``log π(o_t | …)`` and the entropy of ``π(· | …)`` in nats, both ``[T]``.

    ``π = softmax(logits / temperature)``. Gradient flows through both results into the hidden
    states and the head. Without ``entropy`` its place is None, which spares a pass over the logits.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _TokenLogprobs.apply(
        hidden_TD, head.weight_VD, head.bias_V, targets_T, head, temperature, entropy
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
        head: Head,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        normalisers, chosen, entropies = [], [], []
        for at in _chunks(len(targets_T), len(weight_VD)):
            z_TV = head.logits(hidden_TD[at], temperature)
            log_p_TV = z_TV.log_softmax(-1)
            chosen_T = log_p_TV.gather(1, targets_T[at, None])[:, 0]
            normalisers.append(z_TV.gather(1, targets_T[at, None])[:, 0] - chosen_T)
            chosen.append(chosen_T)
            if entropy:
                p_TV = torch.exp(log_p_TV, out=z_TV)
                entropies.append(-p_TV.mul_(log_p_TV).sum(-1))
        entropy_T = torch.cat(entropies) if entropy else None
        normaliser_T = torch.cat(normalisers)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, normaliser_T, entropy_T)
        ctx.rule = (head.scale, head.softcap, temperature)
        ctx.set_materialize_grads(False)
        return torch.cat(chosen), entropy_T

    @staticmethod
    def backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None) -> Any:
        if grad_logprobs_T is None and grad_entropy_T is None:
            return (None,) * 7
        hidden_TD, weight_VD, bias_V, targets_T, normaliser_T, entropy_T = ctx.saved_tensors
        scale, softcap, temperature = ctx.rule
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        head = Head(weight_VD, bias_V, scale, softcap)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_hidden_TD = torch.empty_like(hidden_TD) if of_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if of_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if of_bias else None
        for at in _chunks(len(targets_T), len(weight_VD)):
            z_TV = head.logits(hidden_TD[at], temperature)
            slope_TV = None
            if softcap is not None:
                slope_TV = 1 - (z_TV * (temperature / softcap)).square()
            log_p_TV = z_TV.sub_(normaliser_T[at, None])
            grad_TV = _gradient(
                log_p_TV,
                targets_T[at],
                None if grad_logprobs_T is None else grad_logprobs_T[at],
                None if grad_entropy_T is None else grad_entropy_T[at],
                None if entropy_T is None else entropy_T[at],
            )
            if slope_TV is not None:
                grad_TV *= slope_TV
            if scale != temperature:
                grad_TV *= scale / temperature
            if grad_hidden_TD is not None:
                grad_hidden_TD[at] = multiply(grad_TV.to(weight_VD.dtype), weight_VD.t())
            if grad_weight_VD is not None:
                grad_weight_VD += multiply(grad_TV.t(), hidden_TD[at].to(wide).t())
            if grad_bias_V is not None:
                grad_bias_V += grad_TV.sum(0)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        if bias_V is not None and grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(bias_V.dtype)
        return grad_hidden_TD, grad_weight_VD, grad_bias_V, *[None] * 4


def _gradient(
    log_p_TV: Tensor,
    targets_T: Tensor,
    grad_logprobs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    entropy_T: Tensor | None,
) -> Tensor:
    """The gradient by the logits, ``g (1[target] − p) − h p (log p + H)``; may reuse ``log_p_TV``.

    ``g`` and ``h`` are the gradients by the log-probs and by the entropy ``H``.
    """
    targets_T1 = targets_T[:, None]
    if grad_entropy_T is None or entropy_T is None:
        assert grad_logprobs_T is not None, "one of both results has a gradient"
        grad_TV = log_p_TV.exp_().mul_(-grad_logprobs_T[:, None])
    else:
        p_TV = log_p_TV.exp()
        factor_TV = log_p_TV.add_(entropy_T[:, None]).mul_(-grad_entropy_T[:, None])
        if grad_logprobs_T is not None:
            factor_TV.sub_(grad_logprobs_T[:, None])
        grad_TV = p_TV.mul_(factor_TV)
    if grad_logprobs_T is not None:
        grad_TV.scatter_add_(1, targets_T1, grad_logprobs_T[:, None])
    return grad_TV


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(16, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]
