"""Whether weights, head and tokenizer belong to one model, after they were read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trivium.errors import ModelError

_LM_HEADS = ("lm_head.", "embed_out.")
_SCORE = "score."
_LARGEST_PADDING = 2048
"""Embeddings without a token, beyond twice the tokens, that a checkpoint may have."""


def require_weights(
    model: PreTrainedModel, report: Mapping[str, Any], path: str, *, scorer: bool, new_head: bool
) -> None:
    """Raise unless the files hold exactly the model's weights, as the loading report shows.

    A scorer may lack its head if ``new_head``, and leave the head of a language model out.
    """
    kind, refused = type(model).__name__, "so it is not loaded"
    missing = {str(name) for name in report["missing_keys"]}
    extra = {str(name) for name in report["unexpected_keys"]}
    if wrapped := sorted(n for n in extra if "lora_" in n or n.startswith("base_model.")):
        raise ModelError(
            f"{path} holds the weights of adapters ({_listed(wrapped)}), {refused}: merge them "
            "into their base with peft's merge_and_unload, and save the result"
        )
    if shapes := sorted(report["mismatched_keys"]):
        name, found, expected = shapes[0][:3]
        raise ModelError(
            f"{path} holds {len(shapes)} weights of another shape than its config.json says "
            f"({name} is {list(found)}, and {kind} has {list(expected)}), {refused}: take the "
            "config.json that belongs to these weights"
        )
    if scorer:
        extra = {n for n in extra if not n.startswith(_LM_HEADS)}
        head = {n for n in missing if n.startswith(_SCORE)}
        if head and (extra or not new_head):
            raise ModelError(_without_head(model, path, sorted(extra)))
        missing -= head
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} weights of {kind} ({_listed(sorted(missing))}): they "
            f"would be random, {refused}: copy the checkpoint again, or take the config.json that "
            "belongs to it"
        )
    if extra:
        raise ModelError(
            f"{path} holds {len(extra)} weights that {kind} has no place for "
            f"({_listed(sorted(extra))}): the model would be a part of what was saved, {refused}: "
            "take the config.json that belongs to these weights, or save the model without them"
        )


def _without_head(model: PreTrainedModel, path: str, others: list[str]) -> str:
    kind = type(model).__name__
    found, remedy = "it is a language model", "train a reward model from it"
    if kind in (model.config.architectures or ()):
        found, remedy = "it has no head at all", "copy it again, or train a reward model"
    if others:
        found = f"it holds {_listed(others)} instead"
        remedy = "save that head as score.weight, or train a reward model"
    return (
        f"{path} has no trained head: {kind} reads score.weight, and {found}, so its scores would "
        f"mean nothing: {remedy} (`trivium reward-model`)"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def require_trained_head(model: PreTrainedModel, path: str) -> None:
    """Raise if the head of a reward model is zero everywhere, as a new one is."""
    head = getattr(model, "score", None)
    if isinstance(head, nn.Module) and not any(bool(p.count_nonzero()) for p in head.parameters()):
        raise ModelError(
            f"the head of {path} (score.weight) is zero everywhere, so every score would be the "
            "same: it was never trained; train it with `trivium reward-model`"
        )


def require_finite(weights: Iterable[tuple[str, Tensor]], path: str) -> None:
    """Raise if a weight is NaN or infinite."""
    for name, weight in weights:
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"{path} holds {name} with values that are not finite (NaN or infinity): take an "
                "earlier checkpoint, from before the training that wrote it diverged"
            )


@torch.no_grad()
def require_causal(model: PreTrainedModel, path: str) -> None:
    """Raise if a token changes the hidden states before it, as in an encoder."""
    backbone: PreTrainedModel = model.base_model  # type: ignore[assignment]
    tokens = torch.tensor([[1, 2, 3], [1, 2, 0]], device=model.device)
    top = model.config.get_text_config().vocab_size - 1
    states = backbone(input_ids=tokens.clamp(max=top), use_cache=False).last_hidden_state.float()
    difference = (states[0, :2] - states[1, :2]).abs().max()
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.05
    if float(difference) > tolerance * float(states.abs().mean()):
        raise ModelError(
            f"in {path} ({type(model).__name__}) a token changes the states of those before it: "
            "it is an encoder, which sees the tokens that it predicts; name a decoder, or a "
            "checkpoint whose config.json has is_decoder: true if it was trained as one"
        )


def require_embeddings(tokenizer: PreTrainedTokenizerBase, path: str, known: int) -> None:
    """Raise if the tokenizer writes tokens that a model with ``known`` embeddings has none for.

    Counted are all ordinary tokens, and the special ones that are written without occurring in a
    text: EOS, those that the tokenizer adds, and those that the chat template names. A padding
    token is never embedded here, and others matter only where a text holds them (``data.chat``).
    """
    tokens = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    special |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    template = str(tokenizer.chat_template or "")
    written = {name for name in special if name in template}
    written |= {str(tokenizer.bos_token)} if "bos_token" in template else set()
    added = [n for n in tokenizer.encode("a", verbose=False) if n >= known]
    written |= {str(tokenizer.eos_token), *(tokenizer.convert_ids_to_tokens(n) for n in added)}
    beyond = {n: t for t, n in tokens.items() if n >= known and (t not in special or t in written)}
    if not beyond:
        if known > 2 * len(tokens) + _LARGEST_PADDING:
            raise ModelError(
                f"the tokenizer of {path} has {len(tokens):,} tokens, and the model has "
                f"embeddings for {known:,}: take the tokenizer that belongs to the checkpoint"
            )
        return
    names = ", ".join(f"{beyond[n]} ({n})" for n in sorted(beyond)[:3])
    needed, more = max(beyond) + 1, " …" if len(beyond) > 3 else ""
    if all(name in special for name in beyond.values()):
        remedy = (
            "resize the model's embeddings with resize_token_embeddings, train them, and save it, "
            "or take the tokenizer and chat template that belong to the checkpoint"
        )
    else:
        remedy = "take the tokenizer that belongs to the checkpoint"
    raise ModelError(
        f"the tokenizer of {path} has {needed} tokens, and the model has embeddings for {known}: "
        f"it writes {names}{more}, which would be looked up beyond them: {remedy}"
    )
