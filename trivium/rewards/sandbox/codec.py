"""Values as JSON, between a program and the tests that judge it.

Only plain data crosses: the reading side builds every number, text and container itself, so
nothing that a program defines (``__eq__``, ``__bool__``, a class that pretends to be a list) ever
reaches the tests. Whatever is not plain stays where it is and crosses as a reference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

Reference = Callable[[Any], Any]

_LARGE = 1 << 64  # beyond it in hexadecimal: Python limits the digits of decimal ones
_MANY: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
_TEXTUAL: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": Decimal,
    "Fraction": Fraction,
}


def encode(value: Any, refer: Reference) -> Any:
    """Return a value as JSON; `refer` says how to write what is not plain data.

    A subclass of a plain type crosses as that type: a ``Counter`` as a dict, a named tuple as a
    tuple. A list that contains itself raises RecursionError.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _LARGE else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {("bytes" if isinstance(value, bytes) else "bytearray"): value.hex()}
    if isinstance(value, Decimal | Fraction):
        return {("Decimal" if isinstance(value, Decimal) else "Fraction"): str(value)}
    if isinstance(value, dict):
        return {"dict": [[encode(k, refer), encode(v, refer)] for k, v in dict.items(value)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for name, kind in _MANY.items():
        if isinstance(value, kind):  # pyright: ignore[reportArgumentType]
            return {name: [encode(entry, refer) for entry in value]}
    return {"reference": refer(value)}


def decode(code: Any, resolve: Reference) -> Any:
    """Return the value that ``encode`` wrote; `resolve` turns what `refer` wrote into an object.

    Raises ValueError where it is anything else.
    """
    if code is None or isinstance(code, bool | int | float | str):
        return code
    if not isinstance(code, dict) or len(code) != 1:
        raise ValueError("not a value")
    [(name, inner)] = code.items()
    if name in _MANY and isinstance(inner, list):
        return _MANY[name]([decode(entry, resolve) for entry in inner])
    if name == "dict":
        return {decode(key, resolve): decode(value, resolve) for key, value in inner}
    if name in _TEXTUAL:
        return _TEXTUAL[name](inner)
    if name in ("complex", "range"):
        return complex(*inner) if name == "complex" else range(*inner)
    if name == "reference":
        return resolve(inner)
    raise ValueError("not a value")
