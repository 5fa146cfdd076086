"""Log-probabilities and entropy of response tokens, without logits for the whole vocabulary.

The head is applied only to the hidden states that predict response tokens, a chunk at a time. No
tensor of size [tokens, vocabulary] outlives its chunk, in the forward or the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivium.models.fast_path import REFERENCE, Kernels

CHUNK_ELEMENTS, CHUNK_MULTIPLE = 1 << 24, 16
"""Logits in memory at a time, enough to amortize a pass over the head's weights; and the divisor of
a chunk's number of tokens."""
SLICE_ELEMENTS = 1 << 20
"""Logits in one softmax: few enough for a processor's cache."""


@dataclass(frozen=True)
class Head:
    """A language-model head: ``logits = cap·tanh(scale·(h Wᵀ + b)/cap)``, cap optional."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    kernels: Kernels = REFERENCE

    def logits(self, hidden_TD: Tensor, temperature: float = 1.0) -> Tensor:
        """Return logits divided by the temperature, in float32 or wider, ``[T, V]``."""
        logits_TV = self.kernels.multiply(hidden_TD, self.weight_VD, self.bias_V)
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
    """Return ``log π(o_t | …)`` and the entropy of ``π(· | …)`` in nats, both ``[T]``.

    ``π = softmax(logits / temperature)``. Gradient flows through both results into the hidden
    states and the head. Without ``entropy`` the second result is None, which saves a pass over the
    logits.
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
        parts = []
        for at in chunks(len(targets_T), len(weight_VD), CHUNK_ELEMENTS):
            z_TV, labels_T = head.logits(hidden_TD[at], temperature), targets_T[at]
            parts += [
                _statistics(z_TV[i], labels_T[i], entropy)
                for i in chunks(len(labels_T), len(weight_VD), SLICE_ELEMENTS)
            ]
        chosen_T, entropy_T = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, entropy_T)
        ctx.spec = (head.scale, head.softcap, head.kernels, temperature)
        ctx.set_materialize_grads(False)
        return chosen_T, entropy_T if entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, weight_VD, bias_V, targets_T, entropy_T = ctx.saved_tensors
        scale, softcap, kernels, temperature = ctx.spec
        if grad_entropy_T is not None and not bool(grad_entropy_T.any()):
            grad_entropy_T = None  # An entropy coefficient of 0: skip the passes that add zeros.
        head = Head(weight_VD, bias_V, scale, softcap, kernels)
        gradients = _Gradients(hidden_TD, head, ctx.needs_input_grad)
        for at in chunks(len(targets_T), len(weight_VD), CHUNK_ELEMENTS):
            z_TV, labels_T = head.logits(hidden_TD[at], temperature), targets_T[at]
            for i in chunks(len(labels_T), len(weight_VD), SLICE_ELEMENTS):
                slope = _slope(z_TV[i], head, temperature)
                grad_logits_TV = _logits_grad(
                    z_TV[i],
                    labels_T[i],
                    None if grad_logprobs_T is None else grad_logprobs_T[at][i],
                    None if grad_entropy_T is None else grad_entropy_T[at][i],
                    entropy_T[at][i],
                )
                z_TV[i] = grad_logits_TV if slope is None else grad_logits_TV.mul_(slope)
            gradients.add(at, hidden_TD[at], z_TV)
        return *gradients.results(), *[None] * 4


def _statistics(z_TV: Tensor, targets_T: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Return log-probs of the targets, and entropies (empty unless asked for), from logits.

    The bits of the log-probs do not depend on ``entropy``.
    """
    log_p_TV = z_TV.log_softmax(-1)
    chosen_T = log_p_TV.gather(1, targets_T[:, None])[:, 0]
    if not entropy:
        return chosen_T, chosen_T[:0]
    # A second softmax is faster than the exponential of all log-probs.
    return chosen_T, -z_TV.softmax(-1).mul_(log_p_TV).sum(-1)


def _logits_grad(
    z_TV: Tensor,
    targets_T: Tensor,
    grad_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    entropy_T: Tensor,
) -> Tensor:
    """``g (1[target] − p) − h p (log p + H)``.

    Gradient with respect to the logits; ``g`` and ``h`` are those with respect to the log-probs and
    the entropy ``H``.
    """
    if grad_T is None:
        grad_T = torch.zeros_like(z_TV[:, 0])
    if grad_entropy_T is None:
        grad_logits_TV = z_TV.softmax(-1).mul_(-grad_T[:, None])
    else:
        log_p_TV = z_TV.log_softmax(-1)
        log_p_TV.add_(entropy_T[:, None]).mul_(-grad_entropy_T[:, None]).sub_(grad_T[:, None])
        grad_logits_TV = log_p_TV.mul_(z_TV.softmax(-1))
    return grad_logits_TV.scatter_add_(1, targets_T[:, None], grad_T[:, None])


def _slope(z_TV: Tensor, head: Head, temperature: float) -> Tensor | float | None:
    """Return the derivative of the logits with respect to ``h Wᵀ + b``; None: 1."""
    slope = head.scale / temperature
    if head.softcap is None:
        return None if slope == 1 else slope
    return (1 - (z_TV * (temperature / head.softcap)).square()).mul_(slope)


class _Gradients:
    """Gradients with respect to hidden states, weight and bias, summed over chunks."""

    def __init__(self, hidden_TD: Tensor, head: Head, needed: Sequence[bool]) -> None:
        self.head = head
        self.grad_hidden_TD = torch.empty_like(hidden_TD) if needed[0] else None
        self.needs_weight, self.needs_bias = needed[1:3]
        self.grad_weight_DV: Tensor | None = None
        self.grad_bias_V: Tensor | None = None

    def add(self, at: slice, hidden_TD: Tensor, grad_TV: Tensor) -> None:
        """Add one chunk's gradients, given that of ``h Wᵀ + b``."""
        kernels, weight_VD = self.head.kernels, self.head.weight_VD
        hidden_TD = hidden_TD.to(grad_TV.dtype)
        if self.grad_hidden_TD is not None:
            self.grad_hidden_TD[at] = kernels.multiply(grad_TV.to(weight_VD.dtype), weight_VD.t())
        if self.needs_weight:
            self.grad_weight_DV = _sum(self.grad_weight_DV, kernels.outer(hidden_TD, grad_TV))
        if self.needs_bias:
            self.grad_bias_V = _sum(self.grad_bias_V, grad_TV.sum(0))

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the types of their inputs."""
        dtype = self.head.weight_VD.dtype
        weight_VD = None if self.grad_weight_DV is None else self.grad_weight_DV.t().to(dtype)
        bias_V = None if self.grad_bias_V is None else self.grad_bias_V.to(dtype)
        return self.grad_hidden_TD, weight_VD, bias_V


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def chunks(tokens: int, vocabulary: int, elements: int) -> list[slice]:
    """Split tokens so that the logits of each part have about ``elements`` elements."""
    size = max(1, elements // vocabulary // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]
