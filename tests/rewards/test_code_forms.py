"""The forms in which people write tests: right verdicts, or a refusal that says what to write."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from helpers.code_problems import FORMS, PROBLEMS, native_verdicts, rows_of

from trivium.rewards.code import code
from trivium.rewards.code_tests import read_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

RIGHT = "def f(x):\n    return x * x\n"
PROGRAMS = {
    "right": RIGHT,
    "wrong": "def f(x):\n    return x + 3\n",
    "empty": "",
    "crashing": "def f(x):\n    raise KeyError(x)\n",
}
MAIN = "print(f(int(input())))\n"


def score(source: str, tests: Any, entry_point: Any = None) -> float:
    response = f"```python\n{source}\n```"
    [value] = code([response], [tests], entry_point=[entry_point], seconds=2)
    return value


CASES: dict[str, list[tuple[Any, Any]]] = {
    "HumanEval": [
        ("METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n", "f"),
        ("def check(candidate):\n    assert candidate(2) == 4\n\ncheck(f)\n", None),
        ("def check(f):\n    assert [f(n) for n in (2, 4)] == [4, 16]\n", "f"),
    ],
    "MBPP": [
        (["assert f(2) == 4", "assert f(4) == 16"], None),
        ("f = f(2)\nassert f == 4", None),
        ("def t(f): assert f(2) == 4\nt(f)", None),
        ("def helper():\n    f = 3\n    return f\nhelper()\nassert f(2) == 4", None),
        ("assert sum(f for f in [1, 2]) == 3\nassert f(2) == 4", None),
        ("import sys\nassert f(2) == 4\nsys.exit(0)", None),
        ("if __name__ == '__main__':\n    assert f(2) == 4", None),
        ("for x, expected in [(2, 4), (4, 16)]:\n    assert f(x) == expected", None),
    ],
    "imports": [
        ("from solution import f\nassert f(2) == 4", None),
        ("from solution import f as g\n\ndef test():\n    assert g(2) == 4", None),
        ("import solution\nassert solution.f(2) == 4", None),
        ("from solution import *\nassert f(2) == 4", None),
        ("from __main__ import f\nassert f(2) == 4", None),
    ],
    "pytest functions": [
        ("def test_f():\n    assert f(2) == 4", None),
        ("def test_f():\n    assert f(2) == 4\n\ntest_f()", None),
        (
            "import pytest\n\n@pytest.mark.parametrize('x, y', [(2, 4), (4, 16)])\n"
            "def test_f(x, y):\n    assert f(x) == y",
            None,
        ),
        ("import pytest\n\ndef test_f():\n    assert f(2) == pytest.approx(4.0)", None),
        (
            "import pytest\n\ndef test_f():\n    with pytest.raises(TypeError):\n        f('a')\n"
            "    assert f(2) == 4",
            None,
        ),
        ("class TestF:\n    def test_two(self):\n        assert f(2) == 4", None),
    ],
    "unittest": [
        (f"{head}\nclass T(unittest.TestCase):\n    def test_f(self):\n        "
         f"self.assertEqual(f(2), 4)\n{end}", None)
        for head, end in (
            ("import unittest", ""),
            ("import unittest", "unittest.main()"),
            ("import unittest", "if __name__ == '__main__':\n    unittest.main()"),
            ("import unittest", "unittest.main(argv=['x'], exit=False)"),
            ("import unittest\nfrom solution import f",
             "unittest.TextTestRunner().run(unittest.TestLoader().loadTestsFromTestCase(T))"),
        )
    ],
    "input and output": [
        ([{"input": "2\n", "output": "4\n"}], None),
        ({"inputs": ["2", "4"], "outputs": ["4", "16"]}, None),
        ({"inputs": [["2"]], "outputs": [["4"]]}, None),
    ],
    "APPS": [
        ({"fn_name": "f", "inputs": [[2], [4]], "outputs": [[4], [16]]}, None),
        ({"fn_name": "f", "inputs": [[2]], "outputs": [4]}, None),
    ],
    "LiveCodeBench": [
        ([{"input": "2", "output": "4", "testtype": "functional"}], "f"),
        ([{"input": "2", "output": "4", "testtype": "functional"}], '{"func_name": "f"}'),
        ([{"input": "2\n", "output": "4\n", "testtype": "stdin"}], "{}"),
    ],
    "doctest": [
        (">>> f(2)\n4\n>>> f(4)\n16\n", None),
        ('"""The square.\n\n>>> [f(n) for n in (2, 4)]\n[4, 16]\n"""', None),
        ("Examples:\n    >>> x = f(2)\n    >>> x\n    4\n", None),
    ],
}  # fmt: skip
TABLE = [
    pytest.param(tests, entry, id=f"{form} {number}")
    for form, rows in CASES.items()
    for number, (tests, entry) in enumerate(rows)
]


def reads_input(tests: Any, entry_point: Any) -> bool:
    return all(test.code is None for test in read_tests(tests, entry_point))


@pytest.mark.parametrize(("tests", "entry_point"), TABLE)
def test_every_form_accepts_the_right_program_and_no_other(tests, entry_point):
    end = MAIN if reads_input(tests, entry_point) else ""
    programs = [source and source + end for source in PROGRAMS.values()]
    programs += programs
    rows = [tests] * len(PROGRAMS) + [json.dumps(tests)] * len(PROGRAMS)
    responses = [f"```python\n{source}\n```" for source in programs]
    scores = code(responses, rows, entry_point=[entry_point] * len(rows), seconds=2)
    assert scores == [float(name == "right") for name in PROGRAMS] * 2


def test_the_table_has_nine_forms():
    assert len(CASES) == 9


def test_a_method_of_a_class_named_solution_is_called():
    source = "class Solution:\n    def f(self, x):\n        return (x * x, [x])"
    test = {"input": "3", "output": "[9, [3]]", "testtype": "functional"}
    assert score(source, [test], "f") == 1
    assert score(source.replace("x * x", "x"), [test], "f") == 0
    assert score(RIGHT, {"fn_name": "f", "inputs": [[3]], "outputs": [[9]]}) == 1


@pytest.mark.parametrize(
    ("tests", "entry_point", "reason"),
    [
        ("def check(candidate):\n    assert candidate(1)", None, "no entry_point: name the column"),
        ("import numpy as np\nassert f(1) == np.ones(1)", None, "imports numpy, which the sandbox"),
        ("from .solution import f\nassert f(1)", None, "relative import: write `from solution"),
        ("async def test_f():\n    assert f(1) == 1", None, "calls asyncio.run"),
        ("import pytest\n@pytest.fixture\ndef x(): return 1", None, "uses pytest.fixture"),
        ("import pytest\n@pytest.mark.skip\ndef test_f(): assert f(1)", None, "pytest.mark.skip"),
        ("assert f(1) ==", None, "cannot be run: SyntaxError"),
        ([{"input": "1", "output": "1", "testtype": "functional"}], None, "has no entry_point"),
        ([{"input": "x", "output": "1", "testtype": "functional"}], "f", "'x' is not JSON"),
        ({"fn_name": "f", "inputs": [2], "outputs": [4]}, None, "write a list of its arguments"),
        ({"fn_name": "if", "inputs": [[2]], "outputs": [4]}, None, "is not the name of a function"),
    ],
)
def test_tests_that_cannot_be_run_are_refused_with_what_to_write(tests, entry_point, reason):
    with pytest.raises(ValueError) as caught:
        read_tests(tests, entry_point)
    assert reason in str(caught.value)


def test_a_test_function_that_only_a_fixture_could_call_is_refused():
    with pytest.raises(ValueError, match=r"nothing calls test_f\(tmp_path\)"):
        score(RIGHT, "def test_f(tmp_path):\n    assert f(2) == 4")


def test_setup_code_comes_before_each_test_code():
    response, tests = f"```python\n{RIGHT}```", ["assert f(N) == 4", "assert N + 1 == 3"]
    for setup in ("N = 2\n", ["M = 2", "N = M"]):
        assert code([response], [tests], test_setup=[setup]) == [1]
    with pytest.raises(ValueError, match="test_setup 5 is not code"):
        code([response], [tests], test_setup=[5])


def test_names_of_the_tests_replace_names_of_the_program():
    helper = "def helper():\n    return 4\n"
    forged = "def f(x): return 0\ndef helper(): return 0\nEXPECTED = 0\nclass T: pass\n"
    assert score(forged, f"{helper}assert f(2) == helper()") == 0
    assert score(forged, "EXPECTED = 4\ndef t():\n    assert f(2) == EXPECTED\nt()") == 0
    assert (
        score("import json\nsum = lambda x: 4\ndef f(x): return 0", "assert f(2) == sum([4])") == 0
    )
    unsendable = f"{RIGHT}class K: pass\nresult = {{K(): 1}}\n"
    assert score(unsendable, "result = f(2)\nassert result == 4") == 1


def test_an_exception_class_of_the_program_can_be_expected():
    source = (
        "class Low(ValueError): pass\ndef f(x):\n    if x < 0: raise Low('low')\n    return x\n"
    )
    expects = (
        "try:\n    f(-1)\nexcept {}:\n    pass\nelse:\n    raise AssertionError\nassert f(1) == 1"
    )
    for name in ("Low", "ValueError", "Exception"):
        assert score(source, expects.format(name)) == 1
    for name in ("KeyError", "IndexError"):
        assert score(source, expects.format(name)) == 0
    returned = (
        "class f(Exception):\n    __eq__ = lambda a, b: True\n    __bool__ = lambda a: True\n"
    )
    for tests in ("assert f(1) == 5", "assert f(1)", "assert f(1) != 5"):
        assert score(returned, tests) == 0


def test_failures_that_the_test_code_ignores_count():
    body = "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n"
    wrong = PROGRAMS["wrong"]
    for end in (
        "unittest.main(exit=False)",
        "try:\n    unittest.main()\nexcept SystemExit:\n    pass",
    ):
        tests = f"{body}        self.assertEqual(f(2), 4)\n{end}"
        assert (score(RIGHT, tests), score(wrong, tests)) == (1, 0)
    tests = f"{body}        for n in (2, 4):\n            with self.subTest(n):\n"
    tests += "                self.assertEqual(f(n), n * n)\nunittest.main(exit=False)"
    assert (score(RIGHT, tests), score(wrong, tests)) == (1, 0)
    tests = (
        "import doctest\ndef helper():\n    '''\n    >>> f(2)\n    4\n    '''\ndoctest.testmod()"
    )
    assert (score(RIGHT, tests), score(wrong, tests)) == (1, 0)


# --- Agreement with native execution -------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_verdicts_agree_with_native_execution(form):
    rows = rows_of(form)
    assert len(PROBLEMS) >= 20 and len(rows) >= 4 * len(PROBLEMS)
    cases = [(row.program, test, row.entry_point) for row in rows for test in row.tests]
    ours = code(
        [f"```python\n{program}\n```" for program, _, _ in cases],
        [[test] for _, test, _ in cases],
        entry_point=[entry_point for _, _, entry_point in cases],
        seconds=2,
    )
    native = native_verdicts(form, rows)
    assert [bool(value) for value in ours] == [verdict for row in native for verdict in row]
    assert any(all(row) for row in native) and any(not any(row) for row in native)
