"""Run the real code on tensors without data, and count the bytes that would be allocated.

A formula for activations would have to repeat the attention, the head and the losses of every model
family. Instead, their code runs unchanged: parameters and all tensors computed from them are *fake*
tensors, which have a shape and no data, and every storage that an operation allocates is counted
until Python and autograd release it. Small tensors that decide shapes (token ids, lengths, masks)
stay real. Temporary buffers inside an operation are not counted, except for oneDNN's.
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

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
ACTIVATIONS, CACHE = "activations", "cache"
MIN_FAKE_ELEMENTS = 1 << 16
"""Number of elements from which a real floating-point matrix becomes fake: only its shape
matters."""

_aten = torch.ops.aten
_FAKE_RESULTS = {
    _aten._local_scalar_dense.default: 1.0,
    _aten.allclose.default: True,
    _aten.equal.default: True,
}
"""Results of operations that read a value from a fake tensor."""
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}

_ONEDNN = torch.ops.mkldnn._linear_pointwise.default

Tag = tuple[str, str]
"""Role of the model that owns a storage, and the kind of its content (parameters, gradients …)."""


@dataclass
class _Storage:
    """An allocated storage."""

    reference: weakref.ref[Any]
    size: int
    tag: Tag


class Ledger:
    """Bytes of all allocated storages by tag, now and at the peak.

    A new storage counts as an activation of the model that is running (``active_role``).
    """

    def __init__(self) -> None:
        self.active_role = ""
        self.storages: dict[int, _Storage] = {}
        self.bytes: Counter[Tag] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: Counter[Tag] = Counter()

    def count(self, tensor: Tensor) -> None:
        """Count the tensor's storage if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages or size == 0:
            return
        tag = (self.active_role, ACTIVATIONS)
        self.storages[key] = _Storage(
            weakref.ref(storage, lambda _: self._released(key)), size, tag
        )
        self.bytes[tag] += size
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self.at_peak = Counter(self.bytes)

    def tag(self, tensors: Iterable[Tensor], role: str, kind: str) -> None:
        """Assign the tensors' storages to a model's role and a kind."""
        for tensor in tensors:
            self.count(tensor)
            storage = self.storages.get(tensor.untyped_storage()._cdata)
            if storage is not None:
                self.bytes[storage.tag] -= storage.size
                storage.tag = (role, kind)
                self.bytes[storage.tag] += storage.size

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are allocated now."""
        self.peak = self.total
        self.at_peak = Counter(self.bytes)

    def _released(self, key: int) -> None:
        storage = self.storages.pop(key)
        self.total -= storage.size
        self.bytes[storage.tag] -= storage.size


class DryRun(TorchDispatchMode):
    """Dispatch mode in which operations on fake tensors compute shapes and are counted.

    Operations with only real arguments run as usual. A number read from a fake tensor is 1, and a
    fake tensor compares equal to every tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = Ledger()
        self.uses_onednn = False

    @contextmanager
    def building(self) -> Iterator[None]:
        """Build models from fake tensors inside this context.

        Models are created on their device, and ``Module.to`` does nothing, because PyTorch cannot
        swap fake parameters.
        """
        no_move = mock.patch.object(nn.Module, "_apply", lambda module, *_: module)
        with self.fake, FakeCopies(), no_move:
            yield

    def adopt(self, model: nn.Module, role: str) -> None:
        """Assign the model's parameters, buffers and future gradients to ``role``."""
        self.ledger.tag([*model.parameters(), *model.buffers()], role, PARAMETERS)
        for module in (model, getattr(model, "base_model", model)):
            module.register_forward_pre_hook(lambda *_: setattr(self.ledger, "active_role", role))
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
            if func in _FAKE_RESULTS:
                return _FAKE_RESULTS[func]
            if func in _INDEXED:
                args = (args[0], _as_indices(args[1]), *args[2:])
            self.uses_onednn |= func is _ONEDNN
            with self.fake:
                workspace = _workspace(func, args)
                for tensor in workspace:
                    self.ledger.count(tensor)
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and _is_large_matrix(out):
                out = self.fake.from_tensor(out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.ledger.count(tensor)
        return out


def _workspace(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Return fake tensors for the buffers of an operation that are as large as its inputs.

    oneDNN reorders both of its inputs.
    """
    if func is not _ONEDNN:
        return []
    return [torch.empty_like(x) for x in args[:2] if x is args[1] or not x.is_contiguous()]


class FakeCopies(TorchFunctionMode):
    """Mode in which ``copy.deepcopy`` of a fake tensor is another fake tensor."""

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


def _is_large_matrix(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() > 1 and x.numel() > MIN_FAKE_ELEMENTS


def _as_indices(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Replace masks by indices, so that the number of selected elements is known."""
    result: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            result += index.nonzero().unbind(1)
        else:
            result.append(index)
    return result
