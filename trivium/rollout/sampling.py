"""How responses are drawn; drawing them is for ``engine``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from trivium.config.base import Configuration


def _distinct(values: Sequence[str | int]) -> Sequence[str | int]:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is there twice: keep one")
    return values


StopTexts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(_distinct)]
StopTokens = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_distinct)]


class Sampling(Configuration):
    """How responses are drawn from the policy."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of tokens whose probabilities add up to this; 1 is all."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k most likely tokens; 0 is all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Leave out tokens less likely than this share of the most likely one; 0 is none."""
    max_tokens: int = Field(default=256, ge=1)
    """A response that has not ended by then is cut off."""
    stop: StopTexts = ()
    """Texts that end a response; the text stays part of it."""
    stop_tokens: StopTokens = ()
    """Token ids that end a response, besides the model's own EOS."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
