"""Reward functions of the task: one for the final answer, one for every step.

`correct` scores the outcome, `steps` and `labels` score the process. They are ordinary reward
functions, written in a configuration as `trivium.tasks.verifier:correct` and so on. They read the
columns `answer` and `steps` of the data.

Step rewards. A problem of K operations has K + 1 steps: K lines and the closing "#### answer". Line
j scores 1 if it applies operation j correctly to the current value, which is the result on the
response's own previous line. The closing scores 1 if it repeats the result of line K and ends the
response. Every other step scores 0; a line without a result does not change the current value. A
mistake therefore lowers the reward of its own step alone. The sum of later rewards that GRPO
assigns to a token does not depend on earlier mistakes, and the steps after a mistake still have a
signal.

The step rewards cannot be exploited. Spans cover the response from start to end without gaps, there
are at most K + 1 spans, and the last reward is lowered by 1 for each missing step. An extra or
repeated line takes the place of the expected step and scores 0. Let m be the number of missing
steps and μ <= 1 the mean that is subtracted from rewards: the centered sum of a response is at most
(K + 1 - 2m) - (K + 1 - m) μ, and that of the only correct text is (K + 1)(1 - μ). So only this text
has the maximum reward, and ending early is never better than writing all steps, even incorrectly.
The exception is the empty response: without characters it has no spans, so its sum is 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trivium.errors import DataError
from trivium.tasks.problems import compute

ScoredSpan = tuple[tuple[int, int], float]
"""The first character and the exclusive end of a step, and its reward."""

LINE = re.compile(r"\n*[^\n]+")
STEP = re.compile(r"([0-9]{1,9})([-+*])([0-9]{1,9})=[0-9]{1,9}")
RESULT = re.compile(r"=([0-9]{1,9})$")
CLOSING = "####"


def correct(
    prompts: Sequence[Any], responses: Sequence[str], answer: Sequence[str | int], **columns: Any
) -> list[float]:
    """Return 1 if only the response's last line is a closing, "#### answer", and is correct."""
    return [
        float(_closing(response) == f"{CLOSING} {expected}")
        for response, expected in zip(responses, answer, strict=True)
    ]


def _closing(response: str) -> str | None:
    """Return the last line, or None if an earlier line is a closing."""
    *earlier, last = response.split("\n")
    return None if any(line.startswith(CLOSING) for line in earlier) else last


def steps(
    prompts: Sequence[Any], responses: Sequence[str], steps: Sequence[Sequence[str]], **columns: Any
) -> list[list[ScoredSpan]]:
    """Return for each response its steps as ((start, end), reward), in order.

    The module docstring defines the rewards. `steps` has for each response the correct step lines,
    such as ["31+9=40", "40+6=46"]. Raises DataError if a step line has another form.
    """
    return [
        score_steps(response, expected) for response, expected in zip(responses, steps, strict=True)
    ]


def labels(
    prompts: Sequence[Any], responses: Sequence[str], steps: Sequence[Sequence[str]], **columns: Any
) -> list[list[ScoredSpan]]:
    """Return labels for a process reward model: as `steps`, but with 1 or 0 for every step."""
    scored = (
        score_steps(response, expected) for response, expected in zip(responses, steps, strict=True)
    )
    return [[(span, max(0.0, reward)) for span, reward in spans] for spans in scored]


def score_steps(response: str, expected: Sequence[str]) -> list[ScoredSpan]:
    """Return the scored steps of one response, given its correct step lines."""
    current, operations = _parse_steps(expected)
    spans: list[ScoredSpan] = []
    end = 0
    for symbol, operand in operations:
        line = LINE.match(response, end)
        if line is None or line[0].lstrip("\n").startswith(CLOSING):
            break
        correct_line = f"{current}{symbol}{operand}={compute(current, symbol, operand)}"
        spans.append(((end, line.end()), float(line[0] == ("\n" if end else "") + correct_line)))
        result = RESULT.search(line[0])
        current, end = int(result[1]) if result else current, line.end()
    if end < len(response):
        is_closed = len(spans) == len(operations) and response[end:] == f"\n{CLOSING} {current}"
        spans.append(((end, len(response)), float(is_closed)))
    missing = len(operations) + 1 - len(spans)
    return [*spans[:-1], *((span, reward - missing) for span, reward in spans[-1:])]


def _parse_steps(expected: Sequence[str]) -> tuple[int, list[tuple[str, int]]]:
    """Return the start value and the operations of the correct step lines."""
    matches = []
    for step in expected:
        match = STEP.fullmatch(step)
        if match is None:
            raise DataError(f'steps: {step!r} is not a step line; write one such as "31+9=40"')
        matches.append(match)
    if not matches:
        raise DataError("steps: a row has no step lines; write at least one")
    return int(matches[0][1]), [(match[2], int(match[3])) for match in matches]
