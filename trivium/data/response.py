"""A sampled response, as engines return it and rewards score it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trivium.serialization import serializable

FinishReason = Literal["eos", "stop", "length"]
"""Reason why a response ended: an EOS or stop token, a stop text, or the length limit."""


@serializable
@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        tokens: token ids, including the token that ends the response.
        logprobs: log-prob of each token under ``softmax(logits / temperature)`` (1 when greedy),
            before top-p, top-k and min-p restrict the distribution.
        finish_reason: "eos" for an EOS or stop token, "stop" for a stop text, "length" if the
            length limit truncated the response.
        text: the decoded tokens, without special tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str
