"""The one place that installs a fast path."""

from __future__ import annotations

from transformers import PreTrainedModel

from trivium.models.loading import unwrap_peft
from trivium.models.model_config import FastPath


def install_fast_path(model: PreTrainedModel, fast_path: FastPath) -> None:
    """Install the fast path of the model's device, unless ``fast_path`` is ``off``.

    There is one for CPUs. On other devices the model stays as ``transformers`` made it.
    """
    if fast_path == "auto" and unwrap_peft(model).device.type == "cpu":
        from trivium.models.cpu import accelerate_for_cpu

        accelerate_for_cpu(model)
