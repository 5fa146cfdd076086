"""A batch whose loss or gradient is not finite: what in it is wrong first, and a copy to study.

    non-finite/
      batch.json                   what happened; tokens (and texts) and the loss per micro-batch
      micro-batch-000.safetensors  its tensors: given.<name> and observed.<name>, flat

A tensor's name ends in what its entries belong to: _T to response tokens, _N to responses, _P to
pairs, _S to labeled steps, in the order of batch.json. Left out: weights and gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.data.batch import Group, Grouped
from trivium.errors import NonFiniteError
from trivium.maths.ragged import segment_ids
from trivium.runs.files import placing
from trivium.runs.store import json_line

logger = logging.getLogger(__name__)

_POLICY = (
    "The policy itself no longer gives numbers there: lower optimizer.learning_rate, set "
    "optimizer.warmup_steps or model.dtype: float32, and go on from an earlier checkpoint"
)
_FAR = (
    "The policy moved too far from where the batch was sampled: lower optimizer.learning_rate, "
    "epochs or minibatches"
)
_REWARD = (
    "It comes from the rewards: look at the rewards of this response and its group, and bound them"
)
_CRITIC = (
    "It comes from the critic: lower critic.optimizer.learning_rate, set critic.clip, or bound the "
    "rewards"
)
_REFERENCE = "The reference is frozen: check its checkpoint, or set model.dtype: float32"
_SCORER = (
    "The reward model no longer gives numbers there: lower its optimizer.learning_rate, or set "
    "model.dtype: float32"
)
_GRADIENT = (
    "Each loss is finite and the gradient is not: it overflowed on its way back. Set "
    "model.dtype: float32, lower optimizer.learning_rate, or look for extreme values in the batch"
)
_QUANTITIES = {
    "weights_T": ("weight", "Weights follow from lengths: please report this as a fault"),
    "advantages_T": ("advantage", _REWARD),
    "targets_T": ("return target", _CRITIC),
    "old_values_T": ("critic's value", _CRITIC),
    "sampler_logprobs_T": ("sampler's log-prob", _POLICY),
    "old_logprobs_T": ("log-prob under π_old", _POLICY),
    "ref_logprobs_T": ("log-prob under the reference", _REFERENCE),
    "logprobs_T": ("log-prob", _POLICY),
    "pretraining_nll_T": ("negative log-likelihood of a mixed-in text", _POLICY),
    "ratio_T": ("ratio π/π_old", _FAR),
    "entropy_T": ("entropy", _POLICY),
    "value_loss_T": ("value loss", _CRITIC),
    "logprobs_chosen_P": ("log-prob of the chosen response", _POLICY),
    "logprobs_rejected_P": ("log-prob of the rejected response", _POLICY),
    "margin_P": ("margin", _FAR),
    "score_P": ("score", _SCORER),
    "logit_S": ("logit", _SCORER),
}
"""What must be finite, in the order in which one follows from the other, and what to change."""


@dataclass(frozen=True)
class MicroBatchRecord:
    """A micro-batch: its groups, the tensors it was given, what was observed, and its loss."""

    groups: list[Group]
    given: dict[str, Tensor]
    observed: dict[str, Tensor]
    loss: float

    @classmethod
    def of(cls, part: Grouped, observed: dict[str, Tensor], loss: float) -> MicroBatchRecord:
        """Of a part of the data and what its pass gave."""
        values = {f.name: getattr(part, f.name) for f in fields(part)}
        given = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return cls(part.groups, given, observed, loss)

    def quantities(self) -> dict[str, Tensor]:
        """All that is known, by name; the ratio is computed."""
        known = {**self.given, **self.observed}
        new_T, old_T = known.get("logprobs_T"), known.get("old_logprobs_T")
        if new_T is not None and old_T is not None and len(new_T) == len(old_T):
            known["ratio_T"] = (new_T - old_T.to(new_T)).exp()
        return known


@dataclass(frozen=True)
class NonFiniteReport:
    """An optimizer step that was not taken, with its gradient norms, one per set of parameters."""

    optimizer_step: int
    gradient_norms: list[float]
    micro_batches: list[MicroBatchRecord]


def first_fault(evidence: NonFiniteReport) -> str:
    """The first quantity that is not finite, where it is, and what to change, in words."""
    for number, seen in enumerate(evidence.micro_batches):
        for name, (words, remedy) in _QUANTITIES.items():
            values = seen.quantities().get(name)
            if values is None or bool(values.isfinite().all()):
                continue
            at = int((~values.isfinite()).nonzero()[0, 0])
            place = f"micro-batch {number}, {_place(seen, name, len(values), at)}"
            return f"First, the {words} is {float(values[at])} ({place}). {remedy}"
        if not math.isfinite(seen.loss):
            return (
                f"First, the loss of micro-batch {number} is {seen.loss}, though all that it is "
                f"made of is finite. {_FAR}"
            )
    return f"{_GRADIENT}."


def _place(seen: MicroBatchRecord, name: str, count: int, at: int) -> str:
    """Which response and token (counted from 0) an entry of a flat tensor belongs to."""
    kind = name.rpartition("_")[2]
    if kind != "T":
        return f"{'pair' if kind == 'P' else 'labeled step'} {at}"
    responses = [response for group in seen.groups for response in group.responses]
    lengths = torch.tensor([len(response) for response in responses])
    weights_T = seen.given.get("weights_T")
    if count != int(lengths.sum()):
        # Observed at the tokens that are learned from, as supervised fine-tuning does.
        if weights_T is None or count != int((weights_T > 0).sum()):
            return f"entry {at}"
        at = int((weights_T > 0).nonzero()[at, 0])
    response = int(segment_ids(lengths)[at])
    token = at - int(lengths[:response].sum())
    return f"response {response}, token {token} with the id {responses[response][token]}"


def save_for_study(
    error: NonFiniteError,
    run_directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path | None:
    """Write the batch of ``error`` into ``non-finite/`` of a run, whole or not at all.

    A batch saved before is replaced. The error's message names the place from then on. Where the
    disk refuses, the reason is logged and None returned: the error itself matters more.
    """
    target = run_directory / "non-finite"
    try:
        with placing(target) as partial:
            for number, seen in enumerate(error.evidence.micro_batches):
                save_file(_tensors(seen), partial / _file(number))
            record = _record(str(error), error.evidence, tokenizer)
            (partial / "batch.json").write_text(json_line(record) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        logger.warning("the batch cannot be saved in %s: %s", target, reason)
        return None
    error.saved = target
    return target


def _file(number: int) -> str:
    return f"micro-batch-{number:03d}.safetensors"


def _tensors(seen: MicroBatchRecord) -> dict[str, Tensor]:
    named = [("given", seen.given), ("observed", seen.observed)]
    return {
        f"{kind}.{name}": value.detach().cpu().contiguous().clone()
        for kind, values in named
        for name, value in values.items()
    }


def _record(
    message: str, evidence: NonFiniteReport, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    return {
        "message": message,
        "optimizer_step": evidence.optimizer_step,
        "gradient_norms": evidence.gradient_norms,
        "micro_batches": [
            {
                "file": _file(number),
                "loss": seen.loss,
                "groups": [
                    {
                        "prompt": dict(_said(group.prompt, tokenizer)),
                        "responses": [dict(_said(r, tokenizer)) for r in group.responses],
                    }
                    for group in seen.groups
                ],
            }
            for number, seen in enumerate(evidence.micro_batches)
        ],
    }


def _said(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[str, Any]]:
    yield "tokens", tokens
    if tokenizer is not None:
        yield "text", tokenizer.decode(tokens)
