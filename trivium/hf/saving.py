"""Hugging Face checkpoints out: what plain ``transformers`` loads is what was trained.

Every saved model is loaded again and compared with the trained one. Without adapters, weights and
settings must be the same, as must adapters that are saved alone. Merging adapters changes the
weights, so that log-probs of a probe are compared instead, computed in float32: rounding the sum to
bfloat16 can lose most of what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trivium.data.chat import end_tokens
from trivium.hf.adapters import has_lora, lora_of, precise_copy, unwrap_peft, widened
from trivium.hf.checkpoint_files import ADAPTER_WEIGHTS
from trivium.hf.loading import quiet_transformers
from trivium.hf.model_config import LoraConfig

GENERATION, CARD = "generation_config.json", "README.md"
HALF_TOLERANCE, FULL_TOLERANCE = 1e-2, 1e-4
"""How far a log-prob of a merged model may be from the trained one, saved in half precision and in
float32 or wider."""
TOLERATED_SHARE = 0.1
"""How much of the mean change by training rounding to half precision may move log-probs."""
_PROBES, _PROBE_LENGTH = 2, 32
_NEGLIGIBLE = 1e-5
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, MemoryError)
"""Errors of loading a saved model again. They do not end a run."""


@dataclass(frozen=True)
class SaveCheck:
    """Comparison of a saved model with the trained one.

    Attributes:
        dtype: data type of the saved weights.
        difference: largest difference of a log-prob (of a classifier: a score) of the probe; 0 if
            weights and settings are the same, None if they are not or could not be read.
        message: what is wrong, or not as in the base, and what to do about it.
    """

    dtype: str
    difference: float | None
    message: str = ""

    def fields(self) -> dict[str, Any]:
        """Return the numbers for an event."""
        return {"dtype": self.dtype, "difference": self.difference}


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    stop_tokens: Collection[int] = (),
) -> SaveCheck:
    """Write weights, configuration and tokenizer in the format of ``transformers``.

    Adapters are saved as ``LoraConfig`` says: merged into the weights, by themselves, or both.
    Generation ends at the tokens that ended responses in training: those of ``end_tokens`` and
    ``stop_tokens``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad():
        check = _save_adapted(directory, model) if has_lora(model) else _save(directory, model)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            _add_end_tokens(directory / GENERATION, {*end_tokens(tokenizer), *stop_tokens})
    return check


@torch.no_grad()
def probe(model: nn.Module) -> Tensor:
    """Return a language model's log-probs of the tokens of a probe, or a classifier's scores."""
    base = unwrap_peft(model)
    base.set_attn_implementation("eager")
    config = base.eval().config.get_text_config()
    length = min(_PROBE_LENGTH, getattr(config, "max_position_embeddings", None) or _PROBE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(_PROBES):
        tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
        mask = torch.ones_like(tokens)
        logits = base(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        if logits.dim() == 3:
            logits = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
        found.append(logits.flatten())
    return torch.cat(found)


# --- whole models ---------------------------------------------------------------------------------


def _save(directory: Path, model: nn.Module) -> SaveCheck:
    """Save a model without adapters, and compare what is loaded again with it, bit by bit.

    Equal weights, buffers and settings give equal log-probs, so that no probe is computed.
    """
    assert isinstance(model, PreTrainedModel), "a model without adapters is one of transformers"
    model.save_pretrained(directory)
    try:
        saved = _load(directory, model, model.dtype)
    except _UNREADABLE as error:
        return _not_compared(model.dtype, error)
    wrong = _different(_tensors(saved), _tensors(model)) or _different_settings(saved, model)
    return _exact(model.dtype, wrong, "weights or settings")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _different(saved: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not the same, bit by bit."""
    return [
        name
        for name in sorted(trained.keys() | saved.keys())
        if name not in trained
        or name not in saved
        or not torch.equal(trained[name].detach().cpu(), saved[name].detach().cpu())
    ]


def _different_settings(saved: PreTrainedModel, trained: PreTrainedModel) -> list[str]:
    """Return the names of configuration fields that differ, without those of where it was saved."""
    one, two = saved.config.to_dict(), trained.config.to_dict()
    names = (one.keys() | two.keys()) - {"_name_or_path", "architectures", "transformers_version"}
    return sorted(name for name in names if one.get(name) != two.get(name))


def _exact(dtype: torch.dtype, wrong: Sequence[str], what: str) -> SaveCheck:
    """Return the check of a model that is the trained one unless something in it is wrong."""
    if not wrong:
        return SaveCheck(_name(dtype), 0.0)
    return SaveCheck(
        _name(dtype),
        None,
        f"{len(wrong)} saved {what} ({wrong[0]} …) differ from the trained ones: resume the run to "
        "save them again, and report this as a fault of Trivium",
    )


def _not_compared(dtype: torch.dtype, error: BaseException) -> SaveCheck:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SaveCheck(_name(dtype), None, f"the saved model could not be compared: {reason}")


def _load(directory: Path, model: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """Load a saved model on the CPU."""
    kind: Any = type(unwrap_peft(model))
    return kind.from_pretrained(directory, dtype=dtype, use_safetensors=True)


# --- adapters -------------------------------------------------------------------------------------


def _save_adapted(directory: Path, model: nn.Module) -> SaveCheck:
    """Save a model with adapters, in the forms that their configuration names."""
    lora = lora_of(model)
    if lora.save == "adapter":
        return _save_adapter(directory, model)
    alone = None if lora.save == "merged" else _save_adapter(directory / "adapter", model)
    merged = _save_best_merged(directory, model, lora)
    return alone if alone is not None and alone.message else merged


def _save_best_merged(directory: Path, model: nn.Module, lora: LoraConfig) -> SaveCheck:
    """Save the merged weights in the data type that ``lora.merged_dtype`` decides."""
    copied: Any = precise_copy(model)
    trained = probe(copied)
    with copied.disable_adapter():
        moved = float((trained - probe(copied)).abs().mean())
    del copied
    own = unwrap_peft(model).dtype
    first = torch.float32 if lora.merged_dtype == "float32" else own
    check = _save_merged(directory, model, first, trained, moved)
    if lora.merged_dtype == "auto" and check.message and first != widened(own):
        precise = _save_merged(directory, model, widened(own), trained, moved)
        if precise.message or check.difference is None:
            return precise
        return _saved_precisely(precise, check)
    return check


def _save_adapter(directory: Path, model: Any) -> SaveCheck:
    """Save the adapters alone, and compare the file with them, bit by bit.

    Embeddings are not trained, so they are left out. So is the model card of ``peft``, a form to
    be filled in.
    """
    from peft import get_peft_model_state_dict

    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / CARD).unlink(missing_ok=True)
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = _different(load_file(directory / ADAPTER_WEIGHTS), trained)
    return _exact(next(iter(trained.values())).dtype, wrong, "weights of adapters")


def _save_merged(
    directory: Path, model: nn.Module, dtype: torch.dtype, trained: Tensor, moved: float
) -> SaveCheck:
    """Merge in float32, save in ``dtype``, and compare the files with the trained model.

    Args:
        trained: the probe of the trained model.
        moved: mean change of the probe by the adapters.
    """
    copied: Any = precise_copy(model)
    merged: PreTrainedModel = copied.merge_and_unload()
    types = {
        name.replace(".base_layer.", "."): parameter.dtype
        for name, parameter in unwrap_peft(model).named_parameters()
    }
    for name, parameter in merged.named_parameters():
        kept = types.get(name, dtype)
        parameter.data = parameter.data.to(dtype if kept == unwrap_peft(model).dtype else kept)
    merged.save_pretrained(directory)
    del copied, merged
    try:
        differences = (probe(_load(directory, model, widened(dtype))) - trained).abs()
    except _UNREADABLE as error:
        return _not_compared(dtype, error)
    largest, mean = float(differences.max()), float(differences.mean())
    exact = dtype == widened(dtype)
    tolerance = FULL_TOLERANCE if exact else HALF_TOLERANCE
    close = exact or mean <= max(TOLERATED_SHARE * moved, _NEGLIGIBLE)
    if largest <= tolerance and close:
        return SaveCheck(_name(dtype), largest)
    share = f", in the mean {mean / moved:.0%} of the change by training" if moved else ""
    return SaveCheck(
        _name(dtype),
        largest,
        f"the merged model is not the trained one: its log-probs of a probe differ by up to "
        f"{largest:.2g} (limit {tolerance:g}){share}. Use the adapters with their base, or write "
        "model.lora.merged_dtype: float32",
    )


def _saved_precisely(check: SaveCheck, rounded: SaveCheck) -> SaveCheck:
    """Return the check of a model in float32, with a message that says why it is."""
    return SaveCheck(
        check.dtype,
        check.difference,
        f"the merged weights are saved in {check.dtype}: rounded to {rounded.dtype}, they would "
        f"move log-probs of a probe by up to {rounded.difference:.2g}, which is too much of what "
        "was trained. Load them in float32, or use the adapters with their base; "
        "model.lora.merged_dtype: base rounds them nevertheless",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- ends of responses ----------------------------------------------------------------------------


def _add_end_tokens(file: Path, tokens: Collection[int]) -> None:
    """Add tokens to the EOS of a generation configuration; a classifier has none.

    The file is edited as JSON: ``transformers`` writes back a configuration with faults, as some
    checkpoints have, but refuses to write one that was changed.
    """
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    own = config.get("eos_token_id")
    ends = list(own) if isinstance(own, list) else [] if own is None else [own]
    ends += sorted(set(tokens) - set(ends))
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
