"""Any returned value is either scored exactly or reported in an error that names the reward."""

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
from trivium.data.response import Response
from trivium.errors import RewardError
from trivium.rewards.reward import RewardConfig, Rewards

HUNDRED_EXAMPLES = settings(max_examples=100)
TEXTS = ["aaaa", "b\x1b[31mb", "", "dd\n"]


class Hostile:
    """An object that raises on every access."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def _raise(self, *_: Any) -> Any:
        raise self.error

    __repr__ = __iter__ = __len__ = __float__ = __index__ = __bool__ = __eq__ = _raise
    item = tolist = _raise


class UnconvertibleFloat(float):
    """A float whose conversion to float raises."""

    def __float__(self) -> float:
        raise ZeroDivisionError


def nested_list(depth: int) -> Any:
    value: Any = 1.0
    for _ in range(depth):
        value = [value]
    return value


def self_containing_list() -> list[Any]:
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
INVALID_NUMBERS = [
    *("1.0", "", b"1", 1j, {}, {"a": 1.0}, {1.0}, range(3), object(), float, len),
    *(math.nan, math.inf, -math.inf, 10**400, Fraction(10**400), Decimal("1e999")),
    *(Decimal("NaN"), Decimal("sNaN"), np.float32("nan"), np.zeros(2), np.array("x")),
    *(np.datetime64("nat"), np.array(None), torch.zeros(2), torch.tensor(math.nan)),
    *(
        torch.empty((), device="meta"),
        torch.tensor(1j),
        UnconvertibleFloat(1),
        Hostile(ValueError("no")),
    ),
    *(Hostile(RuntimeError("no")), Hostile(RecursionError()), Hostile(MemoryError())),
]
INVALID_NUMBER = st.sampled_from(INVALID_NUMBERS)
POSITION = st.integers(-1, 6) | st.integers(0, 4).map(np.int64) | st.sampled_from([True, 1.0, "1"])
STEP = st.tuples(st.tuples(POSITION, POSITION), FINITE | INVALID_NUMBER)
INVALID_STEPS = st.lists(
    STEP | FINITE | INVALID_NUMBER | st.lists(FINITE, max_size=3), min_size=1, max_size=3
)
NESTED_LISTS = st.sampled_from(
    [
        nested_list(5),
        nested_list(900),
        (nested_list(900),),
        self_containing_list(),
        [self_containing_list()],
        [[], []],
    ]
)


@st.composite
def valid_steps(draw: Any, length: int = 4) -> list[Any]:
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=4)))
    return [((a, b), draw(FINITE)) for a, b in pairwise(cuts)]


@st.composite
def nearly_valid_steps(draw: Any) -> list[Any]:
    """Draw steps whose spans may overlap, or whose first position is not an integer."""
    if draw(st.booleans()):
        spans = st.tuples(st.integers(0, 4), st.integers(0, 4))
        return draw(st.lists(st.tuples(spans, FINITE), min_size=2, max_size=3))
    end, number = draw(st.integers(1, 4)), draw(FINITE)
    return [((draw(st.sampled_from([False, 0.0, "0", None])), end), number)]


# Equal probability for each kind, unlike `|`, which flattens the nested alternatives.
KINDS = [FINITE, valid_steps(), nearly_valid_steps(), INVALID_NUMBER, INVALID_STEPS, NESTED_LISTS]
VALUE = st.sampled_from(KINDS).flatmap(lambda kind: kind)


def expected_number(value: Any) -> float | None:
    """Return the value as a number, by another method than the tested code."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        is_scalar = value.ndim == 0 and str(value.dtype).split(".")[-1].startswith(("float", "int"))
        if not is_scalar or (isinstance(value, torch.Tensor) and value.is_meta):
            return None
        value = value.tolist()
    if isinstance(value, UnconvertibleFloat) or type(value) not in (
        bool,
        int,
        float,
        Fraction,
        Decimal,
    ):
        return None
    if isinstance(value, Decimal) and not value.is_finite():
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return float(value) if abs(value) < 2**1000 else None


def expected_steps(value: Any, length: int) -> list[tuple[int, float]] | None:
    """Return the ends and values of steps, or None if they are not ordered spans with numbers."""
    found, last = [], 0
    for entry in value:
        if not (isinstance(entry, tuple | list) and len(entry) == 2):
            return None
        span, number = entry
        if not (isinstance(span, tuple | list) and len(span) == 2):
            return None
        if not all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in span):
            return None
        if not last <= span[0] < span[1] <= length or expected_number(number) is None:
            return None
        last = int(span[1])
        found.append((last, expected_number(number)))
    return found


def expected(value: Any, text: str) -> float | list[tuple[int, float]] | None:
    return (
        expected_steps(value, len(text))
        if isinstance(value, list | tuple)
        else expected_number(value)
    )


def score(functions: dict[str, Any], count: int = len(TEXTS), **settings: Any) -> Any:
    configs = [RewardConfig(function=name, timeout=None, **settings) for name in functions]
    prompts = [Prompt(tokens=[1], text="p", columns={}, index=10 + n) for n in range(count)]
    responses = [
        Response(tokens=[1], logprobs=[0.0], finish_reason="eos", text=t) for t in TEXTS[:count]
    ]
    return Rewards(configs, functions=functions).score(prompts, responses)


@HUNDRED_EXAMPLES
@given(st.lists(VALUE, min_size=4, max_size=4))
def test_value_is_exact_or_the_error_names_reward_and_response(values: list[Any]) -> None:
    expected_values = [expected(value, text) for value, text in zip(values, TEXTS, strict=True)]
    are_steps = next(
        (
            isinstance(expected_value, list)
            for expected_value in expected_values
            if expected_value is not None
        ),
        None,
    )
    faulty = [
        n
        for n, expected_value in enumerate(expected_values)
        if expected_value is None or isinstance(expected_value, list) != are_steps
    ]
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
    for n, (expected_value, text) in enumerate(zip(expected_values, TEXTS, strict=True)):
        if n in faulty:
            expected_value = ([(len(text), 0.25)] if text else []) if are_steps else 0.25
        if isinstance(expected_value, list):
            assert scores.steps[n] == expected_value and scores.outcomes[n] == 0.0
        else:
            assert scores.outcomes[n] == expected_value and type(scores.outcomes[n]) is float


@HUNDRED_EXAMPLES
@given(nearly_valid_steps())
def test_steps_are_valid_iff_spans_are_integer_ordered_and_disjoint(steps: Any) -> None:
    expected_value = expected(steps, "aaaa")
    if expected_value is None:
        with pytest.raises(
            RewardError, match=r"on response 0 of 1 \(prompt row 10\), 'aaaa': step "
        ):
            score({"mine": lambda responses: [steps]}, count=1)
    else:
        assert score({"mine": lambda responses: [steps]}, count=1).steps == [expected_value]


@pytest.mark.parametrize(
    "value", INVALID_NUMBERS, ids=[type(value).__name__ for value in INVALID_NUMBERS]
)
def test_invalid_number_is_an_error_as_value_in_a_step_and_as_result(value: Any) -> None:
    for returned in (value, [((0, 1), value)]):
        with pytest.raises(RewardError, match=r"on response 0 of 1 \(prompt row 10\), 'aaaa': "):
            score({"mine": lambda responses, returned=returned: [returned]}, count=1)
    with pytest.raises(RewardError, match=r"^reward 'mine', on "):
        score({"mine": lambda responses: value}, count=3)


@HUNDRED_EXAMPLES
@given(st.one_of(VALUE, st.lists(VALUE, max_size=3), st.lists(VALUE, min_size=5, max_size=6)))
def test_error_of_a_result_of_another_shape_names_the_reward(result: Any) -> None:
    functions = {"mine": lambda responses: result}
    with pytest.raises(RewardError) as caught:
        score(functions)
    assert str(caught.value).startswith("reward 'mine', on ")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    scores = score(functions, fallback=0.25)
    assert scores.fallbacks["mine"] == 4 or (isinstance(result, list) and len(result) == 1)
    assert scores.fallbacks["mine"] > 0 and all(map(math.isfinite, scores.outcomes))


@HUNDRED_EXAMPLES
@given(st.sampled_from([ValueError, KeyError, RecursionError, MemoryError, SystemExit]), st.text())
def test_error_names_any_exception_of_a_reward_in_one_line(kind: type, text: str) -> None:
    def mine(responses: list[str]) -> list[float]:
        raise kind(text)

    with pytest.raises(RewardError) as caught:
        score({"mine": mine})
    assert str(caught.value).startswith("reward 'mine', on response 0 of 4 (prompt row 10), ")
    assert f"{kind.__name__}" in str(caught.value) and str(caught.value).isprintable()


NUMBERS = st.floats(-1e3, 1e3)


@HUNDRED_EXAMPLES
@given(data=st.data(), weights=st.lists(NUMBERS, min_size=1, max_size=4))
def test_weighted_sums_equal_direct_sums(data: Any, weights: list[float]) -> None:
    is_process = [data.draw(st.booleans()) for _ in weights]
    lists = [
        [data.draw(valid_steps(len(text)) if steps else FINITE) for text in TEXTS]
        for steps in is_process
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
    for weight, values_of_reward in zip(weights, lists, strict=True):
        for n, value in enumerate(values_of_reward):
            expected_value = expected(value, TEXTS[n])
            if isinstance(expected_value, list):
                for end, number in expected_value:
                    ends[n].setdefault(end, []).append(weight * number)
            else:
                outcomes[n].append(weight * expected_value)
    for n in range(len(TEXTS)):
        assert_sum(scores.outcomes[n], outcomes[n])
        if scores.steps is not None:
            assert [end for end, _ in scores.steps[n]] == sorted(ends[n])
            for end, total in scores.steps[n]:
                assert_sum(total, ends[n][end])
    assert (scores.steps is not None) == any(is_process)
    assert scores.fallbacks == dict.fromkeys(functions, 0)


def assert_sum(found: float, terms: list[float]) -> None:
    """Assert that a sum is exact up to the rounding error of each addition."""
    rounding = len(terms) * 2**-52 * math.fsum(map(abs, terms))
    assert abs(found - math.fsum(terms)) <= rounding
