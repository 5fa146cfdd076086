"""Base of policies and reward models: a ``transformers`` model that computes over groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trivium.data.batch import Batch
from trivium.hf.adapters import unwrap_peft
from trivium.hf.loading import restore_trained, trained_state
from trivium.hf.model_config import FastPath
from trivium.hf.saving import SaveCheck, save_checkpoint
from trivium.models import flops
from trivium.models.attention import states_at, states_by_frequency
from trivium.models.equivalence import use_ragged_attention
from trivium.models.fast_path import install_fast_path
from trivium.models.rotary import frequency_key


class GroupModel:
    """A model whose responses share their prompt where that is exact.

    Args:
        model: a ``transformers`` model, with or without ``peft`` adapters.
        tokenizer: its tokenizer, saved beside it.
        fast_path: as in ``ModelConfig``.

    Attributes:
        shared: whether prompts are shared; otherwise each response is a row of its own.
        frequency_key: see ``models.rotary``.
        stop_tokens: tokens that ended responses in training besides those of ``end_tokens``.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fast_path: FastPath
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.fast_path: FastPath = fast_path
        self.stop_tokens: tuple[int, ...] = ()
        self.shared = use_ragged_attention(self.base)
        self.frequency_key = frequency_key(self.backbone)
        install_fast_path(model, fast_path)
        flops.watch(self.backbone)

    @property
    def base(self) -> PreTrainedModel:
        """The model without adapters around it."""
        return unwrap_peft(self.model)

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformer without its head."""
        return self.base.base_model  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.base.device

    def hidden_at(self, batch: Batch, index: Tensor) -> Tensor:
        """Return final hidden states at positions of the packed sequence, one per index."""
        batch, index = batch.to(self.device), index.to(self.device)
        if self.frequency_key is None:
            return states_at(self.backbone, batch, index, shared=self.shared)
        return states_by_frequency(
            self.backbone, batch, index, self.frequency_key, shared=self.shared
        )

    def arranged(self, batch: Batch) -> Batch:
        """Return the batch, with a prompt for each response where their frequencies differ.

        The state of a prompt's last token, which predicts a response's first token, then belongs
        to one response.
        """
        key = self.frequency_key
        if key is None or len({key(length) for length in batch.row_lengths_N.tolist()}) == 1:
            return batch
        return Batch.of(batch.rows()).to(batch.tokens_L.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what training changes: the weights, or the adapters."""
        return trained_state(self.model)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights, or adapters, of ``state_dict``."""
        restore_trained(self.model, state)

    def save(self, directory: Path) -> SaveCheck:
        """Write a checkpoint that plain ``transformers`` loads; return how it was checked."""
        with flops.apart():
            return save_checkpoint(directory, self.model, self.tokenizer, self.stop_tokens)
