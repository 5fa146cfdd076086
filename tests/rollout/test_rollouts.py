"""Rollout batches: scores on responses and tokens, concatenation, and selection of groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World, letters_tokenizer, source

from trivium.data.prompts import Prompt
from trivium.data.response import FinishReason, Response
from trivium.errors import RewardError
from trivium.hf.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.rewards.reward import RewardConfig, Rewards, Scores
from trivium.rollout.rollouts import Rollouts, chosen_groups, joined, roll_out
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine

StepValues = list[list[tuple[int, float]]]


def rollouts_of(
    texts: Sequence[Sequence[str]],
    outcomes: list[float],
    steps: StepValues | None = None,
    finish_reasons: Sequence[FinishReason] = (),
) -> Rollouts:
    flat = [t for group in texts for t in group]
    reasons = iter(finish_reasons or ["eos"] * len(flat))
    tokenizer = letters_tokenizer()
    responses = [
        [
            Response([*tokenizer.encode(t), 0], [-0.5 * (i + 1)] * (len(t) + 1), next(reasons), t)
            for t in group
        ]
        for i, group in enumerate(texts)
    ]
    prompts = [Prompt([i + 1], "", {}, i) for i in range(len(texts))]
    scores = Scores(outcomes, steps, {"first": outcomes}, {"first": 1})
    return Rollouts(prompts, responses, scores, {"rollout": 1.0, "scoring": 0.5})


ROLLOUTS = rollouts_of(
    [["abc", "d"], ["ef"]],
    [1.0, 2.0, 4.0],
    [[(1, 0.5), (3, -1.0)], [], [(2, 3.0)]],
    ["eos", "length", "stop"],
)


def test_steps_end_at_the_token_that_completes_their_last_character() -> None:
    steps = ROLLOUTS.steps(letters_tokenizer(), closing=False)
    assert steps.rewards_S.tolist() == [0.5, -1.0, 3.0]
    assert steps.ends_S.tolist() == [0, 2, 1]
    assert steps.counts_N.tolist() == [2, 0, 1]


def test_last_step_includes_trailing_white_space_and_eos() -> None:
    assert ROLLOUTS.steps(letters_tokenizer()).ends_S.tolist() == [0, 3, 2]
    open_ended = rollouts_of([["abc"]], [0.0], [[(1, 0.5), (2, -1.0)]])
    assert open_ended.steps(letters_tokenizer()).ends_S.tolist() == [0, 1]
    trailing_newline = rollouts_of([["ab\n"]], [0.0], [[(1, 0.5), (2, -1.0)]])
    assert trailing_newline.steps(letters_tokenizer()).ends_S.tolist() == [0, 3]


def test_steps_that_end_in_the_same_token_are_added() -> None:
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


def test_outcome_is_added_to_the_last_step_or_the_last_token() -> None:
    steps = ROLLOUTS.steps_with_outcomes(letters_tokenizer())
    assert steps.rewards_S.tolist() == [0.5, 0.0, 2.0, 7.0]
    assert steps.ends_S.tolist() == [0, 3, 1, 2]
    assert steps.counts_N.tolist() == [2, 1, 1]


def test_total_is_outcome_plus_sum_of_steps() -> None:
    assert ROLLOUTS.totals_N.tolist() == [0.5, 2.0, 7.0]
    without_steps = rollouts_of([["a"]], [1.5])
    assert without_steps.totals_N.tolist() == [1.5]


def test_flat_views_follow_the_order_of_the_responses() -> None:
    assert [r.text for r in ROLLOUTS.flat] == ["abc", "d", "ef"]
    assert ROLLOUTS.sizes_G.tolist() == [2, 1]
    assert ROLLOUTS.lengths_N.tolist() == [4, 2, 3]
    assert ROLLOUTS.truncated_N.tolist() == [False, True, False]
    assert ROLLOUTS.sampler_logprobs_T.tolist() == [-0.5] * 6 + [-1.0] * 3
    assert [g.prompt for g in ROLLOUTS.groups] == [[1], [2]]


def test_metrics_are_means_over_responses() -> None:
    metrics = ROLLOUTS.metrics()
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


def test_metrics_of_a_reward_are_over_the_responses_that_it_applies_to() -> None:
    components = {"some": [3.0, None, 5.0], "none": [None] * 3, "all": [1.0, 2.0, 6.0]}
    scores = Scores([1.0, 2.0, 4.0], None, components, {})
    metrics = Rollouts(ROLLOUTS.prompts, ROLLOUTS.responses, scores, {}).metrics()
    assert {name: value for name, value in metrics.items() if name.startswith("rewards/")} == {
        "rewards/some/mean": 4.0,
        "rewards/some/std": 1.0,
        "rewards/some/applied": 2 / 3,
        "rewards/none/applied": 0.0,
        "rewards/all/mean": 3.0,
        "rewards/all/std": pytest.approx((14 / 3) ** 0.5),
    }


def test_selected_groups_keep_their_scores() -> None:
    selected = chosen_groups(ROLLOUTS, [1])
    assert [r.text for r in selected.flat] == ["ef"]
    assert selected.scores.outcomes == [4.0]
    assert selected.scores.steps == [[(2, 3.0)]]
    assert selected.scores.components == {"first": [4.0]}
    assert [p.index for p in selected.prompts] == [1]


def test_joined_batches_are_concatenated_in_order() -> None:
    concatenated = joined([chosen_groups(ROLLOUTS, [1]), ROLLOUTS])
    assert [r.text for r in concatenated.flat] == ["ef", "abc", "d", "ef"]
    assert concatenated.scores.outcomes == [4.0, 1.0, 2.0, 4.0]
    assert concatenated.scores.steps == [[(2, 3.0)], [(1, 0.5), (3, -1.0)], [], [(2, 3.0)]]
    assert concatenated.scores.components == {"first": [4.0, 1.0, 2.0, 4.0]}
    assert concatenated.scores.fallbacks == {"first": 2}
    assert concatenated.seconds == {"rollout": 2.0, "scoring": 1.0}
    without_steps = rollouts_of([["a"]], [1.5])
    assert joined([without_steps, without_steps]).scores.steps is None


def test_each_response_is_scored_with_its_own_prompt(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = source(
        tmp_path / "scored.py",
        "def score(prompts, responses, number):\n"
        "    return [100 * n + len(p) for p, n in zip(prompts, number)]\n",
    )
    policy = Policy.load(ModelConfig(path=world.path))
    prompts = [Prompt([i + 1], "x" * i, {"number": i}, i) for i in range(3)]
    rewards = Rewards([RewardConfig(function=f"{path}:score", timeout=None)])
    sampling = Sampling(max_tokens=4)
    rollouts = roll_out(local_engine(policy), rewards, prompts, 2, sampling, seed=0, step=0)
    assert rollouts.scores.outcomes == [0.0, 0.0, 101.0, 101.0, 202.0, 202.0]
    assert [len(group) for group in rollouts.responses] == [2, 2, 2]


def test_failing_reward_stops_the_rollout_with_its_name(tmp_path: Path) -> None:
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
