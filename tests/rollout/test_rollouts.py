"""Rollout batches: scores on responses and on tokens, joined and chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World, letters_tokenizer, source

from trivium.data.prompts import Prompt
from trivium.errors import RewardError
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.rewards.reward import RewardConfig, Rewards, Scores
from trivium.rollout.engine import FinishReason, Response
from trivium.rollout.rollouts import Rollouts, chosen_groups, joined, roll_out
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine

Places = list[list[tuple[int, float]]]


def rollouts_of(
    texts: Sequence[Sequence[str]],
    outcomes: list[float],
    steps: Places | None = None,
    endings: Sequence[FinishReason] = (),
) -> Rollouts:
    flat = [t for group in texts for t in group]
    ends = iter(endings or ["eos"] * len(flat))
    tokenizer = letters_tokenizer()
    responses = [
        [
            Response([*tokenizer.encode(t), 0], [-0.5 * (i + 1)] * (len(t) + 1), next(ends), t)
            for t in group
        ]
        for i, group in enumerate(texts)
    ]
    prompts = [Prompt([i + 1], "", {}, i) for i in range(len(texts))]
    scores = Scores(outcomes, steps, {"first": outcomes}, {"first": 1})
    return Rollouts(prompts, responses, scores, {"rollout": 1.0, "scoring": 0.5})


TWO = rollouts_of(
    [["abc", "d"], ["ef"]],
    [1.0, 2.0, 4.0],
    [[(1, 0.5), (3, -1.0)], [], [(2, 3.0)]],
    ["eos", "length", "stop"],
)


def test_steps_end_at_the_token_that_completes_their_last_character() -> None:
    steps = TWO.steps(letters_tokenizer(), closing=False)
    assert steps.rewards_S.tolist() == [0.5, -1.0, 3.0]
    assert steps.ends_S.tolist() == [0, 2, 1]
    assert steps.counts_N.tolist() == [2, 0, 1]


def test_step_at_the_texts_end_holds_the_eos_and_space_before_it() -> None:
    assert TWO.steps(letters_tokenizer()).ends_S.tolist() == [0, 3, 2]
    open_ended = rollouts_of([["abc"]], [0.0], [[(1, 0.5), (2, -1.0)]])
    assert open_ended.steps(letters_tokenizer()).ends_S.tolist() == [0, 1]
    blank = rollouts_of([["ab\n"]], [0.0], [[(1, 0.5), (2, -1.0)]])
    assert blank.steps(letters_tokenizer()).ends_S.tolist() == [0, 3]


def test_steps_that_end_in_one_token_are_one_step_with_the_sum() -> None:
    class Pairs:
        """A tokenizer whose tokens hold two letters each."""

        def encode(self, text: str, **_: Any) -> list[int]:
            return [7]

        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join({7: "a", 1: "bc", 2: "de"}[t] for t in tokens)

    response = Response([1, 2], [0.0, 0.0], "eos", "bcde")
    scores = Scores([0.0], [[(1, 1.0), (2, 2.0), (3, 4.0)]], {}, {})
    rollouts = Rollouts([Prompt([1], "", {}, 0)], [[response]], scores, {})
    steps = rollouts.steps(Pairs())  # type: ignore[arg-type]
    assert steps.rewards_S.tolist() == [3.0, 4.0]
    assert steps.ends_S.tolist() == [0, 1]


def test_outcome_joins_the_last_step_or_makes_one_at_the_last_token() -> None:
    steps = TWO.steps_with_outcomes(letters_tokenizer())
    assert steps.rewards_S.tolist() == [0.5, 0.0, 2.0, 7.0]
    assert steps.ends_S.tolist() == [0, 3, 1, 2]
    assert steps.counts_N.tolist() == [2, 1, 1]


def test_total_is_the_outcome_and_the_sum_of_the_steps() -> None:
    assert TWO.totals_N.tolist() == [0.5, 2.0, 7.0]
    plain = rollouts_of([["a"]], [1.5])
    assert plain.totals_N.tolist() == [1.5]


def test_flat_views_follow_the_order_of_the_responses() -> None:
    assert [r.text for r in TWO.flat] == ["abc", "d", "ef"]
    assert TWO.sizes_G.tolist() == [2, 1]
    assert TWO.lengths_N.tolist() == [4, 2, 3]
    assert TWO.truncated_N.tolist() == [False, True, False]
    assert TWO.sampler_logprobs_T.tolist() == [-0.5] * 6 + [-1.0] * 3
    assert [g.prompt for g in TWO.groups] == [[1], [2]]


def test_metrics_are_means_over_responses() -> None:
    metrics = TWO.metrics()
    expected = {
        "reward/mean": 9.5 / 3,
        "rewards/first/mean": 7.0 / 3,
        "rewards/first/fallbacks": 1.0,
        "length/mean": 3.0,
        "length/min": 2.0,
        "length/max": 4.0,
        "length/truncated": 1 / 3,
        "tokens/generated": 9.0,
        "time/rollout": 1.0,
        "time/scoring": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["reward/std"] == pytest.approx(torch.tensor([0.5, 2.0, 7.0]).std(correction=0))


def test_chosen_groups_keep_their_own_scores() -> None:
    kept = chosen_groups(TWO, [1])
    assert [r.text for r in kept.flat] == ["ef"]
    assert kept.scores.outcomes == [4.0]
    assert kept.scores.steps == [[(2, 3.0)]]
    assert kept.scores.components == {"first": [4.0]}
    assert [p.index for p in kept.prompts] == [1]


def test_joined_batches_follow_one_another() -> None:
    both = joined([chosen_groups(TWO, [1]), TWO])
    assert [r.text for r in both.flat] == ["ef", "abc", "d", "ef"]
    assert both.scores.outcomes == [4.0, 1.0, 2.0, 4.0]
    assert both.scores.steps == [[(2, 3.0)], [(1, 0.5), (3, -1.0)], [], [(2, 3.0)]]
    assert both.scores.components == {"first": [4.0, 1.0, 2.0, 4.0]}
    assert both.scores.fallbacks == {"first": 2}
    assert both.seconds == {"rollout": 2.0, "scoring": 1.0}
    plain = rollouts_of([["a"]], [1.5])
    assert joined([plain, plain]).scores.steps is None


def test_each_response_is_scored_with_its_own_prompt(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = source(
        tmp_path / "told.py",
        "def told(prompts, responses, number):\n"
        "    return [100 * n + len(p) for p, n in zip(prompts, number)]\n",
    )
    policy = Policy.load(ModelConfig(path=world.path))
    prompts = [Prompt([i + 1], "x" * i, {"number": i}, i) for i in range(3)]
    rewards = Rewards([RewardConfig(function=f"{path}:told", timeout=None)])
    sampling = Sampling(max_tokens=4)
    found = roll_out(local_engine(policy), rewards, prompts, 2, sampling, seed=0, step=0)
    assert found.scores.outcomes == [0.0, 0.0, 101.0, 101.0, 202.0, 202.0]
    assert [len(group) for group in found.responses] == [2, 2, 2]


def test_reward_that_fails_stops_the_rollout_by_name(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = source(
        tmp_path / "bad.py", "def bad(responses):\n    return [float('nan')] * len(responses)\n"
    )
    policy = Policy.load(ModelConfig(path=world.path))
    rewards = Rewards([RewardConfig(function=f"{path}:bad", timeout=None)])
    with pytest.raises(RewardError, match="bad"):
        roll_out(
            local_engine(policy), rewards, [Prompt([1], "", {}, 0)], 2, Sampling(max_tokens=3),
            seed=0, step=0,
        )  # fmt: skip
