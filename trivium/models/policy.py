"""The policy: a causal language model that scores the response tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trivium.data.batch import Batch
from trivium.errors import ModelError
from trivium.models import flops
from trivium.models.attention import AttentionSpec, Layout, on_line, states_at
from trivium.models.cpu.decode import DecodeModel, decode_specs
from trivium.models.cpu.heads import use_joined_heads
from trivium.models.cpu.layers import swap_norms_and_mlps
from trivium.models.cpu.linear import Linear, use_fast_linears
from trivium.models.equivalence import use_ragged_attention, uses_ragged_attention
from trivium.models.loading import (
    load_causal_lm,
    load_tokenizer,
    require_vocabulary,
    restore_trained,
    save_checkpoint,
    trained_state,
    unwrap_peft,
)
from trivium.models.logprobs import Head, token_logprobs
from trivium.models.model_config import ModelConfig

Forward = Callable[[Tensor, Tensor, Layout], Tensor]
"""From tokens and positions of a line, and who sees whom, to final hidden states."""


@dataclass(frozen=True)
class TokenScores:
    """What a forward pass says of the response tokens: log-probs and entropies, ``[T]``."""

    logprobs_T: Tensor
    entropy_T: Tensor


class Policy:
    """A causal language model over groups.

    Args:
        model: any ``transformers`` causal language model, with or without ``peft`` adapters. Its
            attention is switched to the shared-prompt layout where that is exact.
        tokenizer: its tokenizer, saved beside it.
        temperature: π is ``softmax(logits / temperature)`` everywhere: when sampling, in the
            ratio and in the KL.
        cuda_graphs: sample by CUDA graphs where they work (``rollout.cuda_graphs``).

    Raises:
        ModelError: the head is not one that ``token_logprobs`` computes exactly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        cuda_graphs: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.cuda_graphs = cuda_graphs
        base = unwrap_peft(model)
        if not uses_ragged_attention(base):
            _require_known_head(base)
        use_fast_linears(model)
        swap_norms_and_mlps(model, self.backbone)
        self.shared = use_ragged_attention(base)
        if self.shared:
            use_joined_heads(self.backbone)
        flops.watch(self.backbone)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        temperature: float = 1.0,
    ) -> Policy:
        """The policy of a checkpoint, with the checkpoint's tokenizer unless another is given."""
        tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
        model = load_causal_lm(config)
        require_vocabulary(model, tokenizer)
        return cls(model, tokenizer, temperature=temperature, cuda_graphs=config.cuda_graphs)

    @property
    def device(self) -> torch.device:
        return unwrap_peft(self.model).device

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformer without its head."""
        return unwrap_peft(self.model).base_model  # type: ignore[return-value]

    @property
    def head(self) -> Head:
        return lm_head(unwrap_peft(self.model))

    @property
    def context_length(self) -> int:
        """The most tokens that a prompt and its response may have together."""
        config = unwrap_peft(self.model).config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def score(self, batch: Batch) -> TokenScores:
        """Log-probs and entropies of the batch's response tokens; gradient flows."""
        return self.score_hidden(self.hidden(batch), batch)

    def logprobs(self, batch: Batch) -> Tensor:
        """The same log-probs alone, ``[T]``: for less work."""
        return self._apply_head(self.hidden(batch), batch, entropy=False)[0]

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states at the positions that predict response tokens, ``[T, D]``."""
        return self.hidden_at(batch, batch.logit_positions_T)

    def hidden_at(self, batch: Batch, packed_index: Tensor) -> Tensor:
        """Final hidden states at positions of the batch's line, one per index."""
        where = packed_index.to(self.device)
        return states_at(self.backbone, batch.to(self.device), where, shared=self.shared)

    def score_hidden(self, hidden_TD: Tensor, batch: Batch) -> TokenScores:
        """``score`` from hidden states that were computed before."""
        logprobs_T, entropy_T = self._apply_head(hidden_TD, batch, entropy=True)
        assert entropy_T is not None, "it was asked for"
        return TokenScores(logprobs_T, entropy_T)

    def _apply_head(
        self, hidden_TD: Tensor, batch: Batch, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        targets_T = batch.targets_T.to(self.device)
        flops.count_head(len(targets_T), self.head.weight_VD)
        return token_logprobs(
            hidden_TD, self.head, targets_T, temperature=self.temperature, entropy=entropy
        )

    def decode_model(self) -> Forward:
        """A forward pass for sampling with the weights as they are now; no gradient flows."""
        specs = self._decode_specs
        return (
            partial(on_line, self.backbone) if specs is None else DecodeModel(self.backbone, specs)
        )

    @property
    def has_decode_model(self) -> bool:
        """Whether ``decode_model`` is leaner than the backbone's own."""
        return self._decode_specs is not None

    @cached_property
    def _decode_specs(self) -> dict[int, AttentionSpec] | None:
        return decode_specs(self.backbone) if self.shared else None

    def state_dict(self) -> dict[str, Tensor]:
        """What training changes: the weights, or the adapters."""
        return trained_state(self.model)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights, or adapters, that ``state`` gave."""
        restore_trained(self.model, state)

    def save(self, directory: Path) -> None:
        """Write a checkpoint that plain ``transformers`` loads, adapters merged."""
        save_checkpoint(directory, self.model, self.tokenizer)


def lm_head(model: PreTrainedModel) -> Head:
    """The language-model head of ``model``, with the scale and soft cap its family uses."""
    linear = model.get_output_embeddings()
    assert linear is not None, "checked when the policy was made"
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)


@torch.no_grad()
def _require_known_head(model: PreTrainedModel) -> None:
    """Compare our head's logits with the model's own on three tokens."""
    linear = model.get_output_embeddings()
    if type(linear) not in (nn.Linear, Linear):
        kind = type(linear).__name__
        raise ModelError(
            f"{type(model).__name__} has a head of type {kind}, which is not a plain linear layer: "
            "leave the head out of model.lora.targets, or use another checkpoint"
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
