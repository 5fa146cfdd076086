"""One prompt and its responses as token ids: the output of the loaders, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.serialization import serializable


@serializable
@dataclass(frozen=True)
class Group:
    """One prompt and its responses, as token ids."""

    prompt: list[int]
    responses: list[list[int]]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a group's prompt is empty: no position could predict the first token")
        if not self.responses or not all(self.responses):
            raise ValueError(
                "a group needs at least one response, and every response at least one token"
            )
