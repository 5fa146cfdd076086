"""Validation of data files before a tokenizer or a model is loaded.

Rows are read and checked by the loaders' own functions, as far as no tokens are needed: missing
files, invalid lines, missing columns and wrong types are found within a moment. Checks that depend
on tokens, such as lengths and chat templates, are left to the loaders, which repeat all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trivium.data.demonstrations import DemonstrationsConfig, parse_demonstration
from trivium.data.files import is_dataset
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    parse_pair,
    parse_step_labels,
)
from trivium.data.prompts import PromptsConfig, parse_prompt
from trivium.data.rankings import RankingsConfig, RewardPairsConfig, parse_ranking
from trivium.data.rows import Notes, Row, RowReader, RowsConfig

MAX_ROWS = 20_000
"""Number of rows that are checked; the loaders check the rest."""

Parser = Callable[[Row, Notes], Any]
_PARSERS: dict[type[RowsConfig], Callable[..., Any]] = {
    DemonstrationsConfig: parse_demonstration,
    PreferencesConfig: parse_pair,
    PromptsConfig: parse_prompt,
    RankingsConfig: parse_ranking,
    RewardPairsConfig: parse_pair,
    StepLabelsConfig: parse_step_labels,
}


def survey(config: RowsConfig, parse: Parser | None = None) -> frozenset[str] | None:
    """Check the first rows and return the names of their columns.

    Returns None for saved and hub datasets: the library that reads them is slow to import. `parse`
    checks a row; the default is the parser of the configuration's own loader. Raises DataError
    with the first ten faults.
    """
    if any(is_dataset(source.path) for source in config.sources):
        return None
    reader = RowReader(config)
    rows = reader.items(parse or _default_parser(config), MAX_ROWS)
    reader.report(sum(1 for _ in rows))
    return frozenset(reader.columns)


def _default_parser(config: RowsConfig) -> Parser:
    """Return the parser of the configuration's own loader."""
    parse = _PARSERS[type(config)]
    return lambda row, notes: parse(row, config, notes)
