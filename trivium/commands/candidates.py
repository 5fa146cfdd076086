"""Scored responses in rows of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trivium.commands.pairs_config import CandidateConfig, PairsConfig
from trivium.data.messages import checked_text, nearest, shortened
from trivium.data.prompt_forms import explicit_prompt, tools_of
from trivium.data.rows import Notes, Row
from trivium.data.template import Messages, Tools
from trivium.errors import DataError


@dataclass(frozen=True)
class Candidates:
    """A prompt, the index of its row, and scored responses to the prompt."""

    prompt: str | Messages
    index: int
    responses: list[str]
    scores: list[float]
    tools: Tools | None = None


def candidates_of(row: Row, config: PairsConfig, notes: Notes) -> Candidates:
    """Return the responses and scores of the row's columns that the configuration names."""
    responses: list[str] = []
    scores: list[float] = []
    for candidate in config.candidates:
        texts, numbers = _texts_and_scores(row, candidate)
        responses += texts
        scores += numbers
    prompt = explicit_prompt(row, config.data)
    tools = tools_of(row, prompt, config.data, notes)
    return Candidates(prompt, row.index, responses, scores, tools)


def _texts_and_scores(row: Row, candidate: CandidateConfig) -> tuple[list[str], list[float]]:
    values = [field_of(row.columns, name) for name in (candidate.response, candidate.score)]
    texts, numbers = (value if isinstance(value, list) else [value] for value in values)
    if len(texts) != len(numbers):
        raise DataError(
            f"`{candidate.response}` holds {len(texts)} responses and `{candidate.score}` "
            f"{len(numbers)} scores; each response needs one score"
        )
    return (
        [checked_text(text, f"`{candidate.response}`") for text in texts],
        [_number(number, candidate.score) for number in numbers],
    )


def field_of(columns: dict[str, Any], name: str) -> Any:
    """Return a column, or a field in a column by its dotted name.

    If a value on the way is a list, the field of every entry is returned.
    """
    return columns[name] if name in columns else _nested_field(columns, name.split("."), name)


def _nested_field(value: Any, keys: Sequence[str], name: str) -> Any:
    if not keys:
        return value
    if isinstance(value, list):
        return [_nested_field(entry, keys, name) for entry in value]
    if isinstance(value, dict) and keys[0] in value:
        return _nested_field(value[keys[0]], keys[1:], name)
    if isinstance(value, dict):
        near = nearest(keys[0], value)
        reason = f"there are {', '.join(map(str, value))}"
        reason += f"; did you mean `{near}`?" if near else ""
    else:
        reason = f"expected an object with this key, found {shortened(value)}"
    raise DataError(f"`candidates` names `{name}`, and there is no `{keys[0]}`: {reason}")


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"`{name}` is {shortened(value)}; a score must be true, false or a finite number"
        )
    return float(value)
