"""The pretraining mix of PPO-ptx: a language-modeling loss beside the policy's (Ouyang 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.algorithms.pretraining_config import PretrainingMixConfig
from trivium.data.batch import Batch
from trivium.data.demonstrations import load_demonstrations
from trivium.maths.aggregation import weighted_sum
from trivium.maths.objectives import token_nll
from trivium.models.policy import Policy
from trivium.training.experience import WeightedGroups, epoch_batch
from trivium.training.micro_batch import MicroBatch


class PretrainingMix:
    """Yields the language-modeling micro-batches of one optimizer step after the other."""

    def __init__(self, config: PretrainingMixConfig, policy: Policy, *, seed: int) -> None:
        self.config, self.policy, self.seed = config, policy, seed
        self.texts = load_demonstrations(config.data, policy.tokenizer, policy.context_length)
        self.steps = 0

    def state_dict(self) -> int:
        """How many optimizer steps were given texts."""
        return self.steps

    def load_state_dict(self, state: int) -> None:
        """Go on from a state."""
        self.steps = state

    def next_step(self, max_tokens: int) -> list[MicroBatch]:
        """The micro-batches of the next optimizer step."""
        count = self.config.examples_per_step
        index = epoch_batch(len(self.texts), count, self.steps, seed=self.seed)
        self.steps += 1
        chosen = [self.texts[i] for i in index]
        trained = torch.tensor([t for text in chosen for t in text.trained])
        batch = WeightedGroups([text.group for text in chosen], loss_mask_T=trained)
        parts = batch.split_with_token_weights(batch.split(max_tokens), "token_mean")
        return [MicroBatch(part, self._loss) for part in parts]

    def _loss(self, part: WeightedGroups) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_T = self.policy.logprobs(Batch.of(part.groups))
        nll = weighted_sum(token_nll(logprobs_T), part.weights(logprobs_T))
        return self.config.coefficient * nll, {"pretraining_nll_T": -logprobs_T.detach()}
