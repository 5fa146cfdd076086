"""Advantages of several rewards: summed before or after their normalization in the group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World, metrics_of

from trivium.algorithms import grpo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.rollout_step import RolloutBatches
from trivium.algorithms.supervision import Supervision
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError
from trivium.rewards.reward import Scores
from trivium.rollout.rollouts import Rollouts

NO_TOKENIZER: Any = None
CORRECT = [1.0, 0.0, 0.0, 1.0]
FORMAT = [1.0, 0.0, 1.0, 1.0]
UNWEIGHTED = [9.0, 1.0, 2.0, 3.0]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def config_of(world: World, **options: Any) -> GRPOConfig:
    source = world.directory / "several.py"
    source.write_text(
        "def correct(responses):\n    return [float('a' in r) for r in responses]\n"
        "def shape(responses):\n    return [float(len(r) > 4) for r in responses]\n"
        "def shown(responses):\n    return [float(len(r)) for r in responses]\n"
    )
    rewards = [
        {"function": f"{source}:{name}", "weight": weight, "timeout": None}
        for name, weight in (("correct", 1.0), ("shape", 0.5), ("shown", 0.0))
    ]
    given = {"reward_aggregation": "normalize_then_sum", "rewards": rewards}
    return GRPOConfig(**(world.on_policy() | given | options))


def rollouts_of(components: Any, size: int, steps: Any = None) -> Rollouts:
    rows = zip(*(components[n] for n in ("correct", "shape")), strict=True)
    total = [sum(x or 0.0 for x in row) for row in rows]
    count = len(total) // size
    response = Response(tokens=[1, 2], logprobs=[0.0, 0.0], finish_reason="eos", text="ab")
    prompts = [Prompt(tokens=[1], text="a", columns={}, index=i) for i in range(count)]
    scores = Scores(total, steps, components, {})
    return Rollouts(prompts, [[response] * size for _ in prompts], scores, {})


def advantages(config: GRPOConfig, rollouts: Rollouts) -> list[float]:
    per_token_T = Supervision.of(config).advantages(rollouts, NO_TOKENIZER)
    assert torch.equal(per_token_T[0::2], per_token_T[1::2])
    return per_token_T[0::2].tolist()


def test_each_reward_is_normalized_in_its_group_and_the_sum_over_the_batch(world: World) -> None:
    rollouts = rollouts_of({"correct": CORRECT, "shape": FORMAT, "shown": UNWEIGHTED}, 2)
    half = 0.5**0.5
    # The groups are (1, 0) with (1, 0), and (0, 1) with (1, 1), by hand.
    summed = [1.5 * half, -1.5 * half, -half, half]
    deviation = (sum(x * x for x in summed) / 4) ** 0.5
    found = advantages(config_of(world), rollouts)
    assert found == pytest.approx([x / deviation for x in summed], abs=1e-6)
    plain = advantages(config_of(world, reward_aggregation="sum_then_normalize"), rollouts)
    assert plain == pytest.approx([half, -half, -half, half], abs=1e-6)


# Equal only in sum; in both rewards; in neither; in one of them.
FOUR_GROUPS = {
    "correct": [1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 1.0, 1.0],
    "shape": [0.0, 1.0, 0.2, 0.2, 1.0, 0.0, 1.0, 0.0],
    "shown": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}


def test_groups_without_a_signal_are_those_of_equal_rewards_one_by_one(world: World) -> None:
    rollouts, decoupled = rollouts_of(FOUR_GROUPS, 2), Supervision.of(config_of(world))
    assert decoupled.equal_groups(rollouts).tolist() == [False, True, False, False]
    together = Supervision.of(config_of(world, reward_aggregation="sum_then_normalize"))
    assert together.equal_groups(rollouts).tolist() == [True, True, False, False]
    found = advantages(config_of(world), rollouts)
    assert found[0] == -found[1] > 0 and found[2:4] == [0.0, 0.0] and found[6] == -found[7] > 0


def test_rewards_that_do_not_apply_leave_the_comparison_to_the_others(world: World) -> None:
    components = {"correct": [None, None, 1.0, 0.0], "shape": [1.0, 0.0, 1.0, 1.0]}
    rollouts = rollouts_of(components, 2)
    supervision = Supervision.of(config_of(world))
    assert supervision.equal_groups(rollouts).tolist() == [False, False]
    found = advantages(config_of(world), rollouts)
    # Before the division by the batch's deviation: 0.5/√2 of the shape, and 1/√2 of correctness.
    assert found[2] == pytest.approx(2 * found[0]) and found[0] == -found[1] > 0
    components["shape"] = [1.0, 1.0, 1.0, 1.0]
    assert supervision.equal_groups(rollouts_of(components, 2)).tolist() == [True, False]


def test_dynamic_sampling_keeps_the_groups_that_have_a_signal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, anything = rollouts_of(FOUR_GROUPS, 2), NO_TOKENIZER
    monkeypatch.setattr(RolloutBatches, "roll_out", lambda *_: rollouts)

    def kept(config: GRPOConfig) -> list[int]:
        equal = Supervision.of(config).equal_groups
        batches = RolloutBatches(anything, 2, 2, anything, 0, equal)
        return [prompt.index for prompt in batches.of_step(1, 1).prompts]

    assert kept(config_of(world)) == [0, 2]
    assert kept(config_of(world, reward_aggregation="sum_then_normalize")) == [2, 3]


def test_rewards_of_steps_are_refused_by_normalization_one_by_one(world: World) -> None:
    rollouts = rollouts_of({"correct": CORRECT, "shape": FORMAT}, 2, steps=[[(1, 0.5)]] * 4)
    with pytest.raises(ConfigurationError, match="use sum_then_normalize"):
        Supervision.of(config_of(world)).advantages(rollouts, NO_TOKENIZER)


@pytest.mark.parametrize("dynamic_sampling", [0, 2])
def test_run_with_several_rewards_learns_from_groups_of_equal_sums(
    world: World, dynamic_sampling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Rollouts] = []
    of_step = RolloutBatches.of_step

    def noted(*arguments: Any) -> Rollouts:
        kept.append(of_step(*arguments))
        return kept[-1]

    monkeypatch.setattr(RolloutBatches, "of_step", noted)
    config = config_of(world, steps_per_iteration=2, dynamic_sampling=dynamic_sampling)
    lines = metrics_of(grpo.train(config))
    supervision = Supervision.of(config)
    for line, rollouts in zip(lines, kept, strict=True):
        equal_G = supervision.equal_groups(rollouts)
        assert line["group/equal_rewards"] == float(equal_G.float().mean())
        if dynamic_sampling:
            assert not equal_G.any()
        assert line["advantage/std"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "none"}, "divides each reward by its deviation"),
        ({"rewards": [{"function": "gsm8k"}]}, "one reward with a weight"),
        (
            {"rewards": [{"function": "gsm8k"}, {"function": "math", "weight": 0.0}]},
            "one reward with a weight",
        ),
        ({"supervision": "process"}, "normalizes the rewards of whole responses"),
        ({"reward_aggregation": "each"}, "sum_then_normalize"),
    ],
)
def test_settings_that_do_not_fit_normalization_one_by_one_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(world, **options)
