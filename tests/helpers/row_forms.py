"""Rows in every form of file, and what each loader reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.data_tokenizers import chatml_tokenizer
from trivium.data.demonstrations import DemonstrationsConfig, read_demonstrations
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    read_preferences,
    read_step_labels,
)
from trivium.data.prompts import PromptsConfig, read_prompts
from trivium.data.rows import LoadReport

TEMPLATE = """\
{%- if tools %}{{ '<tools>' + tools | tojson + '</tools>' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{{- m.content or '' }}
{%- for c in m.tool_calls or [] %}
{{- '<call>' + c.function.name + c.function.arguments | tojson + '</call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""A template that writes all parts of a chat."""
EARLIER_THOUGHTS = TEMPLATE.replace(
    "{{- m.content or '' }}", "{{- m.content.split('</think>')[-1] }}"
)
"""A template that leaves out the thoughts in a message's text."""
TOKENIZER: Any = chatml_tokenizer(TEMPLATE)
READERS: dict[str, Any] = {
    "sft": (DemonstrationsConfig, read_demonstrations),
    "dpo": (PreferencesConfig, read_preferences),
    "grpo": (PromptsConfig, read_prompts),
    "steps": (StepLabelsConfig, read_step_labels),
}
FILES = ["jsonl", "json", "parquet", "saved"]
ASK = {"role": "user", "content": "1 + 2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOLS_TEXT = f"<tools>{json.dumps([TOOL])}</tools>"
END, EOS = "<|im_end|>", "<|endoftext|>"
TURN = "<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n"


def says(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def write(directory: Path, form: str, rows: list[dict[str, Any]]) -> str:
    """Write the rows in a form of file, and return its path."""
    path = directory / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def learned(tokens: list[int], loss_mask: list[bool]) -> str:
    return TOKENIZER.decode([t for t, has_loss in zip(tokens, loss_mask, strict=True) if has_loss])


def read(
    path: str, method: str, tokenizer: Any = TOKENIZER, **settings: Any
) -> tuple[list[Any], LoadReport]:
    """Return each row's prompt, and in training data what is learned of each response."""
    config, reader = READERS[method]
    items, report = reader(config(path=path, **settings), tokenizer)
    if method == "grpo":
        return [TOKENIZER.decode(item.tokens) for item in items], report
    texts = []
    for item in items:
        responses = item.group.responses
        masks = [item.loss_mask] if method == "sft" else [[True] * len(r) for r in responses]
        parts = [learned(r, mask) for r, mask in zip(responses, masks, strict=True)]
        texts.append((TOKENIZER.decode(item.group.prompt), *parts))
    return texts, report
