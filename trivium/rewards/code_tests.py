"""Tests of programs in a data row: their forms, and what a form that cannot be run should be.

Every form becomes pairs of an input and its output, or test code (``sandbox.checker`` runs it).
"""

from __future__ import annotations

import ast
import contextlib
import json
import keyword
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trivium.rewards.sandbox.checker import PROGRAM_MODULES, imported_modules

TEST_FORMS = (
    "a list of {input: …, output: …}, {inputs: […], outputs: […]}, a list of assert statements, or "
    "test code as one text; each may be given as JSON"
)
_EXAMPLE = re.compile(r"^[ \t]*>>> ", re.MULTILINE)
_PYTEST = frozenset({"approx", "fail", "main", "mark", "param", "raises"})
_REFUSED_MARKS = frozenset({"skip", "skipif", "usefixtures", "xfail"})
_CALL = """\
import json
def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {{k: plain(v) for k, v in value.items()}} if isinstance(value, dict) else value
def call(arguments):
    try:
        function = Solution().{name}
    except (AttributeError, NameError):
        function = {name}
    return plain(function(*arguments))
result, expected = call(json.loads({arguments!r})), json.loads({expected!r})
assert result == expected{alternative}, result
"""


@dataclass(frozen=True)
class Test:
    """One test: an input and its expected output, or test code and its entry point."""

    code: str | None = None
    entry_point: str | None = None
    input: str = ""
    output: str = ""

    def __str__(self) -> str:
        """Return the test, for messages."""
        return self.input if self.code is None else self.code


def read_tests(tests: Any, entry_point: Any = None, setup: Any = None) -> list[Test]:
    """Parse a data row's tests; raise ValueError if there are none or their form is unknown.

    Args:
        tests: the tests, or their JSON.
        entry_point: name of the tested function, or a mapping or its JSON that holds it as
            ``func_name``.
        setup: code to run before each test code, as text or a list of lines.
    """
    name, before = _function_name(entry_point), _setup_code(setup)
    if isinstance(tests, str):
        try:
            parsed = json.loads(tests)
        except (ValueError, RecursionError):
            return [_code_test(before + tests, name)]
        return read_tests(parsed, name, before)
    if isinstance(tests, dict) and set(tests) >= {"inputs", "outputs"}:
        return _pairs(tests, name)
    if isinstance(tests, list | tuple) and tests:
        return [_read_one(test, name, before) for test in tests]
    raise ValueError(f"the data's tests {tests!r:.120} are not tests: write {TEST_FORMS}")


def _function_name(value: Any) -> str | None:
    """Return the entry point; LiveCodeBench's metadata holds it as ``func_name``."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict):
        value = value.get("func_name")
    if value is None:
        return None
    if not isinstance(value, str) or not value.isidentifier() or keyword.iskeyword(value):
        raise ValueError(f"the data's entry_point {value!r:.80} is not the name of a function")
    return value


def _setup_code(setup: Any) -> str:
    if isinstance(setup, list | tuple) and all(isinstance(line, str) for line in setup):
        setup = "\n".join(setup)
    if setup is not None and not isinstance(setup, str):
        raise ValueError(f"the data's test_setup {setup!r:.80} is not code: write it as text")
    return f"{setup.rstrip()}\n" if setup and setup.strip() else ""


def _pairs(tests: dict[str, Any], entry_point: str | None) -> list[Test]:
    inputs, outputs = tests["inputs"], tests["outputs"]
    is_list = isinstance(inputs, list) and isinstance(outputs, list)
    if not is_list or not inputs or len(inputs) != len(outputs):
        raise ValueError(
            "the data's tests need lists 'inputs' and 'outputs' of texts, of the same length"
        )
    name = _function_name(tests.get("fn_name"))
    if name is not None:
        return [_call_test(i, o, name) for i, o in zip(inputs, outputs, strict=True)]
    return [
        _read_one({"input": i, "output": o}, entry_point, "")
        for i, o in zip(inputs, outputs, strict=True)
    ]


def _read_one(test: Any, entry_point: str | None, setup: str) -> Test:
    if isinstance(test, str):
        if not test.strip():
            raise ValueError("the data's tests are an empty text: every program would pass them")
        return _code_test(setup + test, entry_point)
    if isinstance(test, dict) and "output" in test:
        if test.get("testtype") == "functional":
            if entry_point is None:
                raise ValueError(
                    "the data's test is a function call (testtype: functional), and the row has no "
                    "entry_point: name the column that holds it, as in "
                    "'columns: {entry_point: metadata}'"
                )
            return _call_test(test.get("input", ""), test["output"], entry_point, wrapped=False)
        test_input, expected = _text(test.get("input", "")), _text(test["output"])
        if test_input is not None and expected is not None:
            return Test(input=test_input, output=expected)
    raise ValueError(f"the data's test {test!r:.120} is not a test: write {TEST_FORMS}")


def _text(value: Any) -> str | None:
    """Return an input or output; a list of texts is its lines."""
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


# --- Function calls ------------------------------------------------------------------------------


def _call_test(arguments: Any, expected: Any, name: str, *, wrapped: bool = True) -> Test:
    """Return a call of a function, or of a method of ``Solution``, as test code.

    Arguments in a text are one JSON value per line (LiveCodeBench). APPS has lists, and wraps some
    results in a list of one entry (`wrapped`). A tuple in a result counts as a list.
    """
    if isinstance(arguments, str):
        arguments = [_json(line, "input") for line in arguments.splitlines() if line.strip()]
    if not isinstance(arguments, list):
        raise ValueError(
            f"the data's test calls {name} with {arguments!r:.80}: write a list of its arguments"
        )
    expected = _json(expected, "output") if isinstance(expected, str) else expected
    alternative = wrapped and isinstance(expected, list) and len(expected) == 1
    code = _CALL.format(
        name=name,
        arguments=json.dumps(arguments),
        expected=json.dumps(expected),
        alternative=" or result == expected[0]" if alternative else "",
    )
    return Test(code=code, entry_point=name)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(
            f"the data's test calls a function, and its {what} {text!r:.80} is not JSON: write the "
            "values as JSON, each argument on its own line"
        ) from None


# --- Test code -----------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 14)
def _code_test(text: str, entry_point: str | None) -> Test:
    """Return test code as a test; add the call if it only defines ``check(candidate)``."""
    if not text.strip():
        raise ValueError("the data's tests are an empty text: every program would pass them")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if _EXAMPLE.search(text):
            return Test(code=f"{text!r}\n", entry_point=entry_point)
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the data's test {text!r:.120} cannot be run: {reason}") from None
    for fault in _faults(tree):
        raise ValueError(f"the data's test {text!r:.120} {fault}")
    if _only_defines_check(tree):
        if entry_point is None:
            raise ValueError(
                f"the data's test {text!r:.120} defines check and never calls it, and the row has "
                "no entry_point: name the column that holds the function's name, as in "
                "'columns: {entry_point: name}', or end the test with check(NAME)"
            )
        text = f"{text}\n\ncheck({entry_point})\n"
    return Test(code=text, entry_point=entry_point)


def _only_defines_check(tree: ast.Module) -> bool:
    """Return whether the code defines ``check`` and mentions it nowhere else."""
    defined = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"]
    own = {id(node) for function in defined for node in ast.walk(function)}
    return bool(defined) and not any(
        isinstance(node, ast.Name) and node.id == "check" and id(node) not in own
        for node in ast.walk(tree)
    )


def _faults(tree: ast.Module) -> Iterator[str]:
    """Yield why test code cannot be run here, and what to write."""
    optional = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
    for node in ast.walk(tree):
        for module in imported_modules(node):
            known = sys.stdlib_module_names | PROGRAM_MODULES | {"pytest", "__main__"}
            if module not in known and id(node) not in optional:
                yield (
                    f"imports {module}, which the sandbox does not have: use the standard library; "
                    "the program's own names need no import, or `from solution import NAME`"
                )
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "has a relative import: write `from solution import NAME`, or no import"
        if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield f"has `async def {node.name}`: write a function that calls asyncio.run"
        yield from _pytest_faults(node)


def _pytest_faults(node: ast.AST) -> Iterator[str]:
    names: Sequence[str] = ()
    if isinstance(node, ast.ImportFrom) and node.module == "pytest":
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        names = [node.attr] if node.value.id == "pytest" else ()
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
        is_refused = node.value.attr == "mark" and node.attr in _REFUSED_MARKS
        names = [f"mark.{node.attr}"] if is_refused else ()
    for name in names:
        if name not in _PYTEST:
            yield (
                f"uses pytest.{name}, which the sandbox does not have: it has "
                f"{', '.join(sorted(_PYTEST - {'mark'}))} and mark.parametrize"
            )
