"""Hugging Face checkpoints out: what plain ``transformers`` loads is what was trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from trivium.data.chat import end_tokens
from trivium.hf.loading import has_lora, quiet_transformers

GENERATION = "generation_config.json"


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    stop_tokens: Collection[int] = (),
) -> None:
    """Write weights, configuration and tokenizer in the format of ``transformers``.

    Adapters are merged into the weights, and also saved by themselves in ``directory/adapter``.
    Generation ends at the tokens that ended responses in training: those of ``end_tokens`` and
    ``stop_tokens``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        if has_lora(model):
            model.save_pretrained(directory / "adapter")  # type: ignore[operator]
            model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
        model.save_pretrained(directory)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            _add_end_tokens(directory / GENERATION, {*end_tokens(tokenizer), *stop_tokens})


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
