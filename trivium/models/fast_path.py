"""Fast paths: replaced operations of the forward pass, installed in one place.

``Kernels`` is the reference path: PyTorch's own operations. A fast path overrides methods and is
attached to a backbone by ``install_fast_path``; everything else reads it from there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from trivium.data.batch import Batch
from trivium.hf.adapters import unwrap_peft
from trivium.hf.model_config import FastPath
from trivium.models.group_layout import GroupLayout
from trivium.models.layout import Forward


class Kernels:
    """The reference implementation of every replaceable operation."""

    def multiply(self, a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        """Return ``a bᵀ + bias``; no gradient flows."""
        return F.linear(a_LD, b_ED, bias_E)

    def outer(self, a_LD: Tensor, b_LE: Tensor) -> Tensor:
        """Return ``aᵀ b``; no gradient flows."""
        return a_LD.t() @ b_LE

    def layout(self, batch: Batch, output_positions: Tensor | None) -> GroupLayout:
        """Return a batch's layout; only ``output_positions`` (None: all) need a final state."""
        return GroupLayout(batch)

    def decoder(self, backbone: PreTrainedModel) -> Callable[[], Forward] | None:
        """Return a factory of decode models for ``backbone``; None: use the backbone itself.

        A decode model computes the backbone's forward pass with the weights at the time of its
        creation; no gradient flows.
        """
        return None


REFERENCE = Kernels()


def kernels_of(backbone: PreTrainedModel) -> Kernels:
    """Return the kernels that are attached to a backbone, or the reference."""
    return vars(backbone).get("trivium_kernels", REFERENCE)


def register_choices(device: torch.device, fast_path: FastPath) -> None:
    """Register the choices of the device's fast path with ``trivium.numerics``."""
    if fast_path == "auto" and device.type == "cpu":
        from trivium.models.cpu import register_cpu_choices

        register_cpu_choices()


def install_fast_path(model: PreTrainedModel, fast_path: FastPath) -> None:
    """Install the fast path of the model's device, and in every copy, unless ``fast_path`` is off.

    There is one for CPUs. On other devices the model stays as ``transformers`` made it.
    """
    base = unwrap_peft(model)
    if fast_path == "auto" and base.device.type == "cpu":
        from trivium.models.cpu import accelerate_for_cpu

        vars(base.base_model)["trivium_kernels"] = accelerate_for_cpu(model)
