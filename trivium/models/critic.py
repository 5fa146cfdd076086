"""The critic: V(s_t), the expected return before each response token.

Either a separate model (``SeparateCritic``) or a head on the actor's hidden states
(``SharedCritic``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trivium.data.batch import Batch
from trivium.hf.loading import restore_trained, trained_parameters, trained_state
from trivium.hf.saving import SaveCheck
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel

VALUE_HEAD_FILE = "value_head.safetensors"


@dataclass(frozen=True)
class ActorCriticScores:
    """Log-probs, entropies and values of the response tokens, ``[T]``."""

    logprobs_T: Tensor
    entropy_T: Tensor
    values_T: Tensor


class Critic(Protocol):
    """The interface that the training loop uses."""

    def parameters(self) -> list[nn.Parameter]: ...
    def score(self, policy: Policy, batch: Batch) -> ActorCriticScores: ...
    def final_values(self, policy: Policy, batch: Batch) -> Tensor: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
    def save(self, directory: Path) -> SaveCheck | None: ...


class SeparateCritic:
    """A one-label classifier with its own weights, read at each token's predicting position."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.model.model)

    def values(self, batch: Batch) -> Tensor:
        """Return V(s_t) at the position that predicts token t, ``[T]``."""
        batch = self.model.arranged(batch)
        return self.model.scores_at(batch, batch.logit_positions_T)

    def score(self, policy: Policy, batch: Batch) -> ActorCriticScores:
        scores = policy.score(batch)
        return ActorCriticScores(scores.logprobs_T, scores.entropy_T, self.values(batch))

    def final_values(self, policy: Policy, batch: Batch) -> Tensor:
        """Return V after each response's last token, ``[N]``, to bootstrap truncated responses."""
        return self.model.scores_at(batch, batch.last_tokens_N)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def save(self, directory: Path) -> SaveCheck | None:
        return self.model.save(directory)


class SharedCritic:
    """A linear head on the actor's hidden states, so that one forward pass serves both."""

    def __init__(self, policy: Policy) -> None:
        base = policy.base
        width = base.config.get_text_config().hidden_size
        dtype = torch.promote_types(base.dtype, torch.float32)
        self.head = nn.Linear(width, 1, device=policy.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def score(self, policy: Policy, batch: Batch) -> ActorCriticScores:
        hidden_TD = policy.hidden(batch)
        scores = policy.score_hidden(hidden_TD, batch)
        values_T = self._values(hidden_TD)
        return ActorCriticScores(scores.logprobs_T, scores.entropy_T, values_T)

    def final_values(self, policy: Policy, batch: Batch) -> Tensor:
        """Return V after each response's last token, ``[N]``."""
        return self._values(policy.hidden_at(batch, batch.last_tokens_N))

    def _values(self, hidden_TD: Tensor) -> Tensor:
        return self.head(hidden_TD.to(self.head.weight.dtype))[:, 0]

    def state_dict(self) -> dict[str, Tensor]:
        return trained_state(self.head)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        restore_trained(self.head, state)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.head.state_dict(), directory / VALUE_HEAD_FILE)
