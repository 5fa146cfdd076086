"""Updates of half-precision weights that are not lost in rounding.

An update of AdamW is about the learning rate, 1e-6, and neighboring bfloat16 numbers differ by
1/256 of their size: added to a bfloat16 weight, nearly every update rounds to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_HOOK = "trivium_gradient_hook"
_PERIOD = 1 << 16
_MULTIPLIER = 40503
"""2¹⁶ divided by the golden ratio: neighboring thresholds are far apart."""


def is_half(parameter: Tensor) -> bool:
    """Return whether a parameter is stored in half precision."""
    return parameter.dtype == torch.bfloat16


class MasterWeights:
    """float32 copies of half-precision parameters (Micikevicius et al. 2018, section 3.1).

    The optimizer updates the copies; ``round_`` then rounds them into the parameters, which compute
    the forward and backward pass (``round_evenly``). Gradients of micro-batches are added up in
    float32. A parameter of full precision is its own master.

    Args:
        parameters: the trained parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.of = {p: nn.Parameter(p.detach().float()) if is_half(p) else p for p in parameters}
        self._half = [p for p in self.of if is_half(p)]
        for parameter in self._half:
            # Another optimizer may have trained this model before.
            if (handle := vars(parameter).pop(_HOOK, None)) is not None:
                handle.remove()
            hook = partial(_accumulate, self.of[parameter])
            vars(parameter)[_HOOK] = parameter.register_post_accumulate_grad_hook(hook)

    def zero_grad(self) -> None:
        """Drop all gradients, also those that a failed backward pass left behind."""
        for parameter, master in self.of.items():
            parameter.grad = master.grad = None

    @torch.no_grad()
    def round_(self) -> None:
        """Round the copies into the parameters."""
        for parameter in self._half:
            parameter.copy_(round_evenly(self.of[parameter]))

    def state_dict(self) -> list[Tensor]:
        """Return the copies."""
        return [self.of[parameter].detach() for parameter in self._half]

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor]) -> None:
        """Take the copies of ``state_dict``."""
        for parameter, value in zip(self._half, state, strict=True):
            self.of[parameter].copy_(value)


def _accumulate(master: nn.Parameter, parameter: Tensor) -> None:
    assert parameter.grad is not None, "called after a gradient was accumulated"
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


class StochasticRounding(torch.optim.Optimizer):
    """An optimizer with float32 moments, whose result is rounded to bfloat16 stochastically.

    A number between two neighbors is rounded up with the probability of its distance to the lower
    one, so that the mean of many updates is right (Zamirai et al. 2020, section 3.1). Random
    numbers depend on the number of the step alone.

    Args:
        groups: parameter groups, with the settings of PyTorch's optimizer of the same kind.
        kind: adamw, adam or rmsprop.
    """

    def __init__(self, groups: list[dict[str, Any]], kind: str) -> None:
        super().__init__(groups, {})
        self.update = _UPDATES[kind]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; ``closure`` is not used."""
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("step", torch.zeros(()))
                state["step"] += 1
                step, device = int(state["step"]), parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(step)
                updated = self.update(parameter.float(), parameter.grad.float(), state, group, step)
                if is_half(parameter):
                    updated = round_stochastically(updated, generators[device])
                parameter.copy_(updated)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments; PyTorch would cast them to the type of the parameters."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            parameter = parameters[index]
            self.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}


def _adamw(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], step: int
) -> Tensor:
    """Update the moments in place; return the new weight, all in float32.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,
    w ← (1 − η λ) w − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
    """
    (beta_1, beta_2), rate = group["betas"], group["lr"]
    first, second = _moment(state, "exp_avg", weight), _moment(state, "exp_avg_sq", weight)
    first.lerp_(gradient, 1 - beta_1)
    second.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
    scale = (second / (1 - beta_2**step)).sqrt_().add_(group["eps"])
    decayed = weight * (1 - rate * group["weight_decay"])
    return decayed.addcdiv_(first, scale, value=-rate / (1 - beta_1**step))


def _adam(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], step: int
) -> Tensor:
    """Like ``_adamw`` without its decay, on the gradient g + λ w."""
    gradient = gradient + group["weight_decay"] * weight
    return _adamw(weight, gradient, state, {**group, "weight_decay": 0.0}, step)


def _rmsprop(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], step: int
) -> Tensor:
    """``v ← α v + (1 − α) g²,  w ← w − η g / (√v + ε)``, on the gradient g + λ w."""
    gradient = gradient + group["weight_decay"] * weight
    square, alpha = _moment(state, "square_avg", weight), group["alpha"]
    square.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    return weight.addcdiv(gradient, square.sqrt().add_(group["eps"]), value=-group["lr"])


def _moment(state: dict[str, Any], name: str, weight: Tensor) -> Tensor:
    """Return a moment of a weight, which starts at 0."""
    if name not in state:
        state[name] = torch.zeros_like(weight)
    return state[name]


_UPDATES = {"adamw": _adamw, "adam": _adam, "rmsprop": _rmsprop}


def round_evenly(x: Tensor) -> Tensor:
    """Round float32 numbers to bfloat16 so that many numbers keep their mean.

    Number i is rounded away from zero if its distance to the lower neighbor, in units in the last
    place, exceeds a threshold of its own: ``1 − (40503 i mod 2¹⁶)/2¹⁶``, evenly spread over
    (0, 1]. Rounding to the nearest would leave every weight of a bfloat16 checkpoint where it is
    until its copy has moved by half a unit, and the model would learn late. The thresholds never
    change, so that weights do not flicker and a resumed run computes the same bits.
    """
    flat = x.detach().reshape(-1)
    rounded = torch.empty_like(flat, dtype=torch.bfloat16)
    period = torch.arange(_PERIOD, dtype=torch.int32, device=x.device)
    period.mul_(_MULTIPLIER).bitwise_and_(0xFFFF)
    for start in range(0, len(flat), _PERIOD):
        part = flat[start : start + _PERIOD]
        rounded[start : start + _PERIOD] = _truncated(part, period[: len(part)])
    return rounded.view(x.shape)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 numbers to bfloat16, up or down with the probability of their distance.

    A random number below one unit in the last place is added before the number is truncated.
    """
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return _truncated(x.contiguous(), noise)


def _truncated(x: Tensor, noise: Tensor) -> Tensor:
    """Add noise to the lower half of the bits, and keep the upper half, which is a bfloat16."""
    bits = (x.view(torch.int32) + noise) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)
