"""Learned scores: one number for a response, or one at the end of each step.

A scorer is a one-label ``AutoModelForSequenceClassification``, so reward models trained elsewhere
load here and ours load elsewhere. An outcome reward model is read at the response's last token, a
process reward model at each step's last token, a critic (``models.critic``) before every token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trivium.data.batch import Batch
from trivium.errors import ModelError
from trivium.hf.adapters import unwrap_peft
from trivium.hf.loading import load_scorer, load_tokenizer, require_vocabulary
from trivium.hf.model_config import FastPath, ModelConfig
from trivium.maths.ragged import repeat_per_segment
from trivium.models.group_model import GroupModel

BIAS = "reward_bias"
"""Key of config.json, which plain ``transformers`` keeps and does not use."""


class RewardModel(GroupModel):
    """A one-label sequence classifier over groups, whose head may have a bias."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fast_path: FastPath = "auto",
    ) -> None:
        base = unwrap_peft(model)
        if base.config.num_labels != 1 or not hasattr(base, "score"):
            raise ModelError(
                f"{type(base).__name__} has {base.config.num_labels} labels, and its head is "
                f"{'' if hasattr(base, 'score') else 'not '}named score: a reward model is a "
                "sequence classifier with one label and a head named score"
            )
        if base.config.pad_token_id is None:
            base.config.pad_token_id = _padding(tokenizer, base.config.vocab_size)
        _require_number(getattr(base.config, BIAS, 0.0), str(base.name_or_path))
        super().__init__(model, tokenizer, fast_path)

    @property
    def bias(self) -> float:
        """Number that is added to every score; saved in config.json."""
        return float(getattr(self.base.config, BIAS, 0.0))

    @bias.setter
    def bias(self, bias: float) -> None:
        setattr(self.base.config, BIAS, bias)

    @classmethod
    def load(cls, config: ModelConfig, *, new_head: bool = False) -> RewardModel:
        """Load a checkpoint's reward model, whose head must be trained.

        With ``new_head``, where training starts, a language model gets a head that scores 0.
        """
        tokenizer, model = load_tokenizer(config), load_scorer(config, new_head=new_head)
        require_vocabulary(model, tokenizer)
        return cls(model, tokenizer, fast_path=config.fast_path)

    def scores_at(self, batch: Batch, index: Tensor) -> Tensor:
        """Return the head's output, with the bias, at positions of the packed sequence.

        The product is computed in float32 or wider. Gradient flows.
        """
        hidden_TD, head = self.hidden_at(batch, index), self.base.score
        if type(head) is not nn.Linear:  # Adapters keep a copy of the head that they train.
            scores = head(hidden_TD)[:, 0]  # type: ignore[operator]
            return scores.to(torch.promote_types(scores.dtype, torch.float32)) + self.bias
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        bias = None if head.bias is None else head.bias.to(wide)
        return F.linear(hidden_TD.to(wide), head.weight.to(wide), bias)[:, 0] + self.bias

    def scores(self, batch: Batch) -> Tensor:
        """Return one score per response, read at its last token, ``[N]``.

        If the last token is the padding token (a checkpoint that pads with its EOS), the score is
        read one token earlier, where ``transformers`` reads it.
        """
        batch, padding = self.arranged(batch), self.base.config.pad_token_id
        if padding is None:
            return self.scores_at(batch, batch.last_tokens_N)
        last_T = torch.cumsum(batch.lengths_N, 0) - 1
        is_padding_N = batch.targets_T[last_T] == padding
        before_N = batch.logit_positions_T[last_T]
        return self.scores_at(batch, torch.where(is_padding_N, before_N, batch.last_tokens_N))

    def step_scores(self, batch: Batch, ends: list[list[int]]) -> Tensor:
        """Return one logit per step, read at its last token, ``[S]``.

        ``ends`` lists, for each response of the batch, the index in the response of each step's
        last token.
        """
        counts_N = torch.tensor([len(e) for e in ends])
        ends_S = torch.tensor([end for e in ends for end in e], dtype=torch.long)
        return self.scores_at(batch, repeat_per_segment(batch.starts_N.cpu(), counts_N) + ends_S)


def _require_number(bias: Any, path: str) -> None:
    """Raise unless the bias in a checkpoint's config.json is a finite number."""
    is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not is_number or not math.isfinite(bias):
        raise ModelError(
            f"{path}: config.json has {BIAS} = {bias!r:.80}, which is added to every score: write "
            "a finite number, or leave it out"
        )


def _padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int | None:
    """Return a padding token that ends no response: ``transformers`` reads no score at padding.

    None: there is no such token, and ``transformers`` can score one sequence at a time only.
    """
    names = [tokenizer.pad_token, *tokenizer.all_special_tokens]
    for name in names:
        number = None if name is None else tokenizer.convert_tokens_to_ids(name)
        if isinstance(number, int) and number < vocabulary and number != tokenizer.eos_token_id:
            tokenizer.pad_token = name
            return number
    return None
