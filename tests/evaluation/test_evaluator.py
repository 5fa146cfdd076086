"""Metrics of held-out evaluations, checked by hand and by enumeration."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import World, letters_tokenizer

from trivium.algorithms import dpo, grpo
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.data.batch import Batch
from trivium.data.chat import token_pieces
from trivium.data.group import Group
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.evaluation.evaluator import Evaluator
from trivium.evaluation.statistics import (
    distinct_words,
    pass_at_k,
    repetition,
    wins,
)
from trivium.hf.model_config import ModelConfig
from trivium.maths.intervals import UNBOUNDED, mean_interval
from trivium.models.policy import Policy
from trivium.rollout.sampling import Sampling
from trivium.runs.store import read_evaluations, read_outcomes, read_samples

# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "passed"), [(4, 0), (4, 1), (5, 2), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_subsets_that_contain_a_pass(n: int, passed: int) -> None:
    results = [True] * passed + [False] * (n - passed)
    for k in range(1, n + 1):
        subsets = list(combinations(results, k))
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_beyond_the_number_of_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass@3 of 2 responses"):
        pass_at_k(2, 1, 3)


def test_wins_are_counted_over_all_pairs_of_a_prompt_and_ties_count_half() -> None:
    assert wins([[1.0, 0.0], [2.0]], [[0.0, 0.5], [2.0]]) == [(1 + 1 + 0.5 + 0) / 4, 0.5]


def test_repetition_counts_n_grams_that_occur_earlier() -> None:
    # a b c | b c a | c a b | a b c | b c d: one of five occurs earlier.
    assert repetition(["a b c a b c d"]) == pytest.approx(1 / 5)
    assert repetition(["Happy, happy happy happy happy"]) == pytest.approx(2 / 3)
    assert repetition(["a b", "", "a b c"]) == 0.0
    assert repetition([]) == 0.0


def test_distinct_words_ignore_case_and_texts_without_words() -> None:
    assert distinct_words(["a A b", "!!", "c"]) == pytest.approx((2 / 3 + 1) / 2)
    assert distinct_words(["..."]) == 1.0


# --- Evaluations of runs --------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def evaluated_run(world: World, training: dict[str, object], **options: object) -> Path:
    evaluation = {"data": world.prompts, **options}
    settings = world.on_policy() | {"steps_per_iteration": 2, "beta": 0.1} | training
    return grpo.train(GRPOConfig(**(settings | {"evaluation": evaluation})))


MOVING = {"optimizer": {"learning_rate": 0.05, "max_grad_norm": 1e6}}


def test_metrics_follow_from_the_saved_responses(world: World) -> None:
    path = evaluated_run(world, MOVING | {"run": world.run(samples=9)}, samples=3, max_tokens=5)
    first, last = read_evaluations(path)
    rows = [r for r in read_samples(path) if r["drawn"] == "sampled" and r["step"] == 2]
    assert [(r["index"], r["sample"]) for r in rows] == [(i, j) for i in range(4) for j in range(3)]
    by_prompt = [rows[i : i + 3] for i in range(0, 12, 3)]
    means = [sum(r["reward"] for r in group) / 3 for group in by_prompt]
    assert last["sampled"] == pytest.approx(mean_interval(means).mean)
    assert last["sampled_low"] == pytest.approx(mean_interval(means).low)
    kl = mean_interval([sum(r["kl"] for r in group) / 3 for group in by_prompt], bounds=UNBOUNDED)
    assert last["kl"] == pytest.approx(kl.mean, abs=1e-3)
    assert last["kl_high"] == pytest.approx(kl.high, abs=1e-3)
    assert last["length"] == pytest.approx(sum(r["length"] for r in rows) / 12)
    assert last["truncated"] == pytest.approx(
        sum(r["finish_reason"] == "length" for r in rows) / 12
    )
    assert last["distinct"] == pytest.approx(distinct_words([r["response"] for r in rows]))
    assert first["kl"] == 0.0 and first["win_rate"] is None
    assert first["kl_low"] is None, "equal values have no interval"
    (before, after) = read_outcomes(path)
    won = wins(after["sampled"], before["sampled"])
    assert last["win_rate"] == pytest.approx(sum(won) / 4)
    assert after["index"] == [0, 1, 2, 3]
    assert [sum(group) / 3 for group in after["sampled"]] == pytest.approx(means)
    assert last["pass_at"] == {}


def test_reference_logprob_is_the_log_prob_under_the_base_model(world: World) -> None:
    path = evaluated_run(world, MOVING | {"run": world.run(samples=9)}, max_tokens=5)
    base = Policy.load(ModelConfig(path=world.path))
    rows = [r for r in read_samples(path) if r["drawn"] == "sampled" and r["step"] == 2]
    trained = Policy.load(ModelConfig(path=str(path / "final")))
    tokenizer = letters_tokenizer()
    logprobs, ratios = [], []
    for row in rows:
        tokens = tokenizer.encode(row["response"]) + [0] * (row["finish_reason"] == "eos")
        batch = Batch.of([Group(tokenizer.encode(row["prompt"]), [tokens])])
        with torch.no_grad():
            policy_T, ref_T = trained.score(batch).logprobs_T, base.score(batch).logprobs_T
        logprobs += ref_T.tolist()
        ratios.append((policy_T - ref_T).tolist())
    last = read_evaluations(path)[-1]
    assert last["reference_logprob"] == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)
    assert [r["log_ratio"] for r in rows] == [pytest.approx(r, abs=2e-4) for r in ratios]


def test_log_ratios_do_not_depend_on_the_micro_batch_size(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for tokens in (16384, 20):
        monkeypatch.setitem(Evaluator.__init__.__kwdefaults__, "tokens_per_micro_batch", tokens)
        path = evaluated_run(world, MOVING | {"run": world.run(samples=9)}, samples=3, max_tokens=5)
        rows = [r for r in read_samples(path) if r["drawn"] == "sampled" and r["step"] == 2]
        results.append(([r["log_ratio"] for r in rows], read_evaluations(path)[-1]["kl_low"]))
    (one_batch, low), (many_batches, low_many) = results
    assert [pytest.approx(ratios, abs=2e-4) for ratios in one_batch] == many_batches
    assert low_many == pytest.approx(low, abs=1e-4)


def test_pass_at_k_is_measured_if_every_reward_is_0_or_1(world: World) -> None:
    (world.directory / "correct.py").write_text(
        "def correct(prompts, responses): return [float('a' in r) for r in responses]"
    )
    rewards = [{"function": f"{world.directory / 'correct.py'}:correct", "timeout": None}]
    path = evaluated_run(world, {}, samples=5, rewards=rewards)
    totals = read_outcomes(path)[-1]["sampled"]
    expected = {
        str(k): pytest.approx(sum(pass_at_k(5, int(sum(t)), k) for t in totals) / 4)
        for k in (1, 2, 4)
    }
    assert read_evaluations(path)[-1]["pass_at"] == expected


def test_pass_threshold_makes_pass_at_k_defined_for_any_reward(world: World) -> None:
    path = evaluated_run(world, {}, samples=2, pass_threshold=0.5)
    totals = read_outcomes(path)[-1]["sampled"]
    passed = [sum(t >= 0.5 for t in group) for group in totals]
    expected = sum(pass_at_k(2, c, 2) for c in passed) / 4
    assert read_evaluations(path)[-1]["pass_at"]["2"] == pytest.approx(expected)


def test_held_out_responses_end_as_training_responses_do(world: World) -> None:
    sampling = {"max_tokens": 30, "stop": ["a"], "stop_tokens": [2]}
    path = evaluated_run(world, {"sampling": sampling, "run": world.run(samples=9)}, samples=4)
    rows = [r for r in read_samples(path) if r["drawn"] != "training"]
    assert all("a" not in r["response"][:-1] and "b" not in r["response"][:-1] for r in rows)
    assert {r["finish_reason"] for r in rows} >= {"stop"}
    own = evaluated_run(
        world, {"sampling": sampling, "run": world.run(samples=9)}, samples=4, stop=()
    )
    ended = {r["finish_reason"] for r in read_samples(own) if r["drawn"] != "training"}
    assert "stop" not in ended


def test_online_dpo_is_evaluated_with_its_training_sampling(world: World) -> None:
    online = {
        "data": world.prompts, "rewards": world.reward("letters"), "steps": 1,
        "sampling": {"max_tokens": 30, "stop": ["a"]},
    }  # fmt: skip
    config = DPOConfig(
        model={"path": world.path},
        online=online,
        run=world.run(samples=9),
        evaluation={"data": world.prompts, "samples": 4},
    )
    rows = read_samples(dpo.train(config))
    assert rows and all("a" not in r["response"][:-1] for r in rows)


def test_evaluation_settings_override_those_of_training() -> None:
    data = PromptsConfig(path="p.jsonl")
    training = Sampling(temperature=0.5, top_k=3, max_tokens=7, stop=("x",), stop_tokens=(4,))
    inherited = EvaluationConfig(data=data).sampling(training)
    assert (inherited.max_tokens, inherited.stop, inherited.stop_tokens) == (7, ("x",), (4,))
    assert inherited.top_k == 0, "the unfiltered policy is measured"
    own = EvaluationConfig(data=data, max_tokens=9, stop=(), stop_tokens=(1,)).sampling(training)
    assert (own.max_tokens, own.stop, own.stop_tokens) == (9, (), (1,))
    assert EvaluationConfig(data=data).sampling(None).max_tokens == 256


def test_token_pieces_include_special_tokens() -> None:
    assert token_pieces(letters_tokenizer(), [1, 11, 0]) == ["a", ".", "<eos>"]
