"""Operations of the forward pass that a fast path may replace.

``Kernels`` is the reference path: PyTorch's own operations. A fast path overrides methods and is
attached to a backbone (``models.fast_path``); everything else reads it from there.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from trivium.data.batch import Batch
from trivium.models.layout import Forward

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Maps queries, keys and values ``[L, heads, width]`` and the scaling of scores to the output."""


class Kernels:
    """The reference implementation of every replaceable operation."""

    def multiply(self, a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        """Return ``a bᵀ + bias``. It is called only where autograd records nothing."""
        return F.linear(a_LD, b_ED, bias_E)

    def pack(self, weight_ED: Tensor, bias_E: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return a linear layer for decoding; it is valid until the weights change."""
        return lambda x_LD: self.multiply(x_LD, weight_ED, bias_E)

    def pad_rows(self, rows: int, *tensors: Tensor) -> int:
        """Return how many rows to append to ``rows`` before products with ``tensors``."""
        return 0

    def group_attention(self, batch: Batch, output_positions: Tensor | None) -> Attend | None:
        """Return the attention of a batch's groups without a window or soft cap.

        None: there is no replacement, and the caller uses its own implementation. Only
        ``output_positions`` need an output (None: all).
        """
        return None

    def row_attention(
        self, starts: Tensor, lengths: Tensor, output_positions: Tensor | None
    ) -> Attend | None:
        """Return the causal attention of separate rows of a packed sequence (None: as above)."""
        return None

    def decoder(self, backbone: PreTrainedModel) -> Callable[[], Forward] | None:
        """Return a factory of decode models for ``backbone``; None: use the backbone itself.

        A decode model computes the backbone's forward pass with the weights at the time of its
        creation. No gradient flows.
        """
        return None


REFERENCE = Kernels()


def kernels_of(backbone: PreTrainedModel) -> Kernels:
    """Return the kernels that were attached to a backbone, or the reference."""
    return vars(backbone).get("trivium_kernels", REFERENCE)


def attach_kernels(backbone: PreTrainedModel, kernels: Kernels) -> None:
    """Make a backbone, and every copy of it, use ``kernels``."""
    vars(backbone)["trivium_kernels"] = kernels
