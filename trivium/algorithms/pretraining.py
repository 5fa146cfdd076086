"""PPO-ptx (Ouyang et al. 2022): a language-modeling loss on pretraining data, added to PPO's."""

from __future__ import annotations

import torch

from trivium.algorithms.pretraining_config import PretrainingMixConfig
from trivium.data.batch import Batch
from trivium.data.demonstrations import load_demonstrations
from trivium.maths.aggregation import token_mean, weighted_sum
from trivium.maths.objectives import token_nll
from trivium.models.policy import Policy
from trivium.training.experience import WeightedGroups, epoch_batch
from trivium.training.micro_batch import LossOutput, MicroBatch


class PretrainingMix:
    """Language-modeling micro-batches, one optimizer step after the other."""

    def __init__(self, config: PretrainingMixConfig, policy: Policy, *, seed: int) -> None:
        self.config, self.policy, self.seed = config, policy, seed
        self.texts = load_demonstrations(config.data, policy.tokenizer, policy.context_length)
        self.steps = 0

    @classmethod
    def of(
        cls, config: PretrainingMixConfig | None, policy: Policy, *, seed: int
    ) -> PretrainingMix | None:
        """Return the mix of a configuration; None without one."""
        return None if config is None else cls(config, policy, seed=seed)

    def state_dict(self) -> int:
        """Return the number of optimizer steps that were given texts."""
        return self.steps

    def load_state_dict(self, state: int) -> None:
        """Continue from a state."""
        self.steps = state

    def next_step(self, max_tokens: int) -> list[MicroBatch]:
        """Return the micro-batches of the next optimizer step."""
        count = self.config.examples_per_step
        index = epoch_batch(len(self.texts), count, self.steps, seed=self.seed)
        self.steps += 1
        texts = [self.texts[i] for i in index]
        loss_mask = torch.tensor([t for text in texts for t in text.loss_mask])
        batch = WeightedGroups([text.group for text in texts], loss_mask_T=loss_mask)
        parts = batch.split_with_token_weights(batch.split(max_tokens), token_mean)
        return [MicroBatch(part, self._loss) for part in parts]

    def _loss(self, micro_batch: WeightedGroups) -> LossOutput:
        logprobs_T = self.policy.logprobs(Batch.of(micro_batch.groups))
        nll = weighted_sum(token_nll(logprobs_T), micro_batch.weights(logprobs_T))
        return self.config.coefficient * nll, {"pretraining_nll_T": -logprobs_T.detach()}
