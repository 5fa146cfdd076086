"""Models without weights: what a configuration says of a checkpoint, before it is loaded.

Only ``config.json`` is read. The model is built as ``models.loading`` builds it, adapters and
gradient checkpointing included, from tensors that hold no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.errors import ModelError
from trivium.memory.dry_run import DryRun
from trivium.models.attention import AttentionSpec, GroupLayout
from trivium.models.hf_checkpoint import require_checkpoint
from trivium.models.loading import (
    DTYPES,
    _checkpoint_activations,
    _with_adapters,
    disable_dropout,
    resolve_device,
    unwrap_peft,
)
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel

NO_TOKENIZER = cast(Any, None)
"""Counting memory takes token counts, never text."""


@dataclass(frozen=True)
class Shape:
    """A model's size.

    Attributes:
        parameters: numbers in all weights, tied ones once.
        trained: numbers in the weights that an optimizer moves.
        parameter_bytes: weights and buffers.
        gradient_bytes: gradients of all trained weights.
        optimizer_bytes: AdamW's two moments and its step counts.
    """

    parameters: int
    trained: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """The size of a model, with or without data in its tensors."""
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        moving = _bytes(trained)
        return cls(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in trained),
            parameter_bytes=_bytes([*parameters, *model.buffers()]),
            gradient_bytes=moving,
            optimizer_bytes=2 * moving + 4 * len(trained),
        )

    @classmethod
    def read(cls, config: ModelConfig, *, scorer: bool = False) -> Shape:
        """The size of a checkpoint as ``config`` would load it; ``scorer``: with a score head."""
        return cls.of(weightless(DryRun(), config, scorer=scorer))


def weightless(run: DryRun, config: ModelConfig, *, scorer: bool = False) -> PreTrainedModel:
    """The model of ``config`` without data.

    Raises:
        ModelError: there is no such checkpoint, or nothing that ``transformers`` knows.
    """
    require_checkpoint(config.path)
    options = {"num_labels": 1} if scorer else {}
    kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    trust = config.trust_remote_code
    try:
        about = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=trust, **options
        )
        if scorer and about.pad_token_id is None:
            about.pad_token_id = 0  # Found in the tokenizer when the model is loaded.
        with run.building(), resolve_device(config.device):
            model = kind.from_config(about, dtype=DTYPES[config.dtype], trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot read the configuration of {config.path}: {reason}") from None
    disable_dropout(model)
    if config.gradient_checkpointing:
        _checkpoint_activations(model, config)
    model.train()
    if config.lora is None:
        return model
    with run.building():
        return _with_adapters(model, config.lora, "SEQ_CLS" if scorer else "CAUSAL_LM")


def weightless_policy(run: DryRun, config: ModelConfig, role: str, temperature: float) -> Policy:
    """The policy of ``config`` without data, counted as ``role``'s."""
    model = weightless(run, config)
    with run:
        policy = Policy(model, NO_TOKENIZER, temperature=temperature)
        run.adopt(model, role)
        policy.shared = policy.shared and _shares(unwrap_peft(model))
    return policy


def weightless_scorer(run: DryRun, config: ModelConfig, role: str) -> RewardModel:
    """The reward model or critic of ``config`` without data, counted as ``role``'s."""
    model = weightless(run, config, scorer=True)
    with run:
        scorer = RewardModel(model, NO_TOKENIZER)
        run.adopt(model, role)
        scorer.shared = scorer.shared and _shares(unwrap_peft(model))
    return scorer


class _Witness(GroupLayout):
    """A layout that remembers whether a model asked it."""

    asked = False

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        self.asked = True
        return super().attend(layer, query_LHD, key_LHD, value_LHD, spec)


def _shares(model: PreTrainedModel) -> bool:
    """Whether attention goes through the layout: numbers, which would tell, are not there."""
    batch = Batch.of([Group([0, 0], [[0]])])
    witness = _Witness(batch)
    backbone = cast(PreTrainedModel, model.base_model)
    backbone(
        input_ids=batch.tokens_L[None],
        position_ids=batch.positions_L[None],
        use_cache=False,
        layout=witness,
    )
    if not witness.asked:
        model.set_attn_implementation("eager")
    return witness.asked


def _bytes(tensors: list[Any]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
