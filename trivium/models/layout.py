"""Types that attention layouts share.

A *layout* says which tokens of a packed sequence attend to which. It travels with each forward pass
through ``transformers`` to the attention function of ``models.attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer turns scores into weights."""

    scaling: float
    window: int | None
    softcap: float | None


class Layout(Protocol):
    """Which tokens attend to which in one forward pass over a packed sequence."""

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Return the attention output of one layer, ``[L, heads, width]``."""
        ...


Forward = Callable[[Tensor, Tensor, Layout], Tensor]
"""Maps token ids ``[L]``, position ids ``[L]`` and a layout to final hidden states ``[L, D]``."""
