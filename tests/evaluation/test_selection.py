"""Best of N and majority votes: the expected reward of the chosen response."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from pathlib import Path
from statistics import fmean

import pytest

from trivium.errors import ConfigurationError
from trivium.evaluation.selection import (
    ANSWER,
    best_value,
    boxes,
    numbers,
    read_answers,
    selections,
    vote_value,
)
from trivium.maths.intervals import mean_interval


@pytest.mark.parametrize(
    ("answers", "rewards", "value"),
    [
        (["a", "b", "a"], [1, 0, 1], 1.0),
        (["a", "b", "b"], [1, 0, 0], 0.0),
        (["a", "a", "b", "b"], [1, 1, 0, 0], 0.5),  # a tie
        (["a", "a", "b"], [1, 0, 0], 0.5),  # one answer, written in two ways
        (["a", "a", "a", "b", "b", "b"], [1, 1, 1, 0, 0, 1], (1 + 1 / 3) / 2),
        ([None, None, "a"], [0, 0, 1], 1.0),  # those without an answer do not vote
        ([None, None], [0, 1], 0.5),
        ([Fraction(2), Fraction(4, 2), Fraction(3)], [1, 1, 0], 1.0),
    ],
)
def test_vote_is_the_mean_reward_of_the_most_frequent_answer(
    answers: list, rewards: list[float], value: float
) -> None:
    for order in list(permutations(range(len(answers))))[:24]:
        shuffled = [answers[i] for i in order], [rewards[i] for i in order]
        assert vote_value(*shuffled) == pytest.approx(value, abs=1e-15)


def test_best_value_is_the_mean_reward_of_the_highest_scores() -> None:
    assert best_value([0.1, 0.9, 0.3], [1, 0, 1]) == 0
    assert best_value([0.9, 0.9, 0.3, 0.9], [1, 0, 1, 1]) == pytest.approx(2 / 3)


def test_each_selection_has_an_interval_over_prompts_and_differences_are_paired() -> None:
    rewards = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]]
    answers = [["x", "y", "y"], ["x", "y", "y"], ["x", "x", "y"], ["x", "y", None]]
    scores = {"prm": [[0.9, 0.1, 0.2], [0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.5, 0.5, 0.1]]}
    found = selections(rewards, answers, scores)
    vote, best = [0, 1, 0, 1], [1, 0, 0, 1]
    assert list(found) == ["majority vote", "prm", "best possible", "prm − majority vote"]
    assert found["majority vote"] == mean_interval([float(v) for v in vote])
    assert found["prm"] == mean_interval([float(b) for b in best])
    assert found["best possible"] == mean_interval([1.0, 1.0, 0.0, 1.0])
    gaps = [float(b - v) for b, v in zip(best, vote, strict=True)]
    assert found["prm − majority vote"] == mean_interval(gaps, bounds=(-1.0, 1.0))
    assert found["prm − majority vote"].mean == fmean(gaps)
    assert list(selections(rewards, None, scores)) == ["prm", "best possible"]
    assert list(selections(rewards, answers, {})) == ["majority vote", "best possible"]


def test_answers_are_numbers_after_a_mark_or_the_last_box() -> None:
    assert numbers(["so #### 1,200", "A: 5.0", "12"]) == [Fraction(1200), Fraction(5), None]
    found = boxes([r"\boxed{1} or \boxed{ x^2 }", r"it is \boxed{x**2}", "no box"])
    assert found[0] == found[1] is not None
    assert found[2] is None


def test_own_function_reads_answers_and_its_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "def last(responses): return [r.split()[-1] for r in responses]\n"
        "def short(responses): return ['a']\n"
        "def lists(responses): return [[r] for r in responses]\n"
    )
    own = f"{path}:last"
    assert read_answers(own, ANSWER.load(own), ["it is 4", "5"]) == ["4", "5"]
    for name, responses, message in (
        ("last", [" "], "raised IndexError"),
        ("short", ["a", "b"], "returned 1 answers for 2 responses"),
        ("lists", ["a"], "raised TypeError"),
    ):
        choice = f"{path}:{name}"
        with pytest.raises(ConfigurationError, match=message):
            read_answers(choice, ANSWER.load(choice), responses)
