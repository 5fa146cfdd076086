"""Table of bad inputs and the texts that their error messages must contain.

Each case is a directory with exactly one fault, a command, and four texts of the one message: the
value at fault, its place, the reason and the remedy. `test_bad_inputs.py` runs the cases. A case is
`early` if its fault must be found before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Change = Callable[[Path], Any]

FILES: dict[str, str] = {
    "prompts.jsonl": '{"prompt": "ab", "answer": "#### 1"}\n{"prompt": "cd", "answer": "#### 2"}\n',
    "held_out.jsonl": '{"prompt": "ef", "answer": "#### 3"}\n',
    "demos.jsonl": '{"prompt": "ab", "completion": "c"}\n{"prompt": "cd", "completion": "e"}\n',
    "pairs.jsonl": '{"prompt": "ab", "chosen": "c", "rejected": "d"}\n'
    '{"prompt": "cd", "chosen": "e", "rejected": "f"}\n',
    "steps.jsonl": '{"prompt": "ab", "completions": ["c", "d"], "labels": [true, false]}\n',
    "candidates.jsonl": '{"prompt": "ab", "texts": ["c", "d"], "scores": [1, 0]}\n',
    "solutions.jsonl": '{"prompt": "ab", "completion": "c\\nd"}\n',
    "reward.py": "def score(responses):\n    return [1.0 for _ in responses]\n",
}
MODEL = {"path": "model"}
SCORE = [{"function": "reward.py:score"}]
HELD_OUT = {"data": {"path": "held_out.jsonl"}, "rewards": SCORE}
SHORT = {"max_tokens": 8}
BASES: dict[str, dict[str, Any]] = {
    "sft": {"model": MODEL, "data": {"path": "demos.jsonl"}},
    "reward-model": {"model": MODEL, "pairs": {"path": "pairs.jsonl"}},
    "dpo": {"model": MODEL, "data": {"path": "pairs.jsonl"}},
    "ppo": {"model": MODEL, "data": {"path": "prompts.jsonl"}, "rewards": SCORE},
    "grpo": {"model": MODEL, "data": {"path": "prompts.jsonl"}, "rewards": SCORE},
    "sample": {"model": MODEL, "data": {"path": "prompts.jsonl"}, "output": "out.jsonl"},
    "pairs": {
        "model": MODEL,
        "data": {"path": "prompts.jsonl"},
        "rewards": SCORE,
        "output": "out.jsonl",
    },
    "label-steps": {
        "model": MODEL,
        "data": {"path": "solutions.jsonl"},
        "rewards": SCORE,
        "output": "out.jsonl",
    },
    "evaluate": {
        "model": MODEL,
        "data": {"path": "held_out.jsonl"},
        "rewards": SCORE,
        "max_tokens": 8,
    },
    "compare": {
        "model": MODEL,
        "data": {"path": "prompts.jsonl"},
        "rewards": SCORE,
        "evaluation": HELD_OUT,
        "methods": [{"name": "GRPO", "stages": [{"command": "grpo"}]}],
    },
}
for _name in ("ppo", "grpo", "sample", "pairs", "label-steps", "compare"):
    BASES[_name]["sampling"] = SHORT
for _name in ("sft", "reward-model", "dpo", "ppo", "grpo"):
    BASES[_name]["run"] = {"directory": "run"}


@dataclass(frozen=True)
class Bad:
    """One bad input. `yaml` precedes the command's base configuration and replaces its keys."""

    name: str
    command: str
    yaml: str | bytes = ""
    value: str = ""
    place: str = ""
    reason: str = ""
    remedy: str = ""
    settings: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    files: dict[str, str | bytes] = field(default_factory=dict)
    change: Change | None = None
    early: bool = True
    arguments: tuple[str, ...] | None = None

    def write(self, directory: Path) -> list[str]:
        """Write the case's files into a directory that holds a model; return the command line."""
        for name, content in {**FILES, **self.files}.items():
            data = content if isinstance(content, bytes) else content.encode()
            (directory / name).write_bytes(data)
        if self.change is not None:
            self.change(directory)
        if self.arguments is not None:
            return list(self.arguments)
        config = directory / f"{self.command}.yaml"
        if isinstance(self.yaml, bytes):
            config.write_bytes(self.yaml)
        else:
            replaced = {*re.findall(r"^(\w+):", self.yaml, re.MULTILINE), *self.without}
            base = {k: v for k, v in BASES[self.command].items() if k not in replaced}
            config.write_text(self.yaml + (yaml.safe_dump(base, sort_keys=False) if base else ""))
        return [self.command, config.name, *self.settings]


ALL: list[Bad] = []


def bad(name: str, command: str, yaml: str | bytes = "", /, *texts: str, **options: Any) -> None:
    """Add a case. `texts` are the value, place, reason and remedy."""
    assert len(texts) == 4 and all(texts), name
    ALL.append(Bad(name, command, yaml, *texts, **options))
