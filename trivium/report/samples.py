"""Selection of a run's responses for a page.

The page has all responses if they are few. If there are many, the first and the last step have
priority, then the steps halfway between, and so on, so that a prompt can be followed through
training. The total is reported, so that the page can say how many are omitted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trivium.report.curves import is_number
from trivium.report.page import encode

MAX_ROWS = 3000
"""Maximum number of responses on a page."""
MAX_BYTES = 2_400_000
"""Maximum size of the responses in the page, including prompts and tokens."""
MAX_TEXT_CHARACTERS = 150_000
"""Maximum number of characters of one text on a page."""

Row = Mapping[str, Any]


def select(records: Sequence[Row], max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the selected prompts and responses, in order, and the total number of responses."""
    prompts: list[dict[str, Any]] = []
    positions: dict[str, int] = {}
    kept: dict[int, dict[str, Any]] = {}
    size = 0
    for position in _by_importance(records):
        if len(kept) == MAX_ROWS:
            break
        prompt = _prompt(records[position])
        key = encode(prompt)
        prompt_bytes = len(key.encode()) if key not in positions else 0
        row = _response(records[position], positions.get(key, len(prompts)))
        row, row_bytes = _fit(row, max_bytes - size - prompt_bytes)
        if row is None:
            continue
        if prompt_bytes:
            positions[key] = len(prompts)
            prompts.append(prompt)
        kept[position] = row
        size += prompt_bytes + row_bytes
    rows = [kept[position] for position in sorted(kept)]
    return {"prompts": _in_order(prompts, rows), "rows": rows, "total": len(records)}


def _in_order(prompts: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Renumber the prompts by their first response, and update the rows' prompt numbers."""
    order = {old: new for new, old in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    for row in rows:
        row["prompt"] = order[row["prompt"]]
    return [prompts[position] for position in order]


def _fit(row: dict[str, Any], max_bytes: int) -> tuple[dict[str, Any] | None, int]:
    """Return the row and its size, without tokens if it exceeds ``max_bytes``; None if too
    large."""
    bare = {name: value for name, value in row.items() if name not in _PER_TOKEN}
    for form in (row, {**bare, "tokens_omitted": True}):
        size = len(encode(form).encode())
        if size <= max_bytes:
            return form, size
    return None, 0


_PER_TOKEN = ("tokens", "token_lengths", "log_ratio", "advantages")


def _by_importance(records: Sequence[Row]) -> Iterator[int]:
    """Yield positions by priority: held-out responses first, and steps in bisection order."""
    positions: dict[tuple[bool, Any], list[int]] = {}
    for position, record in enumerate(records):
        training = record.get("drawn") == "training"
        step = record.get("step")
        positions.setdefault((training, step if is_number(step) else None), []).append(position)
    for kind in (False, True):
        steps = [step for training, step in positions if training is kind]
        for i in bisection_order(len(steps)):
            yield from positions[kind, steps[i]]


def bisection_order(count: int) -> list[int]:
    """Return 0..count−1 in the order last, first, then the midpoints of the widest gaps."""
    order = [count - 1, 0][:count] if count else []
    gaps = [(0, count - 1)]
    for first, last in gaps:
        middle = (first + last) // 2
        if first < middle:
            order.append(middle)
            gaps += [(first, middle), (middle, last)]
    return order


def _prompt(record: Row) -> dict[str, Any]:
    prompt_set = "training" if record.get("drawn") == "training" else "held-out"
    value = record.get("prompt")
    turns = value if isinstance(value, list) else [{"role": None, "content": value}]
    return {
        "set": prompt_set,
        "index": record.get("index"),
        "turns": [_turn(turn) for turn in turns],
    }


def _turn(turn: Any) -> list[Any]:
    turn = turn if isinstance(turn, dict) else {"content": turn}
    role = turn.get("role")
    return [None if role is None else _clip(_text(role)), _clip(_text(turn.get("content")))]


def _response(record: Row, prompt: int) -> dict[str, Any]:
    text = _text(record.get("response"))
    rewards = record.get("rewards")
    row = {
        "prompt": prompt,
        "step": record.get("step"),
        "drawn": _text(record.get("drawn")),
        "sample": record.get("sample"),
        "response": _clip(text),
        "finish_reason": _text(record.get("finish_reason")),
        "reward": record.get("reward"),
        "rewards": [[_clip(k), v] for k, v in rewards.items()] if isinstance(rewards, dict) else [],
        "length": record.get("length"),
        "kl": record.get("kl"),
    }
    return (
        row
        | _tokens(record, text)
        | ({"full_length": len(text)} if len(text) > MAX_TEXT_CHARACTERS else {})
    )


def _tokens(record: Row, text: str) -> dict[str, Any]:
    """Return the per-token values, and the tokens: as lengths if they concatenate to the
    response."""
    tokens = record.get("tokens")
    if not isinstance(tokens, list) or len(text) > MAX_TEXT_CHARACTERS:
        return {}
    pieces = [_text(token) for token in tokens]
    per_token: dict[str, Any] = {}
    for name in ("log_ratio", "advantages"):
        values = record.get(name)
        if isinstance(values, list) and len(values) == len(pieces):
            per_token[name] = [_round_digits(value) for value in values]
    if not per_token:
        return {}
    complete = "".join(pieces) == text
    return per_token | (
        {"token_lengths": [len(piece) for piece in pieces]} if complete else {"tokens": pieces}
    )


def _round_digits(value: Any) -> Any:
    """Round to three significant digits, which is enough for a color and a tooltip."""
    if not is_number(value):
        return value if value in ("NaN", "Infinity", "-Infinity") else None
    return float(f"{value:.3g}") if math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _clip(text: str) -> str:
    return text[:MAX_TEXT_CHARACTERS]
