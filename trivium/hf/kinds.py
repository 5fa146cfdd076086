"""Kinds of models that are not trained here, told from config.json before anything is loaded.

Each would be silently wrong: an encoder sees the tokens that it predicts, the state of a recurrent
layer takes in padding, and what reads images gets none. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MODALITIES = (
    "vision_config",
    "audio_config",
    "audio_encoder_config",
    "speech_config",
    "vq_config",
    "vision_tower",
    "mm_vision_tower",
    "visual",
)
_DEQUANTIZED = ("mxfp4",)
"""Methods whose weights ``transformers`` turns into ordinary ones where it must."""
_OTHER_HEADS = {
    "ForMaskedLM": "an encoder, in which every token sees those after it",
    "ForPreTraining": "an encoder, in which every token sees those after it",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a classifier of choices",
}
_CLASSIFIER = "ForSequenceClassification"
POLICY = "a policy is a decoder with a language-model head (…ForCausalLM)"
SCORER = "a reward model is a decoder with one label (…ForSequenceClassification)"


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the class that a checkpoint was saved as, or else its type of model."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else str(config.get("model_type") or "unknown")


def kind_fault(config: Mapping[str, Any]) -> str | None:
    """Return why no model of this kind is trained here; None if it may be."""
    name = architecture_of(config)
    if config.get("is_encoder_decoder") is True:
        return f"is an encoder-decoder ({name}), whose prompts are read by an encoder: {POLICY}"
    modality = next((key for key in _MODALITIES if config.get(key)), None)
    if modality is not None:
        return (
            f"reads more than text ({name} with {modality}), and only text is trained here: save "
            "its language model as a checkpoint of its own, or name a model of text"
        )
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if quantization and method not in _DEQUANTIZED:
        return (
            f"holds quantized weights ({method or 'quantization_config'}), which cannot be "
            "trained: name the checkpoint that it was quantized from"
        )
    return None


def role_fault(config: Mapping[str, Any], *, scorer: bool) -> str | None:
    """Return why a checkpoint with this head is no policy, or no reward model or critic.

    ``config`` has its defaults filled in, as ``PreTrainedConfig.to_dict`` does.
    """
    name = architecture_of(config)
    for suffix, kind in _OTHER_HEADS.items():
        if name.endswith(suffix):
            return f"is a {name}, {kind}: {SCORER if scorer else POLICY}"
    if not scorer and name.endswith(_CLASSIFIER):
        return f"is a {name}, a reward model or classifier without a language-model head: {POLICY}"
    labels = len(config["id2label"])
    if scorer and is_classifier(config) and labels != 1:
        return (
            f"is a {name} with {labels} labels: a reward model or critic is a sequence classifier "
            "with one label, or a language model to start one from"
        )
    return None


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint was saved as a sequence classifier."""
    return architecture_of(config).endswith(_CLASSIFIER)


def is_recurrent(config: Mapping[str, Any], stateful: bool) -> bool:
    """Return whether a layer keeps a state instead of attending.

    ``stateful`` is what ``transformers`` says of the class, some of which exist with attention
    alone.
    """
    text = config.get("text_config")
    types = (text if isinstance(text, Mapping) else config).get("layer_types")
    if not types:
        return stateful
    return any(not t.endswith("_attention") or t == "linear_attention" for t in types)
