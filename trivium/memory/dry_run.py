"""Running the real code on tensors without storage, and counting what would be alive.

A formula for activations would have to repeat what attention, the head and the losses do, for every
model family. Here they are run as they are: parameters and all that follows from them are *fake*
tensors, which know their shape and hold no data, and every storage that an operation opens is
counted until Python and autograd let it go. What is small and decides shapes (token ids, lengths,
masks) stays real. Left out: what an operation uses inside itself and gives back before it returns.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trivium.models.cpu.linear import matmul_backend

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
ACTIVATIONS, CACHE = "activations", "cache"
LARGE = 1 << 16
"""Elements from which a table of real numbers is made fake: only its shape matters."""

_aten = torch.ops.aten
_ANSWERS = {
    _aten._local_scalar_dense.default: 1.0,
    _aten.allclose.default: True,
    _aten.equal.default: True,
}
"""What is said where a value is asked for that no one knows."""
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}

_ONEDNN = torch.ops.mkldnn._linear_pointwise.default

Tag = tuple[str, str]
"""Whose a storage is (a model's role) and what for (parameters, gradients …)."""


@dataclass
class _Held:
    """One storage that is alive."""

    reference: weakref.ref[Any]
    size: int
    tag: Tag


class Ledger:
    """Bytes of all storages that are alive, by tag, and the moment at which they were the most.

    A new storage is an activation of the model that works at that time (``working``).
    """

    def __init__(self) -> None:
        self.working = ""
        self.held: dict[int, _Held] = {}
        self.bytes: Counter[Tag] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: Counter[Tag] = Counter()

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.held or size == 0:
            return
        tag = (self.working, ACTIVATIONS)
        self.held[key] = _Held(weakref.ref(storage, lambda _: self._gone(key)), size, tag)
        self.bytes[tag] += size
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self.at_peak = Counter(self.bytes)

    def tag(self, tensors: Iterable[Tensor], role: str, kind: str) -> None:
        """Say whose these tensors are and what for."""
        for tensor in tensors:
            self.note(tensor)
            held = self.held.get(tensor.untyped_storage()._cdata)
            if held is not None:
                self.bytes[held.tag] -= held.size
                held.tag = (role, kind)
                self.bytes[held.tag] += held.size

    def restart(self) -> None:
        """Forget the peak; what is alive now is the new one."""
        self.peak = self.total
        self.at_peak = Counter(self.bytes)

    def _gone(self, key: int) -> None:
        held = self.held.pop(key)
        self.total -= held.size
        self.bytes[held.tag] -= held.size


class DryRun(TorchDispatchMode):
    """While this mode is on, operations on fake tensors compute shapes and are counted.

    Operations whose arguments are all real are carried out. A number read from a fake tensor
    is 1, and fake tensors equal whatever they are compared with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = Ledger()
        self.uses_onednn = False
        _ = (
            matmul_backend.name
        )  # Measured on real tensors, of which there are none while this mode is on.

    @contextmanager
    def building(self) -> Iterator[None]:
        """Everything that is made inside is fake: for models.

        They are made where they belong, and moving them there again is left out: PyTorch cannot
        swap fake parameters.
        """
        stay = mock.patch.object(nn.Module, "_apply", lambda module, *_: module)
        with self.fake, FakeCopies(), stay:
            yield

    def adopt(self, model: nn.Module, role: str) -> None:
        """Count the model's parameters, buffers and, from now on, gradients as ``role``'s."""
        self.ledger.tag([*model.parameters(), *model.buffers()], role, PARAMETERS)
        for module in (model, getattr(model, "base_model", model)):
            module.register_forward_pre_hook(lambda *_: setattr(self.ledger, "working", role))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.ledger.tag([cast(Tensor, p.grad)], role, GRADIENTS)
                )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            if func in _ANSWERS:
                return _ANSWERS[func]
            if func in _INDEXED:
                args = (args[0], _as_indices(args[1]), *args[2:])
            self.uses_onednn |= func is _ONEDNN
            with self.fake:
                inside = _inside(func, args)
                for tensor in inside:
                    self.ledger.note(tensor)
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and _is_table(out):
                out = self.fake.from_tensor(out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.ledger.note(tensor)
        return out


def _inside(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """What an operation holds while it works, where that is as large as what it is given.

    oneDNN brings both of its inputs into an order of its own.
    """
    if func is not _ONEDNN:
        return []
    return [torch.empty_like(x) for x in args[:2] if x is args[1] or not x.is_contiguous()]


class FakeCopies(TorchFunctionMode):
    """While this mode is on, ``copy.deepcopy`` of a fake tensor is another fake tensor."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        original, memo = args
        if id(original) not in memo:
            copied = torch.empty_like(original)
            if isinstance(original, nn.Parameter):
                copied = nn.Parameter(copied, original.requires_grad)
            memo[id(original)] = copied
        return memo[id(original)]


def _is_table(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() > 1 and x.numel() > LARGE


def _as_indices(places: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks written as indices, so that the number of chosen elements is known."""
    indices: list[Tensor | None] = []
    for place in places:
        if place is not None and place.dtype == torch.bool:
            indices += place.nonzero().unbind(1)
        else:
            indices.append(place)
    return indices
