"""The built-in task as a directory: data files with everything that a recipe's stages read, and an
untrained model.

train.jsonl and test.jsonl have a row per problem: prompt, answer, steps (the correct ones), and in
train.jsonl also completion, a solution that may be wrong. tagged.jsonl has the same solutions in
the tags of DeepSeek-R1, right.jsonl has correct ones, and labels.jsonl has solutions with a label
for each step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trivium.tasks.problems import generate
from trivium.tasks.writer import demonstration_rows, problem_rows, step_label_rows


def write_task(
    directory: Path,
    *,
    seed: int,
    problems: int,
    held_out: int,
    labels: int,
    operations: tuple[int, int],
) -> None:
    """Write the task's files and the untrained model in ``base``, unless they exist already."""
    sizes = {"problems": problems, "held_out": held_out, "labels": labels}
    inputs = {**sizes, "operations": [*operations], "seed": seed, "version": version("trivium")}
    inputs["files"] = ["train", "tagged", "right", "labels", "test"]
    done = directory / "done.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == inputs:
        return
    trained = generate(2 * seed, max(problems, labels), operations)
    demonstrations = demonstration_rows(trained, seed)
    rows = [{**d, **p} for d, p in zip(demonstrations, problem_rows(trained), strict=True)]
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "train.jsonl", rows[:problems])
    tagged = [{**row, "completion": in_tags(row["completion"])} for row in rows[:problems]]
    _write(directory / "tagged.jsonl", tagged)
    right = ["\n".join([*row["steps"], f"#### {row['answer']}"]) for row in rows[:problems]]
    solved = zip(rows, right, strict=False)
    _write(directory / "right.jsonl", [{**row, "completion": text} for row, text in solved])
    _write(directory / "labels.jsonl", step_label_rows(trained[:labels], demonstrations[:labels]))
    tested = generate(seed, held_out, operations, split="test")
    _write(directory / "test.jsonl", problem_rows(tested))
    write_base(directory / "base", demonstrations[:problems], seed)
    done.write_text(json.dumps(inputs), encoding="utf-8")


def in_tags(solution: str) -> str:
    """Return a solution with its lines and its answer in the tags of DeepSeek-R1."""
    lines, _, answer = solution.rpartition("#### ")
    return f"<think>{lines.strip()}</think> <answer>{answer}</answer>"


def write_base(directory: Path, demonstrations: Iterable[Mapping[str, Any]], seed: int) -> None:
    """Write a tokenizer of the task's text, and a small model with random weights."""
    # Slow imports, needed only if there is something to write.
    import torch
    from transformers import AutoModelForCausalLM

    from trivium.hf.saving import save_checkpoint
    from trivium.tasks.tokenizer import small_model_config, train_tokenizer

    tokenizer = train_tokenizer(row["prompt"] + row["completion"] for row in demonstrations)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small_model_config(tokenizer))
    save_checkpoint(directory, model, tokenizer)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
