"""Learned scores: one number for a response, or one at each step's end.

A scorer is a one-label ``AutoModelForSequenceClassification``, so that others' reward models load
here and ours load elsewhere. An outcome reward model is read at the response's last token, a
process reward model at each step's last token, a critic (``models.critic``) before every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trivium.data.batch import Batch
from trivium.errors import ModelError
from trivium.maths.ragged import repeat_per_segment
from trivium.models import flops
from trivium.models.attention import states_at
from trivium.models.cpu.heads import use_joined_heads
from trivium.models.cpu.layers import swap_norms_and_mlps
from trivium.models.cpu.linear import use_fast_linears
from trivium.models.equivalence import use_ragged_attention
from trivium.models.loading import (
    load_scorer,
    load_tokenizer,
    require_vocabulary,
    restore_trained,
    save_checkpoint,
    trained_state,
    unwrap_peft,
)
from trivium.models.model_config import ModelConfig


class RewardModel:
    """A one-label sequence classifier over groups."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        base = unwrap_peft(model)
        if base.config.num_labels != 1 or not hasattr(base, "score"):
            raise ModelError(
                f"{type(base).__name__} has {base.config.num_labels} labels: a reward model is a "
                "sequence classifier with one label and a head named score"
            )
        self.model = model
        self.tokenizer = tokenizer
        if base.config.pad_token_id is None:
            base.config.pad_token_id = _padding(tokenizer, base.config.vocab_size)
        use_fast_linears(model)
        swap_norms_and_mlps(model, base.base_model)  # type: ignore[arg-type]
        self.shared = use_ragged_attention(base)
        if self.shared:
            use_joined_heads(base.base_model)  # type: ignore[arg-type]
        flops.watch(base.base_model)  # type: ignore[arg-type]

    @classmethod
    def load(cls, config: ModelConfig) -> RewardModel:
        """The reward model of a checkpoint; a language model gets a new head that scores 0."""
        model, tokenizer = load_scorer(config), load_tokenizer(config)
        require_vocabulary(model, tokenizer)
        return cls(model, tokenizer)

    @property
    def device(self) -> torch.device:
        return unwrap_peft(self.model).device

    def scores_at(self, batch: Batch, packed_index: Tensor) -> Tensor:
        """The head's output at positions of the batch's line, one per index; gradient flows."""
        base = unwrap_peft(self.model)
        backbone: PreTrainedModel = base.base_model  # type: ignore[assignment]
        where = packed_index.to(self.device)
        states = states_at(backbone, batch.to(self.device), where, shared=self.shared)
        head: nn.Linear = base.score  # type: ignore[assignment]
        scores = head(states)[:, 0]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def scores(self, batch: Batch) -> Tensor:
        """One score per response, read at its last token, ``[N]``.

        Where that is the padding token (a checkpoint that pads with its EOS), the score is read one
        token earlier, which is where ``transformers`` reads it.
        """
        padding = unwrap_peft(self.model).config.pad_token_id
        if padding is None:
            return self.scores_at(batch, batch.last_tokens_N)
        last_T = torch.cumsum(batch.lengths_N, 0) - 1
        is_padding_N = batch.targets_T[last_T] == padding
        before_N = batch.logit_positions_T[last_T]
        return self.scores_at(batch, torch.where(is_padding_N, before_N, batch.last_tokens_N))

    def step_scores(self, batch: Batch, ends: list[list[int]]) -> Tensor:
        """One logit per step, read at its last token, ``[S]``.

        ``ends`` lists, for each response of the batch, the index inside it of each step's end.
        """
        counts_N = torch.tensor([len(e) for e in ends])
        ends_S = torch.tensor([end for e in ends for end in e], dtype=torch.long)
        return self.scores_at(batch, repeat_per_segment(batch.starts_N.cpu(), counts_N) + ends_S)

    def state_dict(self) -> dict[str, Tensor]:
        """What training changes: the weights, or the adapters."""
        return trained_state(self.model)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights, or adapters, that ``state`` gave."""
        restore_trained(self.model, state)

    def save(self, directory: Path) -> None:
        """Write a checkpoint that ``AutoModelForSequenceClassification`` loads, adapters merged."""
        save_checkpoint(directory, self.model, self.tokenizer)


def _padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int | None:
    """A padding token that ends no response, as ``transformers`` never reads a score at padding.

    None where there is no such token: then one sequence at a time can be scored elsewhere.
    """
    names = [tokenizer.pad_token, *tokenizer.all_special_tokens]
    for name in names:
        number = None if name is None else tokenizer.convert_tokens_to_ids(name)
        if isinstance(number, int) and number < vocabulary and number != tokenizer.eos_token_id:
            tokenizer.pad_token = name
            return number
    return None
