"""Record of the operations that a piece of code performs, to count or repeat them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
SYNCHRONIZING = {
    aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal,
    aten.masked_select, aten._unique2, aten.bincount, aten.lift_fresh, aten.allclose,
}  # fmt: skip
"""Operations that make a GPU's host wait for a result or its shape, or that copy from the host."""


class OpRecorder(TorchDispatchMode):
    """Records operations together with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in SYNCHRONIZING, f"{func} cannot be recorded"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def repeat(self) -> None:
        """Repeat the operations with the current contents of their inputs."""
        computed: dict[int, Tensor] = {}

        def current(x: Any) -> Any:
            return computed.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, before in self.calls:
            result = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(result), strict=True):
                computed[id(old)] = new
        self.results = computed
