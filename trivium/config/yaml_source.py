"""Plain values from a YAML file and `key.sub=value` arguments, with where each of them came from.

A configuration's errors must name a line or an argument, and a number must read the same in both;
PyYAML alone gives no lines and reads 3e-4 as text. What the values mean is config/base.py's business.
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

_DEEPEST = 50
_MOST = 20_000
_LARGEST = 2**17
_LONGEST_INTEGER = 1024  # bits: what a float can still hold
_LONGEST_SHOWN = 80
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}
_WHOLE = "(0|[1-9][0-9]*(_[0-9]+)*)"
_INTEGER = re.compile(rf"[-+]?({_WHOLE}|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    rf"[-+]?({_WHOLE}\.[0-9]*|\.[0-9]+|{_WHOLE}(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Plain scalars as in YAML 1.2: 3e-4 is a number; `no`, 1:30 and 2026-01-01 are text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Stop at a depth that no configuration has: PyYAML's time grows with its square."""
        if self.flow_level == _DEEPEST:
            reason = f"brackets nest more than {_DEEPEST} deep"
            raise ScannerError(None, None, reason, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes any text that YAML 1.1 or 1.2 would read as something else."""

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
for _scalars in (_Loader, _Dumper):
    _scalars.add_implicit_resolver(_TAG + "int", _INTEGER, list("-+0123456789"))
    _scalars.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def dump_yaml(values: Any) -> str:
    """Return plain values as YAML text that reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def parse_scalar(text: str) -> Any:
    """Return what unquoted text would be in a file: a number, a truth value, null or text."""
    node = yaml.ScalarNode(_Loader("").resolve(yaml.ScalarNode, text, (True, False)), text)
    return _Loader("").construct_object(node)


def shown(value: Any) -> str:
    """Return a value as an error message shows it: as in a file, on one line, not too long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def dotted(keys: Keys) -> str:
    """Return keys as an argument writes them, `rewards.0.weight`."""
    return ".".join(map(str, keys))


class YamlSource:
    """The values of a YAML file, corrected by arguments; faults that do not stop it are noted.

    Without a file, the values are those that the arguments give.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.faults: list[str] = []
        self._origins: dict[Keys, str] = {(): str(self)}
        self._arguments: dict[Keys, str] = {}
        self._argument: str | None = None
        self._count = 0
        node = None if path is None else _compose(_read_text(path), str(path), lines=True)
        values = {} if node is None else self._plain(node, ())
        if not isinstance(values, dict):
            raise ConfigurationError(
                f"{path}: holds {shown(values)}, not a configuration; write `key: value` lines"
            )
        self.values: dict[str, Any] = values

    def __str__(self) -> str:
        return "the arguments" if self.path is None else str(self.path)

    @property
    def directory(self) -> Path | None:
        """Where the file lies."""
        return None if self.path is None else self.path.parent

    def override(self, argument: str) -> None:
        """Apply one `key.sub=value` argument, or note why it cannot be applied."""
        key, equals, text = argument.partition("=")
        hidden = is_secret(key.rpartition(".")[2], text)
        self._argument = f"argument `{f'{key}=…' if hidden else argument}`"
        names = key.split(".")
        try:
            if not _is_text(argument):
                raise ConfigurationError(f"{self._argument}: is not UTF-8 text; retype it")
            if not equals or not all(names):
                raise ConfigurationError(f"{self._argument}: not an assignment; write key=value")
            node = _compose(text, self._argument, lines=False)
            comment = text[node.end_mark.index if node else 0 :].strip()
            if comment:
                raise ConfigurationError(
                    f"{self._argument}: `{comment}` reads as a comment; put the value in quotes"
                )
            holder, keys = self._place(names)
            for table in (self._origins, self._arguments):
                for known in [known for known in table if known[: len(keys)] == keys]:
                    del table[known]
            self._arguments[keys] = self._origins[keys] = self._argument
            holder[keys[-1]] = None if node is None else self._plain(node, keys)
        except ConfigurationError as error:
            self.faults.append(str(error))

    def origin(self, keys: Keys) -> str:
        """Return where the value at `keys` came from, with the arguments that changed parts."""
        closest = next(keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in self._origins)
        inside = [a for k, a in self._arguments.items() if k[: len(keys)] == keys and k != closest]
        return " with ".join([self._origins[closest], *inside])

    def _place(self, names: Sequence[str]) -> tuple[Any, Keys]:
        """Return the mapping or list that holds the named value, and the value's keys."""
        held: Any = self.values
        keys: Keys = ()
        for name, following in zip(names, [*names[1:], None], strict=True):
            keys = (*keys, self._key(held, name, dotted(keys)))
            if following is None:
                break
            child = held.get(keys[-1]) if isinstance(held, dict) else held[keys[-1]]
            if child is None and following.isdecimal():
                raise ConfigurationError(
                    f"{self._argument}: `{dotted(keys)}` is not set in {self}, so there is no "
                    f"entry {following} to change; give the whole list, {dotted(keys)}=[...]"
                )
            if child is None:
                child = held[keys[-1]] = {}
            held = child
        return held, keys

    def _key(self, held: Any, name: str, parent: str) -> int | str:
        """Return `name` as a key of the mapping or a number in the list held at `parent`."""
        if isinstance(held, dict):
            return name
        if not isinstance(held, list):
            reason = f"is {shown(held)}, which has no parts to set; set `{parent}` itself"
        elif not name.isdecimal():
            reason = f"is a list; name one entry by its number, as in `{parent}.0`"
        elif int(name) >= len(held):
            last = f"`{parent}.{len(held) - 1}`" if held else "nothing"
            reason = f"ends with {last}; to add an entry give the whole list, {parent}=[...]"
        else:
            return int(name)
        raise ConfigurationError(f"{self._argument}: `{parent}` {reason}")

    def _plain(self, node: yaml.Node, keys: Keys) -> Any:
        """Return the node's plain value, noting where it and its parts came from."""
        origin = self._origin_of(node)
        if keys:
            self._origins.setdefault(keys, origin)
        self._count += 1
        if len(keys) > _DEEPEST or self._count > _MOST:
            raise ConfigurationError(
                f"{origin}: values nest more than {_DEEPEST} deep or are more than {_MOST}; does "
                f"an anchor repeat or hold itself?"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._plain(item, (*keys, n)) for n, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            origin = self._origin_of(key_node)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not _is_text(key):
                self.faults.append(f"{origin}: a key must be a word, not a list or section")
                continue
            if key in values:
                first = self._origins[(*keys, key)]
                self.faults.append(f"{origin}: `{key}` is given twice, first at {first}; keep one")
                continue
            self._origins[(*keys, key)] = origin
            values[key] = self._plain(value_node, (*keys, key))
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        origin = self._origin_of(node)
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            self.faults.append(f"{origin}: the tag `{node.tag}` is not allowed; remove it")
            return None
        if not _is_text(node.value):
            self.faults.append(f"{origin}: {shown(node.value)} holds half of a character, not text")
            return None
        try:
            value = _Loader("").construct_object(node)
        except (ValueError, ArithmeticError, LookupError, yaml.YAMLError):
            kind = node.tag.removeprefix(_TAG)
            self.faults.append(f"{origin}: {shown(node.value)} is not of type {kind}")
            return None
        if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
            self.faults.append(f"{origin}: {shown(node.value)} is too large a number")
            return None
        return value

    def _origin_of(self, node: yaml.Node) -> str:
        return self._argument or f"{self}:{node.start_mark.line + 1}"


def _is_text(value: str) -> bool:
    """Whether it is whole characters: an escape or a broken argument can give half of one."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _compose(text: str, origin: str, lines: bool) -> yaml.Node | None:
    """Return the YAML text as nodes, which know their lines; `origin` names it in errors."""
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
            data = file.read(_LARGEST + 1)
        if len(data) <= _LARGEST:
            return data.decode("utf-8-sig")
        raise ConfigurationError(
            f"{path}: holds more than {_LARGEST:,} bytes, which no configuration does; is it data?"
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
