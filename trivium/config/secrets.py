"""What looks like a secret, and so must not be written into a run's files or shown in a message.

A run's configuration is saved, mirrored to trackers and shown in reports. Names and the known
forms of keys are all that is judged: a password in a field called ``note`` is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAME = re.compile(
    r"token|(.*_)?(api_?key|(access|private|secret|auth|account)_?key|secret|password|passwd|passphrase"
    r"|credentials?|(api|access|auth|bearer|hf|hub|refresh|session|secret)_?token"
    r"|authorization)",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"(sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|bearer\s+|basic\s+)[\w./+=-]{12,}"
    r"|[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@.*",
    re.IGNORECASE,
)
_SHORTEST = 8


def is_secret(name: str, value: Any) -> bool:
    """Whether the value, under this name, looks like a secret."""
    if not isinstance(value, str):
        return False
    named = _NAME.fullmatch(name.replace("-", "_")) is not None
    return (named and len(value) >= _SHORTEST) or _VALUE.fullmatch(value.strip()) is not None


def secrets_in(values: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted name of everything in the values that looks like a secret."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from secrets_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from secrets_in(value, f"{name}.{number}" if name else str(number))
    elif is_secret(_telling(name), values):
        yield name


def _telling(name: str) -> str:
    """The part of a dotted name that tells of a secret; in ``headers_from_env`` none does."""
    *above, last = name.split(".")
    return "" if above and above[-1].lower().endswith("env") else last
