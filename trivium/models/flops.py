"""Count of the model FLOPs of this process: matrix products and attention.

A product of ``[n, k]`` and ``[k, m]`` counts 2nkm. A token costs 2 FLOPs per weight of every matrix
it passes, and 4·(heads·width) per layer for each token that it attends to, itself included (Kaplan
et al. 2020, section 2.1). A backward pass adds the same again for the gradients of inputs and once
more for those of trained weights. This is the model's cost, so that implementations can be
compared: padding and recomputation do not count, tokens that a fast path leaves out do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_total = 0.0
_lock = threading.Lock()
_thread = threading.local()


def total() -> float:
    """Return the FLOPs that this process has counted."""
    return _total


def set_total(total: float) -> None:
    """Set the count to that of a checkpoint, so that differences of counts have the same bits."""
    global _total
    _total = total


def add(flops: float) -> None:
    """Add to the count, from any thread."""
    global _total
    tally: Tally | None = getattr(_thread, "tally", None)
    if tally is not None:
        tally.flops += flops
        return
    with _lock:
        _total += flops


class Tally:
    """A separate count."""

    flops = 0.0


@contextmanager
def apart() -> Iterator[Tally]:
    """Count this thread's FLOPs separately; the caller may ``add`` them later."""
    outer: Tally | None = getattr(_thread, "tally", None)
    _thread.tally = tally = Tally()
    try:
        yield tally
    finally:
        _thread.tally = outer


@contextmanager
def paused() -> Iterator[None]:
    """Do not count this thread's forward passes: reading the positions would wait for the GPU."""
    outer = getattr(_thread, "paused", False)
    _thread.paused = True
    try:
        yield
    finally:
        _thread.paused = outer


def count_head(tokens: int, weight: Tensor) -> None:
    """Count a linear head, with its backward pass if gradients are enabled."""
    passes = 1 + (1 + weight.requires_grad) * torch.is_grad_enabled()
    add(2.0 * tokens * weight.numel() * passes)


def watch(backbone: PreTrainedModel) -> None:
    """Count every forward pass of this backbone and of its copies from now on."""
    hooks = backbone._forward_pre_hooks.values()
    if not any(isinstance(hook, partial) and hook.func is _count for hook in hooks):
        backbone.register_forward_pre_hook(partial(_count, _matrices(backbone)), with_kwargs=True)


def counter(backbone: PreTrainedModel) -> Callable[[Tensor], None]:
    """Return a function that counts forward passes that bypass the backbone, without gradients.

    It takes the positions of the pass's tokens, each of which attends to all positions before it.
    """
    weights = _passed(_matrices(backbone))
    width = _attention_width(backbone)

    def count(position_L: Tensor) -> None:
        pairs = int(position_L.sum()) + len(position_L)
        add(2.0 * len(position_L) * weights + 4.0 * pairs * width)

    return count


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of a forward pass of a model, by what it computes.

    Attributes:
        token: FLOPs of the backbone for one token, without attention.
        pair: FLOPs of attention for one token and one that it attends to.
        head: FLOPs of the head for one response token; 0 for a score.
    """

    token: float
    pair: float
    head: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> ForwardCost:
        """Return the cost of a model, with or without data in its tensors."""
        backbone = cast(PreTrainedModel, model.base_model)
        head = model.get_output_embeddings()
        size = 0.0 if head is None else float(cast(Tensor, head.weight).numel())
        token = 2.0 * _passed(_matrices(backbone))
        return cls(token, 4.0 * _attention_width(backbone), 2.0 * size)

    def group(self, prompt: float, responses: Sequence[float]) -> float:
        """Return the FLOPs of one prompt and its responses, each of a number of tokens."""
        tokens = sum(responses)
        pairs = prompt * (prompt + 1) / 2
        pairs += sum(prompt * n + n * (n + 1) / 2 for n in responses)
        return self.token * (prompt + tokens) + self.pair * pairs + self.head * tokens


Matrices = list[tuple[nn.Parameter, float]]
"""Weight matrices, and the share of each that one token passes."""


def _count(
    matrices: Matrices, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Count one forward pass, and its backward pass if gradients are enabled."""
    if getattr(_thread, "paused", False):
        return
    tokens, pairs = _work(args, kwargs)
    products = 2.0 * tokens * _passed(matrices)
    scores = 4.0 * pairs * _attention_width(module)
    add(products + scores)
    trained = _passed((p, share) for p, share in matrices if p.requires_grad)
    if torch.is_grad_enabled() and trained:
        add(products + 2.0 * tokens * trained + 2 * scores)


def _passed(matrices: Iterable[tuple[nn.Parameter, float]]) -> float:
    """Return the number of weights that multiply one token."""
    return sum(p.numel() * share for p, share in matrices)


def _work(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return the tokens of a forward pass, and the pairs of tokens that attend to each other."""
    tokens: Tensor = args[0] if args else kwargs["input_ids"]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    attended: Tensor = positions + 1
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is None:
        return attended.numel(), int(attended.sum())
    mask = mask[:, -attended.shape[1] :]
    return int(mask.sum()), int((attended * mask).sum())


def _matrices(backbone: PreTrainedModel) -> Matrices:
    """Return all matrices except embeddings; of experts, the share that a token is routed to."""
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    config = backbone.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    return [
        (p, 1.0 if p.dim() == 2 else chosen / p.shape[0])
        for p in backbone.parameters()
        if p.dim() in (2, 3) and id(p) not in tables
    ]


def _attention_width(backbone: nn.Module) -> int:
    """Return heads times head width, summed over all layers."""
    config = backbone.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * heads * width
