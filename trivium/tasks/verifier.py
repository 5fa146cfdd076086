"""The task's rewards: the final answer, and every step.

`correct` judges the outcome, `steps` and `labels` the process. They are ordinary rewards, named in
a configuration as `trivium.tasks.verifier:correct` and so on; the data rows bring the columns
`answer` and `steps`.

How `steps` judges. A problem of K operations asks for K + 1 steps: K lines and the closing
"#### answer". Line j is right (1) where it carries out operation j, correctly, on the value that
the response itself had reached on the line before; the closing is right where it repeats the value
reached on line K and ends the response. All else is wrong (0); a line that states no result leaves
the value reached as it was. So a slip costs its own step and no
later one: the sum over later steps that GRPO gives a token is not blurred by a mistake made before
it, and what follows a mistake still teaches.

Why it cannot be gamed. Spans follow one another without gaps from the response's start to its end,
there are never more than K + 1 of them, and the last is lowered by 1 for each step that is missing.
An extra or repeated line takes the place of the step due there and is wrong. Let m be the number of
missing steps and μ <= 1 the mean by which rewards are centered: a response's centered sum is at most
(K + 1 - 2m) - (K + 1 - m) μ, against (K + 1)(1 - μ) of the one correct text. So only that text
attains the maximum, and ending early never beats writing the steps, even all of them wrongly. The
exception is the empty response: it has no characters that could carry a value, so it has no steps
and neither gains nor loses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trivium.errors import DataError
from trivium.tasks.problems import compute

Judgment = tuple[tuple[int, int], float]

LINE = re.compile(r"\n*[^\n]+")
STEP = re.compile(r"([0-9]{1,9})([-+*])([0-9]{1,9})=[0-9]{1,9}")
RESULT = re.compile(r"=([0-9]{1,9})$")
CLOSING = "####"


def correct(
    prompts: Sequence[Any], responses: Sequence[str], answer: Sequence[str | int], **columns: Any
) -> list[float]:
    """1 where the response's last line, and no other, gives the answer as "#### answer"; else 0."""
    return [
        float(_final(response) == f"{CLOSING} {expected}")
        for response, expected in zip(responses, answer, strict=True)
    ]


def _final(response: str) -> str | None:
    *earlier, last = response.split("\n")
    return None if any(line.startswith(CLOSING) for line in earlier) else last


def steps(
    prompts: Sequence[Any], responses: Sequence[str], steps: Sequence[Sequence[str]], **columns: Any
) -> list[list[Judgment]]:
    """Per response its steps as ((start, end), value), in order; see the module for the rule.

    `steps` holds, per response, the correct step lines, such as ["31+9=40", "40+6=46"]. Raises
    DataError where one of them is not of that form.
    """
    return [judge(response, expected) for response, expected in zip(responses, steps, strict=True)]


def labels(
    prompts: Sequence[Any], responses: Sequence[str], steps: Sequence[Sequence[str]], **columns: Any
) -> list[list[Judgment]]:
    """As `steps`, but whether each step is right, 1 or 0: what a process reward model learns."""
    judged = (
        judge(response, expected) for response, expected in zip(responses, steps, strict=True)
    )
    return [[(span, max(0.0, value)) for span, value in each] for each in judged]


def judge(response: str, expected: Sequence[str]) -> list[Judgment]:
    """The judgment of one response against its correct step lines."""
    reached, operations = _read(expected)
    judged: list[Judgment] = []
    end = 0
    for symbol, operand in operations:
        line = LINE.match(response, end)
        if line is None or line[0].lstrip("\n").startswith(CLOSING):
            break
        right = f"{reached}{symbol}{operand}={compute(reached, symbol, operand)}"
        judged.append(((end, line.end()), float(line[0] == ("\n" if end else "") + right)))
        written = RESULT.search(line[0])
        reached, end = int(written[1]) if written else reached, line.end()
    if end < len(response):
        closed = len(judged) == len(operations) and response[end:] == f"\n{CLOSING} {reached}"
        judged.append(((end, len(response)), float(closed)))
    missing = len(operations) + 1 - len(judged)
    return [*judged[:-1], *((span, value - missing) for span, value in judged[-1:])]


def _read(expected: Sequence[str]) -> tuple[int, list[tuple[str, int]]]:
    matches = []
    for step in expected:
        match = STEP.fullmatch(step)
        if match is None:
            raise DataError(f'steps: {step!r} is not a step line; write it as in "31+9=40"')
        matches.append(match)
    if not matches:
        raise DataError("steps: a row has no step lines; write at least one")
    return int(matches[0][1]), [(match[2], int(match[3])) for match in matches]
