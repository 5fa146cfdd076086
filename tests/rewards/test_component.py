"""Checks of returned values: valid values, errors, and fallbacks."""

from __future__ import annotations

import math
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.rewards import (
    PROMPTS,
    RESPONSES,
    TEXTS,
    per_response,
    prompt,
    response,
    returning,
    rewards,
    score,
)
from helpers.waiting import eventually
from hypothesis import given
from hypothesis import strategies as st

from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.functions import time_left
from trivium.rewards.reward import Rewards
from trivium.rewards.reward_config import RewardConfig

# --- Values --------------------------------------------------------------------------------------

VALID_SCALARS = [
    True,
    np.float32(0.5),
    np.int64(2),
    np.bool_(False),
    torch.tensor(1.5),
    Fraction(1, 4),
]


@pytest.mark.parametrize("value", [*VALID_SCALARS, Decimal("0.25"), np.array(3.0), 7])
def test_scalars_of_every_type_are_numbers(value):
    outcomes = score(per_response([0, 0, value, 0])).outcomes
    assert outcomes == [0.0, 0.0, float(value), 0.0]
    assert all(type(number) is float for number in outcomes)


@pytest.mark.parametrize(
    "result",
    [
        (1.0, 2.0, 3.0, 4.0),
        np.array([1, 2, 3, 4]),
        torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True).detach(),
    ],
)
def test_sequences_of_every_type_are_lists_of_values(result):
    assert score(returning(result)).outcomes == [1.0, 2.0, 3.0, 4.0]


def test_generator_function_is_a_reward():
    def reward(responses):
        for text in responses:
            yield len(text)

    assert score(reward).outcomes == [4.0, 9.0, 4.0, 4.0]


INVALID_VALUES = [math.nan, math.inf, -math.inf, "1.0", np.nan, 1j, {}, 10**400, np.zeros(2)]


@pytest.mark.parametrize("value", INVALID_VALUES, ids=repr)
def test_error_of_an_invalid_value_names_function_and_response(value):
    with pytest.raises(RewardError) as caught:
        score(per_response([0, value, 0, 0]))
    message = str(caught.value)
    assert "reward 'f0'" in message
    assert "response 1 of 4 (prompt row 11)" in message
    assert r"'bb\x1b[31mbb'" in message and "\x1b" not in message
    assert "fallback" in message


@pytest.mark.parametrize("value", INVALID_VALUES, ids=repr)
def test_fallback_replaces_an_invalid_value_and_is_counted(value):
    scores = score(per_response([1, value, 2, value]), fallback=-0.5, weight=2)
    assert scores.outcomes == [2.0, -1.0, 4.0, -1.0]
    assert scores.components == {"f0": [1.0, -0.5, 2.0, -0.5]}
    assert scores.fallbacks == {"f0": 2}


INVALID_STEPS = {
    "outside": ([((0, 5), 1.0)], "outside the response's 4 characters"),
    "before the beginning": ([((-1, 2), 1.0)], "outside the response's 4 characters"),
    "overlapping": ([((0, 3), 1.0), ((2, 4), 1.0)], "must be in order and must not overlap"),
    "unordered": ([((2, 4), 1.0), ((0, 2), 1.0)], "must be in order and must not overlap"),
    "empty": ([((2, 2), 1.0)], "end must be after start"),
    "backwards": ([((3, 1), 1.0)], "end must be after start"),
    "not a pair": ([((0, 1, 2), 1.0)], "not ((start, end), number)"),
    "not spans": ([0.5, 0.5], "not ((start, end), number)"),
    "a float position": ([((0, 1.0), 1.0)], "not ((start, end), number)"),
    "a boolean position": ([((False, True), 1.0)], "not ((start, end), number)"),
    "a NaN": ([((0, 1), math.nan)], "is nan, not a finite number"),
    "no value": ([((0, 1), None)], "is NoneType None, not a number"),
}


@pytest.mark.parametrize(("steps", "reason"), INVALID_STEPS.values(), ids=INVALID_STEPS)
def test_invalid_steps_raise_an_error_or_use_the_fallback(steps, reason):
    good = [((0, 4), 1.0)]
    with pytest.raises(RewardError) as caught:
        score(per_response([good, good, steps, good]))
    message = str(caught.value)
    assert "response 2 of 4 (prompt row 12), 'cccc': step " in message
    assert reason in message
    scores = score(per_response([good, good, steps, good]), fallback=0.25, weight=2)
    assert scores.steps == [[(4, 2.0)], [(4, 2.0)], [(4, 0.5)], [(4, 2.0)]]
    assert scores.components["f0"] == [1.0, 1.0, 0.25, 1.0]
    assert scores.fallbacks == {"f0": 1}


@given(st.lists(st.tuples(st.integers(-2, 7), st.integers(-2, 7)), max_size=4))
def test_spans_are_valid_iff_ordered_disjoint_nonempty_and_inside(spans):
    covered = [position for start, end in spans for position in range(start, end)]
    proper = all(s < e for s, e in spans) and covered == sorted(set(covered))
    proper = proper and all(0 <= position < 4 for position in covered)
    scorer = rewards(lambda responses: [[(span, 1.0) for span in spans]], timeout=None)
    if proper:
        steps = scorer.score(PROMPTS[:1], RESPONSES[:1]).steps
        assert steps == [[(end, 1.0) for _, end in spans]]
    else:
        with pytest.raises(RewardError):
            scorer.score(PROMPTS[:1], RESPONSES[:1])


@given(st.lists(st.one_of(st.floats(), st.booleans(), st.text(max_size=2)), max_size=6))
def test_scores_are_finite_floats_for_any_returned_list(values):
    responses = [response(str(i)) for i in range(3)]
    scorer = rewards(lambda responses: values, fallback=0.125, timeout=None)
    scores = scorer.score(PROMPTS[:3], responses)
    assert all(type(x) is float and math.isfinite(x) for x in scores.outcomes)
    if len(values) != 3:
        assert scores.fallbacks == {"f0": 3}
    else:
        is_valid = [isinstance(v, bool | float) and math.isfinite(v) for v in values]
        assert scores.fallbacks == {"f0": is_valid.count(False)}
        expected = [float(v) if k else 0.125 for v, k in zip(values, is_valid, strict=True)]
        assert scores.outcomes == expected


def test_numbers_and_steps_cannot_be_mixed():
    mixed = per_response([1.0, 0.0, [((0, 1), 1.0)], 1.0])
    with pytest.raises(RewardError, match=r"response 2 of 4.*is a list of steps.*is a number"):
        score(mixed)
    assert score(mixed, fallback=7.0).outcomes == [1.0, 0.0, 7.0, 1.0]


def test_reward_cannot_change_its_form_between_batches():
    results = iter([[[((0, 1), 1.0)]] * 4, [1.0] * 4])
    scorer = rewards(lambda responses: next(results))
    scorer.score(PROMPTS, RESPONSES)
    with pytest.raises(RewardError, match=r"its value is a number, .* is a list of steps"):
        scorer.score(PROMPTS, RESPONSES)


def test_fallback_of_a_process_reward_is_at_the_end_of_the_response():
    scorer = rewards(per_response([[((0, 2), 1.0)], "none", "none", []]), fallback=0.5)
    assert scorer.score(PROMPTS, RESPONSES).steps == [[(2, 1.0)], [(9, 0.5)], [(4, 0.5)], []]
    empty = rewards(lambda responses: [[((0, 1), 1.0)], "none"], fallback=0.5)
    scores = empty.score(PROMPTS[:2], [response("a"), response("")])
    assert (scores.steps, scores.fallbacks) == ([[(1, 1.0)], []], {"f0": 1})


# --- Calls that fail -----------------------------------------------------------------------------


def fails_on_c(responses):
    if "cccc" in responses:
        raise KeyError("no \x1b[31m such thing")
    return [1.0] * len(responses)


def test_error_names_the_failing_response_the_exception_and_its_line():
    with pytest.raises(RewardError) as caught:
        score(fails_on_c)
    message = str(caught.value)
    assert "response 2 of 4 (prompt row 12), 'cccc': raised" in message
    assert "test_component.py:" in message and "KeyError" in message
    assert "\x1b" not in message
    assert isinstance(caught.value.__cause__, KeyError)


def test_search_stops_at_the_first_failing_response_without_a_fallback():
    calls = []

    def reward(responses):
        calls.append(responses)
        return fails_on_c(responses)

    with pytest.raises(RewardError):
        score(reward)
    assert calls == [TEXTS, TEXTS[:1], TEXTS[1:2], TEXTS[2:3]]


def test_fallback_applies_only_to_the_failing_response():
    scores = score(fails_on_c, fallback=0.0)
    assert scores.outcomes == [1.0, 1.0, 0.0, 1.0]
    assert scores.fallbacks == {"f0": 1}


def only_together(responses):
    if len(responses) > 1:
        raise ValueError("too many")
    return [1.0]


def test_error_names_the_batch_if_no_single_response_fails():
    with pytest.raises(RewardError, match=r"a batch of 4 responses.*too many.*raised no error"):
        score(only_together)
    assert score(only_together, fallback=0.5).fallbacks == {"f0": 4}


def test_wrong_number_of_values_names_the_response_that_causes_it():
    def skips(responses):
        return [1.0 for text in responses if text != "cccc"]

    with pytest.raises(RewardError, match=r"response 2 of 4.*returned 0 values for 1"):
        score(skips)
    assert score(skips, fallback=0.0).outcomes == [1.0, 1.0, 0.0, 1.0]
    with pytest.raises(RewardError, match=r"a batch of 4 .*returned 1 value for 4"):
        score(returning([1.0]))


@pytest.mark.parametrize("result", [None, 1.0, "1234", {"a": 1}, np.float64(1.0)], ids=repr)
def test_result_that_is_not_a_list_is_an_error_of_the_whole_batch(result):
    with pytest.raises(RewardError, match=r"a batch of 4 responses.*not a list of 4 values"):
        score(returning(result))
    assert score(returning(result), fallback=1.0).fallbacks == {"f0": 4}


def test_system_exit_in_a_reward_is_a_reward_error():
    def reward(responses):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="SystemExit: 3"):
        score(reward)


def test_hanging_call_is_abandoned_at_its_timeout():
    release, finished = threading.Event(), []

    def hangs(responses):
        release.wait(60)
        finished.append(responses)

    with pytest.raises(RewardError, match=r"'f0', on a batch of 4.*exceeded its timeout of 0.1 s"):
        score(hangs, timeout=0.1)
    assert score(hangs, timeout=0.1, fallback=2.0).outcomes == [2.0] * 4
    assert finished == []
    release.set()


def test_search_for_the_failing_response_shares_one_timeout():
    given = []

    def slow_failure(responses):
        given.append(time_left())
        time.sleep(0.15)
        raise ValueError("down")

    many = [response(str(i)) for i in range(50)]
    scores = rewards(slow_failure, timeout=0.2, fallback=0.0).score([prompt()] * 50, many)
    assert scores.fallbacks == {"f0": 50}
    # The batch has the timeout, and so has the search: two responses use it up.
    assert len(given) > 3 and sorted(given)[-4] <= 1e-3


def test_function_without_timeout_runs_in_the_callers_thread():
    def reward(responses):
        return [float(threading.current_thread() is threading.main_thread())] * len(responses)

    assert score(reward, timeout=None).outcomes == [1.0] * 4
    assert score(reward).outcomes == [0.0] * 4


def test_error_of_a_function_that_needs_the_main_thread_suggests_timeout_null():
    import signal

    def reward(responses):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return [1.0] * len(responses)

    with pytest.raises(RewardError, match="set 'timeout: null' to call it there"):
        score(reward)
    assert score(reward, timeout=None).outcomes == [1.0] * 4


def test_keyboard_interrupt_of_the_user_propagates():
    def reward(responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(reward, timeout=None, fallback=0.0)


# --- Asynchronous functions ----------------------------------------------------------------------


def test_asynchronous_reward_is_awaited():
    import asyncio

    waiting, all_wait = [], asyncio.Event()

    async def one(text):
        # Every response waits until all do: one after the other would not end.
        waiting.append(text)
        if len(waiting) % len(TEXTS) == 0:
            all_wait.set()
        await all_wait.wait()
        return float(len(text))

    async def reward(responses):
        return await asyncio.gather(*map(one, responses))

    assert score(reward).outcomes == [4.0, 9.0, 4.0, 4.0]
    assert score(reward, timeout=None).outcomes == [4.0, 9.0, 4.0, 4.0]


def test_hanging_coroutine_is_canceled_at_its_timeout():
    import asyncio

    canceled = threading.Event()

    async def reward(responses):
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            canceled.set()
            raise

    with pytest.raises(RewardError, match=r"exceeded its timeout of 0\.1 s"):
        score(reward, timeout=0.1)
    assert eventually(canceled.is_set)


def test_timeout_error_of_the_function_is_reported_as_its_own_error():
    async def reward(responses):
        raise TimeoutError("server is silent")

    with pytest.raises(RewardError, match=r"raised .*TimeoutError: server is silent"):
        score(reward)


def test_coroutine_that_ignores_cancellation_is_abandoned():
    import asyncio

    release, finished = threading.Event(), []

    async def reward(responses):
        while not release.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        finished.append(responses)

    with pytest.raises(RewardError, match=r"exceeded its timeout of 0\.1 s"):
        score(reward, timeout=0.1)
    assert finished == []
    release.set()


# --- Hostile functions ---------------------------------------------------------------------------


class Hostile(Exception):
    """An exception whose message and repr raise."""

    def __str__(self):
        raise ValueError("no")

    __repr__ = __str__


class Unreadable:
    """An object that looks like a scalar tensor and raises when it is read."""

    ndim = 0

    def __init__(self, kind=RuntimeError):
        self.kind = kind

    def tolist(self):
        raise self.kind("device lost")

    def __repr__(self):
        raise self.kind("device lost")


class UnconvertibleNumber(Fraction):
    """A number whose conversion to float raises."""

    def __float__(self):
        raise RuntimeError("no")


UNREADABLE = [Unreadable(), UnconvertibleNumber(1, 2), np.ma.masked, Hostile]


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda v: type(v).__name__)
def test_unreadable_value_is_an_error_of_its_response(value):
    with pytest.raises(RewardError, match=r"response 1 of 4 \(prompt row 11\)"):
        score(per_response([0, value, 0, 0]))
    assert score(per_response([1, value, 2, 3]), fallback=9.0).outcomes == [1.0, 9.0, 2.0, 3.0]


RAISED = [Hostile(), MemoryError(), RecursionError(), StopIteration(), GeneratorExit()]


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_exception_of_any_type_is_a_reward_error(error):
    def reward(responses):
        raise error

    with pytest.raises(RewardError, match=rf"raised .*{type(error).__name__}"):
        score(reward)
    assert score(reward, fallback=0.5).fallbacks == {"f0": 4}


def test_keyboard_interrupt_raised_by_the_function_is_a_reward_error():
    def reward(responses):
        raise KeyboardInterrupt

    with pytest.raises(RewardError, match="raised KeyboardInterrupt itself"):
        score(reward)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_exception_in_a_generator_is_a_reward_error(steps_before):
    def reward(responses):
        yield from [1.0] * min(steps_before, len(responses) - 1)
        raise KeyError("halfway")

    with pytest.raises(RewardError, match=r"response 0 of 4.*KeyError: 'halfway'"):
        score(reward)


SHAPES = {
    "a column": (np.zeros((4, 1)), r"ndarray of the shape \(4, 1\)"),
    "a matrix": (torch.zeros(2, 2), r"Tensor of the shape \(2, 2\)"),
    "nothing": (np.zeros((4, 0)), r"ndarray of the shape \(4, 0\)"),
    "too long": (np.zeros(5), r"returned 5 values for 1"),
    "an array of texts": (np.array(["1"] * 4), r"is str '1', not a number"),
    "complex": (np.zeros(4, dtype=complex), r"is complex 0j, not a number"),
    "nested lists": ([[1.0]] * 4, r"step 0 is float 1.0, not \(\(start, end\), number\)"),
    "an array that raises": (Unreadable(), r"returned Unreadable .*, which raises RuntimeError"),
}


@pytest.mark.parametrize(("result", "reason"), SHAPES.values(), ids=SHAPES)
def test_result_of_the_wrong_shape_reports_its_shape(result, reason):
    with pytest.raises(RewardError, match=reason):
        score(returning(result))
    assert score(returning(result), fallback=0.5).fallbacks == {"f0": 4}


def test_exception_in_place_of_a_value_is_its_reason():
    values = [1.0, RewardError("the judge is asleep"), 2.0, ValueError()]
    with pytest.raises(
        RewardError, match=r"response 1 of 4 .*: the judge is asleep \(1 more failed"
    ):
        score(per_response(values))
    scores = score(per_response(values), fallback=-1.0)
    assert (scores.outcomes, scores.fallbacks) == ([1.0, -1.0, 2.0, -1.0], {"f0": 2})


def test_reward_error_raised_by_the_function_skips_the_search():
    calls = []

    def reward(responses):
        calls.append(len(responses))
        raise RewardError("the judge is asleep")

    with pytest.raises(RewardError, match=r"on a batch of 4 responses .*: the judge is asleep\."):
        score(reward)
    assert calls == [4]


def test_reward_can_print(capsys):
    def reward(responses):
        print("thinking about", len(responses))
        return [1.0] * len(responses)

    assert score(reward).outcomes == [1.0] * 4
    assert capsys.readouterr().out == "thinking about 4\n"


def test_function_can_query_the_remaining_time():
    def reward(responses):
        return [time_left() or 0.0] * len(responses)

    assert all(0.0 < left <= 1000.0 for left in score(reward, timeout=1000.0).outcomes)
    assert score(reward, timeout=None).outcomes == [0.0] * 4


# --- Rows that a reward does not apply to ---------------------------------------------------------


def routed(function, others, sources):
    """Return a reward for some sources, and a constant one for all rows."""
    configs = [
        RewardConfig(function="own", only={"source": sources}), RewardConfig(function="others")
    ]  # fmt: skip
    return Rewards(configs, functions={"own": function, "others": lambda responses: others})


def test_a_reward_with_only_sees_and_scores_the_rows_it_names() -> None:
    seen = []

    def length(responses, source):
        seen.append((list(responses), list(source)))
        return [float(len(text)) for text in responses]

    prompts = [prompt(i, source=name) for i, name in enumerate(["math", "chat", "math", "code"])]
    scores = routed(length, [1.0] * 4, ["math", "code"]).score(prompts, RESPONSES)
    assert seen == [([TEXTS[0], TEXTS[2], TEXTS[3]], ["math", "math", "code"])]
    assert scores.outcomes == [5.0, 1.0, 5.0, 5.0]


def test_a_reward_of_no_row_of_a_batch_is_not_called() -> None:
    def never(responses, source):
        raise AssertionError("called")

    prompts = [prompt(i, source="chat") for i in range(4)]
    assert routed(never, [2.0] * 4, ["math"]).score(prompts, RESPONSES).outcomes == [2.0] * 4


def test_a_column_of_only_that_no_row_has_is_refused() -> None:
    def one(responses):
        return [1.0] * len(responses)

    prompts = [prompt(i, sauce="math") for i in range(4)]
    with pytest.raises(ConfigurationError, match=r"`only` names the column 'source'.*'sauce'"):
        rewards(one, only={"source": ["math"]}).score(prompts, RESPONSES)


def test_only_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="source has no value, so that no row is scored"):
        rewards(lambda responses: responses, only={"source": []})
