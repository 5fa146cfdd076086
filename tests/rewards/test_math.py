"""Verifiers of final answers: parsing, rejected answers, and agreement with real labels."""

from __future__ import annotations

import runpy
import signal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import RewardError
from trivium.rewards import math as module
from trivium.rewards.answers import boxed_answer, readable_response
from trivium.rewards.math import final_number, gsm8k, math, read_number
from trivium.rewards.reward import RewardConfig, Rewards

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gsm8k_verifier.py"

# --- GSM8K ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" 1,450,000 ", 1450000),
        ("$1,234.50", Fraction(2469, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("−7", -7),
        ("+7", 7),
        (".5", Fraction(1, 2)),
        ("18.", 18),
        ("18.00", 18),
        ("0018", 18),
        ("50%", 50),
        ("**18** eggs", 18),
        ("\\$18", 18),
        ("€ 20", 20),
        ("18 eggs, not 19", 18),
        ("18-year-old", 18),
        ("9" * 60, int("9" * 60)),
        (" **18** eggs", 18),
        ("**$18**", 18),
        ("__18__", 18),
        ("**18** (not 19)", 18),
        ("₹1,200", 1200),
        ("18 €", 18),
        ("90°", 90),
        ("−１８", -18),
        ("–5", -5),
        ("٣", 3),
        ("٣٫٥", Fraction(7, 2)),
        ("1e3", 1000),
        ("-1.5E-3", Fraction(-3, 2000)),
        ("2eggs", 2),
    ],
)
def test_number_is_parsed_exactly_with_surrounding_text(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eggs 18",
        "1,23",
        "1,2345",
        "12,345,67",
        "1/5",
        "18 + 2",
        "18 - 2",
        "5*3=15",
        "10+John's age",
        "10:30",
        "1.2.3",
        "3 x 4",
        "--",
        "--5",
        "-$-5",
        "$",
        "2**10",
        "9" * 300,
        "." * 5,
    ],
)
def test_part_of_a_longer_expression_is_not_a_number(text):
    assert read_number(text) is None


@given(st.decimals(-(10**9), 10**9, places=3), st.booleans(), st.sampled_from(["", "$", "€"]))
def test_every_notation_of_a_number_parses_to_that_number(number, commas, currency):
    sign, digits = ("-", -number) if number < 0 else ("", number)
    text = f"{sign}{currency}{digits:,}" if commas else f"{sign}{currency}{digits}"
    assert read_number(text) == Fraction(number)


def test_long_runs_of_white_space_are_read_without_backtracking():
    # Backtracking over so long a text would not end.
    assert final_number("A:" + " " * 200_000 + "x") is None
    assert final_number("A: $" + " " * 200_000 + "5") is None
    assert final_number("A: -\t" * 50_000) is None


def test_last_marker_counts_with_the_number_on_its_line():
    assert final_number("#### 1\n#### 2") == 2
    assert final_number("A: 1\nso #### 2") == 2
    assert final_number("#### 2\nA: 3") == 3
    assert final_number("#### 2\nand more 5") == 2
    assert final_number("#### \n5") is None
    assert final_number("DNA: 5, 46####46") is None
    assert final_number("the answer is 18") is None
    assert final_number("Answer: 4", ["Answer:"]) == 4
    assert final_number("**A:** 18") == final_number("**A: 18**") == 18
    assert final_number("x*A: 18") == 18
    assert final_number("#### **18**") == final_number("####**18**") == 18


def test_gsm8k_compares_numbers_not_texts():
    responses = ["#### 3,000", "A: $18.00", "#### 17", "eighteen", "#### 0.5", "A: 2,125"]
    answers = ["3000", "so <<9*2=18>>18\n#### 18", "18", "18", 0.5, 2125]
    assert gsm8k(responses, answers) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("answer", ["no number", None, True, [18]])
def test_answer_without_a_number_is_a_data_error(answer):
    with pytest.raises(ValueError, match="has no final number"):
        gsm8k(["#### 18"], [answer])


def test_error_of_an_unreadable_answer_names_its_row():
    prompts = [Prompt(tokens=[1], text="p", columns={"answer": a}, index=7) for a in ("5", "?")]
    response = Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text="#### 5")
    for name in ("gsm8k", "math"):
        with pytest.raises(RewardError, match=r"response 1 of 2 \(prompt row 7\)"):
            answers = prompts if name == "gsm8k" else [prompts[0], prompt_with_answer("")]
            Rewards([RewardConfig(function=name)]).score(answers, [response] * 2)


def prompt_with_answer(answer):
    return Prompt(tokens=[1], text="p", columns={"answer": answer}, index=7)


@pytest.mark.parametrize(("reward", "count"), [("gsm8k", 5276), ("math", 400)])
def test_verifiers_agree_with_the_labels_of_real_solutions(shared_dir, reward, count):
    benchmark = runpy.run_path(str(SCRIPT))
    path = shared_dir / "datasets" / "gsm8k" / "example_model_solutions.jsonl.gz"
    solutions = list(benchmark["read_solutions"](path))
    assert len(solutions) == 5276
    found = benchmark["verdicts"](solutions[:count], reward)
    num_equal = sum(s.label == verdict for s, verdict in zip(solutions, found, strict=False))
    assert num_equal / count >= 0.995
    assert 0.2 < sum(found) / count < 0.5


# --- Mathematics in general ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("18", "The answer is 18.", "The answer is 81."),
        ("\\frac{1}{2}", "\\boxed{0.5}", "\\boxed{2}"),
        ("$x^2+1$", "thus $1+x^2$", "thus $x^2$"),
        ("10,000", "It makes 10,000.", "It makes 10."),
        ("so #### 18", "\\boxed{18}", "\\boxed{-18}"),
        ("then \\boxed{1} and \\boxed{3}", "\\boxed{3}, \\boxed{1}", "\\boxed{3}"),
        ("then \\boxed{1} and \\boxed{3}", "$1$ and $3$", "\\boxed{1} and \\boxed{4}"),
        ("\\boxed{2}, that is \\boxed{2}", "\\boxed{2}", "\\boxed{3}"),
        ("1, 3", "\\boxed{3} or \\boxed{1}", "\\boxed{13}"),
        ("pi", "\\boxed{\\pi}", "\\boxed{ip}"),
        ("2*pi", "The answer is 2*pi.", "The answer is not 2*pi"),
        ("pi/2", "$\\frac{\\pi}{2}$", "$\\pi$"),
        ("x**2+1", "\\boxed{x^2+1}", "\\boxed{2x+1}"),
        ("x^2+1", "The answer is x^2+1", "The answer is x^2-1"),
        ("2^(n+1)", "$2^{n+1}$", "$2^n+1$"),
        ("(1+sqrt(5))/2", "\\boxed{\\frac{1+\\sqrt5}{2}}", "\\boxed{\\frac{1+5}{2}}"),
        ("ln(2)", "\\boxed{\\ln 2}", "\\boxed{2}"),
        ("infinity", "\\boxed{\\infty}", "\\boxed{1}"),
        ("1e3", "\\boxed{1000}", "\\boxed{3e}"),
        ("1.5e-3", "\\boxed{1.5\\times 10^{-3}}", "\\boxed{1.5}"),
        ("1000", "The answer is 1e3", "The answer is 1e2"),
        ("-5", "The final answer is −5", "The final answer is 5"),
        ("−5", "\\boxed{-5}", "\\boxed{5}"),
        ("90", "\\boxed{90°}", "\\boxed{9°}"),
        ("90°", "It is 90°.", "It is 9°."),
        ("25", "It is 25 °C outside.", "It is 26 °C outside."),
        ("€5", "It costs 5 €.", "It costs 6 €."),
        ("5", "\\boxed{€5}", "\\boxed{€6}"),
        ("18", "\\boxed{１８}", "\\boxed{８}"),
        ("\\sqrt{3}", "\\boxed{√3}", "\\boxed{3}"),
        ("x²+1", "$x²+1$", "$x+1$"),
        ("Paris", "\\boxed{Paris}", "\\boxed{Pairs}"),
        ("B", "The answer is B.", "The answer is C."),
        ("10 apples", "\\boxed{10}", "\\boxed{1}"),
        ("#### **18**", "The answer is **18**.", "The answer is **81**."),
        ("50%", "\\boxed{50\\%}", "\\boxed{51}"),
        ("\\(\\sqrt{8}\\)", "$2\\sqrt{2}$", "$4\\sqrt{2}$"),
        ("(1,2)", "$(1,2)$", "$(2,1)$"),
        (18, "A: 18", "A: 19"),
        (0.5, "\\boxed{\\frac12}", "\\boxed{5}"),
    ],
)
def test_math_accepts_equal_answers_and_no_others(answer, right, wrong):
    assert math([right, wrong, "no idea", ""], [answer] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_math_with_boxed_accepts_only_a_boxed_answer():
    responses = ["The final answer is $18$.", "so \\boxed{18}", "\\boxed{18", "18 \\boxed{17}"]
    assert math(responses, ["18"] * 4, boxed=True) == [0.0, 1.0, 0.0, 0.0]


def test_math_refuses_an_answer_that_it_cannot_parse():
    for answer in ("", None, True):
        with pytest.raises(ValueError, match="answer"):
            math(["18"], [answer])


def test_answers_are_normalized_to_boxed():
    for text in ("18", " $18$ ", "\\(18\\)", "\\[18\\]", "$$18$$", "x = 1\n#### 18", "**18**"):
        assert boxed_answer(text) == "\\boxed{18}"
    assert boxed_answer("a \\boxed{1} b \\boxed{2}") == "\\boxed{1, 2}"
    assert boxed_answer("\\boxed{\\boxed{1}} \\boxed{{2}") == "\\boxed{\\boxed{1}}"
    assert boxed_answer("5%") == "\\boxed{5\\%}"
    assert boxed_answer("\\$5") == "\\boxed{\\$5}"
    assert boxed_answer("") == boxed_answer("$$") == boxed_answer("\\boxed{}") == ""


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(
    "response",
    [
        "So we get \\boxed{17}. Wait, I forgot the last term. \\boxed{19}",
        "\\boxed{17}\n\n\\boxed{19}",
        "\\boxed{17} is wrong. The answer is \\boxed{19}.",
        "$\\boxed{17}$ and $\\boxed{19}$",
        "\\boxed{17}, \\boxed{18}, \\boxed{19}",
    ],
)
def test_last_box_is_the_answer_to_a_question_with_one(response, boxed):
    assert math([response] * 3, ["19", "17", "17, 19"], boxed=boxed)[:2] == [1.0, 0.0]


def test_response_with_more_boxes_than_answers_is_its_last_ones():
    response = "Not \\boxed{4}, but \\boxed{3} and \\boxed{1}"
    assert math([response] * 3, ["1, 3", "3, 4", "1, 3, 4"]) == [1.0, 0.0, 1.0]
    assert math(["\\boxed{1, 3}", "\\boxed{3}"], ["1, 3"] * 2) == [1.0, 0.0]


def test_only_a_plain_expression_after_answer_is_becomes_latex():
    for response in (
        "no answer is known",
        "The answer is 18",
        "The answer is $2\\pi$",
        "The answer is the sum of x and y",
        "The answer is x; y",
    ):
        assert readable_response(response, "\\boxed{18}") == response
    assert readable_response("answer: x, so the answer is **2*pi**.", "") == (
        "answer: x, so the answer is **$2\\cdot \\pi$**."
    )


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 50_000,
        "\\boxed{1}" * 50_000,
        "{" * 200_000 + "}" * 200_000,
        "\\boxed " * 50_000,
        "answer is " * 50_000,
        "$" * 200_001 + "−",
        "−" + " " * 200_000 + "°",
        "1" + " €" * 100_000,
        "answer is " + "(" * 200_000,
    ],
    ids=lambda text: text[:8],
)
def test_long_responses_are_read_without_backtracking(text):
    # Backtracking over so long a text would not end.
    assert len(readable_response(text, "\\boxed{1, 2}")) <= len(text) + 100
    assert final_number(f"A: {text}") in (None, 1)


def test_slow_response_scores_zero_and_the_next_one_is_verified(caplog):
    # Without a limit the first response would not end.
    assert math(["9^9^9^9", "The answer is 5"], ["5", "5"], seconds=1) == [0.0, 1.0]
    assert "9^9^9^9" in caplog.text
    assert len(caplog.records) == 1


def test_worker_that_cannot_be_interrupted_is_killed_and_replaced(monkeypatch):
    worker = module._Worker()
    slow = {"answer": "\\boxed{5}", "response": "9^9^9^9", "boxed": False, "seconds": 3600}
    assert worker.request(slow, 0.3) is None
    assert worker._process.wait() == -signal.SIGKILL
    with pytest.raises(module.WorkerDied, match="signal 9"):
        worker.request(slow, 0.3)
    monkeypatch.setattr(module, "_idle", [worker])
    assert math(["5", "5"], ["5", "5"]) == [1.0, 1.0]  # a new worker answers
    assert module._idle != [worker]
    module._close_idle()


def test_worker_that_dies_twice_is_named_and_the_next_response_is_verified(monkeypatch, caplog):
    request = module._Worker.request

    def die_on_six(worker, fields, seconds):
        if "6" in fields["response"]:
            worker._process.kill()
        return request(worker, fields, seconds)

    monkeypatch.setattr(module._Worker, "request", die_on_six)
    monkeypatch.setattr(module, "_idle", [])
    assert math(["5", "6", "5"], ["5", "6", "5"]) == [1.0, 0.0, 1.0]
    assert "the verifier process died twice (signal 9); score is 0: '6'" in caplog.text
    assert len(caplog.records) == 1
    module._close_idle()


def test_math_works_outside_the_main_thread():
    prompts = [prompt_with_answer("1/2")] * 2
    responses = [
        Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=t) for t in ("0.5", "2")
    ]
    assert Rewards([RewardConfig(function="math")]).score(prompts, responses).outcomes == [1, 0]


def test_verifier_that_cannot_start_reports_the_reason(monkeypatch):
    monkeypatch.setattr(module, "_idle", [])
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(
        RuntimeError, match="the verifier process could not start: it ended at once"
    ):
        math(["5"], ["5"])
