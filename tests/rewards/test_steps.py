"""The step verifier: parsing of equations, verdicts, and spans of steps."""

from __future__ import annotations

import gzip
import json
import re
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rewards.steps import equations_hold, evaluate, step_spans, steps

CORRECT = """
31+9=40 | 31 + 9 = 40 eggs | He makes 48/2 = <<48/2=24>>24 dollars | 9 * 2 = $<<9*2=18>>18
2 x 3 = 6 | 2×3=6 | 12÷4=3 | 3 \\times 4 = 12 | $80,000+$50,000=$130,000 | 12*20,000=240,000
- 5+4=9 | -5+4=-1 | 1. 5+4=9 | 1) 5+4=9 | (so 5+4=9) | **5+4=9** | 3+4 = **7** | 40 = 31+9
3*(4+5) = 27 | ((1+2)*3)/9 = 1 | He has 5. 5+4=9. | Total:5+4=9 | 05+1=6 | 5+4=9kg | x=3+4=7
16-3=13 eggs, 13-4=9 eggs | 3+4=7 2+5=7 | 3 + 4 = 7 (seven) | 3+4 == 7 | 1+2=3=3
2 - 1/2 = 1 1/2 | 10/3=3.33 | 2/3=.67 | 1.87*9=16.830000000000002 | 80/26.666666666666668=3
0.1+0.2=0.3 | 20/50 = 40% | 20/50*100 = 40% | 50*20% = 10 | 10% * 50 = 5
60 students x 2/3 = <<60*2/3=40>>40 | 3+4=7; 5 = 6 | 10 / 2 = 5 and 3 + 4 = 7
"""

WRONG = """
31+9=41 | 31 + 9 = 41 eggs | <<48/2=25>> | 48/2=24 <<48/2=25>> | 48/2=25 <<48/2=24>>
5*2=10+3=13 | 3+4=7=8 | 1.5+1.26=2.7 | 10/3=3.34 | 10/4=2 | 10/3=3 | 1/0=0 | 1/0=1/0 | 2 x 3 = 5
16-3=13, 13-4=8 | - 5+4=-1 | 40 = 31+8 | 20/50 = 41% | 3*(4+5) = 17 | 3 \\times 4 = 13
"""

NOT_PARSED = """
x = 5 | x+3 = 5 | 3 eggs + 4 eggs = 7 eggs | 12 eggs - 5 = 7 | 12 eggs - 5*1 = 8 | 5x = 25
26=5+3x | 75=(3/2)x | 2*L/10*20=40 | 2**3=9 | 9//2=5 | 1e5+1=3 | 2:15-10=2:05 | 3 (4+5) = 20
12,34+1=13 | $80 000 x 20/100 = $16 000 | 3+4= | =7 | 3+4 >= 8 | 3+4 != 8 | 7 eggs | 5 = 7
#### 46 | 192 / 1.2 = 1.2Y / 1.2 | 10% of 150 = 75+15 | Week 2 = 35 + 35 | 5 + 4 = 9 - y
2^3 = 9 | = | == | 80 000 * 2 = 160000 | 2 * 80 000 = 160
"""


def _cases(text):
    return [case for line in text.strip().split("\n") for case in line.split(" | ")]


@pytest.mark.parametrize("step", _cases(CORRECT))
def test_step_whose_equations_hold_is_correct(step):
    assert equations_hold(step) is True


@pytest.mark.parametrize("step", _cases(WRONG))
def test_step_with_a_false_equation_is_wrong(step):
    assert equations_hold(step) is False


@pytest.mark.parametrize("step", ["", *_cases(NOT_PARSED)])
def test_step_without_an_equation_of_plain_numbers_has_no_verdict(step):
    assert equations_hold(step) is None


def test_exact_rejects_rounded_results():
    assert equations_hold("10/3=3.33", exact=True) is False
    assert equations_hold("10/4=2.5", exact=True) is True


expressions = st.recursive(
    st.integers(0, 50).map(str) | st.decimals(0, 50, places=2).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({''.join(t)})"),
    max_leaves=6,
)


@given(expressions)
def test_evaluation_equals_python_fractions(expression):
    python = re.sub(r"\d+(?:\.\d+)?", r"Fraction('\g<0>')", expression)
    try:
        expected = eval(python, {"Fraction": Fraction, "__builtins__": {}})
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="divides by zero"):
            evaluate(expression)
        return
    assert evaluate(expression) == expected


@given(st.integers(-99, 99), st.sampled_from("+-*"), st.integers(0, 99), st.integers(-3, 3))
def test_integer_equation_is_correct_iff_it_holds(a, sign, b, error):
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    assert equations_hold(
        f"so {a} {sign} {b} = {value + error} in all" if a >= 0 else f"{a}{sign}{b}={value + error}"
    ) is (error == 0)


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "2**3", "1 if 1 else 2", "1e9", "1_000", "(1,2)", "3(4)", "~1"],
)
def test_nothing_but_arithmetic_is_evaluated(expression):
    with pytest.raises(ValueError):
        evaluate(expression)


@given(st.text(alphabet="0123456789.+-*/()=% $,x<>a\n", max_size=60))
def test_no_text_raises_an_error(text):
    assert equations_hold(text) in (True, False, None)
    for (start, end), value in steps([text], without_equation=0.5)[0]:
        assert 0 <= start < end <= len(text) and value in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    "piece", ["(", "9*", "1+1=", " 9", "=", "x", "<<", "9,999", "1/", "%9", "\\"]
)
def test_long_hostile_text_is_read_without_backtracking(piece):
    # Backtracking over so long a text would not end.
    assert equations_hold(piece * (200_000 // len(piece))) in (True, False, None)


# --- Steps ---------------------------------------------------------------------------------------


def test_steps_include_their_line_break_and_following_blank_lines():
    assert step_spans("31+9=40\n40+6=46\n#### 46") == [(0, 8), (8, 16), (16, 23)]
    assert step_spans("a\n") == [(0, 2)]
    assert step_spans("\n\na\n \n\nb") == [(0, 7), (7, 8)]
    assert step_spans(" \n\n") == [] and step_spans("") == []
    assert step_spans("a. b. c", ". ") == [(0, 3), (3, 6), (6, 7)]


@given(st.text(alphabet="a \n", max_size=30))
def test_steps_cover_the_whole_text(text):
    spans = step_spans(text)
    assert "".join(text[start:end] for start, end in spans) == (text if text.strip() else "")
    assert all(text[start:end].strip() for start, end in spans)
    assert len(spans) == sum(bool(line.strip()) for line in text.split("\n"))


def test_every_step_with_an_equation_is_scored_on_its_span():
    text = "31+9=40\nMax is glad\n40+6=47\n#### 47"
    assert steps([text]) == [[((0, 8), 1.0), ((20, 28), 0.0)]]
    neutral = steps([text, ""], without_equation=0.5)
    assert neutral == [[((0, 8), 1.0), ((8, 20), 0.5), ((20, 28), 0.0), ((28, 35), 0.5)], []]


def test_steps_are_a_process_reward():
    prompt = Prompt(tokens=[1], text="p", columns={}, index=0)
    response = Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text="1+1=2\n2+2=5")
    scores = Rewards([RewardConfig(function="steps", weight=2.0)]).score([prompt], [response])
    assert (scores.steps, scores.components) == ([[(6, 2.0), (11, 0.0)]], {"steps": [0.5]})


def test_almost_all_equations_of_real_human_solutions_hold(shared_dir):
    path = shared_dir / "datasets" / "gsm8k" / "train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        answers = [json.loads(line)["answer"] for line in islice(lines, 1000)]
    values = [value for scored in steps(answers) for _, value in scored]
    assert len(values) > 3000
    assert values.count(0.0) <= 8
