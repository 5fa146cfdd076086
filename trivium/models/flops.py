"""Counting model FLOPs: the matrix products and attention that the models of this process do.

A product of ``[n, k]`` and ``[k, m]`` counts 2nkm. A token costs 2 FLOPs per weight of every matrix
that it passes, and 4·(heads·width) per layer for each token that it attends to, itself included
(Kaplan et al. 2020, section 2.1). A backward pass costs one more of these for the gradients that
flow on and one more for those of trained weights. It is the model's cost, so that implementations
can be compared: what is done beyond it, for padding or recomputation, is not counted, and what is
left out of the last layer because no one reads it (``models.cpu.layers``) is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_total = 0.0
_lock = threading.Lock()
_thread = threading.local()


def total() -> float:
    """FLOPs that were counted in this process so far."""
    return _total


def go_on_from(total: float) -> None:
    """Let the count stand where it stood when a run was stopped: differences are then the same to
    the last bit."""
    global _total
    _total = total


def add(flops: float) -> None:
    """Count some more, in whatever thread."""
    global _total
    tally: Tally | None = getattr(_thread, "tally", None)
    if tally is not None:
        tally.flops += flops
        return
    with _lock:
        _total += flops


class Tally:
    """A count of its own."""

    flops = 0.0


@contextmanager
def apart() -> Iterator[Tally]:
    """What this thread does here is counted apart, for whoever uses its result to ``add``."""
    outer: Tally | None = getattr(_thread, "tally", None)
    _thread.tally = tally = Tally()
    try:
        yield tally
    finally:
        _thread.tally = outer


def count_head(tokens: int, weight: Tensor) -> None:
    """Count a linear head on so many tokens, with its backward pass where gradients are wanted."""
    passes = 1 + (1 + weight.requires_grad) * torch.is_grad_enabled()
    add(2.0 * tokens * weight.numel() * passes)


def watch(backbone: PreTrainedModel) -> None:
    """Count every forward pass of this backbone, or of a copy of it, from now on."""
    hooks = backbone._forward_pre_hooks.values()
    if not any(isinstance(hook, partial) and hook.func is _count for hook in hooks):
        backbone.register_forward_pre_hook(partial(_count, _matrices(backbone)), with_kwargs=True)


def counter(backbone: PreTrainedModel) -> Callable[[Tensor], None]:
    """Counts a pass without gradients that is made around the backbone, given the positions of its
    tokens, each of which sees all before it and itself."""
    weights = _passed(_matrices(backbone))
    width = _attention_width(backbone)

    def count(position_L: Tensor) -> None:
        pairs = int(position_L.sum()) + len(position_L)
        add(2.0 * len(position_L) * weights + 4.0 * pairs * width)

    return count


Matrices = list[tuple[nn.Parameter, float]]
"""Weights that tokens are multiplied by, and the share of them that one token passes."""


def _count(
    matrices: Matrices, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Count one forward pass, and its backward pass where gradients are wanted."""
    tokens, pairs = _work(args, kwargs)
    products = 2.0 * tokens * _passed(matrices)
    scores = 4.0 * pairs * _attention_width(module)
    add(products + scores)
    trained = _passed((p, share) for p, share in matrices if p.requires_grad)
    if torch.is_grad_enabled() and trained:
        add(products + 2.0 * tokens * trained + 2 * scores)


def _passed(matrices: Iterable[tuple[nn.Parameter, float]]) -> float:
    """How many weights one token is multiplied by."""
    return sum(p.numel() * share for p, share in matrices)


def _work(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a forward pass, and pairs of a token with one that it attends to."""
    tokens: Tensor = args[0] if args else kwargs["input_ids"]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    pad_rows = getattr(kwargs.get("layout"), "pad_rows", 0)
    seen: Tensor = positions[:, : positions.shape[1] - pad_rows] + 1
    held: Tensor | None = kwargs.get("attention_mask")
    if held is None:
        return seen.numel(), int(seen.sum())
    held = held[:, -seen.shape[1] :]
    return int(held.sum()), int((seen * held).sum())


def _matrices(backbone: PreTrainedModel) -> Matrices:
    """All matrices but look-up tables; of experts, the share that a token is routed to."""
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    config = backbone.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    return [
        (p, 1.0 if p.dim() == 2 else chosen / p.shape[0])
        for p in backbone.parameters()
        if p.dim() in (2, 3) and id(p) not in tables
    ]


def _attention_width(backbone: nn.Module) -> int:
    """Heads times their width, over all layers."""
    config = backbone.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * heads * width
