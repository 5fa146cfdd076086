"""The built-in task as a part of a pipeline or a comparison: its size, its place, its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.jobs.job import Job, texts_in

TASK_DIRECTORY = "task"
Positive = Annotated[int, Field(ge=1)]


class TaskConfig(Configuration):
    """The built-in task: chained word problems, with imperfect solutions to learn from."""

    problems: int = Field(default=8_000, ge=1)
    """Problems of train.jsonl, each with its answer, its correct steps and a solution that may be
    wrong (completion); tagged.jsonl and right.jsonl have other solutions of them."""
    held_out: int = Field(default=250, ge=1)
    """Problems of test.jsonl, which no training file has."""
    labels: int = Field(default=4_000, ge=1)
    """Solutions of labels.jsonl, with a label for each step."""
    operations: tuple[Positive, Positive] = (2, 2)
    """Smallest and largest number of steps of a problem."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.operations[0] > self.operations[1]:
            yield "operations", "the first is larger than the second: write the smaller one first"


def names_task(directory: Path, jobs: Mapping[str, Job]) -> bool:
    """Return whether a job reads a file or the model of the built-in task in ``directory``."""
    texts = (text for job in jobs.values() for _, text in texts_in(job.settings))
    return any(text == str(directory) or text.startswith(f"{directory}/") for text in texts)


def write_task_files(directory: Path, task: TaskConfig, seed: int, jobs: Mapping[str, Job]) -> None:
    """Write the built-in task into ``directory`` if a job uses it."""
    if names_task(directory, jobs):
        from trivium.tasks.files import write_task

        write_task(directory, seed=seed, **task.model_dump())
