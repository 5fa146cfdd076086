"""Checks of a user's own equation on a tiny batch before the run.

The tiny batch holds two responses (or groups, or pairs) with unequal values. It cannot show that an
equation is right; it shows wrong shapes, values that are not finite, and losses without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trivium.config.functions import error_with_location
from trivium.config.option import Option
from trivium.errors import ConfigurationError
from trivium.maths.objectives import SurrogateLoss


def check(option: Option, choice: str, function: Callable[..., Any]) -> None:
    """Raise ConfigurationError if a user's function fails on the tiny batch of its kind."""
    values, differentiated = _TINY[option.name]()
    arguments, settings = values
    try:
        result = function(*arguments, **settings)
    except Exception as error:
        reason = error_with_location(error, lambda file: file == choice.rpartition(":")[0])
        raise ConfigurationError(
            f"{choice} failed on a tiny batch: {reason}. It is called as '{option.signature}'"
        ) from error
    expected = arguments[0].shape
    if isinstance(result, SurrogateLoss) and option.name == "surrogate":
        _require_masks(choice, result, expected)
        result = result.loss_T
    if not isinstance(result, Tensor) or result.shape != expected:
        shown = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ConfigurationError(
            f"{choice} returned {shown} for a tiny batch of {tuple(expected)}: return "
            f"{option.result}, as a tensor of that shape"
        )
    if not bool(result.isfinite().all()):
        raise ConfigurationError(
            f"{choice} returned {result.tolist()} for a tiny batch of ordinary values: every value "
            "must be finite"
        )
    if differentiated is not None:
        _require_gradient(choice, result, differentiated)


def _require_masks(choice: str, result: SurrogateLoss, expected: torch.Size) -> None:
    for name, mask_T in result._asdict().items():
        if name != "loss_T" and not (
            isinstance(mask_T, Tensor) and mask_T.shape == expected and mask_T.dtype == torch.bool
        ):
            raise ConfigurationError(
                f"{choice} returned a SurrogateLoss whose {name} is not a mask of "
                f"{tuple(expected)} booleans: mark every token, or return the loss alone"
            )


def _require_gradient(choice: str, result: Tensor, differentiated: Tensor) -> None:
    gradient = None
    if result.requires_grad:
        (gradient,) = torch.autograd.grad(result.sum(), differentiated, allow_unused=True)
    if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        shown = "no gradient" if gradient is None else f"the gradient {gradient.tolist()}"
        raise ConfigurationError(
            f"{choice} has {shown} with respect to its first argument on a tiny batch, so nothing "
            "would be learned: compute the result from that argument with torch operations"
        )


Call = tuple[tuple[Tensor, ...], dict[str, Any]]


def _advantage() -> tuple[Call, None]:
    rewards_N = torch.tensor([1.0, 0.0, 0.5, 1.0])
    return ((rewards_N, torch.tensor([2, 2])), {"scale": "sample_std"}), None


def _surrogate() -> tuple[Call, Tensor]:
    logprobs_T = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.1], requires_grad=True)
    old_T = torch.tensor([-1.1, -1.9, -0.5, -1.6, -0.1])
    advantages_T, lengths_N = torch.tensor([1.0, 1.0, -0.5, -0.5, -0.5]), torch.tensor([2, 3])
    settings = {"clip_low": 0.2, "clip_high": 0.2}
    return ((logprobs_T, old_T, advantages_T, lengths_N), settings), logprobs_T


def _kl_estimator() -> tuple[Call, Tensor]:
    logprobs_T = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    return ((logprobs_T, torch.tensor([-1.2, -1.5, -0.6])), {}), logprobs_T


def _preference_loss() -> tuple[Call, Tensor]:
    margins_P = torch.tensor([0.5, -1.0], requires_grad=True)
    settings = {"beta": 0.1, "label_smoothing": 0.0, "target_margin": 0.0}
    return ((margins_P,), settings), margins_P


_TINY: dict[str, Callable[[], tuple[Call, Tensor | None]]] = {
    "advantage": _advantage,
    "surrogate": _surrogate,
    "KL estimator": _kl_estimator,
    "preference loss": _preference_loss,
}
"""Arguments for each kind of function, and the argument that must receive a gradient."""
