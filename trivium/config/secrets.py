"""Detection of values that look like secrets, to keep them out of run files and messages.

A run's configuration is saved, sent to trackers and shown in reports. The checks use only names
and the known formats of keys: a password in a field called ``note`` is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_SECRET_NAME = re.compile(
    r"token|(.*_)?(api_?key|(access|private|secret|auth|account)_?key|secret|password|passwd|passphrase"
    r"|credentials?|(api|access|auth|bearer|hf|hub|refresh|session|secret)_?token"
    r"|authorization)",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"(sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|bearer\s+|basic\s+)[\w./+=-]{12,}"
    r"|[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@.*",
    re.IGNORECASE,
)
_MIN_LENGTH = 8


def is_secret(name: str, value: Any) -> bool:
    """Return whether the value, under this name, looks like a secret."""
    if not isinstance(value, str):
        return False
    has_secret_name = _SECRET_NAME.fullmatch(name.replace("-", "_")) is not None
    if has_secret_name and len(value) >= _MIN_LENGTH:
        return True
    return _SECRET_VALUE.fullmatch(value.strip()) is not None


def secrets_in(values: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted name of every value that looks like a secret."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from secrets_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from secrets_in(value, f"{name}.{number}" if name else str(number))
    elif is_secret(_checked_name(name), values):
        yield name


def _checked_name(name: str) -> str:
    """Return the last part of a dotted name, or "" if the value names an environment variable."""
    *parents, last = name.split(".")
    return "" if parents and parents[-1].lower().endswith("env") else last
