"""Scoring while sampling: the same rewards, errors and fallbacks, in less time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.tiny_models import EOS, family, letters_tokenizer, random_lm

from trivium.data.prompts import Prompt
from trivium.errors import ConfigurationError, RewardError
from trivium.models.policy import Policy
from trivium.rewards.reward import RewardConfig, Rewards, Scores
from trivium.rollout.engine import Finished, Response
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.rollout.sampling import Sampling

COUNT = 13
PROMPTS = [
    Prompt([1 + i % 5], "xyz"[: i % 4], {"answer": i} if i == 7 else {}, 20 + i)
    for i in range(COUNT)
]
SAMPLING = Sampling(max_tokens=30)


class Slow:
    """An engine whose groups end in the order of ``ends``, so many seconds after one another."""

    def __init__(self, ends: Sequence[int] = range(COUNT), seconds: float = 0.0) -> None:
        self.ends, self.seconds = ends, seconds

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        finished: Finished | None = None,
    ) -> list[list[Response]]:
        texts = [[f"{i}.{j}" for j in range(samples)] for i in range(len(prompts))]
        groups = [[Response([1], [0.0], "eos", text) for text in group] for group in texts]
        for place in self.ends:
            time.sleep(self.seconds)
            assert finished is not None
            finished(place, groups[place])
        return groups


def local(max_rows: int = 12) -> LocalEngine:
    policy = Policy(random_lm(family("llama", 13), spread=0.2), letters_tokenizer())
    return LocalEngine(policy, {EOS}, max_rows=max_rows)


def rewards_of(*functions: Callable[..., Any], early: bool = True, **settings: Any) -> Rewards:
    names = [f"f{i}" for i in range(len(functions))]
    given = {"while_sampling": early, "timeout": 20.0} | settings
    configs = [RewardConfig(function=name, **given) for name in names]
    return Rewards(configs, functions=dict(zip(names, functions, strict=True)))


def rolled(engine: Any, rewards: Rewards) -> Rollouts:
    return roll_out(engine, rewards, PROMPTS, 3, SAMPLING, seed=1, step=2)


def both_ways(*functions: Callable[..., Any], **settings: Any) -> list[Scores]:
    """The scores of one batch, scored while it is sampled and afterwards."""
    ways = [rewards_of(*functions, early=early, **settings) for early in (True, False)]
    return [rolled(local(), rewards).scores for rewards in ways]


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("trivium")]


# --- The same ------------------------------------------------------------------------------------


def by_text(prompts: list[str], responses: list[str], answer: list[Any]) -> list[float]:
    rows = zip(prompts, responses, answer, strict=True)
    return [len(p) + r.count("a") - 0.1 * r.count("b") + (a or -3) for p, r, a in rows]


def by_step(response_tokens: list[list[int]], responses: list[str]) -> list[Any]:
    return [
        [((i, i + 1), len(tokens) + 0.3 * i) for i in range(len(text))]
        for tokens, text in zip(response_tokens, responses, strict=True)
    ]


def test_rewards_are_those_of_one_call_after_sampling() -> None:
    early, after = both_ways(by_text, by_step)
    assert early == after
    assert len(set(early.outcomes)) > 10


def test_values_of_single_responses_that_are_none_are_faults_of_these_alone() -> None:
    def some_fail(responses: list[str]) -> list[Any]:
        return [ValueError("no a") if "a" not in r else len(r) for r in responses]

    early, after = both_ways(some_fail, fallback=-7.0)
    assert early == after
    assert 0 < early.fallbacks["f0"] < 3 * COUNT


@pytest.mark.parametrize("fallback", [None, 0.25])
@pytest.mark.parametrize("fault", ["raises", "count", "nan", "mixed", "hangs", "not a list"])
def test_faults_end_in_the_same_error_or_the_same_fallbacks(
    fault: str, fallback: float | None
) -> None:
    free = threading.Event()

    def faulty(responses: list[str]) -> Any:
        bad = ["a" in r for r in responses]
        if any(bad):
            if fault == "raises":
                raise KeyError("a")
            if fault == "hangs":
                free.wait(10)
            if fault == "not a list":
                return 1.0
            if fault == "count":
                return [1.0] * (len(responses) - 1)
        wrong = {"nan": float("nan"), "mixed": [((0, 1), 1.0)]}.get(fault, 0.0)
        return [wrong if b else 1.0 for b in bad]

    def outcome(early: bool) -> Any:
        limit = 0.3 if fault == "hangs" else 20.0
        rewards = rewards_of(faulty, early=early, fallback=fallback, timeout=limit)
        try:
            return rolled(local(), rewards).scores
        except RewardError as error:
            return str(error)

    try:
        found = outcome(True)
        assert found == outcome(False)
        assert isinstance(found, str) == (fallback is None)
    finally:
        free.set()


def test_missing_column_is_told_as_after_sampling() -> None:
    def needs(responses: list[str], gold: list[Any]) -> list[float]:
        return [0.0] * len(responses)

    told = []
    for early in (True, False):
        with pytest.raises(ConfigurationError) as raised:
            rolled(local(), rewards_of(needs, early=early))
        told.append(str(raised.value))
    assert told[0] == told[1]


def test_calls_are_for_whole_groups_and_the_same_however_slow() -> None:
    def calls(seconds: float) -> list[list[str]]:
        seen: list[list[str]] = []

        def noted(responses: list[str]) -> list[float]:
            time.sleep(seconds)
            seen.append(responses)
            return [0.0] * len(responses)

        ends = (5, 0, 1, 11, 2, 3, 4, 6, 7, 8, 9, 10, 12)
        rolled(Slow(ends), rewards_of(noted))
        return seen

    first, second = calls(0.0)[:2]
    assert first == ["5.0", "5.1", "5.2", "0.0", "0.1", "0.2"]
    assert second == ["1.0", "1.1", "1.2", "11.0", "11.1", "11.2"]
    assert calls(0.0) == calls(0.02)
    assert [len(call) for call in calls(0.0)] == [6] * 6 + [3]


def test_rewards_are_called_once_with_everything_unless_asked_otherwise() -> None:
    seen: list[int] = []

    def noted(responses: list[str]) -> list[float]:
        seen.append(len(responses))
        return [0.0] * len(responses)

    rolled(Slow(), Rewards([RewardConfig(function="noted")], functions={"noted": noted}))
    assert seen == [3 * COUNT]
    rolled(Slow(ends=()), rewards_of(noted))
    assert seen == [3 * COUNT] * 2  # An engine that learns of all groups together tells of none.


def test_only_rewards_that_wait_for_processes_are_early_by_themselves() -> None:
    names = ("server", "code", "math", "gsm8k", "format", "length", "steps", "f.py:g")
    early = [name for name in names if RewardConfig(function=name).early]
    assert early == ["server", "code", "math"]
    assert not RewardConfig(function="server", timeout=None).early
    assert not RewardConfig(function="server", while_sampling=False).early


def test_engine_tells_of_every_group_once_when_it_ends() -> None:
    engine, told = local(max_rows=36), []
    found = engine.generate(
        PROMPTS, 3, SAMPLING, seed=1, step=2, finished=lambda *group: told.append(group)
    )
    assert sorted(place for place, _ in told) == list(range(COUNT))
    assert all(group is found[place] for place, group in told)
    assert [place for place, _ in told] != list(range(COUNT))
    again: list[int] = []
    engine.generate(PROMPTS, 3, SAMPLING, seed=1, step=2, finished=lambda i, _: again.append(i))
    assert again == [place for place, _ in told]


# --- In less time --------------------------------------------------------------------------------


def test_scoring_goes_on_while_groups_are_sampled() -> None:
    called = threading.Event()

    def told(responses: list[str]) -> list[float]:
        called.set()
        return [0.0] * len(responses)

    class Waits(Slow):
        def generate(self, *args: Any, finished: Any, **kwargs: Any) -> Any:
            groups = super().generate(*args, finished=finished, **kwargs)
            assert called.wait(10), "no reward was called before sampling ended"
            return groups

    rolled(Waits(ends=(3, 4)), rewards_of(told))


def test_a_batch_takes_as_long_as_the_longer_of_sampling_and_scoring() -> None:
    def slow(responses: list[str]) -> list[float]:
        time.sleep(0.1)
        return [0.0] * len(responses)

    start = time.perf_counter()
    rollouts = rolled(Slow(seconds=0.06), rewards_of(slow))  # 0.78 s of sampling, 0.7 s of scoring
    took = time.perf_counter() - start
    assert 0.78 <= took < 1.2
    assert rollouts.seconds["rollout"] >= 0.78
    assert 0.05 < rollouts.seconds["scoring"] < 0.4
    assert sum(rollouts.seconds.values()) == pytest.approx(took, abs=0.05)


def test_learned_reward_in_the_thread_keeps_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    modes: list[bool] = []

    @torch.no_grad()
    def learned(responses: list[str]) -> torch.Tensor:
        modes.append((weight * 2).requires_grad)
        return torch.zeros(len(responses))

    rolled(local(), rewards_of(learned))
    assert modes and not any(modes)


# --- Given up ------------------------------------------------------------------------------------


def test_sampling_that_is_given_up_leaves_no_call_to_come() -> None:
    free, calls = threading.Event(), []

    def held(responses: list[str]) -> list[float]:
        calls.append(responses)
        free.wait(10)
        return [0.0] * len(responses)

    class GivenUp(Slow):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            super().generate(*args, **kwargs)
            while not calls:
                time.sleep(0.001)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rolled(GivenUp(), rewards_of(held))
    free.set()
    for thread in threads():
        thread.join(10)
    assert len(calls) == 1
    assert threads() == []


def test_signal_breaks_off_the_wait_for_the_last_calls() -> None:
    free = threading.Event()

    def held(responses: list[str]) -> list[float]:
        free.wait(10)
        return [0.0] * len(responses)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            rolled(Slow(), rewards_of(held))
        assert time.perf_counter() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        free.set()
        for thread in threads():
            thread.join(10)
