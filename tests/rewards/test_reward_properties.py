"""The border of rewards, whatever comes back: read exactly, or named and given up."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.prompts import Prompt
from trivium.errors import RewardError
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rollout.engine import Response

EACH = settings(max_examples=100)
TEXTS = ["aaaa", "b\x1b[31mb", "", "dd\n"]


class Hostile:
    """An object whose every question raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def _raise(self, *_: Any) -> Any:
        raise self.error

    __repr__ = __iter__ = __len__ = __float__ = __index__ = __bool__ = __eq__ = _raise
    item = tolist = _raise


class Odd(float):
    """A number that does not become one."""

    def __float__(self) -> float:
        raise ZeroDivisionError


def deep(depth: int) -> Any:
    value: Any = 1.0
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


FINITE = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(-1e6, 1e6),
    st.fractions(),
    st.decimals(allow_nan=False, allow_infinity=False, places=3),
    st.floats(-9, 9).map(np.float64),
    st.integers(-9, 9).map(np.int16),
    st.integers(-9, 9).map(torch.tensor),
    st.floats(-9, 9).map(np.array),
)
NO_NUMBERS = [
    *(None, "1.0", "", b"1", 1j, {}, {"a": 1.0}, {1.0}, range(3), object(), float, len),
    *(math.nan, math.inf, -math.inf, 10**400, Fraction(10**400), Decimal("1e999")),
    *(Decimal("NaN"), Decimal("sNaN"), np.float32("nan"), np.zeros(2), np.array("x")),
    *(np.datetime64("nat"), np.array(None), torch.zeros(2), torch.tensor(math.nan)),
    *(torch.empty((), device="meta"), torch.tensor(1j), Odd(1), Hostile(ValueError("no"))),
    *(Hostile(RuntimeError("no")), Hostile(RecursionError()), Hostile(MemoryError())),
]
NO_NUMBER = st.sampled_from(NO_NUMBERS)
POSITION = st.integers(-1, 6) | st.integers(0, 4).map(np.int64) | st.sampled_from([True, 1.0, "1"])
STEP = st.tuples(st.tuples(POSITION, POSITION), FINITE | NO_NUMBER)
NO_STEPS = st.lists(
    STEP | FINITE | NO_NUMBER | st.lists(FINITE, max_size=3), min_size=1, max_size=3
)
STRANGE = st.sampled_from([deep(5), deep(900), (deep(900),), itself(), [itself()], [[], []]])


@st.composite
def proper_steps(draw: Any, length: int = 4) -> list[Any]:
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=4)))
    return [((a, b), draw(FINITE)) for a, b in pairwise(cuts)]


@st.composite
def almost_proper_steps(draw: Any) -> list[Any]:
    """Steps in which spans may overlap, or the first position is no whole number."""
    if draw(st.booleans()):
        spans = st.tuples(st.integers(0, 4), st.integers(0, 4))
        return draw(st.lists(st.tuples(spans, FINITE), min_size=2, max_size=3))
    end, number = draw(st.integers(1, 4)), draw(FINITE)
    return [((draw(st.sampled_from([False, 0.0, "0", None])), end), number)]


# Of each kind alike, which `|` would not give: it counts the alternatives inside.
KINDS = [FINITE, proper_steps(), almost_proper_steps(), NO_NUMBER, NO_STEPS, STRANGE]
VALUE = st.sampled_from(KINDS).flatmap(lambda kind: kind)


def number_of(value: Any) -> float | None:
    """The number, read another way than the border reads it."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        simple = value.ndim == 0 and str(value.dtype).split(".")[-1].startswith(("float", "int"))
        if not simple or (isinstance(value, torch.Tensor) and value.is_meta):
            return None
        value = value.tolist()
    if isinstance(value, Odd) or type(value) not in (bool, int, float, Fraction, Decimal):
        return None
    if isinstance(value, Decimal) and not value.is_finite():
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return float(value) if abs(value) < 2**1000 else None


def num_steps(value: Any, length: int) -> list[tuple[int, float]] | None:
    """The steps' ends and values; None where they are not ordered spans with numbers."""
    found, last = [], 0
    for entry in value:
        if not (isinstance(entry, tuple | list) and len(entry) == 2):
            return None
        span, number = entry
        if not (isinstance(span, tuple | list) and len(span) == 2):
            return None
        if not all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in span):
            return None
        if not last <= span[0] < span[1] <= length or number_of(number) is None:
            return None
        last = int(span[1])
        found.append((last, number_of(number)))
    return found


def expected(value: Any, text: str) -> float | list[tuple[int, float]] | None:
    return num_steps(value, len(text)) if isinstance(value, list | tuple) else number_of(value)


def score(functions: dict[str, Any], count: int = len(TEXTS), **settings: Any) -> Any:
    configs = [RewardConfig(function=name, timeout=None, **settings) for name in functions]
    prompts = [Prompt(tokens=[1], text="p", columns={}, index=10 + n) for n in range(count)]
    responses = [
        Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=t) for t in TEXTS[:count]
    ]
    return Rewards(configs, functions=functions).score(prompts, responses)


@EACH
@given(st.lists(VALUE, min_size=4, max_size=4))
def test_a_value_is_read_exactly_or_named_with_its_reward_and_response(values: list[Any]) -> None:
    wanted = [expected(value, text) for value, text in zip(values, TEXTS, strict=True)]
    form = next((isinstance(want, list) for want in wanted if want is not None), None)
    faulty = [n for n, want in enumerate(wanted) if want is None or isinstance(want, list) != form]
    functions = {"mine": lambda responses: [values[TEXTS.index(text)] for text in responses]}
    if faulty:
        with pytest.raises(RewardError) as caught:
            score(functions)
        message = str(caught.value)
        place = f"reward 'mine', on response {faulty[0]} of 4 (prompt row {10 + faulty[0]}), "
        assert message.startswith(f"{place}{TEXTS[faulty[0]]!r}: ")
        assert message.isprintable() and len(message) < 600
    scores = score(functions, fallback=0.25)
    assert scores.fallbacks == {"mine": len(faulty)}
    for n, (want, text) in enumerate(zip(wanted, TEXTS, strict=True)):
        if n in faulty:
            want = ([(len(text), 0.25)] if text else []) if form else 0.25
        if isinstance(want, list):
            assert scores.steps[n] == want and scores.outcomes[n] == 0.0
        else:
            assert scores.outcomes[n] == want and type(scores.outcomes[n]) is float


@EACH
@given(almost_proper_steps())
def test_steps_are_read_exactly_when_their_spans_are_whole_ordered_and_disjoint(steps: Any) -> None:
    want = expected(steps, "aaaa")
    if want is None:
        with pytest.raises(
            RewardError, match=r"on response 0 of 1 \(prompt row 10\), 'aaaa': step "
        ):
            score({"mine": lambda responses: [steps]}, count=1)
    else:
        assert score({"mine": lambda responses: [steps]}, count=1).steps == [want]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=[type(value).__name__ for value in NO_NUMBERS])
def test_what_is_no_number_is_none_alone_in_a_step_and_as_the_result(value: Any) -> None:
    for returned in (value, [((0, 1), value)]):
        with pytest.raises(RewardError, match=r"on response 0 of 1 \(prompt row 10\), 'aaaa': "):
            score({"mine": lambda responses, returned=returned: [returned]}, count=1)
    with pytest.raises(RewardError, match=r"^reward 'mine', on "):
        score({"mine": lambda responses: value}, count=3)


@EACH
@given(st.one_of(VALUE, st.lists(VALUE, max_size=3), st.lists(VALUE, min_size=5, max_size=6)))
def test_a_result_of_another_shape_is_named_with_its_reward(result: Any) -> None:
    functions = {"mine": lambda responses: result}
    with pytest.raises(RewardError) as caught:
        score(functions)
    assert str(caught.value).startswith("reward 'mine', on ")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    scores = score(functions, fallback=0.25)
    assert scores.fallbacks["mine"] == 4 or (isinstance(result, list) and len(result) == 1)
    assert scores.fallbacks["mine"] > 0 and all(map(math.isfinite, scores.outcomes))


@EACH
@given(st.sampled_from([ValueError, KeyError, RecursionError, MemoryError, SystemExit]), st.text())
def test_whatever_a_reward_raises_is_named_in_one_line(kind: type, text: str) -> None:
    def mine(responses: list[str]) -> list[float]:
        raise kind(text)

    with pytest.raises(RewardError) as caught:
        score({"mine": mine})
    assert str(caught.value).startswith("reward 'mine', on response 0 of 4 (prompt row 10), ")
    assert f"{kind.__name__}" in str(caught.value) and str(caught.value).isprintable()


NUMBERS = st.floats(-1e3, 1e3)


@EACH
@given(data=st.data(), weights=st.lists(NUMBERS, min_size=1, max_size=4))
def test_weighted_sums_are_those_by_hand(data: Any, weights: list[float]) -> None:
    kinds = [data.draw(st.booleans()) for _ in weights]
    lists = [
        [data.draw(proper_steps(len(text)) if steps else FINITE) for text in TEXTS]
        for steps in kinds
    ]
    functions = {
        f"f{n}": (lambda responses, given=given: list(given)) for n, given in enumerate(lists)
    }
    configs = [
        RewardConfig(function=name, weight=weight, timeout=None)
        for name, weight in zip(functions, weights, strict=True)
    ]
    prompts = [Prompt(tokens=[1], text="p", columns={}, index=n) for n in range(len(TEXTS))]
    responses = [
        Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=text) for text in TEXTS
    ]
    scores = Rewards(configs, functions=functions).score(prompts, responses)
    outcomes: list[list[float]] = [[] for _ in TEXTS]
    ends: list[dict[int, list[float]]] = [{} for _ in TEXTS]
    for weight, of_one in zip(weights, lists, strict=True):
        for n, value in enumerate(of_one):
            want = expected(value, TEXTS[n])
            if isinstance(want, list):
                for end, number in want:
                    ends[n].setdefault(end, []).append(weight * number)
            else:
                outcomes[n].append(weight * want)
    for n in range(len(TEXTS)):
        assert_sum(scores.outcomes[n], outcomes[n])
        if scores.steps is not None:
            assert [end for end, _ in scores.steps[n]] == sorted(ends[n])
            for end, total in scores.steps[n]:
                assert_sum(total, ends[n][end])
    assert (scores.steps is not None) == any(kinds)
    assert scores.fallbacks == dict.fromkeys(functions, 0)


def assert_sum(found: float, terms: list[float]) -> None:
    """Equal, but for the rounding of each addition."""
    rounding = len(terms) * 2**-52 * math.fsum(map(abs, terms))
    assert abs(found - math.fsum(terms)) <= rounding
