"""A device that computes on the CPU, on which mixing devices is an error, as on a GPU.

Tensors of the device are wrappers around CPU tensors. Every operation is computed on these, after
the check that no tensor with dimensions is on another device. PyTorch's generic device name
"privateuseone" stands for it, so that factories, ``Tensor.to`` and autograd treat it as a device of
its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

KIND = "standin"


class _Module(_DummyBackendModule):
    """The device's module, as ``torch.cuda`` is that of GPUs."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend(KIND, backend_module=_Module())
DEVICE = torch.device(KIND, 0)
_CPU = torch.device("cpu")
_MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
"""Operations whose tensors may be on two devices."""


class StandInTensor(Tensor):
    """A tensor of the device, around a CPU tensor."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> StandInTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        tensor.raw = raw
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandInTensor({self.raw})"

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy: Tensor = StandInTensor(self.raw.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return StandInTensor(self.raw.detach())

    @data.setter
    def data(self, value: StandInTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy: use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Give the device's factories and moves to it a result on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Move what is made or moved below the dispatcher: by ``torch.tensor``, and by ``Tensor.to`` in
    inference mode with a device and a type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device")):
            kwargs["device"] = _CPU
            return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.to and isinstance(args[0], Tensor):
            device, dtype = _target(args[1:], kwargs)
            if dtype is not None and _is_ours(device) and args[0].device != DEVICE:
                return func(func(args[0], dtype), DEVICE)
            if dtype is not None and device is not None and _is_ours(args[0].device):
                return (
                    func(func(args[0], dtype), device) if device != DEVICE else func(args[0], dtype)
                )
        return func(*args, **kwargs)


def _target(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the device and the type of the arguments of ``Tensor.to``."""
    if args and isinstance(args[0], Tensor):
        return args[0].device, args[0].dtype
    device, dtype, *_ = torch._C._nn._parse_to(
        *args, **{name: value for name, value in kwargs.items() if name != "copy"}
    )
    return device, dtype


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == KIND


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the CPU, and put its result on the device of its arguments."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [t for t in tensors if isinstance(t, StandInTensor)]
    others = [t for t in tensors if not isinstance(t, StandInTensor) and t.dim()]
    if ours and others and func not in _MOVES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got tensors on {DEVICE} "
            f"and on {others[0].device}"
        )
    device = kwargs.get("device")
    on_device = bool(ours) if device is None else _is_ours(device)
    if func is torch.ops.aten.copy_.default:
        on_device = isinstance(args[0], StandInTensor)
    if _is_ours(device):
        kwargs = {**kwargs, "device": _CPU}
    wrappers = {id(t.raw): t for t in ours}
    raw_args, raw_kwargs = tree_map(
        lambda leaf: leaf.raw if isinstance(leaf, StandInTensor) else leaf, (args, kwargs)
    )
    result = func(*raw_args, **raw_kwargs)

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        known = wrappers.get(id(leaf))
        return known if known is not None else StandInTensor(leaf) if on_device else leaf

    return tree_map(wrapped, result)


@contextmanager
def stand_in_device() -> Iterator[torch.device]:
    """Make the device usable inside the context, also in threads that start there."""
    make, run = torch.Generator, threading.Thread.run

    def generator(device: Any = _CPU) -> torch.Generator:
        return make(_CPU if _is_ours(device) else device)

    def run_with_device(thread: threading.Thread) -> None:
        with _Dispatch(), _Functions():
            run(thread)

    patches = (
        patch.object(torch, "Generator", generator),
        patch.object(threading.Thread, "run", run_with_device),
    )
    with patches[0], patches[1], _Dispatch(), _Functions():
        yield DEVICE
