"""Report of a batch whose loss or gradient is not finite, and a copy of the batch on the disk.

    non-finite/
      batch.json                   message; tokens (and texts) and the loss of each micro-batch
      micro-batch-000.safetensors  its tensors: inputs.<name> and observed.<name>, flat

The suffix of a tensor's name says what its entries belong to: _T to response tokens, _N to
responses, _P to pairs, _S to labeled steps, in the order of batch.json. Weights and gradients are
not saved.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium import distributed
from trivium.data.batch import Group, Grouped
from trivium.errors import NonFiniteError
from trivium.maths.ragged import segment_ids
from trivium.runs.files import atomic_directory
from trivium.runs.store import json_line

logger = logging.getLogger(__name__)

_POLICY = (
    "The policy itself returns values that are not finite: lower optimizer.learning_rate, set "
    "optimizer.warmup_steps or model.dtype: float32, and resume from an earlier checkpoint"
)
_RATIO = (
    "The policy moved too far from the policy that sampled the batch: lower "
    "optimizer.learning_rate, epochs or minibatches"
)
_REWARD = (
    "The rewards cause it: check the rewards of this response and of its group, and bound them"
)
_CRITIC = (
    "The critic causes it: lower critic.optimizer.learning_rate, set critic.clip, or bound the "
    "rewards"
)
_REFERENCE = "The reference is frozen: check its checkpoint, or set model.dtype: float32"
_SCORER = (
    "The reward model returns values that are not finite: lower its optimizer.learning_rate, or "
    "set model.dtype: float32"
)
_GRADIENT = (
    "Every loss is finite and the gradient is not: it overflowed in the backward pass. Set "
    "model.dtype: float32, lower optimizer.learning_rate, or look for extreme values in the batch"
)
_QUANTITIES = {
    "weights_T": ("weight", "Weights depend on lengths alone: please report this as a bug"),
    "advantages_T": ("advantage", _REWARD),
    "targets_T": ("return target", _CRITIC),
    "old_values_T": ("critic's value", _CRITIC),
    "sampler_logprobs_T": ("sampler's log-prob", _POLICY),
    "old_logprobs_T": ("log-prob under π_old", _POLICY),
    "ref_logprobs_T": ("log-prob under the reference", _REFERENCE),
    "logprobs_T": ("log-prob", _POLICY),
    "pretraining_nll_T": ("negative log-likelihood of a pretraining text", _POLICY),
    "ratio_T": ("ratio π/π_old", _RATIO),
    "entropy_T": ("entropy", _POLICY),
    "value_loss_T": ("value loss", _CRITIC),
    "logprobs_chosen_P": ("log-prob of the chosen response", _POLICY),
    "logprobs_rejected_P": ("log-prob of the rejected response", _POLICY),
    "margin_P": ("margin", _RATIO),
    "score_P": ("score", _SCORER),
    "logit_S": ("logit", _SCORER),
}
"""Quantities that must be finite, causes before effects: name in messages, and remedy."""


@dataclass(frozen=True)
class MicroBatchRecord:
    """A micro-batch: its groups, its input tensors, the observed tensors, and its loss."""

    groups: list[Group]
    inputs: dict[str, Tensor]
    observed: dict[str, Tensor]
    loss: float

    @classmethod
    def of(cls, data: Grouped, observed: dict[str, Tensor], loss: float) -> MicroBatchRecord:
        """Return the record of a micro-batch from its data and the results of its pass."""
        values = {f.name: getattr(data, f.name) for f in fields(data)}
        inputs = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return cls(data.groups, inputs, observed, loss)

    def quantities(self) -> dict[str, Tensor]:
        """Return all tensors by name, and the ratio π/π_old if both log-probs are known."""
        tensors = {**self.inputs, **self.observed}
        new_T, old_T = tensors.get("logprobs_T"), tensors.get("old_logprobs_T")
        if new_T is not None and old_T is not None and len(new_T) == len(old_T):
            tensors["ratio_T"] = (new_T - old_T.to(new_T)).exp()
        return tensors


@dataclass(frozen=True)
class NonFiniteReport:
    """A rejected optimizer step, with its gradient norms, one per parameter set."""

    optimizer_step: int
    gradient_norms: list[float]
    micro_batches: list[MicroBatchRecord]


def describe_first_nonfinite(report: NonFiniteReport) -> str:
    """Return a sentence with the first quantity that is not finite, its position and a remedy."""
    for number, record in enumerate(report.micro_batches):
        for name, (label, remedy) in _QUANTITIES.items():
            values = record.quantities().get(name)
            if values is None or bool(values.isfinite().all()):
                continue
            at = int((~values.isfinite()).nonzero()[0, 0])
            position = f"micro-batch {number}, {_position(record, name, len(values), at)}"
            return f"First, the {label} is {float(values[at])} ({position}). {remedy}"
        if not math.isfinite(record.loss):
            return (
                f"First, the loss of micro-batch {number} is {record.loss}, although all of its "
                f"terms are finite. {_RATIO}"
            )
    return f"{_GRADIENT}."


def _position(record: MicroBatchRecord, name: str, count: int, at: int) -> str:
    """Return the response and the token (counted from 0) of an entry of a flat tensor."""
    suffix = name.rpartition("_")[2]
    if suffix != "T":
        return f"{'pair' if suffix == 'P' else 'labeled step'} {at}"
    responses = [response for group in record.groups for response in group.responses]
    lengths = torch.tensor([len(response) for response in responses])
    weights_T = record.inputs.get("weights_T")
    if count != int(lengths.sum()):
        # Supervised fine-tuning observes only the tokens that it trains on.
        if weights_T is None or count != int((weights_T > 0).sum()):
            return f"entry {at}"
        at = int((weights_T > 0).nonzero()[at, 0])
    response = int(segment_ids(lengths)[at])
    token = at - int(lengths[:response].sum())
    return f"response {response}, token {token} with the id {responses[response][token]}"


def save_nonfinite_batch(
    error: NonFiniteError,
    run_directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path | None:
    """Write the batch of ``error`` atomically to ``non-finite/`` in a run directory.

    A batch saved before is replaced. Return the directory, which the message of ``error`` names
    from then on. If the batch cannot be written, log the reason and return None: the error itself
    matters more. Of several processes the first writes.
    """
    if distributed.rank() > 0:
        return None
    target = run_directory / "non-finite"
    try:
        with atomic_directory(target) as partial:
            for number, record in enumerate(error.report.micro_batches):
                save_file(_tensors(record), partial / _file_name(number))
            batch = _batch_record(str(error), error.report, tokenizer)
            (partial / "batch.json").write_text(json_line(batch) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        logger.warning("the batch cannot be saved in %s: %s", target, reason)
        return None
    error.saved = target
    return target


def _file_name(number: int) -> str:
    return f"micro-batch-{number:03d}.safetensors"


def _tensors(record: MicroBatchRecord) -> dict[str, Tensor]:
    by_prefix = [("inputs", record.inputs), ("observed", record.observed)]
    return {
        f"{prefix}.{name}": value.detach().cpu().contiguous().clone()
        for prefix, values in by_prefix
        for name, value in values.items()
    }


def _batch_record(
    message: str, report: NonFiniteReport, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    return {
        "message": message,
        "optimizer_step": report.optimizer_step,
        "gradient_norms": report.gradient_norms,
        "micro_batches": [
            {
                "file": _file_name(number),
                "loss": record.loss,
                "groups": [
                    {
                        "prompt": _tokens_and_text(group.prompt, tokenizer),
                        "responses": [_tokens_and_text(r, tokenizer) for r in group.responses],
                    }
                    for group in record.groups
                ],
            }
            for number, record in enumerate(report.micro_batches)
        ],
    }


def _tokens_and_text(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    text = {} if tokenizer is None else {"text": tokenizer.decode(tokens)}
    return {"tokens": tokens, **text}
