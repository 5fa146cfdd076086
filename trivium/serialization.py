"""Values as JSON and tensors, and back, bit by bit: what a checkpoint is made of.

A packed value is a tree that JSON can hold, in which every tensor is a name. Numbers, texts, lists,
tuples, mappings, tensors and the dataclasses that are declared here with ``serializable`` can be
packed; nothing that a file says can make anything else, so that reading one runs no code. Left
out: the files (``runs.checkpoint``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C")

_SERIALIZABLE: dict[str, type] = {}
_KIND, _VALUE = "!", "="
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def serializable(cls: type[C]) -> type[C]:
    """Declare that instances of a dataclass can be packed: by the fields its constructor takes."""
    assert is_dataclass(cls), f"{cls.__name__} is no dataclass"
    assert cls.__name__ not in _SERIALIZABLE, f"two packable classes are called {cls.__name__}"
    _SERIALIZABLE[cls.__name__] = cls
    return cls


class Serializer:
    """Packs one value after the other, and collects their tensors by name.

    Args:
        shared_objects: objects that whoever unpacks has as well, in the same order, such as the run's
            prompts: only their places are written.

    Attributes:
        tensors: what was collected. The tensors share the memory of what was packed.
    """

    def __init__(self, shared_objects: Sequence[object] = ()) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._places = {id(thing): place for place, thing in enumerate(shared_objects)}

    def pack(self, value: Any, name: str) -> Any:
        """The tree of a value; its tensors' names begin with ``name``.

        Raises:
            TypeError: something in the value cannot be packed.
        """
        if id(value) in self._places:
            return _tagged("shared_objects", self._places[id(value)])
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else _tagged("float", str(value))
            case tuple():
                return _tagged("tuple", self._each(value, name))
            case list():
                return self._each(value, name)
            case Mapping():
                return self._mapping(value, name)
        if is_dataclass(value):
            return self._dataclass(value, name)
        return self._tensor(value, name)

    def _each(self, values: Sequence[Any], name: str) -> list[Any]:
        return [self.pack(value, f"{name}.{i}") for i, value in enumerate(values)]

    def _mapping(self, values: Mapping[Any, Any], name: str) -> Any:
        if all(isinstance(key, str) for key in values) and _KIND not in values:
            return {key: self.pack(value, f"{name}.{key}") for key, value in values.items()}
        pairs = [[key, value] for key, value in values.items()]
        return _tagged("mapping", self.pack(pairs, name))

    def _dataclass(self, value: Any, name: str) -> Any:
        kind = type(value).__name__
        if _SERIALIZABLE.get(kind) is not type(value):
            raise TypeError(f"{name}: {kind} cannot be packed")
        given = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return _tagged(kind, self._mapping(given, name))

    def _tensor(self, value: Any, name: str) -> Any:
        import torch  # Here, since configurations are read where torch is not imported yet.

        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: {type(value).__name__} cannot be packed")
        self.tensors[name] = value.detach().contiguous()
        return _tagged("tensor", [name, str(value.device)])


def deserialize(
    tree: Any, tensor: Callable[[str], Tensor], shared_objects: Sequence[object] = ()
) -> Any:
    """The value that was packed into a tree.

    Args:
        tree: what ``Serializer.pack`` returned, perhaps by way of JSON.
        tensor: gives the tensor of a name; it becomes part of the value.
        shared_objects: the packer's shared_objects objects.

    Raises:
        ValueError: the tree is not one that ``pack`` makes.
    """
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case list():
            return [deserialize(item, tensor, shared_objects) for item in tree]
        case dict() if _KIND not in tree:
            return {key: deserialize(item, tensor, shared_objects) for key, item in tree.items()}
        case {"!": str() as kind, "=": inner} if len(tree) == 2:
            return _made(kind, inner, tensor, shared_objects)
    raise ValueError(f"{tree!r:.80} is no packed value")


def _made(
    kind: str, inner: Any, tensor: Callable[[str], Tensor], shared_objects: Sequence[object]
) -> Any:
    if kind == "tensor":
        name, device = inner
        return tensor(name).to(device)
    if kind == "float":
        return _NOT_FINITE[inner]
    if kind == "shared_objects":
        return shared_objects[inner]
    value = deserialize(inner, tensor, shared_objects)
    if kind == "tuple":
        return tuple(value)
    if kind == "mapping":
        return dict(value)
    if kind not in _SERIALIZABLE:
        raise ValueError(f"a packed value is of the kind {kind!r}, which does not exist here")
    return _SERIALIZABLE[kind](**value)


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {_KIND: kind, _VALUE: value}
