"""Losses as their papers write them: one value per token or per pair, not reduced.

The caller multiplies by the weights of ``maths.aggregation`` and sums. In every policy loss,
gradient flows through ``logprobs_T`` alone; advantages, old log-probs and return targets are
constants of the rollout batch. Every ratio is ``exp(min(log ρ, 20))`` (``MAX_LOG_RATIO``): in
float32 an exponential overflows at 88.7, and one token would make the whole step infinite. A token
beyond the bound has a finite loss and no gradient through its ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.maths.kl import bounded_exp
from trivium.maths.ragged import (
    repeat_per_segment,
    require_same_shape,
    segment_mean,
    segment_sum,
)


def importance_ratio(logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """``ρ_t = π_θ(o_t) / π_old(o_t)``, ``[T]``, at most ``exp(MAX_LOG_RATIO)``."""
    require_same_shape(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T)
    return bounded_exp(logprobs_T - old_logprobs_T)


class SurrogateLoss(NamedTuple):
    """A policy loss, and the tokens on which its clipping takes effect, all ``[T]``.

    Attributes:
        loss_T: the loss; gradient flows through the policy's log-probs alone.
        clipped_low_T: bool; tokens whose gradient the lower end of the clip range removes.
        clipped_high_T: bool; the same for the upper end.
    """

    loss_T: Tensor
    clipped_low_T: Tensor
    clipped_high_T: Tensor


def clipped_surrogate(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    lengths_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """``−min(ρ Â, clip(ρ, 1−ε_low, 1+ε_high) Â)``, ``[T]`` (Schulman et al. 2017, eq. 7).

    Asymmetric when ``clip_high > clip_low`` (DAPO, Yu et al. 2025, eq. 10).
    """
    require_same_shape(logprobs_T=logprobs_T, advantages_T=advantages_T)
    _require_clip(clip_low, clip_high)
    ratio_T = importance_ratio(logprobs_T, old_logprobs_T)
    return _pessimistic(ratio_T, advantages_T, clip_low, clip_high)


def gspo_surrogate(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    lengths_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """GSPO: the clipped surrogate of ``s_i = (π_θ(o_i)/π_old(o_i))^{1/|o_i|}``, ``[T]``.

    The sequence ratio is written per token as ``s_i · π_θ(o_t)/sg[π_θ(o_t)]`` (Zheng et al. 2025,
    eq. 14). Its value is s_i, and its sum weighted by ``sequence_mean`` has the gradient of s_i.
    A clipped sequence loses the gradient of all its tokens.
    """
    require_same_shape(
        logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T
    )
    _require_clip(clip_low, clip_high)
    mean_log_ratio_N = segment_mean((logprobs_T - old_logprobs_T).detach(), lengths_N)
    # Its value is 0, and its gradient is that of log π_θ(o_t).
    zero_T = logprobs_T - logprobs_T.detach()
    ratio_T = bounded_exp(repeat_per_segment(mean_log_ratio_N, lengths_N) + zero_T)
    return _pessimistic(ratio_T, advantages_T, clip_low, clip_high)


def cispo_surrogate(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    lengths_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateLoss:
    """CISPO: ``−sg[clip(ρ, 1−ε_low, 1+ε_high)] Â log π_θ``, ``[T]`` (MiniMax 2025, eq. 4).

    The clipped ratio is only a weight, so no token loses its gradient: ``clipped_low_T`` and
    ``clipped_high_T`` are the tokens with Â ≠ 0 whose weight is clipped.
    """
    require_same_shape(logprobs_T=logprobs_T, advantages_T=advantages_T)
    _require_clip(clip_low, clip_high)
    ratio_T = importance_ratio(logprobs_T, old_logprobs_T).detach()
    loss_T = -ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T * logprobs_T
    has_gradient_T = advantages_T != 0
    return SurrogateLoss(
        loss_T,
        has_gradient_T & (ratio_T < 1 - clip_low),
        has_gradient_T & (ratio_T > 1 + clip_high),
    )


def _pessimistic(
    ratio_T: Tensor, advantages_T: Tensor, clip_low: float, clip_high: float
) -> SurrogateLoss:
    """``−min(ρ Â, clip(ρ) Â)``: below the range Â < 0 loses its gradient, above it Â > 0."""
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    return SurrogateLoss(loss_T, low_T, high_T)


Surrogate = Callable[..., SurrogateLoss | Tensor]
"""A policy loss per token, with the arguments of ``clipped_surrogate``.

A user's own may return the loss alone; then no clip metrics are logged.
"""


def truncated_importance(
    logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    lengths_N: Tensor | None = None,
    *,
    cap: float,
) -> Tensor:
    """``min(π_trainer/π_sampler, C)``, detached, ``[T]`` (Yao et al. 2025).

    The weight corrects for a sampler whose log-probs differ from the trainer's by rounding or
    because it is an older policy. ``lengths_N`` is not used.
    """
    _require_cap(cap)
    return importance_ratio(logprobs_T, sampler_logprobs_T).detach().clamp(max=cap)


def masked_importance(
    logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    lengths_N: Tensor | None = None,
    *,
    cap: float,
) -> Tensor:
    """``ρ 1[ρ ≤ C]`` with ``ρ = π_trainer/π_sampler``, detached, ``[T]``.

    A token whose ratio is above C is left out instead of truncated; the other weights stay as they
    are. ``lengths_N`` is not used.
    """
    _require_cap(cap)
    return _masked(importance_ratio(logprobs_T, sampler_logprobs_T).detach(), cap)


def truncated_sequence_importance(
    logprobs_T: Tensor, sampler_logprobs_T: Tensor, lengths_N: Tensor, *, cap: float
) -> Tensor:
    """``min(Π_t π_trainer(o_t)/π_sampler(o_t), C)`` of each response on its tokens, ``[T]``.

    Detached. Unlike a token's own ratio, the product corrects for the whole prefix: without the
    cap, the weighted mean over the sampler's responses is the trainer's (Liu et al. 2025, "When
    speed kills stability"). Its variance grows with the length.
    """
    _require_cap(cap)
    ratio_N = _sequence_ratio(logprobs_T, sampler_logprobs_T, lengths_N)
    return repeat_per_segment(ratio_N.clamp(max=cap), lengths_N)


def masked_sequence_importance(
    logprobs_T: Tensor, sampler_logprobs_T: Tensor, lengths_N: Tensor, *, cap: float
) -> Tensor:
    """Like ``truncated_sequence_importance``, but 0 for responses whose ratio is above C, ``[T]``.

    Liu et al. 2025 find it the most stable of the four.
    """
    _require_cap(cap)
    ratio_N = _sequence_ratio(logprobs_T, sampler_logprobs_T, lengths_N)
    return repeat_per_segment(_masked(ratio_N, cap), lengths_N)


ImportanceWeight = Callable[..., Tensor]
"""Weights per token, with the arguments of ``truncated_sequence_importance``."""


def _sequence_ratio(logprobs_T: Tensor, sampler_logprobs_T: Tensor, lengths_N: Tensor) -> Tensor:
    require_same_shape(logprobs_T=logprobs_T, sampler_logprobs_T=sampler_logprobs_T)
    return bounded_exp(segment_sum((logprobs_T - sampler_logprobs_T).detach(), lengths_N))


def _masked(ratio: Tensor, cap: float) -> Tensor:
    return torch.where(ratio > cap, 0.0, ratio)


def _require_cap(cap: float) -> None:
    if cap <= 0:
        raise ValueError(f"the cap of the importance weight must be positive, got {cap}")


def value_loss(
    values_T: Tensor,
    targets_T: Tensor,
    *,
    old_values_T: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """``(V − Target)²``, ``[T]``; gradient flows through ``values_T`` alone.

    With ``clip = ε`` it is ``max((V − Target)², (V_old + clip(V − V_old, ±ε) − Target)²)``, the
    pessimistic clipping of the PPO reference implementation.
    """
    require_same_shape(values_T=values_T, targets_T=targets_T, old_values_T=old_values_T)
    error_T = (values_T - targets_T).square()
    if clip is None:
        return error_T
    if clip <= 0 or old_values_T is None:
        raise ValueError(f"value clipping needs old_values_T and a clip > 0, got {clip}")
    clipped_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
    return torch.maximum(error_T, (clipped_T - targets_T).square())


def token_nll(logprobs_T: Tensor) -> Tensor:
    """``−log π_θ(o_t)``, ``[T]``: supervised fine-tuning."""
    return -logprobs_T


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | None = None
) -> Tensor:
    """``−log σ(s_w − s_l − margin)``, ``[P]`` (Ouyang et al. 2022, eq. 1; Llama 2, eq. 2)."""
    require_same_shape(chosen_P=chosen_P, rejected_P=rejected_P, margin_P=margin_P)
    difference_P = chosen_P - rejected_P
    return -F.logsigmoid(difference_P if margin_P is None else difference_P - margin_P)


def tie_loss(first_P: Tensor, second_P: Tensor) -> Tensor:
    """``−½ log σ(d) − ½ log σ(−d)`` with ``d = s_1 − s_2``, ``[P]``: each response wins by half.

    Nakano et al. 2021, section 3.2, learn from ties in this way.
    """
    require_same_shape(first_P=first_P, second_P=second_P)
    difference_P = first_P - second_P
    return -(F.logsigmoid(difference_P) + F.logsigmoid(-difference_P)) / 2


def step_loss(scores_S: Tensor, labels_S: Tensor) -> Tensor:
    """Binary cross-entropy of a step's logit with its label in [0, 1], ``[S]``.

    It trains process reward models (Lightman et al. 2024).
    """
    require_same_shape(scores_S=scores_S, labels_S=labels_S)
    return F.binary_cross_entropy_with_logits(scores_S, labels_S, reduction="none")


def dpo_loss(
    margins_P: Tensor, *, beta: float, label_smoothing: float = 0.0, target_margin: float = 0.0
) -> Tensor:
    """``−log σ(β h − γ)``, ``[P]`` (Rafailov et al. 2023, eq. 7).

    ``margins_P`` is ``h = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)``, before β. With
    ``label_smoothing = ε`` labels are assumed to be flipped with probability ε:
    ``−(1−ε) log σ(βh) − ε log σ(−βh)`` (cDPO, Mitchell 2023). ``target_margin`` is γ of SimPO (Meng
    et al. 2024, eq. 6), where h is the difference of length-normalized log-probs without a
    reference.
    """
    _require_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    logit_P = beta * margins_P - target_margin
    return -(1 - label_smoothing) * F.logsigmoid(logit_P) - label_smoothing * F.logsigmoid(-logit_P)


def ipo_loss(
    margins_P: Tensor, *, beta: float, label_smoothing: float = 0.0, target_margin: float = 0.0
) -> Tensor:
    """``(h − 1/(2β))²``, ``[P]`` (Azar et al. 2024, eq. 17, with τ = β)."""
    _require_beta(beta)
    _require_unused("ipo", label_smoothing, target_margin)
    return (margins_P - 1 / (2 * beta)).square()


def hinge_loss(
    margins_P: Tensor, *, beta: float, label_smoothing: float = 0.0, target_margin: float = 0.0
) -> Tensor:
    """``max(0, 1 − β h)``, ``[P]`` (SLiC, Zhao et al. 2023; on log ratios, Liu et al. 2024)."""
    _require_beta(beta)
    _require_unused("hinge", label_smoothing, target_margin)
    return torch.relu(1 - beta * margins_P)


def robust_loss(
    margins_P: Tensor, *, beta: float, label_smoothing: float = 0.0, target_margin: float = 0.0
) -> Tensor:
    """``(−(1−ε) log σ(βh) + ε log σ(−βh)) / (1 − 2ε)``, ``[P]`` (rDPO, Chowdhury et al. 2024).

    Unbiased for the DPO loss if a share ε of the labels is flipped.
    """
    _require_beta(beta)
    _require_unused("robust", 0.0, target_margin)
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"robust needs label_smoothing in (0, 0.5), got {label_smoothing}")
    logit_P = beta * margins_P
    kept_P = (1 - label_smoothing) * F.logsigmoid(logit_P)
    return (label_smoothing * F.logsigmoid(-logit_P) - kept_P) / (1 - 2 * label_smoothing)


PreferenceLoss = Callable[..., Tensor]
"""A loss per pair, with the arguments of ``dpo_loss``."""


def preference_gradient_weight(
    loss: PreferenceLoss,
    margins_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
) -> Tensor:
    """``−∂L/∂h / β``, ``[P]``, detached: the weight of a pair in the gradient of its loss.

    The gradient is ``−β w (∇log π(y_w) − ∇log π(y_l))``. For the sigmoid loss
    ``w = σ(−β h) = σ(r̂_l − r̂_w)`` (Rafailov et al. 2023). A weight below 0 pulls a pair's margin
    down, as IPO does beyond 1/(2β).
    """
    with torch.enable_grad():
        margins_P = margins_P.detach().requires_grad_()
        loss_P = loss(
            margins_P, beta=beta, label_smoothing=label_smoothing, target_margin=target_margin
        )
        (gradient_P,) = torch.autograd.grad(loss_P.sum(), margins_P)
    return -gradient_P / beta


def _require_clip(clip_low: float, clip_high: float) -> None:
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ValueError(
            f"clipping needs 0 < clip_low ≤ 1 and clip_high > 0, got {clip_low} and {clip_high}"
        )


def _require_beta(beta: float) -> None:
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")


def _require_unused(loss: str, label_smoothing: float, target_margin: float) -> None:
    if label_smoothing or target_margin:
        raise ValueError(
            f"the {loss} loss has no label_smoothing or target_margin: leave them at 0"
        )
