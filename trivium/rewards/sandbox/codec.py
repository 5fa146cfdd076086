"""JSON encoding of values that a program and its tests exchange.

Only plain data is transferred. The decoding side builds every number, text and container itself,
so nothing that a program defines (``__eq__``, ``__bool__``, a class that pretends to be a list)
reaches the tests. Other objects stay in their process and are transferred as references.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

Reference = Callable[[Any], Any]

_DECIMAL_LIMIT = 1 << 64  # larger integers are hexadecimal: Python limits decimal digits
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": Decimal,
    "Fraction": Fraction,
}


def encode(value: Any, refer: Reference) -> Any:
    """Encode a value as JSON; `refer` encodes objects that are not plain data.

    A subclass of a plain type is encoded as that type: a ``Counter`` as a dict, a named tuple as a
    tuple. A list that contains itself raises RecursionError.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _DECIMAL_LIMIT else {"int": hex(value)}
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
    for name, container in _CONTAINERS.items():
        if isinstance(value, container):  # pyright: ignore[reportArgumentType]
            return {name: [encode(entry, refer) for entry in value]}
    return {"reference": refer(value)}


def decode(encoded: Any, resolve: Reference) -> Any:
    """Decode a value of ``encode``; `resolve` returns the object of a reference.

    Raises ValueError for anything that ``encode`` does not produce.
    """
    if encoded is None or isinstance(encoded, bool | int | float | str):
        return encoded
    if not isinstance(encoded, dict) or len(encoded) != 1:
        raise ValueError("not a value")
    [(name, content)] = encoded.items()
    if name in _CONTAINERS and isinstance(content, list):
        return _CONTAINERS[name]([decode(entry, resolve) for entry in content])
    if name == "dict":
        return {decode(key, resolve): decode(value, resolve) for key, value in content}
    if name in _FROM_TEXT:
        return _FROM_TEXT[name](content)
    if name in ("complex", "range"):
        return complex(*content) if name == "complex" else range(*content)
    if name == "reference":
        return resolve(content)
    raise ValueError("not a value")
