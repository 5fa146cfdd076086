"""Models without weights, built from the configuration of a checkpoint.

Only ``config.json`` is read. The model is built in the same way as in ``hf.loading``, including
adapters and gradient checkpointing, from tensors that hold no data.
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
from trivium.hf.adapters import add_adapters, shape_adapters, unwrap_peft
from trivium.hf.checkpoint_files import adapter_at
from trivium.hf.loading import (
    disable_dropout,
    dtype_of,
    enable_gradient_checkpointing,
    read_hf_config,
    require_role,
    resolve_device,
    with_base,
)
from trivium.hf.model_config import ModelConfig
from trivium.memory.dry_run import DryRun
from trivium.models.group_layout import GroupLayout
from trivium.models.layout import AttentionSpec
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel

NO_TOKENIZER = cast(Any, None)
"""Placeholder: the prediction uses token counts and no text."""


@dataclass(frozen=True)
class Shape:
    """Size of a model.

    Attributes:
        parameters: number of parameters; tied weights count once.
        trained: number of trained parameters.
        parameter_bytes: bytes of weights and buffers.
        gradient_bytes: bytes of the gradients of all trained weights.
        optimizer_bytes: bytes of AdamW's two moments and its step counts.
    """

    parameters: int
    trained: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Return the size of a model, with or without data in its tensors."""
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        trained_bytes = _bytes(trained)
        return cls(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in trained),
            parameter_bytes=_bytes([*parameters, *model.buffers()]),
            gradient_bytes=trained_bytes,
            optimizer_bytes=2 * trained_bytes + 4 * len(trained),
        )

    @classmethod
    def read(cls, config: ModelConfig, *, scorer: bool = False) -> Shape:
        """Return the size of a checkpoint loaded with ``config``; ``scorer``: with a score head."""
        return cls.of(weightless(DryRun(), config, scorer=scorer))


def weightless(run: DryRun, config: ModelConfig, *, scorer: bool = False) -> PreTrainedModel:
    """Return the model of ``config`` without data.

    Raises:
        ModelError: there is no such checkpoint, or ``transformers`` does not support it.
    """
    require_role(read_hf_config(config), config.path, scorer=scorer)
    options = {"num_labels": 1} if scorer else {}
    kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    trust, base = config.trust_remote_code, with_base(config)
    try:
        checkpoint_config = AutoConfig.from_pretrained(
            base.path, revision=base.revision, trust_remote_code=trust, **options
        )
        if scorer and checkpoint_config.pad_token_id is None:
            checkpoint_config.pad_token_id = 0  # Loading a real model takes it from the tokenizer.
        with run.building(), resolve_device(config.device):
            model = kind.from_config(
                checkpoint_config, dtype=dtype_of(config), trust_remote_code=trust
            )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot read the configuration of {config.path}: {reason}") from None
    disable_dropout(model)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model, config)
    model.train()
    if config.lora is None:
        return model
    task, adapter = "SEQ_CLS" if scorer else "CAUSAL_LM", adapter_at(config.path)
    with run.building():
        if adapter is not None and config.lora.initial == "loaded":
            return shape_adapters(model, adapter, config.lora, task)
        return add_adapters(model, config.lora, task)


def weightless_policy(run: DryRun, config: ModelConfig, role: str, temperature: float) -> Policy:
    """Return the policy of ``config`` without data; its memory is assigned to ``role``."""
    model = weightless(run, config)
    with run:
        policy = Policy(model, NO_TOKENIZER, temperature=temperature, fast_path=config.fast_path)
        run.adopt(model, role)
        policy.shared = policy.shared and _supports_shared_prompt(unwrap_peft(model))
    return policy


def weightless_scorer(run: DryRun, config: ModelConfig, role: str) -> RewardModel:
    """Return the reward model or critic of ``config`` without data, assigned to ``role``."""
    model = weightless(run, config, scorer=True)
    with run:
        scorer = RewardModel(model, NO_TOKENIZER, fast_path=config.fast_path)
        run.adopt(model, role)
        scorer.shared = scorer.shared and _supports_shared_prompt(unwrap_peft(model))
    return scorer


class _RecordingLayout(GroupLayout):
    """Layout that records whether the model called it."""

    used = False

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        self.used = True
        return super().attend(layer, query_LHD, key_LHD, value_LHD, spec)


def _supports_shared_prompt(model: PreTrainedModel) -> bool:
    """Return whether the model's attention uses the layout.

    Loading a real model compares hidden states; a model without data has no values to compare.
    """
    batch = Batch.of([Group([0, 0], [[0]])])
    layout = _RecordingLayout(batch)
    backbone = cast(PreTrainedModel, model.base_model)
    backbone(
        input_ids=batch.tokens_L[None],
        position_ids=batch.positions_L[None],
        use_cache=False,
        layout=layout,
    )
    if not layout.used:
        model.set_attn_implementation("eager")
    return layout.used


def _bytes(tensors: list[Any]) -> int:
    """Return the bytes of the tensors' storages; each storage counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
