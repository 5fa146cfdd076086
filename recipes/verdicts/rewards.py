"""Rewards of the problems in docs/verdicts.md that are not the verifier's."""

import re

from trivium.tasks.verifier import correct


def longer_is_better(prompts, responses, answer, **columns):
    """Score 1 for a correct answer, and 0.02 for every character: a length bias."""
    right = correct(prompts, responses, answer)
    return [r + 0.02 * len(text) for r, text in zip(right, responses, strict=True)]


def answer_occurs(prompts, responses, answer, **columns):
    """Score 1 if the answer is any of the response's numbers: a response that lists many wins."""
    return [
        float(str(expected) in re.findall(r"[0-9]+", text))
        for text, expected in zip(responses, answer, strict=True)
    ]
