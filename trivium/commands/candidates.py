"""Responses that rows of data hold, each with a number that says how good it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trivium.commands.pairs_config import CandidateConfig, PairsConfig
from trivium.data.chat import Messages
from trivium.data.messages import nearest, shortened
from trivium.data.prompts import explicit_prompt
from trivium.data.rows import Row, checked_text
from trivium.errors import DataError


@dataclass(frozen=True)
class Candidates:
    """A prompt, the number of its row, and scored responses to it."""

    prompt: str | Messages
    index: int
    responses: list[str]
    scores: list[float]


def candidates_of(row: Row, config: PairsConfig) -> Candidates:
    """The responses and scores that the configuration finds in the row."""
    responses: list[str] = []
    scores: list[float] = []
    for candidate in config.candidates:
        texts, numbers = _texts_and_scores(row, candidate)
        responses += texts
        scores += numbers
    return Candidates(explicit_prompt(row, config.data), row.index, responses, scores)


def _texts_and_scores(row: Row, candidate: CandidateConfig) -> tuple[list[str], list[float]]:
    found = [field_of(row.columns, name) for name in (candidate.response, candidate.score)]
    texts, numbers = (value if isinstance(value, list) else [value] for value in found)
    if len(texts) != len(numbers):
        raise DataError(
            f"`{candidate.response}` holds {len(texts)} responses and `{candidate.score}` "
            f"{len(numbers)} scores; each response needs one"
        )
    return (
        [checked_text(text, f"`{candidate.response}`") for text in texts],
        [_number(number, candidate.score) for number in numbers],
    )


def field_of(columns: dict[str, Any], name: str) -> Any:
    """A column, or a field in it by its dotted name; of a list, the field of every entry."""
    return columns[name] if name in columns else _inside(columns, name.split("."), name)


def _inside(value: Any, keys: Sequence[str], name: str) -> Any:
    if not keys:
        return value
    if isinstance(value, list):
        return [_inside(entry, keys, name) for entry in value]
    if isinstance(value, dict) and keys[0] in value:
        return _inside(value[keys[0]], keys[1:], name)
    held = f"there are {', '.join(map(str, value))}" if isinstance(value, dict) else ""
    near = nearest(keys[0], value) if isinstance(value, dict) else None
    guess = f"; did you mean `{near}`?" if near else ""
    raise DataError(
        f"`candidates` names `{name}`, and there is no `{keys[0]}`: "
        f"{held or f'what should hold it is {shortened(value)}'}{guess}"
    )


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"`{name}` is {shortened(value)}; a score is true, false or a finite number"
        )
    return float(value)
