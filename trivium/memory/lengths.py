"""Token counts of a run's data, on which its memory depends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trivium.config.base import Configuration
from trivium.data.demonstrations import load_demonstrations
from trivium.data.group import Group
from trivium.data.preferences import load_preferences, load_step_labels
from trivium.data.prompt_forms import with_arguments_of
from trivium.data.prompts import PromptsConfig, load_prompts
from trivium.data.rankings import load_rankings
from trivium.hf.loading import load_tokenizer
from trivium.memory.report import Lengths

MAX_EXAMPLES = 256
"""Maximum number of prompts, pairs or demonstrations that are counted."""


def data_lengths(kind: str, config: Configuration) -> Lengths:
    """Return the token counts of the data of a run of ``kind``.

    Responses that the run will sample count with ``sampling.max_tokens`` tokens.

    Raises:
        DataError: the data cannot be read.
        ModelError: the tokenizer cannot be read.
    """
    settings: Any = config
    tokenizer = load_tokenizer(settings.model)
    if kind in ("ppo", "grpo", "sample", "pairs"):
        return _prompt_lengths(settings.data, tokenizer, settings.sampling.max_tokens)
    if kind == "evaluate":
        return _prompt_lengths(settings.data, tokenizer, settings.max_tokens)
    if kind == "dpo" and settings.online is not None:
        return _prompt_lengths(settings.online.data, tokenizer, settings.online.sampling.max_tokens)
    if kind == "sft":
        rows = load_demonstrations(settings.data, tokenizer)
        held_out = settings.validation and load_demonstrations(
            with_arguments_of(settings.validation, settings.data), tokenizer
        )
        return _group_lengths([row.group for row in rows], len(held_out or ()))
    if kind == "dpo":
        return _group_lengths([pair.group for pair in load_preferences(settings.data, tokenizer)])
    if settings.pairs is not None:
        groups = [pair.group for pair in load_preferences(settings.pairs, tokenizer)]
        validation = settings.validation_pairs and load_preferences(
            with_arguments_of(settings.validation_pairs, settings.pairs), tokenizer
        )
    elif settings.rankings is not None:
        groups = [row.group for row in load_rankings(settings.rankings, tokenizer)]
        validation = settings.validation_rankings and load_rankings(
            with_arguments_of(settings.validation_rankings, settings.rankings), tokenizer
        )
    else:
        groups = [row.group for row in load_step_labels(settings.steps, tokenizer)]
        validation = settings.validation_steps and load_step_labels(
            with_arguments_of(settings.validation_steps, settings.steps), tokenizer
        )
    split_off = math.ceil(settings.held_out_share * len(groups))
    return _group_lengths(groups, split_off if validation is None else len(validation))


def _prompt_lengths(
    data: PromptsConfig, tokenizer: PreTrainedTokenizerBase, response: int
) -> Lengths:
    prompts = load_prompts(data, tokenizer)
    lengths = tuple(len(prompt.tokens) for prompt in prompts[:MAX_EXAMPLES])
    return Lengths(lengths, (response,), count=len(prompts))


def _group_lengths(groups: Sequence[Group], held_out: int = 0) -> Lengths:
    counted = groups[:MAX_EXAMPLES]
    responses = tuple(len(response) for group in counted for response in group.responses)
    prompts = tuple(len(group.prompt) for group in counted)
    return Lengths(prompts, responses, held_out, count=len(groups))
