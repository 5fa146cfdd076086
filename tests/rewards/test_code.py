"""The code reward: parsing of programs and tests, scoring, and resistance to forged verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forged_verdicts import EXPECTED, FORGED_PROGRAMS, TEST_STYLES
from helpers.waiting import eventually

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards import code as module
from trivium.rewards.code import code, find_program, same_output
from trivium.rewards.code_tests import read_tests
from trivium.rewards.reward import RewardConfig, Rewards

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


def fenced(source: str) -> str:
    return f"Here it is:\n```python\n{source}\n```\nDone."


def score(source: str, tests: object, **arguments: object) -> float:
    [value] = code([fenced(source)], [tests], **arguments)
    return value


# --- Finding the program and the tests -----------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```\n```py\nb\n```", "b\n"),
        ("```python\na\n```\n```\nb\n```", "a\n"),
        ("```\na\n```\n```sh\nb\n```", "a\n"),
        ("```Python3 title=x\na\n```", "a\n"),
        ("  ```python\n  a\n  ```  \nmore", "  a\n"),
        ("```python\na\n```\n```python\ntruncated", "a\n"),
        ("```python\ntruncated", None),
        ("```sh\nls\n```", None),
        ("print('```')", None),
        ("", None),
    ],
)
def test_the_last_closed_python_block_is_the_program(response, program):
    assert find_program(response) == program
    assert find_program(response, "response") == response


def test_every_form_of_tests_is_parsed():
    pairs = [("1\n", "2"), ("", "3")]
    listed = [{"input": i, "output": o} for i, o in pairs]
    columns = {"inputs": [i for i, _ in pairs], "outputs": [o for _, o in pairs]}
    for form in (listed, columns, json.dumps(listed), json.dumps(columns)):
        assert [(t.input, t.output, t.code) for t in read_tests(form)] == [
            (*p, None) for p in pairs
        ]
    assert [t.output for t in read_tests([{"output": "3"}])] == ["3"]
    asserts = ["assert f(1) == 2", "assert f(2) == 3"]
    for form in (asserts, tuple(asserts), json.dumps(asserts)):
        assert [t.code for t in read_tests(form)] == asserts
    assert [t.code for t in read_tests("\n".join(asserts))] == ["\n".join(asserts)]


def test_check_is_called_with_the_entry_point_unless_the_tests_call_it():
    defines = "def check(candidate):\n    assert candidate(1) == 2\n"
    assert read_tests(defines, "f")[0].code == f"{defines}\n\ncheck(f)\n"
    assert read_tests(f"{defines}\ncheck(f)", "f")[0].code == f"{defines}\ncheck(f)"
    assert read_tests(["assert f(1) == 2"], "f")[0].code == "assert f(1) == 2"
    with pytest.raises(ValueError, match=r"defines check and never calls it.*entry_point"):
        read_tests(defines)
    assert code([fenced("def f(x): return x")], [defines], entry_point=["f"]) == [0]
    assert code([fenced("def sum(x): return x + 1")], [defines], entry_point=["sum"]) == [1]


@pytest.mark.parametrize(
    "tests",
    [None, [], {}, 5, "5", "", "  ", "[]", [3], [""], [{"input": "1"}], [{"output": 3}]],
)
def test_invalid_tests_are_a_data_error(tests):
    with pytest.raises(ValueError, match="the data's test"):
        read_tests(tests)


def test_inputs_and_outputs_must_have_the_same_length():
    with pytest.raises(ValueError, match="lists 'inputs' and 'outputs' of texts"):
        read_tests({"inputs": ["1"], "outputs": []})
    with pytest.raises(ValueError, match="is not the name of a function"):
        read_tests(["assert 1"], "f(); evil")


def test_outputs_are_compared_without_trailing_white_space():
    assert same_output("1 2 \r\n3\n\n", "1 2\n3")
    assert same_output("", "\n")
    assert not same_output("1  2", "1 2")
    assert not same_output("1\n\n2", "1\n2")
    assert not same_output(" 1", "1")


# --- Scoring -------------------------------------------------------------------------------------

DOUBLE = [{"input": f"{n}\n", "output": f"{2 * n}\n"} for n in range(4)]


def test_score_is_the_fraction_of_passed_tests_or_requires_all():
    source = "n = int(input())\nprint(n * 2 if n != 3 else 0)"
    assert score(source, DOUBLE) == 0.75
    assert score(source, DOUBLE, score="all") == 0
    assert score("print(int(input()) * 2)", DOUBLE, score="all") == 1
    asserts = ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 0"]
    assert score("def f(x): return x * x", asserts) == 0.75


def test_program_that_fails_after_its_output_does_not_pass():
    assert score("print(2)", [{"output": "2"}]) == 1
    for failing in (
        "print(2); exit(1)",
        "print(2); 1/0",
        "print(2, flush=True); import os; os.abort()",
    ):
        assert score(failing, [{"output": "2"}]) == 0


def test_scores_keep_the_order_of_responses_with_any_number_of_workers():
    sources = [f"print({n})" for n in range(12)]
    responses = [fenced(s) if n % 3 else "no program" for n, s in enumerate(sources)]
    tests = [[{"output": str(n - n % 2)}] for n in range(12)]
    expected = [float(n % 3 != 0 and n % 2 == 0) for n in range(12)]
    for workers in (1, 4):
        assert code(responses, tests, workers=workers) == expected
    assert code(["none"], [DOUBLE]) == [0] and code([], []) == []


def test_all_tests_of_a_response_share_its_time():
    loops = "n = int(input())\nif n == 1:\n    while True: pass\nprint(n * 2)"
    assert score(loops, DOUBLE, seconds=2) == 0.25  # with a limit each, it would be 0.75


def test_timeout_of_the_call_is_an_error_and_not_a_score():
    config = RewardConfig(
        function="code", timeout=0.7, arguments={"seconds": 3000, "extract": "response"}
    )
    prompt = Prompt(tokens=[1], text="p", columns={"tests": ["assert f(1) == 1"]}, index=0)
    texts = ["def f(x): return x", "while True: pass"]
    responses = [Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=t) for t in texts]
    with pytest.raises(RewardError, match=r"exceeded its timeout of 0.7 s"):
        Rewards([config]).score([prompt] * 2, responses)
    assert eventually(lambda: not _supervisors())  # the program itself would run for 3000 s


def _supervisors() -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (
                parent == os.getpid()
                and b"sandbox.supervisor" in (process / "cmdline").read_bytes()
            ):
                found.append(process)
        except OSError:
            continue
    return found


def test_code_is_a_built_in_reward_that_uses_data_columns():
    config = RewardConfig(function="code", columns={"tests": "test_list"})
    rewards = Rewards([config])
    with pytest.raises(ConfigurationError, match="needs a data column 'test_list'"):
        rewards.check({"tests"})
    columns = {"test_list": ["assert f(1) == 2"], "entry_point": "f"}
    prompt = Prompt(tokens=[1], text="p", columns=columns, index=3)
    response = Response(
        tokens=[1], logprobs=[0.0], finish_reason="eos", text=fenced("f = lambda x: x + 1")
    )
    assert rewards.score([prompt], [response]).outcomes == [1]


def test_error_names_the_row_whose_tests_cannot_be_run():
    for bad, reason in (
        (["assert f(1) =="], "SyntaxError"),
        (["assert f(lambda: 1) == 1"], "a test passes the program function"),
    ):
        good = Prompt(tokens=[1], text="p", columns={"tests": ["assert f(1) == 1"]}, index=4)
        row = Prompt(tokens=[1], text="p", columns={"tests": bad}, index=7)
        text = fenced("def f(x): return x")
        response = Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=text)
        with pytest.raises(RewardError, match=rf"prompt row 7\).*{reason}"):
            Rewards([RewardConfig(function="code")]).score([good, row], [response] * 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"extract": "first"}, "extract must be block or response"),
        ({"score": "some"}, "score must be share or all"),
        ({"seconds": 0}, "seconds must be a positive number"),
        ({"seconds": True}, "seconds must be a positive number"),
        ({"seconds": float("nan")}, "seconds must be a positive number"),
        ({"memory": 1}, "memory must be a whole number of at least 64"),
        ({"output": 0.5}, "output must be a whole number"),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
        ({"workers": 0}, "workers must be a whole number of at least 1"),
        ({"accept_missing": ["net"]}, "accept_missing must be a list of files, network, processes"),
        ({"accept_missing": "network"}, "accept_missing must be a list"),
        ({"second": 5}, "did you mean 'seconds'?"),
    ],
)
def test_wrong_arguments_are_refused_before_the_run(arguments, reason):
    with pytest.raises(ConfigurationError) as caught:
        Rewards([RewardConfig(function="code", arguments=arguments)])
    assert reason in str(caught.value)


def test_machine_without_isolation_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("trivium.rewards.sandbox.host.isolation_gaps", lambda layers: ("network",))
    with pytest.raises(ConfigurationError, match=r"accept_missing: \[network\]"):
        Rewards([RewardConfig(function="code")])
    Rewards([RewardConfig(function="code", arguments={"accept_missing": ["network"]})])


@pytest.mark.parametrize(
    "source",
    [
        "\0",
        "\ud800 = 1",
        "(" * 50_000,
        "-" * 200_000 + "1",
        "x = '" + "a" * (2 << 20) + "'",
        "é",
        "\x1b[2J",
    ],
    ids=["null", "surrogate", "brackets", "signs", "long", "name", "terminal"],
)
def test_hostile_text_only_scores_zero(source):
    responses, tests = [source] * 2, [["assert f(1) == 1"], [{"output": "1"}]]
    assert code(responses, tests, extract="response") == [0, 0]


# --- Test code of every kind ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("def f(x): return {'a': (x, [x]), 2: {x}}", "assert f(1) == {'a': (1, [1]), 2: {1}}"),
        ("def f(x): return float('nan')", "assert f(1) != f(1)"),
        ("def f(x): return 3 ** x", "assert f(9000) == 3 ** 9000 and f(-1) > 0.33"),
        ("def f(x): return b'a' + bytes(x)", "assert f(1) == b'a\\0'"),
        ("def f(a, *, b=1): return a - b", "assert f(5) == 4 and f(5, b=2) == 3"),
        ("def f(x): x.sort(); x.append(9)", "a = [3, 1]\nf(a)\nassert a == [1, 3, 9]"),
        ("def f(d): d['k'] = 1; return d", "d = {}\nassert f(d) == {'k': 1} == d"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]"),
        (
            "def f():\n    n = 0\n    while True: yield n; n += 1",
            "g = f()\nassert next(g) == 0 == next(g) - 1",
        ),
        ("def f(x): return range(x)", "assert f(3) == range(3)"),
        ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("f = lambda x: None", "assert f(1) is None"),
        (
            "def f(x): raise ValueError('no')",
            "try:\n    f(1)\n    assert 0\nexcept ValueError as e:\n    assert str(e) == 'no'",
        ),
        ("import math\ndef f(x): return x / 3", "assert math.isclose(f(1), 1 / 3)"),
        ("def f(g, x): return g(x)", "assert f(abs, -1) == 1 and f(str, 1) == '1'"),
        ("X = 5", "assert X == 5"),
        (
            "class Stack:\n    def __init__(self): self.items = []\n"
            "    def push(self, x): self.items.append(x)\n"
            "    def __len__(self): return len(self.items)\n"
            "    def __getitem__(self, i): return self.items[i]\n    def __str__(self): return 'S'",
            "s = Stack()\ns.push(4)\nassert len(s) == 1 and s[0] == 4 and s.items == [4]\n"
            "assert 4 in s and str(s) == 'S' and list(s) == [4]",
        ),
        ("class Solution:\n    def two(self, n): return n * 2", "assert Solution().two(4) == 8"),
        (
            "def f(x): return x",
            "import random\nfor _ in range(50):\n    n = random.random()\n    assert f(n) == n",
        ),
        (
            "def f(x): return x",
            "def helper(y):\n    return f(y)\nassert [helper(y) for y in (1, 2)] == [1, 2]",
        ),
        ("def f(x): print('noise'); return x", "assert f(1) == 1"),
    ],
)
def test_test_code_passes_correct_programs(source, tests):
    assert score(source, tests) == 1


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("def f(x): return x", "assert f(1) == 2"),
        ("def g(x): return x", "assert f(1) == 1"),
        ("def f(x: return x", "assert f(1) == 1"),
        ("1 / 0\ndef f(x): return x", "assert f(1) == 1"),
        ("def f(x): return [x]", "assert f(1) == (1,)"),
        ("def f(x): return str(x)", "assert f(1) == 1"),
        ("def f(x): raise KeyError", "try:\n    f(1)\n    assert 0\nexcept ValueError:\n    pass"),
        ("def f(x): return x", "assert not f(1)"),
        ("def f(x): x.clear(); return []", "assert f([1]) == [1]"),
        ("def f(x):\n    while True: pass", "assert f(1) == 1"),
    ],
)
def test_test_code_fails_wrong_programs(source, tests):
    assert score(source, tests, seconds=0.5) == 0


# --- Forgeries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", TEST_STYLES)
def test_no_forgery_passes_test_code(style):
    responses = [fenced(source) for source in FORGED_PROGRAMS.values()]
    scores = code(responses, [TEST_STYLES[style]] * len(responses), seconds=0.5)
    assert {name: s for name, s in zip(FORGED_PROGRAMS, scores, strict=True) if s} == {}
    honest = fenced(f"def f(x): return {EXPECTED}")
    assert code([honest], [TEST_STYLES[style]]) == [1]


def test_every_forgery_compiles_and_defines_f():
    for name, source in FORGED_PROGRAMS.items():
        assert "def f(x)" in source or "when imported" in name
        compile(source, name, "exec")


def test_no_forgery_passes_an_output_test():
    responses = [fenced(source + "\nf(1)\n") for source in FORGED_PROGRAMS.values()]
    scores = code(responses, [[{"output": str(EXPECTED)}]] * len(responses), seconds=0.5)
    assert {name: s for name, s in zip(FORGED_PROGRAMS, scores, strict=True) if s} == {}


def test_many_forgeries_fool_a_checker_in_the_same_process():
    """The usual checker executes the program, then its test, and uses the exit status."""
    fooled = [name for name, source in FORGED_PROGRAMS.items() if _passes_naive_checker(source)]
    assert len(fooled) >= 12, fooled
    assert not _passes_naive_checker("def f(x): return 0")
    assert _passes_naive_checker(f"def f(x): return {EXPECTED}")


def _passes_naive_checker(program: str) -> bool:
    script = f"names = {{}}\nexec({program!r}, names)\nexec({TEST_STYLES['assert']!r}, names)"
    try:
        done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, timeout=5)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def test_a_program_that_ends_when_an_error_is_expected_does_not_pass():
    expects_error = "try:\n    f(1)\nexcept Exception:\n    pass\nelse:\n    raise AssertionError"
    assert score("def f(x): raise ValueError", expects_error) == 1
    for name in ("os._exit(0) when called", "sys.exit when called", "a kill of itself"):
        assert score(FORGED_PROGRAMS[name], expects_error) == 0


def test_tests_do_not_use_modules_that_the_program_changed():
    forged = "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0"
    assert score(forged, "assert math.isclose(f(1), 1 / 3)") == 0


def test_program_cannot_cause_a_data_error():
    """A data error stops the run, so no value that a program returns may cause one."""
    for value in ("math", "print", "f", "type", "iter([1])", "(lambda: 1)", "[f]", "{f: f}", "..."):
        source = f"import math\ndef f(x): return {value}"
        assert score(source, "x = f(1)\nf(x)\nassert x == 1") == 0


def test_programs_and_tests_never_share_a_sandbox(monkeypatch):
    jobs: list[tuple[int, str]] = []
    start = module.Sandbox.start

    def record_job(self, job, *rest, **more):
        jobs.append((id(self), job["mode"]))
        return start(self, job, *rest, **more)

    monkeypatch.setattr(module.Sandbox, "start", record_job)
    assert (
        code([fenced("def f(x): return x")] * 3, [["assert f(1) == 1"]] * 3, workers=1) == [1] * 3
    )
    assert len({sandbox for sandbox, _ in jobs}) == 2 and len(set(jobs)) == 2
