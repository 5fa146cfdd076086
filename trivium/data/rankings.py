"""Data of reward models beside plain pairs: rankings of several responses, pairs with a margin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trivium.config.base import Conflict
from trivium.data.demonstrations import (
    ResponsesConfig,
    check_context,
    drop_if_empty,
    encode_exchange,
    group_key,
    limit_response,
)
from trivium.data.encoder import Encoder
from trivium.data.group import Group
from trivium.data.messages import checked_text, shortened
from trivium.data.preferences import PreferencesConfig
from trivium.data.prompt_forms import CONTEXT_COLUMNS, explicit_prompt, prompt_form, tools_of
from trivium.data.prompts import check_prompt
from trivium.data.rows import DropRow, LoadReport, Notes, Row, collect
from trivium.data.template import Messages
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TIED = "all responses are tied"
_REPEATED = "a response occurs twice in its ranking"


class RewardPairsConfig(PreferencesConfig):
    """Pairs of a chosen and a rejected response for a reward model."""

    margins: bool = False
    """Read the column `margin`: by how much the chosen response's score must exceed the other's
    (Touvron et al. 2023, eq. 2)."""

    known_columns: ClassVar = CONTEXT_COLUMNS | {
        *("prompt", "chosen", "rejected", "conversations", "margin")
    }

    def uses_column(self, column: str) -> bool:
        unused = column == "margin" and not self.margins
        return not unused and super().uses_column(column)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if "margin" in self.columns and not self.margins:
            yield "columns", "`columns` gives a source for margin; set `margins: true` to use it"

    def margin(self, row: Row) -> float | None:
        """Return the margin of a row, at least 0; None without margins."""
        if not self.margins:
            return None
        value = _number(row.column("margin"), "column `margin`")
        if value < 0:
            raise DataError(
                f"column `margin` is {value:g}, and the chosen response is the better one; write 0 "
                "or more, or exchange the two responses"
            )
        return value


class RankingsConfig(ResponsesConfig):
    """Rankings of two or more responses to each prompt."""

    ties: Literal["drop", "half"] = "drop"
    """Two responses of equal score: no comparison (Ouyang et al. 2022, appendix C.2), or one that
    each of them wins by half (Nakano et al. 2021)."""
    margin_scale: float = Field(default=0.0, ge=0)
    """Margin by which the better response must win, per unit of difference in the data's scores
    (Touvron et al. 2023, eq. 2)."""

    known_columns: ClassVar = CONTEXT_COLUMNS | {"prompt", "responses", "scores"}


@dataclass(frozen=True)
class Ranking:
    """A prompt with its responses, and the score of each; higher is better."""

    group: Group
    scores: list[float]


def load_rankings(
    config: RankingsConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> list[Ranking]:
    """Return the rankings in the order of the rows; see `read_rankings`."""
    return read_rankings(config, tokenizer, context_length)[0]


def read_rankings(
    config: RankingsConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> tuple[list[Ranking], LoadReport]:
    """Return the rankings and the report of rows kept and dropped.

    A row has a prompt (`prompt` or `template`), the texts of its `responses`, and a number for each
    of them in `scores`. Rows with an empty response are dropped and counted, as are those whose
    responses are all tied if ties are dropped. Raises DataError for any other row, or one that
    exceeds the model's context.
    """
    encoder = Encoder(tokenizer, config.template_arguments)

    def convert(row: Row, notes: Notes) -> Ranking:
        prompt, texts, scores = parse_ranking(row, config, notes)
        tools = tools_of(row, prompt, config, notes)
        exchanges = [encode_exchange(encoder, prompt, text, notes, tools) for text in texts]
        encoder.tell_of_chat(prompt)
        tokens = exchanges[0].prompt
        check_prompt(tokens, config)
        responses = [limit_response(exchange.response, config, notes) for exchange in exchanges]
        check_context(len(tokens) + max(map(len, responses)), context_length)
        return Ranking(Group(tokens, responses), scores)

    return collect(config, convert, dedup_key=lambda item: group_key(item.group))


def parse_ranking(
    row: Row, config: RankingsConfig, notes: Notes
) -> tuple[str | Messages, list[str], list[float]]:
    """Return prompt, responses and scores, with every check that needs no tokenizer."""
    responses, scores = _list(row, "responses", "texts"), _list(row, "scores", "numbers")
    if len(responses) != len(scores):
        raise DataError(
            f"has {len(responses)} `responses` and {len(scores)} `scores`; each response needs one"
        )
    if len(responses) < 2:
        raise DataError(
            f"ranks {len(responses)} response{'' if responses else 's'}, and a ranking compares at "
            "least two; add others to `responses`, or remove the row"
        )
    texts = [checked_text(x, f"response {n} of `responses`") for n, x in enumerate(responses, 1)]
    numbers = [_number(x, f"score {n} of `scores`") for n, x in enumerate(scores, 1)]
    prompt = explicit_prompt(row, config)
    for text in texts:
        drop_if_empty(text)
    if config.ties == "drop" and len(set(numbers)) == 1:
        raise DropRow(_TIED)
    if len(set(texts)) < len(texts):
        notes.remark(_REPEATED)
    notes.forms[prompt_form(prompt)] += 1
    return prompt, texts, numbers


def _list(row: Row, name: str, entries: str) -> list[Any]:
    values = row.column(name)
    if not isinstance(values, list):
        raise DataError(
            f"column `{name}` is {shortened(values)}; write a list of {entries}, one per response"
        )
    return values


def _number(value: Any, label: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{label} is {shortened(value)}; write a finite number")
    return number
