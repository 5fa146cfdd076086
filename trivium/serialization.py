"""Exact conversion of values to JSON and tensors, and back, for checkpoints.

A packed value is a JSON-compatible tree in which every tensor is replaced by a name. Numbers, text,
lists, tuples, mappings, tensors and dataclasses registered with ``serializable`` can be packed. No
other type can be constructed from a file, so loading a checkpoint runs no code. Reading and writing
the files is left to ``runs.checkpoint``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from trivium import distributed

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C")

_SERIALIZABLE: dict[str, type] = {}
_KIND_KEY, _VALUE_KEY = "!", "="
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def serializable(cls: type[C]) -> type[C]:
    """Register a dataclass, so that its instances can be packed by their ``init`` fields."""
    assert is_dataclass(cls), f"{cls.__name__} is not a dataclass"
    assert cls.__name__ not in _SERIALIZABLE, f"two serializable classes are named {cls.__name__}"
    _SERIALIZABLE[cls.__name__] = cls
    return cls


class Serializer:
    """Packs values one at a time, and collects their tensors by name.

    Args:
        shared_objects: objects that the reader also has, in the same order, such as the run's
            prompts. Only their indices are written.

    Attributes:
        tensors: the collected tensors, which share memory with the packed values.
    """

    def __init__(self, shared_objects: Sequence[object] = ()) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._shared_indices = {id(item): index for index, item in enumerate(shared_objects)}

    def pack(self, value: Any, name: str) -> Any:
        """Return the tree of a value. The names of its tensors begin with ``name``.

        Raises:
            TypeError: something in the value cannot be packed.
        """
        if id(value) in self._shared_indices:
            return _tagged("shared_objects", self._shared_indices[id(value)])
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else _tagged("float", str(value))
            case tuple():
                return _tagged("tuple", self._pack_items(value, name))
            case list():
                return self._pack_items(value, name)
            case Mapping():
                return self._pack_mapping(value, name)
        if is_dataclass(value):
            return self._pack_dataclass(value, name)
        return self._pack_tensor(value, name)

    def _pack_items(self, values: Sequence[Any], name: str) -> list[Any]:
        return [self.pack(value, f"{name}.{i}") for i, value in enumerate(values)]

    def _pack_mapping(self, values: Mapping[Any, Any], name: str) -> Any:
        if all(isinstance(key, str) for key in values) and _KIND_KEY not in values:
            return {key: self.pack(value, f"{name}.{key}") for key, value in values.items()}
        pairs = [[key, value] for key, value in values.items()]
        return _tagged("mapping", self.pack(pairs, name))

    def _pack_dataclass(self, value: Any, name: str) -> Any:
        kind = type(value).__name__
        if _SERIALIZABLE.get(kind) is not type(value):
            raise TypeError(f"{name}: {kind} cannot be packed")
        arguments = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return _tagged(kind, self._pack_mapping(arguments, name))

    def _pack_tensor(self, value: Any, name: str) -> Any:
        import torch  # imported here, so that reading a configuration does not import torch

        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: {type(value).__name__} cannot be packed")
        self.tensors[name] = value.detach().contiguous()
        return _tagged("tensor", [name, str(value.device)])


def deserialize(
    tree: Any, tensor: Callable[[str], Tensor], shared_objects: Sequence[object] = ()
) -> Any:
    """Return the value that was packed into a tree.

    Args:
        tree: the result of ``Serializer.pack``, which may have been saved as JSON.
        tensor: a function that returns the tensor of a name. The value holds that tensor.
        shared_objects: the shared objects of the serializer that packed the value.

    Raises:
        ValueError: ``pack`` cannot have returned this tree.
    """
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case list():
            return [deserialize(item, tensor, shared_objects) for item in tree]
        case dict() if _KIND_KEY not in tree:
            return {key: deserialize(item, tensor, shared_objects) for key, item in tree.items()}
        case {"!": str() as kind, "=": inner} if len(tree) == 2:
            return _construct(kind, inner, tensor, shared_objects)
    raise ValueError(f"{tree!r:.80} is not a packed value")


def _construct(
    kind: str, inner: Any, tensor: Callable[[str], Tensor], shared_objects: Sequence[object]
) -> Any:
    if kind == "tensor":
        name, device = inner
        return tensor(name).to(distributed.own_device(device))
    if kind == "float":
        return _NONFINITE[inner]
    if kind == "shared_objects":
        return shared_objects[inner]
    value = deserialize(inner, tensor, shared_objects)
    if kind == "tuple":
        return tuple(value)
    if kind == "mapping":
        return dict(value)
    if kind not in _SERIALIZABLE:
        raise ValueError(f"a packed value has the type {kind!r}, which is not registered")
    return _SERIALIZABLE[kind](**value)


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {_KIND_KEY: kind, _VALUE_KEY: value}
