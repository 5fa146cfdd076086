"""A look at data before a tokenizer or a model is loaded.

Rows are read and checked by the loaders' own functions, up to where these need tokens: files that
are not there, broken lines, missing columns and wrong types are known in a moment. What depends on
tokens, such as lengths and chat templates, is left to the loaders, which check the rest again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trivium.data.demonstrations import DemonstrationsConfig, written_demonstration
from trivium.data.files import is_dataset
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    written_pair,
    written_steps,
)
from trivium.data.prompts import PromptsConfig, written_prompt
from trivium.data.rows import Notes, Pass, Row, RowsConfig

MOST_ROWS = 20_000
"""Rows that are looked at; those behind them are checked when they are loaded."""

Written = Callable[[Row, Notes], Any]
_WRITTEN: dict[type[RowsConfig], Callable[..., Any]] = {
    DemonstrationsConfig: written_demonstration,
    PreferencesConfig: written_pair,
    PromptsConfig: written_prompt,
    StepLabelsConfig: written_steps,
}


def survey(config: RowsConfig, written: Written | None = None) -> frozenset[str] | None:
    """Look at the rows and return their columns, or None where nothing can be said yet.

    That is so for saved and hub datasets, whose library is slow to import. `written` says what a
    row must hold, by default what the configuration's own loader needs. Raises DataError with the
    first ten faults.
    """
    if is_dataset(config.path):
        return None
    looked = Pass(config)
    rows = looked.items(written or _of_kind(config), MOST_ROWS)
    looked.report(sum(1 for _ in rows))
    return frozenset(looked.columns)


def _of_kind(config: RowsConfig) -> Written:
    """What the configuration's own loader makes of a row."""
    of_kind = _WRITTEN[type(config)]
    return lambda row, notes: of_kind(row, config, notes)
