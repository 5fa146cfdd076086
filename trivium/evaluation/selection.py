"""Choosing one of a prompt's sampled responses: by majority vote, or by a score (best of N).

The value of a choice is the reward of the chosen response. Where several responses are equally
good choices it is their mean, the expectation over a random one, so the order of samples has no
effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import fmean
from typing import Any

from trivium.config.option import Option
from trivium.errors import ConfigurationError
from trivium.maths.intervals import Interval, mean_interval, value_bounds
from trivium.rewards.answers import last_box
from trivium.rewards.math import final_number

ANSWERS = {
    "number": "trivium.evaluation.selection:numbers",
    "boxed": "trivium.evaluation.selection:boxes",
}
ANSWER = Option("answer", ANSWERS, "def answers(responses)", "an answer, or None, per response")
"""How the final answer of a response is read, for majority votes."""

VOTE, BEST = "majority vote", "best possible"


def numbers(responses: Sequence[str]) -> list[Hashable]:
    """Return the number after the last ``####`` or ``A:`` of each response, or None."""
    return [final_number(response) for response in responses]


def boxes(responses: Sequence[str]) -> list[Hashable]:
    r"""Return the LaTeX in the last ``\boxed{…}`` of each response, without spaces, or None."""
    return [last_box(response) for response in responses]


def read_answers(
    choice: str, function: Callable[..., Any], responses: Sequence[str]
) -> list[Hashable]:
    """Return the final answer of each response by a function; None for one without an answer.

    Raises:
        ConfigurationError: a user's function fails, or does not return one hashable per response.
    """
    try:
        found = list(function(list(responses)))
        hash(tuple(found))
    except Exception as error:
        raise ConfigurationError(
            f"vote = {choice}: it raised {type(error).__name__}: {error}. It is called as "
            f"'{ANSWER.signature}', and returns {ANSWER.result}"
        ) from error
    if len(found) != len(responses):
        raise ConfigurationError(
            f"vote = {choice}: it returned {len(found)} answers for {len(responses)} responses"
        )
    return found


def vote_value(answers: Sequence[Hashable], rewards: Sequence[float]) -> float:
    """Return the mean reward of the responses with the most frequent answer.

    Answers that are equally frequent count equally. Responses without an answer do not vote; if
    none votes, the value is the mean reward.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return fmean(rewards)
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]
    return fmean(
        [
            fmean([r for a, r in zip(answers, rewards, strict=True) if a == winner])
            for winner in winners
        ]
    )


def best_value(scores: Sequence[float], rewards: Sequence[float]) -> float:
    """Return the mean reward of the responses with the highest score."""
    highest = max(scores)
    return fmean([r for s, r in zip(scores, rewards, strict=True) if s == highest])


def selections(
    rewards: Sequence[Sequence[float]],
    answers: Sequence[Sequence[Hashable]] | None,
    scores: Mapping[str, Sequence[Sequence[float]]],
) -> dict[str, Interval]:
    """Return the value of each way to choose, with its interval over prompts.

    All arguments are by prompt. With answers and scores, the differences between each score and
    the vote have intervals of their own: both choose from the same responses.
    """
    values: dict[str, list[float]] = {}
    if answers is not None:
        values[VOTE] = [vote_value(a, r) for a, r in zip(answers, rewards, strict=True)]
    for name, by_prompt in scores.items():
        values[name] = [best_value(s, r) for s, r in zip(by_prompt, rewards, strict=True)]
    values[BEST] = [max(group) for group in rewards]
    found = {name: mean_interval(group) for name, group in values.items()}
    low, high = value_bounds([reward for group in rewards for reward in group])
    for name in scores if answers is not None else ():
        gaps = [a - b for a, b in zip(values[name], values[VOTE], strict=True)]
        found[f"{name} − {VOTE}"] = mean_interval(gaps, bounds=(low - high, high - low))
    return found


def by_prompt(values: Sequence[Any], prompts: int) -> list[list[Any]]:
    """Return flat values of responses as one list per prompt."""
    size = len(values) // prompts
    return [list(values[start : start + size]) for start in range(0, len(values), size)]
