"""Log-probabilities and entropy of response tokens, without logits for the whole vocabulary.

The head is applied to the hidden states that predict response tokens only, a chunk at a time;
nothing of size [tokens, vocabulary] outlives its chunk, in the forward or the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.models.cpu.linear import ROUND, Packed, multiply, pad_rows

CHUNK_ELEMENTS = 1 << 24
"""Logits in memory at a time: many enough that passing over the head's weights is worth it."""
SLICE_ELEMENTS = 1 << 20
"""Logits that go through a softmax at a time: few enough for a processor's cache."""


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
        parts = []
        for at in chunks(len(targets_T), len(weight_VD), CHUNK_ELEMENTS):
            z_TV, goals_T = head.logits(_filled(hidden_TD[at], head), temperature), targets_T[at]
            parts += [
                _statistics(z_TV[i], goals_T[i], entropy)
                for i in chunks(len(goals_T), len(weight_VD), SLICE_ELEMENTS)
            ]
        chosen_T, entropy_T = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, entropy_T)
        ctx.spec = (head.scale, head.softcap, temperature)
        ctx.set_materialize_grads(False)
        return chosen_T, entropy_T if entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None) -> Any:
        hidden_TD, weight_VD, bias_V, targets_T, entropy_T = ctx.saved_tensors
        scale, softcap, temperature = ctx.spec
        if grad_entropy_T is not None and not bool(grad_entropy_T.any()):
            grad_entropy_T = None  # A bonus of 0: the passes for it would add zeros.
        head = Head(weight_VD, bias_V, scale, softcap)
        gradients = _Gradients(hidden_TD, head, ctx.needs_input_grad)
        for at in chunks(len(targets_T), len(weight_VD), CHUNK_ELEMENTS):
            filled_TD, goals_T = _filled(hidden_TD[at], head), targets_T[at]
            z_TV = head.logits(filled_TD, temperature)
            given = (grad_logprobs_T, grad_entropy_T)
            of_logprobs_T, of_entropy_T = (None if x is None else x[at] for x in given)
            for i in chunks(len(goals_T), len(weight_VD), SLICE_ELEMENTS):
                slope = _slope(z_TV[i], head, temperature)
                by_logits_TV = _by_logits(
                    z_TV[i],
                    goals_T[i],
                    None if of_logprobs_T is None else of_logprobs_T[i],
                    None if of_entropy_T is None else of_entropy_T[i],
                    entropy_T[at][i],
                )
                z_TV[i] = by_logits_TV if slope is None else by_logits_TV.mul_(slope)
            z_TV[len(goals_T) :] = 0
            gradients.add(at, filled_TD, z_TV)
        return *gradients.results(), *[None] * 4


def _filled(hidden_TD: Tensor, head: Head) -> Tensor:
    """Hidden states with rows of zeros behind them, so that products meet few numbers of rows."""
    more = pad_rows(len(hidden_TD), hidden_TD, head.weight_VD)
    return F.pad(hidden_TD, (0, 0, 0, more)) if more else hidden_TD


def _statistics(z_TV: Tensor, targets_T: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets, whose bits do not depend on whether entropies are asked for, and
    those (none unless they are), from logits."""
    log_p_TV = z_TV.log_softmax(-1)
    chosen_T = log_p_TV.gather(1, targets_T[:, None])[:, 0]
    if not entropy:
        return chosen_T, chosen_T[:0]
    # A processor takes a softmax sooner than the exponential of all logarithms.
    return chosen_T, -z_TV.softmax(-1).mul_(log_p_TV).sum(-1)


def _by_logits(
    z_TV: Tensor,
    targets_T: Tensor,
    grad_T: Tensor | None,
    of_entropy_T: Tensor | None,
    entropy_T: Tensor,
) -> Tensor:
    """``g (1[target] − p) − h p (log p + H)``.

    ``g`` and ``h`` are the gradients by the log-probs and by the entropy ``H``.
    """
    if grad_T is None:
        grad_T = torch.zeros_like(z_TV[:, 0])
    if of_entropy_T is None:
        by_logits_TV = z_TV.softmax(-1).mul_(-grad_T[:, None])
    else:
        log_p_TV = z_TV.log_softmax(-1)
        log_p_TV.add_(entropy_T[:, None]).mul_(-of_entropy_T[:, None]).sub_(grad_T[:, None])
        by_logits_TV = log_p_TV.mul_(z_TV.softmax(-1))
    return by_logits_TV.scatter_add_(1, targets_T[:, None], grad_T[:, None])


def _slope(z_TV: Tensor, head: Head, temperature: float) -> Tensor | float | None:
    """The derivative of the logits by the raw product; None: 1."""
    slope = head.scale / temperature
    if head.softcap is None:
        return None if slope == 1 else slope
    return (1 - (z_TV * (temperature / head.softcap)).square()).mul_(slope)


class _Gradients:
    """Gradients by hidden states, weight and bias, those that are asked for, chunk by chunk."""

    def __init__(self, hidden_TD: Tensor, head: Head, asked: Sequence[bool]) -> None:
        of_hidden, self.of_weight, self.of_bias = asked[:3]
        self.head = head
        self.by_hidden_TD = torch.empty_like(hidden_TD) if of_hidden else None
        self.by_weight_DV: Tensor | None = None
        self.by_bias_V: Tensor | None = None

    def add(self, at: slice, hidden_TD: Tensor, grad_TV: Tensor) -> None:
        """Take the gradient by the raw product of one chunk, rows that fill it up included."""
        weight_VD, hidden_TD = self.head.weight_VD, hidden_TD.to(grad_TV.dtype)
        if self.by_hidden_TD is not None:
            by_hidden_TD = multiply(grad_TV.to(weight_VD.dtype), weight_VD.t())
            self.by_hidden_TD[at] = by_hidden_TD[: at.stop - at.start]
        if self.of_weight:
            self.by_weight_DV = _sum(self.by_weight_DV, multiply(hidden_TD.t(), grad_TV.t()))
        if self.of_bias:
            self.by_bias_V = _sum(self.by_bias_V, grad_TV.sum(0))

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the types of what they are gradients by."""
        dtype = self.head.weight_VD.dtype
        weight_VD = None if self.by_weight_DV is None else self.by_weight_DV.t()
        weight_VD = None if weight_VD is None else weight_VD.to(dtype)
        bias_V = None if self.by_bias_V is None else self.by_bias_V.to(dtype)
        return self.by_hidden_TD, weight_VD, bias_V


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def chunks(tokens: int, vocabulary: int, elements: int) -> list[slice]:
    """Cut tokens so that each part's logits have about so many elements."""
    size = max(1, elements // vocabulary // ROUND) * ROUND
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]
