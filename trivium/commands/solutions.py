"""Solutions in rows of data, and their steps."""

from __future__ import annotations

from typing import Any

from trivium.commands.label_steps_config import LabelStepsConfig
from trivium.data.messages import checked_text, shortened
from trivium.data.prompt_forms import tools_of
from trivium.data.prompts import parse_prompt
from trivium.data.rows import DropRow, Notes, Row
from trivium.errors import DataError
from trivium.rewards.steps import step_spans

COLUMN = "completion"
EMPTY = "empty solution"


class SolutionReader:
    """Reads the solutions of rows before a tokenizer is loaded, and counts those of several steps.

    Args:
        config: names the data and the separator of steps.
    """

    def __init__(self, config: LabelStepsConfig) -> None:
        self.config = config
        self.count = self.divided = 0

    def __call__(self, row: Row, notes: Notes) -> list[str]:
        """Return the row's solutions that are not empty.

        Raises DropRow if all are empty, DataError if the row has no prompt or no solution.
        """
        prompt = parse_prompt(row, self.config.data, notes)
        tools_of(row, prompt, self.config.data, notes)
        found = [text for text in solutions_of(row) if text.strip()]
        if not found:
            raise DropRow(EMPTY)
        separator = self.config.separator
        self.count += len(found)
        self.divided += sum(len(split_steps(text, separator)) > 1 for text in found)
        return found

    def require_steps(self) -> None:
        """Raise DataError if no solution has more than one step."""
        if self.count and not self.divided:
            raise no_steps(self.config, self.count)


def no_steps(config: LabelStepsConfig, solutions: int) -> DataError:
    """Return the error for solutions without separators."""
    return DataError(
        f"{config.data.place}: none of {solutions:,} solutions has two steps: the separator "
        f"{config.separator!r} is between no two of them; set `separator` to the text between two "
        "steps, or score whole solutions with `trivium sample`"
    )


def solutions_of(row: Row) -> list[str]:
    """Return the texts in the row's column `completion`; some may be empty."""
    value: Any = row.column(COLUMN)
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise DataError(
            f"column `{COLUMN}` is {shortened(value)}; write a solution, or a list of them"
        )
    return [checked_text(text, f"column `{COLUMN}`") for text in texts]


def split_steps(solution: str, separator: str) -> list[str]:
    """Return the texts of the steps; joined by the separator they are the solution.

    A blank piece belongs to the step before it, or to the first step.
    """
    spans = step_spans(solution, separator)
    steps = [solution[start:end] for start, end in spans]
    return [*(step.removesuffix(separator) for step in steps[:-1]), *steps[-1:]]
