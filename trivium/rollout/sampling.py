"""How responses are drawn; drawing them is for ``engine``."""

from __future__ import annotations

from pydantic import model_validator

from trivium.config import Configuration


class Sampling(Configuration):
    """How responses are drawn from the policy."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities add up to this; 1 is all."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 is all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one; 0 is none."""
    max_tokens: int = 256
    """A response that has not ended by then is cut off."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; the text stays part of it."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a response, besides the model's own EOS."""

    @model_validator(mode="after")
    def _in_range(self) -> Sampling:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}: it must be at least 0 and below 1")
        if self.top_k < 0 or self.max_tokens < 1:
            raise ValueError(
                f"top_k must be ≥ 0 and max_tokens ≥ 1, got {self.top_k} and {self.max_tokens}"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which would end every response at once")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
