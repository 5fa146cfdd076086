"""Run directories with given records, for tests of reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>alert(1)</script><!-- \u2028\u202e\x1b[31m\x00 & \ud800"


def make_run(path: Path, config: str = "model: {path: base}\n", **files: list[Any]) -> Path:
    """Write a run directory; records that are strings are written unchanged."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps({"kind": "grpo", "started": "2026-01-01T00:00:00Z"}))
    (path / "config.yaml").write_text(config)
    for stem, records in files.items():
        lines = [r if isinstance(r, str) else json.dumps(r) + "\n" for r in records]
        (path / f"{stem}.jsonl").write_text("".join(lines))
    return path


def sample(step: int, response: str = "words", **fields: Any) -> dict[str, Any]:
    row = {"step": step, "drawn": "greedy", "index": 3, "sample": 0, "prompt": "ask"}
    row |= {"response": response, "finish_reason": "eos", "reward": 1.0, "rewards": {"r": 1.0}}
    row |= {"length": 2, "kl": 0.5, "tokens": None, "log_ratio": None, "advantages": None}
    return row | fields


def evaluation(step: int, value: float, half: float = 0.1, **fields: Any) -> dict[str, Any]:
    ends = {"greedy_low": value - half, "greedy_high": value + half}
    return {"step": step, "elapsed": 1.0, "n": 50, "greedy": value, **ends, **fields}


def embedded(html: str) -> dict[str, Any]:
    """Return the data in a page, read like a browser: up to the first end of a script element."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL)
    assert found
    return json.loads(found[1])
