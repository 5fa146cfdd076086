"""Measure how often the verifiers agree with the labels of GSM8K's example solutions.

    python benchmarks/gsm8k_verifier.py example_model_solutions.jsonl.gz [--reward math]
    python benchmarks/gsm8k_verifier.py train.jsonl.gz --reward steps

The first file holds the solutions of four models to each test question, with the label
`is_correct`. The second file holds human solutions, which count as correct. OpenAI publishes both
files, which are gzipped here (https://github.com/openai/grade-school-math). The script prints the
agreement and every disagreement. For the step verifier it prints every equation that the verifier
marks as wrong in a solution labeled correct.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trivium.rewards.math import gsm8k
from trivium.rewards.math import math as math_verified
from trivium.rewards.steps import steps


class Solution(NamedTuple):
    """One labeled solution; `question` is the 0-based index in the file."""

    question: int
    model: str
    text: str
    truth: str
    label: bool


def read_solutions(path: Path) -> Iterator[Solution]:
    """Yield the labeled solutions of a file as OpenAI published it."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for question, line in enumerate(lines):
            row = json.loads(line)
            if "answer" in row:
                yield Solution(question, "people", row["answer"], row["answer"], True)
            for model, solution in row.items():
                if isinstance(solution, dict):
                    text, label = solution["solution"], solution["is_correct"]
                    yield Solution(question, model, text, row["ground_truth"], label)


def verdicts(solutions: list[Solution], reward: str) -> list[bool]:
    """Return whether the verifier accepts each solution."""
    texts, truths = [s.text for s in solutions], [s.truth for s in solutions]
    if reward == "gsm8k":
        return [score == 1.0 for score in gsm8k(texts, truths)]
    finals = [truth.rpartition("A:")[2].strip() for truth in truths]
    return [score == 1.0 for score in math_verified(texts, finals)]


def report_answers(solutions: list[Solution], reward: str) -> None:
    """Print the agreement of a final-answer verifier with the labels, and every disagreement."""
    accepted = verdicts(solutions, reward)
    wrong = [(s, v) for s, v in zip(solutions, accepted, strict=True) if s.label != v]
    agreed = len(solutions) - len(wrong)
    print(f"{reward}: agrees with {agreed} of {len(solutions)} labels", end=" ")
    print(f"({100 * agreed / len(solutions):.2f} %), {len(wrong)} disagreements; ", end="")
    print(f"{sum(s.label for s in solutions)} are labeled correct, {sum(accepted)} are accepted")
    for solution, verdict in wrong:
        print(f"question {solution.question}, {solution.model}: label {solution.label}, ", end="")
        print(f"verifier {verdict}; ends {solution.text[-60:]!r}, truth {solution.truth[-30:]!r}")


def report_steps(solutions: list[Solution]) -> None:
    """Print how many steps and solutions have a wrong equation, and those in correct solutions."""
    scored = steps([solution.text for solution in solutions])
    values = [value for solution_steps in scored for _, value in solution_steps]
    print(f"steps: {len(values)} have an equation, {values.count(0.0)} of them a wrong one")
    clean = Counter(
        (s.label, all(value for _, value in solution_steps))
        for s, solution_steps in zip(solutions, scored, strict=True)
    )
    for label in (True, False):
        total = clean[label, True] + clean[label, False]
        print(f"{clean[label, False]} of {total} solutions labeled {label} have a wrong equation")
    for solution, solution_steps in zip(solutions, scored, strict=True):
        for (start, end), value in solution_steps:
            if solution.label and value == 0.0:
                text = solution.text[start:end].strip()
                print(f"question {solution.question}, {solution.model}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the verifiers with GSM8K's labels.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--reward", choices=("gsm8k", "math", "steps"), default="gsm8k")
    arguments = parser.parse_args()
    solutions = list(read_solutions(arguments.path))
    if arguments.reward == "steps":
        report_steps(solutions)
    else:
        report_answers(solutions, arguments.reward)


if __name__ == "__main__":
    main()
