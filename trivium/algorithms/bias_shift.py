"""A bias at which demonstrations score 0 on average (Ouyang et al. 2022, section 3.5).

The loss of pairs and rankings does not change if a number is added to all scores, so their zero
means nothing. PPO is easier to read, and a critic that starts from the reward model starts better,
if 0 is the score of a demonstration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.data.batch import Batch, Grouped
from trivium.data.demonstrations import DemonstrationsConfig, load_demonstrations
from trivium.data.oom import run_with_oom_split
from trivium.hf.checkpoint_files import longest_context
from trivium.hf.saving import SaveCheck
from trivium.models import flops
from trivium.models.reward_model import RewardModel


class ShiftedRewardModel:
    """A reward model that is saved with the bias; while it trains, it has none.

    Args:
        model: the reward model.
        demonstrations: the demonstrations; None saves the model as it is.
        max_tokens: tokens per forward pass.
    """

    def __init__(self, model: RewardModel, demonstrations: Grouped | None, max_tokens: int) -> None:
        self.model, self.demonstrations, self.max_tokens = model, demonstrations, max_tokens

    @classmethod
    def of(
        cls, model: RewardModel, config: DemonstrationsConfig | None, max_tokens: int
    ) -> ShiftedRewardModel:
        """Load the demonstrations of a configuration."""
        if config is None:
            return cls(model, None, max_tokens)
        context = longest_context(model.base.config.to_dict())
        rows = load_demonstrations(config, model.tokenizer, context)
        return cls(model, Grouped([row.group for row in rows]), max_tokens)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    @torch.no_grad()
    def bias(self) -> float:
        """Return the bias at which the demonstrations score 0 on average."""
        data = self.demonstrations
        if data is None:
            return self.model.bias
        total = 0.0
        with flops.paused():  # Saving is no part of a step.
            for part in data.split(self.max_tokens):
                for _, scores_N in run_with_oom_split(
                    data, part, lambda d: self.model.scores(Batch.of(d.groups))
                ):
                    total += float(scores_N.double().sum())
        return self.model.bias - total / len(data.groups)

    def save(self, directory: Path) -> SaveCheck:
        """Write the model with the bias."""
        before = self.model.bias
        try:
            self.model.bias = self.bias()
            return self.model.save(directory)
        finally:
            self.model.bias = before

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)
