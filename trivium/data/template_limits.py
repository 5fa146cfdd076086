"""Limits on the time and memory that a checkpoint's chat template may take.

``transformers`` renders templates in a sandbox of Jinja that keeps them from Python's objects, but
not from looping or multiplying text for ever. Here every loop and call of a template is counted
against its time, and every operation that can multiply its operands is checked before it is done.
"""

from __future__ import annotations

import functools
import importlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 10.0
"""Processor time that one rendering may take."""
LONGEST = 2**24
"""Characters of any text that a template makes."""
LONGEST_SOURCE = 2**20
"""Characters of a template."""
MOST_PARTS = 100_000
"""Values in a list or object that a template makes, counting those inside it."""
LARGEST = 1_000_000
"""Largest number given to a method of text, such as a width."""
_WIDEST = 1_000
_MOST_BITS = 100_000
_WIDTH = re.compile(r"\d{5}|\*")
_NESTED_WIDTH = re.compile(r"\d{5}|:[^}]*\{")
_LIBRARY = "transformers.utils.chat_template_utils"

lock = threading.RLock()
"""Held while the functions of the library that renders are replaced."""
_current = threading.local()


class TemplateLimitError(Exception):
    """A template needs more time or memory than it may."""


@contextmanager
def limited_templates() -> Iterator[Any]:
    """Render the templates of ``transformers`` within the limits; the library has no argument."""
    library: Any = importlib.import_module(_LIBRARY)
    with lock:
        own = library._compile_jinja_template
        library._compile_jinja_template = _compiled
        _current.end = time.thread_time() + SECONDS
        try:
            yield library
        finally:
            library._compile_jinja_template = own
            _current.end = None


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    """Compile a template with the library's own function, in an environment with limits."""
    if len(source) > LONGEST_SOURCE:
        raise TemplateLimitError(f"has {len(source):,} characters; at most {LONGEST_SOURCE:,}")
    library: Any = importlib.import_module(_LIBRARY)
    own = library.ImmutableSandboxedEnvironment
    library.ImmutableSandboxedEnvironment = _LimitedEnvironment
    try:
        return library._cached_compile_jinja_template(source)
    finally:
        library.ImmutableSandboxedEnvironment = own


def _tick() -> str:
    """Raise if the rendering has used up its time."""
    end = getattr(_current, "end", None)
    if end is not None and time.thread_time() > end:
        raise TemplateLimitError(f"did not end in {SECONDS:g} s")
    return ""


def _require_length(length: int) -> None:
    if length > LONGEST:
        raise TemplateLimitError(f"makes a text of {length:,} characters; at most {LONGEST:,}")


def _concat(parts: Iterable[str]) -> str:
    """Join the pieces of an output while their length is within the limit."""
    kept, length = [], 0
    for part in parts:
        length += len(part)
        _require_length(length)
        kept.append(part)
    return "".join(kept)


def _joined(parts: Iterable[Any]) -> str:
    """Return what the operator ``~`` does."""
    return _concat(map(str, parts))


def _built(value: Any) -> Any:
    """Return a list or object that a template made, if it is within the limit."""
    left, todo = MOST_PARTS, [value]
    while todo:
        inner = todo.pop()
        inner = [*inner, *inner.values()] if isinstance(inner, Mapping) else inner
        if isinstance(inner, list | tuple | set | frozenset):
            left -= len(inner)
            if left < 0:
                raise TemplateLimitError(f"makes a list of more than {MOST_PARTS:,} values")
            todo += [x for x in inner if isinstance(x, list | tuple | set | frozenset | Mapping)]
    return value


# --- operators ------------------------------------------------------------------------------------


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        _require_length(len(left) + len(right))
    return _built(left + right)


def _multiply(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__"):
            _require_length(one * len(other))
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())
    return _built(left * right)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() * right)
    return left**right


def _require_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise TemplateLimitError(f"makes a number of {bits:,} bits; at most {_MOST_BITS:,}")


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _require_widths(left, _WIDTH)
    return left % right


def _require_widths(text: str, pattern: re.Pattern[str]) -> None:
    if pattern.search(text):
        raise TemplateLimitError("formats a text with a width of more than 9,999 characters")


# --- calls and filters ----------------------------------------------------------------------------


def _require_small(name: str, arguments: Iterable[Any], largest: int = LARGEST) -> None:
    for value in arguments:
        if isinstance(value, int) and abs(value) > largest:
            raise TemplateLimitError(f"calls {name} with {value:,}; at most {largest:,}")


def _require_replaced(text: str, old: str, new: str) -> None:
    found = text.count(old) if len(new) > len(old) else 0
    _require_length(len(text) + found * (len(new) - len(old)))


def _require_joined(separator: Any, parts: Any) -> Any:
    """Return the parts as a list, if the text that joins them is within the limit."""
    listed = list(parts)
    length = len(str(separator)) * len(listed)
    _require_length(length + sum(len(part) for part in listed if isinstance(part, str)))
    return listed


def _call_method(method: Any, arguments: list[Any], named: Mapping[str, Any]) -> Any:
    """Call a method of a built-in type."""
    name, owner = method.__name__, method.__self__
    _require_small(name, [*arguments, *named.values()])
    if name == "translate":
        raise TemplateLimitError("calls translate, which is not supported")
    if name == "replace" and len(arguments) >= 2:
        _require_replaced(owner, *arguments[:2])
    if name == "join" and arguments:
        arguments = [_require_joined(owner, arguments[0])]
    if name == "expandtabs":
        _require_length(len(owner) * max(*arguments, *named.values(), 8))
    return method(*arguments, **named)


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that checks its arguments and its time first."""
    skipped = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def limited(*given: Any, **named: Any) -> Any:
        _tick()
        value, arguments = given[skipped], [*given[skipped + 1 :], *named.values()]
        texts = [x for x in arguments if isinstance(x, str)]
        _require_small(name, arguments, _WIDEST if name in ("indent", "tojson") else LARGEST)
        if name == "format":
            _require_widths(str(value), _WIDTH)
        elif name == "replace" and len(texts) >= 2:
            _require_replaced(str(value), *texts[:2])
        elif name == "join":
            value = _require_joined("".join(texts), value)
        elif name in ("indent", "wordwrap") and isinstance(value, str):
            width = max([_WIDEST, *map(len, texts)]) if name == "indent" else sum(map(len, texts))
            lines = value.count("\n") + 1 if name == "indent" else len(value)
            _require_length(len(value) + lines * width)
        result = function(*given[:skipped], value, *given[skipped + 1 :], **named)
        if isinstance(result, str):
            _require_length(len(result))
        return result

    return limited


# --- the environment ------------------------------------------------------------------------------


class _Checks(NodeTransformer):
    """Adds to a template's syntax tree the calls that check it while it is rendered."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", node), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_List(self, node: nodes.List, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("built", node, node)

    def visit_Dict(self, node: nodes.Dict, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("built", node, node)

    def visit_Tuple(self, node: nodes.Tuple, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("built", node, node) if node.ctx == "load" else node


def _call(name: str, place: nodes.Node, *arguments: nodes.Expr) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=place.lineno)
    return nodes.Call(function, [*arguments], [], None, None, lineno=place.lineno)


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of ``transformers``, with the limits of this module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)  # type: ignore[assignment]
    tick, joined, built = staticmethod(_tick), staticmethod(_joined), staticmethod(_built)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.binop_table |= {"+": _add, "*": _multiply, "**": _power, "%": _remainder}
        del self.globals["lipsum"]

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        # The library adds filters of its own to the environment that it made.
        self.filters = {name: _limited_filter(name, f) for name, f in self.filters.items()}
        return super()._generate(_Checks().visit(source), *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _require_widths(value.__self__, _NESTED_WIDTH)
        return wrapped

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            given = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
            method = functools.partial(_call_method, __obj, [*args], given)
            result = super().call(__context, method)
        else:
            result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            _require_length(len(result))
        return _built(result) if isinstance(result, dict) else result
