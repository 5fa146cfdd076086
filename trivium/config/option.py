"""Settings whose value names a function: one of a table, or a user's own ``file.py:function``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from trivium.config.functions import (
    FunctionKind,
    anchored,
    file_faults,
    find_file,
    load_function,
)
from trivium.errors import ConfigurationError

USERS_OWN = "file.py:function"


@dataclass(frozen=True, eq=False)
class Option:
    """The type of such a setting: ``Annotated[str, Option("surrogate", SURROGATES, …)]``.

    Attributes:
        name: the kind of function, in words.
        table: each choice, with the ``module:function`` that it stands for.
        signature: the first line of a user's own function; empty if only the table serves.
        result: the shape that the function returns.
    """

    name: str
    table: Mapping[str, str]
    signature: str = ""
    result: str = ""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._validate, handler(source))

    def load(self, choice: str) -> Callable[..., Any]:
        """Return the function that a setting chose.

        Raises:
            ConfigurationError: the user's file cannot be imported, or lacks the function.
        """
        return load_function(self.table.get(choice, choice), [Path.cwd()], self._kind)

    def is_users(self, choice: str) -> bool:
        """Return whether a setting names a user's own function."""
        return choice not in self.table

    def inputs(self, choice: str) -> Iterator[Path]:
        """Yield the file of a user's own function."""
        if self.is_users(choice) and (path := Path(choice.rpartition(":")[0])).is_file():
            yield path

    def describe(self) -> str:
        """Return the choices, as the reference of fields prints them."""
        return " | ".join([*self.table, *([USERS_OWN] if self.signature else [])])

    @property
    def _kind(self) -> FunctionKind:
        return FunctionKind(self.name, f"'{self.signature}'", f"that returns {self.result}")

    def _validate(self, choice: str, info: ValidationInfo) -> str:
        """Return the choice, with the whole path of a file beside the configuration."""
        if choice in self.table:
            return choice
        place, colon, function = choice.rpartition(":")
        if not (self.signature and colon and function and place.endswith(".py")):
            *first, last = [*map(repr, self.table), *([USERS_OWN] if self.signature else [])]
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}"})
        try:
            choice = anchored(choice, (info.context or {}).get("directory"))
            path = find_file(choice.rpartition(":")[0], [Path.cwd()])
            faults = [*file_faults(path, place, function, self._kind)]
        except ConfigurationError as error:
            faults = [str(error)]
        if faults:
            raise PydanticCustomError("function", "{error}", {"error": faults[0]})
        return choice


@dataclass(frozen=True)
class DefaultByChoice:
    """Default that depends on an earlier field, for ``Field(default_factory=…)``.

    Attributes:
        field: the earlier field.
        by_choice: the default for some of its values.
        otherwise: the default for all others, which the reference of fields prints.
    """

    field: str
    by_choice: Mapping[str, Any]
    otherwise: Any

    def __call__(self, validated: dict[str, Any]) -> Any:
        return self.by_choice.get(validated.get(self.field, ""), self.otherwise)
