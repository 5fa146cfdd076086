"""Job of a sandboxed process that holds tests: run them against a program in another process.

Test code runs as a script does, and then whatever it defines and has not run itself: unittest
classes, pytest's functions and classes, and the examples of its docstring. A failure counts even
where the test code ignores it, as with ``unittest.main(exit=False)``.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import symtable
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from . import pytest_forms
from .channel import Channel
from .child import new_module
from .session import NO_VERDICT, ProbeSession, ProgramModule, TestCodeError, TestSession

PROGRAM_MODULES = frozenset(
    "answer candidate main my_module my_solution program response solution solutions submission "
    "your_module your_solution".split()
)
"""Names under which test code may import the program."""
_RECORD = " record"  # not valid as a name


def run_tests(tests: str, entry_point: str | None, channel: Channel) -> int:
    """Run test code against the program at the other end of the channel; send the verdict."""
    verdict = _verdict(tests, entry_point, TestSession(channel))
    channel.send(verdict)
    return NO_VERDICT if "test_error" in verdict else 0


def probe_tests(tests: list[dict[str, Any]], channel: Channel) -> int:
    """Run each test against a program that defines nothing, and one that returns wrong objects.

    Sends one verdict for each, with the test's number and the program's.
    """
    for number, test in enumerate(tests):
        for program, defines_names in enumerate((False, True)):
            verdict = _verdict(test["source"], test["entry_point"], ProbeSession(defines_names))
            channel.send({"test": number, "program": program, **verdict})
    return 0


def _verdict(tests: str, entry_point: str | None, session: TestSession) -> dict[str, Any]:
    try:
        code = _TestCode(tests, entry_point)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"test_error": f"{type(error).__name__}: {error}"}
    failure = None
    try:
        code.run(session)
    except TestCodeError as error:
        session.refuse(str(error))
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:200]
    if session.test_error is not None:
        return {"test_error": session.test_error}
    return {"passed": True} if failure is None else {"passed": False, "failure": failure}


# --- Names ---------------------------------------------------------------------------------------


def global_names(table: symtable.SymbolTable) -> dict[str, None]:
    """Return the names that code reads from its global scope or the built-in ones, by scope."""
    names: dict[str, None] = {}
    scopes = [table]
    for scope in scopes:
        is_function = scope.get_type() == "function"
        for symbol in scope.get_symbols():
            # Outside functions, a name that is bound later is read from the global scope first.
            if symbol.is_referenced() and (symbol.is_global() or not is_function):
                names[symbol.get_name()] = None
        scopes += scope.get_children()
    return names


def _names_of_examples(text: str) -> dict[str, None]:
    """Return the global names that the examples in a docstring read."""
    names: dict[str, None] = {}
    for example in _examples(text):
        with contextlib.suppress(SyntaxError):  # the example may expect it
            names |= global_names(symtable.symtable(example.source, "tests.py", "exec"))
    return names


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Yield the first parts of the names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module.partition(".")[0]


def _examples(text: str) -> list[Any]:
    """Return the examples of a docstring, which doctest parses."""
    if ">>>" not in text:
        return []
    import doctest

    with contextlib.suppress(ValueError):  # a text that is no docstring
        return doctest.DocTestParser().get_examples(text)
    return []


def _is_provided(name: str) -> bool:
    return hasattr(builtins, name) or (name.startswith("__") and name.endswith("__"))


# --- Test code -----------------------------------------------------------------------------------


class _TestCode:
    """Parsed test code."""

    def __init__(self, source: str, entry_point: str | None) -> None:
        self._tree = ast.parse(source)
        self._source, self._entry_point = source, entry_point
        self._examples = _examples(ast.get_docstring(self._tree) or "")
        table = symtable.symtable(source, "tests.py", "exec")
        names = global_names(table)
        nodes = list(ast.walk(self._tree))
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= _names_of_examples(node.value)
            if isinstance(node, ast.ImportFrom) and node.module == "__main__":
                names |= dict.fromkeys(alias.name for alias in node.names)
        self._names = [n for n in names if not _is_provided(n) and n != entry_point]
        self._names += [entry_point] if entry_point else []
        self._bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
        self._modules = {m for node in nodes for m in imported_modules(node)} & PROGRAM_MODULES
        for node in self._tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                node.decorator_list.insert(0, ast.Name(_RECORD, ast.Load()))
        self._code = compile(ast.fix_missing_locations(self._tree), "tests.py", "exec")

    def run(self, session: TestSession) -> None:
        """Run the test code; raise if a test fails."""
        record = _Record(self._source)
        names = new_module("__main__")
        names[_RECORD] = record.function
        for module in self._modules:
            sys.modules[module] = ProgramModule(module, session)
        sys.modules.pop("pytest", None)
        if "pytest" in self._source:
            sys.modules["pytest"] = pytest_forms.module()
        self._take_names(names, session)
        try:
            exec(self._code, names)
        except SystemExit as stop:
            if stop.code:
                raise
        self._run_examples(names)
        record.run_rest(names, session)
        assert not record.failures, record.failures[0]

    def _take_names(self, names: dict[str, Any], session: TestSession) -> None:
        """Give the test code the program's names that it reads.

        Its own definitions replace them as it runs, so a value that cannot be sent matters only if
        the test code has none of its own.
        """
        for name in self._names:
            try:
                exists, value = session.find(name)
            except BaseException:
                if name not in self._bound or session.test_error is not None:
                    raise
                continue
            if exists:
                names[name] = value

    def _run_examples(self, names: dict[str, Any]) -> None:
        if not self._examples:
            return
        import doctest

        test = doctest.DocTest(self._examples, names, "tests", "tests.py", 0, None)
        runner = doctest.DocTestRunner(verbose=False)
        lines: list[str] = []
        result = runner.run(test, out=lines.append, clear_globs=False)
        assert not result.failed, "".join(lines)[-150:]


# --- What the test code does not run itself ------------------------------------------------------


class _Record:
    """Which tests have run, and what failed, however the test code ran them."""

    def __init__(self, source: str) -> None:
        self._started: set[Any] = set()
        self.failures: list[str] = []
        if "unittest" in source:
            self._watch_unittest()
        if "doctest" in source:
            self._watch_doctest()

    def function(self, function: Any) -> Any:
        """Wrap a test function, to know whether it has run."""
        if not isinstance(function, types.FunctionType):
            return function

        @functools.wraps(function)
        def recorded(*arguments: Any, **keywords: Any) -> Any:
            self._started.add(recorded)
            return function(*arguments, **keywords)

        return recorded

    def _watch_unittest(self) -> None:
        import unittest

        def started(result: Any, test: Any) -> None:
            self._started.add(type(test))

        def failed(result: Any, test: Any, *details: Any) -> None:
            if details[-1:] != (None,):  # the error of a subtest that passed
                self.failures.append(f"{test} failed")

        _call_first(unittest.TestResult, "startTest", started)
        for name in ("addFailure", "addError", "addSubTest", "addUnexpectedSuccess"):
            _call_first(unittest.TestResult, name, failed)

    def _watch_doctest(self) -> None:
        import doctest

        def failed(*details: Any) -> None:
            self.failures.append("an example of a docstring failed")

        for name in ("report_failure", "report_unexpected_exception"):
            _call_first(doctest.DocTestRunner, name, failed)

    def run_rest(self, names: dict[str, Any], session: TestSession) -> None:
        """Run the test classes and functions that have not run."""
        for name, value in list(names.items()):
            if not isinstance(value, type | types.FunctionType) or value.__module__ != "__main__":
                continue
            if value in self._started:
                continue
            if isinstance(value, type):
                self._run_class(name, value, session)
            elif name.startswith("test"):
                for keywords in pytest_forms.cases(value):
                    _call(value, keywords, session)

    def _run_class(self, name: str, kind: type, session: TestSession) -> None:
        unittest = sys.modules.get("unittest")
        if unittest is not None and issubclass(kind, unittest.TestCase):
            tests = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
            result = tests.run(unittest.TestResult())
            for _, trace in [*result.failures, *result.errors]:
                self.failures.append(trace.strip().rpartition("\n")[2])
        elif name.startswith("Test") and "__init__" not in vars(kind):
            for method, keywords in pytest_forms.methods(kind()):
                instance = kind()
                getattr(instance, "setup_method", lambda *_: None)()
                _call(getattr(instance, method.__name__), keywords, session)


def _call_first(kind: type, name: str, action: Callable[..., None]) -> None:
    """Call `action` before a method of a class."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def called(*arguments: Any, **keywords: Any) -> Any:
        action(*arguments, **keywords)
        return method(*arguments, **keywords)

    setattr(kind, name, called)


def _call(function: Callable[..., Any], keywords: dict[str, Any], session: TestSession) -> None:
    """Call a test function; without the parameters that only pytest's fixtures would give."""
    try:
        inspect.signature(function).bind(**keywords)
    except TypeError:
        raise session.refuse(
            f"nothing calls {function.__name__}{inspect.signature(function)}, and pytest's "
            "fixtures do not exist here: call it, or take no parameters"
        ) from None
    function(**keywords)
