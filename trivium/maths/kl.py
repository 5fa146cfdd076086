"""KL divergence: estimators from samples, the KL-shaped reward, and the adaptive coefficient.

Throughout, ``l = log π(o_t) − log π_ref(o_t)`` for a token sampled from π. The names k1, k2 and k3
are those of Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trivium.maths.ragged import require_lengths, require_same_shape, segment_starts

MAX_LOG_RATIO = 20.0
"""Bound of a log-ratio before it is exponentiated: exp(20) is 4.9e8."""


def bounded_exp(log_ratio_T: Tensor) -> Tensor:
    """``exp(min(x, MAX_LOG_RATIO))``: finite in float32, with gradient 0 beyond the bound."""
    return torch.exp(log_ratio_T.clamp(max=MAX_LOG_RATIO))


def k1(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``l``, ``[T]``: unbiased for KL(π‖π_ref), may be negative.

    Gradient flows through both inputs.
    """
    require_same_shape(logprobs_T=logprobs_T, ref_logprobs_T=ref_logprobs_T)
    return logprobs_T - ref_logprobs_T


def k2(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``l²/2``, ``[T]``: biased, low variance.

    On samples of π its gradient is that of KL(π‖π_ref) of one token's distribution, with the prefix
    held fixed: see ``docs/kl.md``.
    """
    return k1(logprobs_T, ref_logprobs_T).square() / 2


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``exp(−l) − 1 + l``, ``[T]``: unbiased for KL(π‖π_ref) and ≥ 0 (Shao et al. 2024, eq. 4).

    The *value* estimates KL(π‖π_ref). The *gradient*, with samples held fixed as in a loss, is
    ``(1 − exp(−l)) ∇log π``. Its expectation under π is ∇KL(π_ref‖π); multiplied by the ratio ρ it
    is ∇KL(π‖π_ref). Both hold the prefix fixed: see ``docs/kl.md``. ``−l`` is at most
    ``MAX_LOG_RATIO``; beyond it the value is constant.
    """
    log_ratio_T = k1(logprobs_T, ref_logprobs_T).clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-log_ratio_T) + log_ratio_T


KLEstimator = Callable[[Tensor, Tensor], Tensor]
"""Estimate the KL per token, ``[T]``, from log-probs of the policy and of the reference."""


def kl_shaped_rewards(
    scores_N: Tensor,
    kl_T: Tensor,
    lengths_N: Tensor,
    beta: float,
    token_rewards_T: Tensor | None = None,
) -> Tensor:
    """``r_t = 1[t = T]·score − β·kl_t (+ reward of token t)``, ``[T]`` (Ouyang et al. 2022, eq. 2).

    ``scores_N`` is added at each response's last token. ``kl_T`` is an estimate between π_old and
    the reference, usually k1.

    Raises:
        ValueError: a response is empty, so that its score would fall on no token.
    """
    require_lengths(lengths_N, len(kl_T))
    require_same_shape(kl_T=kl_T, token_rewards_T=token_rewards_T)
    require_same_shape(scores_N=scores_N, lengths_N=lengths_N)
    if len(lengths_N) and int(lengths_N.min()) < 1:
        raise ValueError("an empty response has no last token for its score to fall on")
    last_N = segment_starts(lengths_N) + lengths_N - 1
    rewards_T = (-beta * kl_T).index_add(0, last_N, scores_N.to(kl_T.dtype))
    return rewards_T if token_rewards_T is None else rewards_T + token_rewards_T


def adapted_coefficient(beta: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Return the next β of the proportional controller of Ziegler et al. 2019, section 2.2.

    ``e = clip(kl/target − 1, −0.2, 0.2)`` and ``β ← β·(1 + e·samples/horizon)``. ``kl`` is the mean
    KL per response (nats) of the last batch, ``samples`` its number of responses;
    ``samples/horizon`` is the paper's K_β.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target and horizon must be positive, got {target} and {horizon}")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * samples / horizon)
