"""Operations that a piece of code does, noted so that they can be counted or repeated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
ASKING = {
    aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal,
    aten.masked_select, aten._unique2, aten.bincount, aten.lift_fresh, aten.allclose,
}  # fmt: skip
"""Operations whose result, or the shape of it, a GPU's host waits for or brings."""


class Noted(TorchDispatchMode):
    """Notes operations together with the tensors they are done on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in ASKING, f"{func} cannot be recorded"
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def repeat(self) -> None:
        """Do the same again: what came from outside is what is there now."""
        made: dict[int, Tensor] = {}

        def now(x: Any) -> Any:
            return made.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, before in self.calls:
            found = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(found), strict=True):
                made[id(old)] = new
        self.made = made
