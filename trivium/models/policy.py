"""The policy: a causal language model that scores the response tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trivium.data.batch import Batch
from trivium.errors import ModelError
from trivium.hf.adapters import unwrap_peft
from trivium.hf.checkpoint_files import longest_context
from trivium.hf.loading import load_causal_lm, load_tokenizer, require_vocabulary
from trivium.hf.model_config import FastPath, ModelConfig
from trivium.models import flops
from trivium.models.attention import packed_forward
from trivium.models.equivalence import uses_ragged_attention
from trivium.models.fast_path import kernels_of
from trivium.models.group_model import GroupModel
from trivium.models.layout import Forward
from trivium.models.logprobs import Head, token_logprobs


@dataclass(frozen=True)
class TokenScores:
    """Log-probs and entropies of the response tokens, ``[T]``."""

    logprobs_T: Tensor
    entropy_T: Tensor


class Policy(GroupModel):
    """A causal language model over groups.

    Args:
        model, tokenizer, fast_path: see ``GroupModel``.
        temperature: π is ``softmax(logits / temperature)`` everywhere: when sampling, in the
            ratio and in the KL.
        cuda_graphs: sample by CUDA graphs where they work (``rollout.cuda_graphs``).

    Raises:
        ModelError: ``token_logprobs`` does not compute the model's head exactly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        cuda_graphs: bool = False,
        fast_path: FastPath = "auto",
    ) -> None:
        if not uses_ragged_attention(base := unwrap_peft(model)):
            _require_known_head(base)
        super().__init__(model, tokenizer, fast_path)
        self.temperature = temperature
        self.cuda_graphs = cuda_graphs

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        temperature: float = 1.0,
    ) -> Policy:
        """Load a checkpoint's policy, with the checkpoint's tokenizer unless another is given."""
        tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
        model = load_causal_lm(config)
        require_vocabulary(model, tokenizer)
        return cls(
            model,
            tokenizer,
            temperature=temperature,
            cuda_graphs=config.cuda_graphs,
            fast_path=config.fast_path,
        )

    @property
    def head(self) -> Head:
        return lm_head(self.base)

    @property
    def context_length(self) -> int:
        """The most tokens that a prompt and its response may have together."""
        return longest_context(self.base.config.to_dict()) or 1 << 30

    def score(self, batch: Batch) -> TokenScores:
        """Return log-probs and entropies of the batch's response tokens; gradient flows."""
        return self.score_hidden(self.hidden(batch), batch)

    def logprobs(self, batch: Batch) -> Tensor:
        """Return the same log-probs, ``[T]``, without the cost of entropies."""
        return self._apply_head(self.hidden(batch), batch, entropy=False)[0]

    def hidden(self, batch: Batch) -> Tensor:
        """Return final hidden states at the positions that predict response tokens, ``[T, D]``."""
        batch = self.arranged(batch)
        return self.hidden_at(batch, batch.logit_positions_T)

    def score_hidden(self, hidden_TD: Tensor, batch: Batch) -> TokenScores:
        """Return ``score`` from the hidden states that ``hidden`` gave."""
        logprobs_T, entropy_T = self._apply_head(hidden_TD, batch, entropy=True)
        assert entropy_T is not None, "entropy=True returns entropies"
        return TokenScores(logprobs_T, entropy_T)

    def _apply_head(
        self, hidden_TD: Tensor, batch: Batch, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        targets_T, head = batch.targets_T.to(self.device), self.head
        flops.count_head(len(targets_T), head.weight_VD)
        return token_logprobs(
            hidden_TD, head, targets_T, temperature=self.temperature, entropy=entropy
        )

    def decode_model(self) -> Forward:
        """Return a forward pass for sampling with the current weights; no gradient flows."""
        make = self._decoder
        return partial(packed_forward, self.backbone) if make is None else make()

    @cached_property
    def _decoder(self) -> Callable[[], Forward] | None:
        return kernels_of(self.backbone).decoder(self.backbone) if self.shared else None


def lm_head(model: PreTrainedModel) -> Head:
    """Return the language-model head of ``model``, with its family's scale and soft cap."""
    linear = model.get_output_embeddings()
    assert linear is not None, "checked when the policy was made"
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    kernels = kernels_of(model.base_model)  # type: ignore[arg-type]
    return Head(linear.weight, getattr(linear, "bias", None), scale, softcap, kernels)


@torch.no_grad()
def _require_known_head(model: PreTrainedModel) -> None:
    """Raise unless our head's logits equal the model's own on three tokens."""
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise ModelError(
            f"{type(model).__name__} has a head of type {type(linear).__name__}, which is not a "
            "plain linear layer: leave the head out of model.lora.targets, or use another "
            "checkpoint"
        )
    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    output = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    ours = lm_head(model).logits(output.hidden_states[-1][0])
    theirs = output.logits[0].to(ours.dtype)
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
        raise ModelError(
            f"the head of {type(model).__name__} does more than a linear map, a scale and a soft "
            "cap, so its log-probs would be wrong here: use another checkpoint"
        )
