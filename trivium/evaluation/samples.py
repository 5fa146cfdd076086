"""Records of responses for ``samples.jsonl``: text, rewards and values per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.data.chat import token_pieces
from trivium.rollout.rollouts import Rollouts

Rows = list[dict[str, Any]]
"""Records for ``samples.jsonl``."""


def sample_rows(
    rollouts: Rollouts,
    drawn: str,
    prompts: int,
    *,
    pieces: Sequence[list[str]] | None = None,
    log_ratio_T: Tensor | None = None,
    advantages_T: Tensor | None = None,
) -> Rows:
    """Return records of the responses to the first `prompts` prompts.

    Args:
        rollouts: prompts, responses and scores.
        drawn: origin of the responses: "greedy", "sampled" or "training".
        prompts: number of prompts.
        pieces: text of every token of each response.
        log_ratio_T: log π − log π_ref of every response token.
        advantages_T: advantage of every response token.
    """
    lengths = rollouts.lengths_N.tolist()
    per_token = {
        name: None if flat_T is None else flat_T.split(lengths)
        for name, flat_T in (("log_ratio", log_ratio_T), ("advantages", advantages_T))
    }
    rows: Rows = []
    position = 0
    for prompt, responses in zip(rollouts.prompts[:prompts], rollouts.responses, strict=False):
        for sample, response in enumerate(responses):
            values = {
                name: None if split is None else _rounded(split[position])
                for name, split in per_token.items()
            }
            rows.append(
                {
                    "drawn": drawn,
                    "index": prompt.index,
                    "sample": sample,
                    "prompt": prompt.text,
                    "response": response.text,
                    "finish_reason": response.finish_reason,
                    "length": len(response.tokens),
                    "reward": float(rollouts.totals_N[position]),
                    "rewards": {k: v[position] for k, v in rollouts.scores.components.items()},
                    "kl": None if log_ratio_T is None else math.fsum(values["log_ratio"] or ()),
                    "tokens": None if pieces is None else pieces[position],
                    **values,
                }
            )
            position += 1
    return rows


def training_rows(
    rollouts: Rollouts,
    tokenizer: PreTrainedTokenizerBase,
    advantages_T: Tensor,
    log_ratio_T: Tensor | None,
) -> Rows:
    """Return records of a training step's first group, with the advantage of every token."""
    first = rollouts.responses[0]
    return sample_rows(
        rollouts,
        "training",
        1,
        pieces=[token_pieces(tokenizer, response.tokens) for response in first],
        log_ratio_T=log_ratio_T,
        advantages_T=advantages_T,
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
