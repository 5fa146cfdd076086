"""The check before a run: rows whose tests accept a wrong program or refuse the right one."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from trivium.data.prompts import PromptsConfig
from trivium.rewards.code_check import data_faults
from trivium.rewards.reward_config import RewardConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

CONFIG = RewardConfig(
    function="code",
    columns={"reference_solution": "canonical"},
    arguments={"seconds": 1, "workers": 2},
)
CASE = "class T(unittest.TestCase):\n    def test_f(self):\n        "


def faults(tmp_path, rows: list[dict[str, Any]], config: RewardConfig = CONFIG) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", **row}) + "\n" for row in rows))
    return [f.removeprefix(str(path)) for f in data_faults(config, PromptsConfig(path=str(path)))]


NOTHING = {
    "a function that nothing calls": "def run():\n    assert f(1) == 1",
    "caught errors": "try:\n    assert f(1) == 1\nexcept Exception:\n    pass",
    "a test without an assert": "def test_f():\n    pass",
    "a setup line": "import math",
    "a check of itself": "def f(x):\n    return 1\nassert f(1) == 1",
    "a branch that never runs": "if __name__ == 'solution':\n    assert f(1) == 1",
    "an end before the asserts": "import sys\nsys.exit(0)\nassert f(1) == 1",
}
NO_RESULT = {
    "a call": "f(1)",
    "a print": "import sys\nprint(f(1) is None, file=sys.stderr)",
    "everything caught": "f(1)\ntry:\n    assert f(1) == 1\nexcept:\n    pass",
}


@pytest.mark.parametrize("name", [*NOTHING, *NO_RESULT])
def test_tests_that_check_nothing_are_reported_with_their_line(name, tmp_path):
    tests = {**NOTHING, **NO_RESULT}[name]
    good = {"tests": ["assert f(1) == 1"]}
    [fault] = faults(tmp_path, [good, {"tests": tests}, good])
    assert fault.startswith(":2: ")
    reason = "passes a program that defines nothing" if name in NOTHING else "they check no result"
    assert reason in fault and tests.split("\n")[0][:40] in fault


@pytest.mark.parametrize(
    "tests",
    [
        ["assert f(1) == 1"],
        "assert f(1)",
        "assert not f(1)",
        "assert f(1) is not None and f(1) != 3",
        "for x in f(3):\n    assert x > 0",
        "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",
        f"import unittest\n{CASE}self.assertTrue(f(1))\nunittest.main(argv=['x'], exit=False)",
        "def test_f():\n    assert f(1) == 1",
        ">>> f(1)\n1\n",
        [{"input": "", "output": "1"}],
        {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]},
        ["f(1)", "assert f(2) == 2"],
        "import os\nassert f(1) == 1\nos._exit(0)",
        "while f(1) == 2:\n    pass\nassert f(1) == 1",
    ],
)
def test_tests_that_check_something_are_not_reported(tests, tmp_path):
    assert faults(tmp_path, [{"tests": tests}]) == []


def test_one_test_of_many_that_checks_nothing_is_reported(tmp_path):
    [fault] = faults(tmp_path, [{"tests": ["import math", "assert f(1) == 1"]}])
    assert "test 1 of 2 'import math' passes a program that defines nothing" in fault
    [fault] = faults(tmp_path, [{"tests": [{"input": "1", "output": " \n"}]}])
    assert "test 1 of 1 expects no output" in fault


def test_tests_that_refuse_the_reference_solution_are_reported(tmp_path):
    right, body = "def f(x):\n    return x + 1\n", "    return x + 1\n"
    for solution, prompt in (
        (right, "p"),
        (f"Like this:\n```python\n{right}```", "p"),
        (body, "def f(x):\n"),
        (json.dumps([right, "wrong"]), "p"),
        ([right], "p"),
    ):
        row = {"canonical": solution, "prompt": prompt}
        assert faults(tmp_path, [{**row, "tests": ["assert f(1) == 2"]}]) == []
        [fault] = faults(tmp_path, [{**row, "tests": ["assert f(1) == 2", "assert f(1) == 3"]}])
        assert "test 2 of 2 'assert f(1) == 3' refuses the row's reference_solution" in fault
    [fault] = faults(tmp_path, [{"tests": ["assert f(1) == 2"], "canonical": "def f(x) return"}])
    assert "reference_solution 'def f(x) return' is not a Python program" in fault


def test_tests_that_cannot_be_read_or_run_are_reported(tmp_path):
    rows: list[dict[str, Any]] = [
        {"tests": ["assert f(lambda: 1) == 1"]},
        {"tests": 5},
        {"tests": "def test_f(tmp_path):\n    pass"},
        {"tests": ["assert f(1) == 1"], "entry_point": "not a name"},
    ]
    found = faults(tmp_path, rows)
    for line, reason in enumerate(
        ["passes the program function", "tests 5 are not tests", "fixtures do not exist here",
         "is not the name of a function"], 1
    ):  # fmt: skip
        assert found[line - 1].startswith(f":{line}: ") and reason in found[line - 1]


def test_checking_stops_after_ten_rows(tmp_path):
    found = faults(tmp_path, [{"tests": "pass"}] * 30)
    assert len(found) == 11 and found[-1] == "checking stopped after 10 rows; there may be more"
    assert [fault.split(" ")[0] for fault in found[:10]] == [f":{n}:" for n in range(1, 11)]
