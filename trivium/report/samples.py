"""Which of a run's responses a page carries, and in what shape.

All of them where they are few. Where they are many, the first and the last step come first, then
the steps half-way between, and so on, so that a prompt can still be followed; what is left out is
counted. Left out: showing them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trivium.report.curves import is_number
from trivium.report.page import encode

MOST_ROWS = 3000
"""Responses that a page carries at most."""
MOST_BYTES = 2_400_000
"""Their size in the page at most, prompts and tokens included."""
MOST_TEXT = 150_000
"""Characters that a page carries of one text at most."""

Row = Mapping[str, Any]


def select(records: Sequence[Row], most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the prompts and responses that a page carries, in order, and how many there are."""
    prompts: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    kept: dict[int, dict[str, Any]] = {}
    size = 0
    for place in _by_importance(records):
        if len(kept) == MOST_ROWS:
            break
        prompt = _prompt(records[place])
        key = encode(prompt)
        fresh = len(key.encode()) if key not in places else 0
        row = _response(records[place], places.get(key, len(prompts)))
        row, own = _within(row, most_bytes - size - fresh)
        if row is None:
            continue
        if fresh:
            places[key] = len(prompts)
            prompts.append(prompt)
        kept[place] = row
        size += fresh + own
    rows = [kept[place] for place in sorted(kept)]
    return {"prompts": _in_order(prompts, rows), "rows": rows, "total": len(records)}


def _in_order(prompts: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Number the prompts by their first response; the rows are told their new numbers."""
    order = {old: new for new, old in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    for row in rows:
        row["prompt"] = order[row["prompt"]]
    return [prompts[place] for place in order]


def _within(row: dict[str, Any], most: int) -> tuple[dict[str, Any] | None, int]:
    """Return the row if its JSON has at most ``most`` bytes, without its tokens if they are why."""
    bare = {name: value for name, value in row.items() if name not in _PER_TOKEN}
    for form in (row, {**bare, "tokens_left_out": True}):
        size = len(encode(form).encode())
        if size <= most:
            return form, size
    return None, 0


_PER_TOKEN = ("tokens", "cuts", "log_ratio", "advantages")


def _by_importance(records: Sequence[Row]) -> Iterator[int]:
    """Yield places: held-out responses before the training's, steps by how much they tell."""
    places: dict[tuple[bool, Any], list[int]] = {}
    for place, record in enumerate(records):
        training = record.get("drawn") == "training"
        places.setdefault((training, record.get("step")), []).append(place)
    for kind in (False, True):
        steps = [step for training, step in places if training is kind]
        for i in halving(len(steps)):
            yield from places[kind, steps[i]]


def halving(count: int) -> list[int]:
    """Return the places 0..count−1: the last, the first, then what halves the widest gaps."""
    order = [count - 1, 0][:count] if count else []
    gaps = [(0, count - 1)]
    for first, last in gaps:
        middle = (first + last) // 2
        if first < middle:
            order.append(middle)
            gaps += [(first, middle), (middle, last)]
    return order


def _prompt(record: Row) -> dict[str, Any]:
    drawn = "training" if record.get("drawn") == "training" else "held-out"
    given = record.get("prompt")
    turns = given if isinstance(given, list) else [{"role": None, "content": given}]
    return {
        "set": drawn,
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
    return row | _tokens(record, text) | ({"whole": len(text)} if len(text) > MOST_TEXT else {})


def _tokens(record: Row, text: str) -> dict[str, Any]:
    """Per-token numbers; the tokens themselves as lengths where they make up the response."""
    tokens = record.get("tokens")
    if not isinstance(tokens, list) or len(text) > MOST_TEXT:
        return {}
    pieces = [_text(token) for token in tokens]
    found: dict[str, Any] = {}
    for name in ("log_ratio", "advantages"):
        values = record.get(name)
        if isinstance(values, list) and len(values) == len(pieces):
            found[name] = [_digits(value) for value in values]
    if not found:
        return {}
    whole = "".join(pieces) == text
    return found | ({"cuts": [len(piece) for piece in pieces]} if whole else {"tokens": pieces})


def _digits(value: Any) -> Any:
    """Three digits are enough for a color and a hover."""
    if not is_number(value):
        return value if value in ("NaN", "Infinity", "-Infinity") else None
    return float(f"{value:.3g}") if math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _clip(text: str) -> str:
    return text[:MOST_TEXT]
