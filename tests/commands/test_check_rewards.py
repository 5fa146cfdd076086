"""``trivium check-rewards``: rewards that tell responses apart, and those that do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import checkpoint

from trivium.cli import main

FUNCTIONS = """
def constant(responses, **columns): return [0.5] * len(responses)
def by_prompt(prompts, responses, **columns): return [float(len(p)) for p in prompts]
def fails(responses, **columns): return [1 / len(r) for r in responses]
def by_length(responses, **columns): return [float(len(r)) for r in responses]
def nothing(responses, **columns): return [None] * len(responses)
def sometimes(responses, **columns): return [None if len(r) > 20 else len(r) for r in responses]
def steps(responses, **columns): return [[((0, len(r)), len(r))] if r else [] for r in responses]
def nan(responses, **columns): return [float("nan") for r in responses]
"""


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "functions.py").write_text(FUNCTIONS)

    def run(reward: dict[str, Any], rows: list[dict[str, Any]], *arguments: str, **other: Any):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = {"data": {"path": "rows.jsonl"}, "rewards": [reward], **other}
        (tmp_path / "grpo.yaml").write_text(json.dumps(config))
        status = main(["check-rewards", "grpo.yaml", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, " ".join(captured.out.split()), " ".join(captured.err.split())

    return run


ROWS = [{"prompt": "p" * n, "answer": str(n)} for n in range(1, 6)]


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        ("functions.py:constant", 2, "gives 0.5 to each of 21 responses, so it trains nothing"),
        ("functions.py:by_prompt", 2, "gives all responses to a prompt the same value"),
        ("functions.py:fails", 2, "raised"),
        ("functions.py:nan", 2, "is nan, not a finite number"),
        ("functions.py:by_length", 0, "differs between responses"),
        ("functions.py:nothing", 2, "applies to none of 21 responses"),
        ("functions.py:sometimes", 0, "differs between responses"),
        ("functions.py:steps", 0, "differs between responses"),
        ("gsm8k", 0, "differs between responses"),
    ],
)
def test_rewards_that_do_not_tell_responses_apart_are_reported(function, status, reason, check):
    found, out, err = check({"function": function}, ROWS)
    assert (found, reason in out + err) == (status, True), (out, err)
    assert out.startswith("Rewards of a few responses")
    name = function.rpartition(":")[2]
    assert status == 0 or name in err


def test_a_fallback_does_not_hide_a_reward_that_fails(check):
    status, _, err = check({"function": "functions.py:fails", "fallback": 0.0}, ROWS)
    assert status == 2 and "fails on 5 of 21 responses, which get its fallback" in err


def test_a_verifier_that_refuses_the_data_s_own_answers_is_reported(check):
    rows = [*ROWS, {"prompt": "p", "answer": "so \\boxed{5}, Result: 5"}]
    reward = {"function": "gsm8k", "arguments": {"markers": ["Result:"]}}
    status, out, err = check(reward, rows)
    assert status == 2 and "refuses the answers of 5 rows" in out
    assert "rows.jsonl:1: refuses the row's own answer" in err and "rows.jsonl:6" not in err
    status, _, err = check({"function": "gsm8k"}, [*ROWS, {"prompt": "p", "answer": "none"}])
    assert status == 2 and "the data's answer 'none' has no final number" in err


def test_other_sections_are_left_to_their_command_and_settings_apply(check):
    status, _, _ = check({"function": "gsm8k"}, ROWS, "--rows", "2", unknown={"a": 1})
    assert status == 0
    status, _, err = check({"function": "gsm8k"}, ROWS, "rewards.0.function=gsm8")
    assert status == 2 and "did you mean 'gsm8k'?" in err
    status, _, err = check({"function": "gsm8k"}, [{"prompt": "p"}])
    assert status == 2 and "needs a data column 'answer'" in err


def test_rewards_with_tokens_use_the_model_s_tokenizer(check, tmp_path):
    length = {"function": "length", "arguments": {"limit": 8, "buffer": 4}}
    status, _, err = check(length, ROWS)
    assert status == 2 and "there is no `model`" in err
    checkpoint(tmp_path / "model", letters="abcdefghijkp")
    rows = [{"prompt": "ab", "response": "abcdef"}]
    status, out, _ = check(length, rows, model={"path": "model"})
    assert status == 0 and "differs between responses" in out


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_tests_of_programs_are_checked(check):
    rows = [{"prompt": "p", "tests": ["assert f(1) == 1"], "reference_solution": "f = abs"}]
    status, out, _ = check({"function": "code"}, rows)
    assert status == 0 and "differs between responses" in out
    status, out, err = check({"function": "code"}, [*rows, {"prompt": "p", "tests": "def t(): 1"}])
    assert status == 2 and "rows.jsonl:2" in err and "checks nothing" in err
    assert "tests that cannot be used" in out
