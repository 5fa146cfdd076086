"""Plain values from a YAML file and `key.sub=value` arguments, with the origin of each value.

An error in a configuration must name a line or an argument, and a number must mean the same in
both. PyYAML alone records no lines and reads 3e-4 as text. Validating the values is left to
``config.base``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.scanner import ScannerError

from trivium.config.secrets import is_secret
from trivium.errors import ConfigurationError

Keys = tuple[Any, ...]

_MAX_DEPTH = 50
_MAX_VALUES = 20_000
_MAX_BYTES = 2**17
_MAX_INTEGER_BITS = 1024  # a larger integer overflows a float
_MAX_SHOWN = 80
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}
_DIGITS = "(0|[1-9][0-9]*(_[0-9]+)*)"
_INTEGER = re.compile(rf"[-+]?({_DIGITS}|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    rf"[-+]?({_DIGITS}\.[0-9]*|\.[0-9]+|{_DIGITS}(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Read plain scalars as YAML 1.2: 3e-4 is a number; `no`, 1:30 and 2026-01-01 are text."""

    # PyYAML declares an instance variable but reads the class's.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Raise at a depth that no configuration needs: PyYAML's time is quadratic in the depth."""
        if self.flow_level == _MAX_DEPTH:
            reason = f"brackets nest more than {_MAX_DEPTH} deep"
            raise ScannerError(None, None, reason, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


class _Dumper(yaml.SafeDumper):
    """Quote every text that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these line breaks into spaces unless they are escaped, in double quotes.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(~|null|Null|NULL|)$"), [*"~nN", ""])
_Loader.add_implicit_resolver(
    _TAG + "bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(_TAG + "int", _INTEGER, list("-+0123456789"))
    _yaml_class.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def dump_yaml(values: Any) -> str:
    """Return plain values as YAML text that parses to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def parse_scalar(text: str) -> Any:
    """Return the value of unquoted text in a file: a number, a boolean, None or text."""
    node = yaml.ScalarNode(_Loader("").resolve(yaml.ScalarNode, text, (True, False)), text)
    return _Loader("").construct_object(node)


def format_value(value: Any) -> str:
    """Return a value for an error message: as in a file, on one line, at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def dotted(keys: Keys) -> str:
    """Return keys joined by dots, as an argument writes them: `rewards.0.weight`."""
    return ".".join(map(str, keys))


class YamlSource:
    """Values of a YAML file with arguments applied. ``faults`` collects the recoverable errors.

    If `path` is None, the arguments give all values, together with `text`, if any.
    """

    def __init__(self, path: Path | None, text: str | None = None) -> None:
        self.path = path
        self.faults: list[str] = []
        self._origins: dict[Keys, str] = {(): str(self)}
        self._arguments: dict[Keys, str] = {}
        self._current_argument: str | None = None
        self._value_count = 0
        if path is not None:
            text = _read_text(path)
        node = None if text is None else _parse_yaml(text, str(self), lines=True)
        values = {} if node is None else self._node_value(node, ())
        if not isinstance(values, dict):
            raise ConfigurationError(
                f"{path}: holds {format_value(values)}, not a configuration; "
                "write `key: value` lines"
            )
        self.values: dict[str, Any] = values

    def __str__(self) -> str:
        return "the arguments" if self.path is None else str(self.path)

    @property
    def directory(self) -> Path | None:
        """Directory of the file, or None without a file."""
        return None if self.path is None else self.path.parent

    def override(self, argument: str) -> None:
        """Apply one `key.sub=value` argument, or add to ``faults`` why it cannot be applied."""
        key, equals, text = argument.partition("=")
        hide_value = is_secret(key.rpartition(".")[2], text)
        self._current_argument = f"argument `{f'{key}=…' if hide_value else argument}`"
        names = key.split(".")
        try:
            if not _is_valid_text(argument):
                raise ConfigurationError(f"{self._current_argument}: is not UTF-8 text; retype it")
            if not equals or not all(names):
                raise ConfigurationError(
                    f"{self._current_argument}: not an assignment; write key=value"
                )
            node = _parse_yaml(text, self._current_argument, lines=False)
            comment = text[node.end_mark.index if node else 0 :].strip()
            if comment:
                raise ConfigurationError(
                    f"{self._current_argument}: `{comment}` reads as a comment; "
                    "put the value in quotes"
                )
            container, keys = self._container_of(names)
            for table in (self._origins, self._arguments):
                for replaced in [known for known in table if known[: len(keys)] == keys]:
                    del table[replaced]
            self._arguments[keys] = self._origins[keys] = self._current_argument
            container[keys[-1]] = None if node is None else self._node_value(node, keys)
        except ConfigurationError as error:
            self.faults.append(str(error))

    def origin(self, keys: Keys) -> str:
        """Return the origin of the value at `keys`, with the arguments that changed parts of it."""
        closest = next(keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in self._origins)
        inside = [a for k, a in self._arguments.items() if k[: len(keys)] == keys and k != closest]
        return " with ".join([self._origins[closest], *inside])

    def _container_of(self, names: Sequence[str]) -> tuple[Any, Keys]:
        """Return the mapping or list that contains the named value, and the value's keys."""
        container: Any = self.values
        keys: Keys = ()
        for name, following in zip(names, [*names[1:], None], strict=True):
            keys = (*keys, self._key_in(container, name, dotted(keys)))
            if following is None:
                break
            is_mapping = isinstance(container, dict)
            child = container.get(keys[-1]) if is_mapping else container[keys[-1]]
            if child is None and following.isdecimal():
                raise ConfigurationError(
                    f"{self._current_argument}: `{dotted(keys)}` is not set in {self}, so there is "
                    f"no entry {following} to change; give the whole list, {dotted(keys)}=[...]"
                )
            if child is None:
                child = container[keys[-1]] = {}
            container = child
        return container, keys

    def _key_in(self, container: Any, name: str, parent: str) -> int | str:
        """Return `name` as a key of the mapping, or an index of the list, that is at `parent`."""
        if isinstance(container, dict):
            return name
        if not isinstance(container, list):
            reason = f"is {format_value(container)}, which has no keys; set `{parent}` itself"
        elif not name.isdecimal():
            reason = f"is a list; address one entry by its index, as in `{parent}.0`"
        elif int(name) >= len(container):
            last = f"ends with `{parent}.{len(container) - 1}`" if container else "is empty"
            reason = f"{last}; to add an entry give the whole list, {parent}=[...]"
        else:
            return int(name)
        raise ConfigurationError(f"{self._current_argument}: `{parent}` {reason}")

    def _node_value(self, node: yaml.Node, keys: Keys) -> Any:
        """Return the node's plain value, and record the origins of the value and its parts."""
        origin = self._node_origin(node)
        if keys:
            self._origins.setdefault(keys, origin)
        self._value_count += 1
        if len(keys) > _MAX_DEPTH or self._value_count > _MAX_VALUES:
            raise ConfigurationError(
                f"{origin}: values nest more than {_MAX_DEPTH} deep, or there are more than "
                f"{_MAX_VALUES}; does an anchor contain itself, or many copies of another?"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping_value(node, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._node_value(item, (*keys, n)) for n, item in enumerate(node.value)]
        return self._scalar_value(node)

    def _mapping_value(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            origin = self._node_origin(key_node)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not _is_valid_text(key):
                self.faults.append(f"{origin}: a key must be a word, not a list or section")
                continue
            if key in values:
                first = self._origins[(*keys, key)]
                self.faults.append(f"{origin}: `{key}` is given twice, first at {first}; keep one")
                continue
            self._origins[(*keys, key)] = origin
            values[key] = self._node_value(value_node, (*keys, key))
        return values

    def _scalar_value(self, node: yaml.Node) -> Any:
        origin = self._node_origin(node)
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            self.faults.append(f"{origin}: the tag `{node.tag}` is not allowed; remove it")
            return None
        if not _is_valid_text(node.value):
            self.faults.append(
                f"{origin}: {format_value(node.value)} holds an unpaired surrogate; remove it"
            )
            return None
        try:
            value = _Loader("").construct_object(node)
        except (ValueError, ArithmeticError, LookupError, yaml.YAMLError):
            kind = node.tag.removeprefix(_TAG)
            self.faults.append(f"{origin}: {format_value(node.value)} is not of type {kind}")
            return None
        if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
            self.faults.append(f"{origin}: {format_value(node.value)} is too large a number")
            return None
        return value

    def _node_origin(self, node: yaml.Node) -> str:
        return self._current_argument or f"{self}:{node.start_mark.line + 1}"


def _is_valid_text(value: str) -> bool:
    """Return whether the text has no unpaired surrogate, as from an escape or a bad argument."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _parse_yaml(text: str, origin: str, lines: bool) -> yaml.Node | None:
    """Return the YAML text as nodes, which have line numbers; errors name the text by `origin`."""
    line = ""
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        if lines and error.problem_mark is not None:
            line = f":{error.problem_mark.line + 1}"
        reason = " ".join(part for part in (error.context, error.problem) if part)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except RecursionError:
        reason = "it is nested too deeply"
    remedy = "put text that holds special characters in quotes"
    raise ConfigurationError(f"{origin}{line}: not valid YAML: {reason}; {remedy}")


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) <= _MAX_BYTES:
            return data.decode("utf-8-sig")
        raise ConfigurationError(
            f"{path}: holds more than {_MAX_BYTES:,} bytes, too many for a configuration; "
            "is it a data file?"
        )
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
        remedy = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise ConfigurationError(f"{path}: there is no such file; {remedy}") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{path}: is a directory; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
