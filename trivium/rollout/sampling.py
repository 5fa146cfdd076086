"""Sampling configuration; ``rollout.engine`` implements sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from trivium.config.base import Configuration


def _require_distinct(values: Sequence[str | int]) -> Sequence[str | int]:
    duplicate = next((value for value in values if values.count(value) > 1), None)
    if duplicate is not None:
        raise ValueError(f"{duplicate!r} occurs twice: keep one")
    return values


StopTexts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(_require_distinct)
]
StopTokens = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_require_distinct)]


class Sampling(Configuration):
    """Sampling of responses from the policy."""

    temperature: float = Field(default=1.0, ge=0)
    """Divisor of the logits; 0 is greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probabilities add up to top_p; 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k most likely tokens; 0 keeps all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Minimum probability of a token, relative to the most likely token; 0 keeps all."""
    max_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens per response; longer responses are truncated."""
    stop: StopTexts = ()
    """Texts that end a response; the text remains part of the response."""
    stop_tokens: StopTokens = ()
    """Token ids that end a response, in addition to the model's EOS."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
