"""Scoring overlapped with sampling: the same rewards, errors and fallbacks in less time."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import EOS, family, letters_tokenizer, random_lm
from helpers.waiting import eventually

from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError, RewardError
from trivium.models.policy import Policy
from trivium.rewards.overlap import CALLS_PER_BATCH
from trivium.rewards.reward import RewardConfig, Rewards, Scores
from trivium.rollout import rollouts as rollouts_module
from trivium.rollout.engine import Finished
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.rollout.sampling import Sampling

COUNT = 13
GROUPS_PER_CALL = math.ceil(COUNT / CALLS_PER_BATCH)
PROMPTS = [
    Prompt([1 + i % 5], "xyz"[: i % 4], {"answer": i} if i == 7 else {}, 20 + i)
    for i in range(COUNT)
]
SAMPLING = Sampling(max_tokens=30)


class ScriptedEngine:
    """An engine whose groups finish in the given order, ``seconds`` apart."""

    def __init__(self, order: Sequence[int] = range(COUNT), seconds: float = 0.0) -> None:
        self.order, self.seconds = order, seconds

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        first_samples: Sequence[int] | None = None,
        finished: Finished | None = None,
    ) -> list[list[Response]]:
        texts = [[f"{i}.{j}" for j in range(samples)] for i in range(len(prompts))]
        groups = [[Response([1], [0.0], "eos", text) for text in group] for group in texts]
        for index in self.order:
            time.sleep(self.seconds)
            assert finished is not None
            finished(index, groups[index])
        return groups


def local_engine_of(max_rows: int = 12) -> LocalEngine:
    policy = Policy(random_lm(family("llama", 13), spread=0.2), letters_tokenizer())
    return LocalEngine(policy, {EOS}, max_rows=max_rows)


def rewards_of(*functions: Callable[..., Any], overlapped: bool = True, **settings: Any) -> Rewards:
    names = [f"f{i}" for i in range(len(functions))]
    config_values = {"while_sampling": overlapped, "timeout": 20.0} | settings
    configs = [RewardConfig(function=name, **config_values) for name in names]
    return Rewards(configs, functions=dict(zip(names, functions, strict=True)))


def roll_out_with(engine: Any, rewards: Rewards) -> Rollouts:
    return roll_out(engine, rewards, PROMPTS, 3, SAMPLING, seed=1, step=2)


def scores_overlapped_and_after(*functions: Callable[..., Any], **settings: Any) -> list[Scores]:
    """Return the scores of one batch, scored during sampling and after sampling."""
    variants = [
        rewards_of(*functions, overlapped=overlapped, **settings) for overlapped in (True, False)
    ]
    return [roll_out_with(local_engine_of(), rewards).scores for rewards in variants]


def trivium_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("trivium")]


# --- Equal results -------------------------------------------------------------------------------


def by_text(prompts: list[str], responses: list[str], answer: list[Any]) -> list[float]:
    rows = zip(prompts, responses, answer, strict=True)
    return [len(p) + r.count("a") - 0.1 * r.count("b") + (a or -3) for p, r, a in rows]


def by_step(response_tokens: list[list[int]], responses: list[str]) -> list[Any]:
    return [
        [((i, i + 1), len(tokens) + 0.3 * i) for i in range(len(text))]
        for tokens, text in zip(response_tokens, responses, strict=True)
    ]


def test_overlapped_scores_equal_one_call_after_sampling() -> None:
    overlapped, afterwards = scores_overlapped_and_after(by_text, by_step)
    assert overlapped == afterwards
    assert len(set(overlapped.outcomes)) > 10


def test_invalid_values_affect_only_their_own_responses() -> None:
    def some_fail(responses: list[str]) -> list[Any]:
        return [ValueError("no a") if "a" not in r else len(r) for r in responses]

    overlapped, afterwards = scores_overlapped_and_after(some_fail, fallback=-7.0)
    assert overlapped == afterwards
    assert 0 < overlapped.fallbacks["f0"] < 3 * COUNT


@pytest.mark.parametrize("fallback", [None, 0.25])
@pytest.mark.parametrize("fault", ["raises", "count", "nan", "mixed", "hangs", "not a list"])
def test_failures_give_the_same_error_or_fallbacks_with_overlap(
    fault: str, fallback: float | None
) -> None:
    release = threading.Event()

    def faulty(responses: list[str]) -> Any:
        has_a = ["a" in r for r in responses]
        if any(has_a):
            if fault == "raises":
                raise KeyError("a")
            if fault == "hangs":
                release.wait(10)
            if fault == "not a list":
                return 1.0
            if fault == "count":
                return [1.0] * (len(responses) - 1)
        wrong = {"nan": float("nan"), "mixed": [((0, 1), 1.0)]}.get(fault, 0.0)
        return [wrong if b else 1.0 for b in has_a]

    def outcome(overlapped: bool) -> Any:
        limit = 0.3 if fault == "hangs" else 20.0
        rewards = rewards_of(faulty, overlapped=overlapped, fallback=fallback, timeout=limit)
        try:
            return roll_out_with(local_engine_of(), rewards).scores
        except RewardError as error:
            return str(error)

    try:
        result = outcome(True)
        assert result == outcome(False)
        assert isinstance(result, str) == (fallback is None)
    finally:
        release.set()


def test_missing_column_gives_the_same_error_with_overlap() -> None:
    def needs(responses: list[str], gold: list[Any]) -> list[float]:
        return [0.0] * len(responses)

    messages = []
    for overlapped in (True, False):
        with pytest.raises(ConfigurationError) as raised:
            roll_out_with(local_engine_of(), rewards_of(needs, overlapped=overlapped))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_calls_hold_whole_groups_and_do_not_depend_on_speed() -> None:
    def calls(seconds: float) -> list[list[str]]:
        recorded: list[list[str]] = []

        def record_call(responses: list[str]) -> list[float]:
            time.sleep(seconds)
            recorded.append(responses)
            return [0.0] * len(responses)

        order = (5, 0, 1, 11, 2, 3, 4, 6, 7, 8, 9, 10, 12)
        roll_out_with(ScriptedEngine(order), rewards_of(record_call))
        return recorded

    first, second = calls(0.0)[:2]
    assert first == ["5.0", "5.1", "5.2", "0.0", "0.1", "0.2"]
    assert second == ["1.0", "1.1", "1.2", "11.0", "11.1", "11.2"]
    assert calls(0.0) == calls(0.02)
    assert [len(call) for call in calls(0.0)] == [6] * 6 + [3]


def test_rewards_are_called_once_for_all_responses_by_default() -> None:
    recorded: list[int] = []

    def record_call(responses: list[str]) -> list[float]:
        recorded.append(len(responses))
        return [0.0] * len(responses)

    rewards = Rewards([RewardConfig(function="f")], functions={"f": record_call})
    roll_out_with(ScriptedEngine(), rewards)
    assert recorded == [3 * COUNT]
    roll_out_with(ScriptedEngine(order=()), rewards_of(record_call))
    assert recorded == [3 * COUNT] * 2  # The engine reported no finished group.


def test_only_rewards_that_wait_for_processes_overlap_by_default() -> None:
    names = ("server", "code", "math", "gsm8k", "format", "length", "steps", "f.py:g")
    overlapped = [name for name in names if RewardConfig(function=name).overlaps_sampling]
    assert overlapped == ["server", "code", "math"]
    assert not RewardConfig(function="server", timeout=None).overlaps_sampling
    assert not RewardConfig(function="server", while_sampling=False).overlaps_sampling


def test_engine_reports_every_finished_group_once() -> None:
    engine, reported = local_engine_of(max_rows=36), []
    groups = engine.generate(
        PROMPTS, 3, SAMPLING, seed=1, step=2, finished=lambda *group: reported.append(group)
    )
    assert sorted(index for index, _ in reported) == list(range(COUNT))
    assert all(group is groups[index] for index, group in reported)
    assert [index for index, _ in reported] != list(range(COUNT))
    again: list[int] = []
    engine.generate(PROMPTS, 3, SAMPLING, seed=1, step=2, finished=lambda i, _: again.append(i))
    assert again == [index for index, _ in reported]


# --- Time ----------------------------------------------------------------------------------------


def test_scoring_runs_while_groups_are_sampled() -> None:
    called = threading.Event()

    def reward(responses: list[str]) -> list[float]:
        called.set()
        return [0.0] * len(responses)

    class WaitingEngine(ScriptedEngine):
        def generate(self, *args: Any, finished: Any, **kwargs: Any) -> Any:
            groups = super().generate(*args, finished=finished, **kwargs)
            assert called.wait(10), "no reward was called before sampling ended"
            return groups

    roll_out_with(WaitingEngine(order=(3, 4)), rewards_of(reward))


def test_calls_end_while_groups_are_sampled_so_only_the_last_are_waited_for() -> None:
    scored: list[str] = []

    def reward(responses: list[str]) -> list[float]:
        scored.extend(responses)
        return [0.0] * len(responses)

    class PatientEngine(ScriptedEngine):
        def generate(self, *args: Any, finished: Any, **kwargs: Any) -> Any:
            reported = 0

            def report_and_wait(index: int, group: list[Response]) -> None:
                nonlocal reported
                finished(index, group)
                reported += len(group)
                # Sampling continues once all groups are scored that fill a call.
                full = reported - 3 * (GROUPS_PER_CALL - 1)
                assert eventually(lambda: len(scored) >= full)

            return super().generate(*args, finished=report_and_wait, **kwargs)

    roll_out_with(PatientEngine(), rewards_of(reward))
    assert len(scored) == 3 * COUNT


def test_stages_are_timed_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def reward(responses: list[str]) -> list[float]:
        return [0.0] * len(responses)

    readings = iter([100.0, 107.0, 109.5])  # the start, the end of sampling, the end of scoring
    clock = SimpleNamespace(perf_counter=lambda: next(readings))
    monkeypatch.setattr(rollouts_module, "time", clock)
    assert roll_out_with(ScriptedEngine(), rewards_of(reward)).seconds == {
        "rollout": 7.0,
        "scoring": 2.5,
    }


def test_learned_reward_in_the_thread_builds_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    modes: list[bool] = []

    @torch.no_grad()
    def learned(responses: list[str]) -> torch.Tensor:
        modes.append((weight * 2).requires_grad)
        return torch.zeros(len(responses))

    roll_out_with(local_engine_of(), rewards_of(learned))
    assert modes and not any(modes)


# --- Interruption --------------------------------------------------------------------------------


def test_interrupted_sampling_starts_no_further_calls() -> None:
    release, calls = threading.Event(), []

    def blocking(responses: list[str]) -> list[float]:
        calls.append(responses)
        release.wait(10)
        return [0.0] * len(responses)

    class InterruptedEngine(ScriptedEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            super().generate(*args, **kwargs)
            while not calls:
                time.sleep(0.001)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out_with(InterruptedEngine(), rewards_of(blocking))
    release.set()
    for thread in trivium_threads():
        thread.join(10)
    assert len(calls) == 1
    assert trivium_threads() == []


def test_signal_interrupts_the_wait_for_the_last_calls() -> None:
    release, finished = threading.Event(), []

    def blocking(responses: list[str]) -> list[float]:
        release.wait(60)
        finished.append(responses)
        return [0.0] * len(responses)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            roll_out_with(ScriptedEngine(), rewards_of(blocking))
        assert finished == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        release.set()
        for thread in trivium_threads():
            thread.join(10)
