"""Equations that a configuration chooses: tables, a user's own functions, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World, metrics_of

from trivium.algorithms import grpo
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.supervision import Supervision
from trivium.config.base import dump, load_configuration
from trivium.config.field_reference import describe
from trivium.config.option import Option
from trivium.errors import ConfigurationError
from trivium.training.options import (
    ADVANTAGE,
    AGGREGATION,
    KL_ESTIMATOR,
    PREFERENCE_LOSS,
    SURROGATE,
    load_option,
)

OPTIONS = [ADVANTAGE, AGGREGATION, KL_ESTIMATOR, PREFERENCE_LOSS, SURROGATE]
MEDIAN = """
import torch

def median_baseline(rewards_N, sizes_G, *, scale):
    groups = rewards_N.split(sizes_G.tolist())
    return torch.cat([group - group.median() for group in groups])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MEDIAN)
    return path


def grpo_config(world: World, **settings: Any) -> GRPOConfig:
    return GRPOConfig(**(world.on_policy() | {"steps_per_iteration": 1} | settings))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_name_of_a_table_is_a_function(option: Option) -> None:
    assert all(callable(option.load(name)) for name in option.table)


def test_choices_of_a_field_are_those_of_its_table() -> None:
    reference = describe(GRPOConfig)
    assert (
        'advantage: group_mean | leave_one_out | file.py:function, default "group_mean"'
        in reference
    )
    assert 'aggregation: sequence_mean | token_mean | fixed_length, default "seque' in reference


def test_one_line_in_a_table_makes_a_function_a_choice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="centered"):
        grpo_config(world, advantage="centered")
    monkeypatch.setitem(ADVANTAGE.table, "centered", "trivium.maths.advantages:group_advantages")
    supervision = Supervision.of(grpo_config(world, advantage="centered", scale="none"))
    rewards_N, sizes_G = torch.tensor([1.0, 3.0]), torch.tensor([2])
    assert supervision.estimator(rewards_N, sizes_G, scale="none").tolist() == [-1, 1]


def test_a_users_own_advantage_trains_a_policy(world: World, mine: Path) -> None:
    config = grpo_config(world, advantage=f"{mine}:median_baseline", beta=0.0)
    estimator = Supervision.of(config).estimator
    rewards_N, sizes_G = torch.tensor([1.0, 0.0, 5.0, 2.0, 4.0]), torch.tensor([3, 2])
    assert estimator(rewards_N, sizes_G, scale="none").tolist() == [0, -1, 4, 0, 2]
    assert (grpo.train(config) / "final" / "model.safetensors").is_file()


def test_a_file_beside_the_configuration_is_found_from_anywhere(
    world: World, mine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "dpo.yaml"
    mine.write_text(
        "def plain(margins_P, *, beta, label_smoothing, target_margin):\n    return -margins_P\n"
    )
    path.write_text("model: {path: m}\ndata: {path: d.jsonl}\nloss: mine.py:plain\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_configuration(DPOConfig, path)
    assert config.loss == f"{mine}:plain"
    assert mine in list(config.inputs())
    assert (
        load_option(PREFERENCE_LOSS, config.loss)(
            torch.ones(1), beta=1, label_smoothing=0, target_margin=0
        )
        == -1
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "defines no 'median_baseline'"),
        ("def median_baseline(:", "not valid Python"),
    ],
)
def test_a_file_without_the_function_is_refused_before_anything_is_loaded(
    world: World, mine: Path, text: str, reason: str
) -> None:
    mine.write_text(text)
    with pytest.raises(ValueError, match=reason):
        grpo_config(world, advantage=f"{mine}:median_baseline")


SURROGATES = """
from trivium.maths import SurrogateLoss, clipped_surrogate

def alone(logprobs_T, old_logprobs_T, advantages_T, lengths_N, *, clip_low, clip_high):
    return -advantages_T * logprobs_T

def whole(logprobs_T, old_logprobs_T, advantages_T, lengths_N, *, clip_low, clip_high):
    every_T = advantages_T == advantages_T
    return SurrogateLoss(-advantages_T * logprobs_T, every_T, ~every_T)

def halved(logprobs_T, old_logprobs_T, advantages_T, lengths_N, *, clip_low, clip_high):
    every_T = advantages_T == advantages_T
    return SurrogateLoss(-advantages_T * logprobs_T, every_T, 0.5 * every_T)
"""


def test_a_users_own_surrogate_may_return_the_loss_alone_and_logs_no_clip_metrics(
    world: World, mine: Path
) -> None:
    mine.write_text(SURROGATES)
    (line,) = metrics_of(grpo.train(grpo_config(world, surrogate=f"{mine}:alone")))
    assert not {"policy/clip_low", "policy/clip_high"} & line.keys()
    assert {"policy/ratio_max", "loss"} <= line.keys()
    (line,) = metrics_of(grpo.train(grpo_config(world, surrogate=f"{mine}:whole")))
    assert (line["policy/clip_low"], line["policy/clip_high"]) == (1.0, 0.0)


def test_masks_of_a_users_own_surrogate_must_be_booleans(mine: Path) -> None:
    mine.write_text(SURROGATES)
    with pytest.raises(
        ConfigurationError, match=r"clipped_high_T is not a mask of \(5,\) booleans"
    ):
        load_option(SURROGATE, f"{mine}:halved")


def test_clip_range_defaults_to_the_paper_of_the_surrogate_and_a_given_one_stays(
    world: World,
) -> None:
    def clip_of(**settings: Any) -> tuple[float, float]:
        config = grpo_config(world, **settings)
        return config.clip_low, config.clip_high

    assert clip_of() == clip_of(surrogate="clipped") == (0.2, 0.2)
    assert clip_of(surrogate="gspo") == (3e-4, 4e-4)
    assert clip_of(surrogate="gspo", clip_low=0.2) == (0.2, 4e-4)
    assert clip_of(surrogate="gspo", clip_low=0.2, clip_high=0.2) == (0.2, 0.2)
    assert clip_of(surrogate="cispo") == (1.0, 0.2)
    with pytest.raises(ValueError, match="surrogate"):
        clip_of(surrogate="gspoo")


def test_saved_configuration_keeps_the_clip_range_that_it_ran_with(
    world: World, tmp_path: Path
) -> None:
    config = grpo_config(world, surrogate="gspo")
    path = tmp_path / "saved.yaml"
    path.write_text(dump(config))
    saved = load_configuration(GRPOConfig, path)
    assert (saved.clip_low, saved.clip_high) == (3e-4, 4e-4)
    assert load_configuration(GRPOConfig, path, ["surrogate=clipped"]).clip_low == 3e-4


@pytest.mark.parametrize(
    ("option", "body", "reason"),
    [
        (ADVANTAGE, "f(rewards_N, sizes_G): return rewards_N", "failed on a tiny batch"),
        (ADVANTAGE, "f(r_N, s_G, *, scale): return s_G", r"returned \(2,\) for a"),
        (ADVANTAGE, "f(r_N, s_G, *, scale): return r_N / 0", "must be finite"),
        (ADVANTAGE, "f(r_N, s_G, *, scale): return [0.0] * 4", "returned list for a"),
        (KL_ESTIMATOR, "f(a_T, b_T): return (a_T - b_T).detach()", "has no gradient"),
        (KL_ESTIMATOR, "f(a_T, b_T): return a_T.sum()", r"returned \(\) for a tiny batch"),
        (KL_ESTIMATOR, "f(a_T, b_T): return 0 * a_T", "has the gradient"),
        (SURROGATE, "f(a_T, b_T, c_T, n_N, *, clip_low, clip_high): return -c_T", "no gradient"),
        (PREFERENCE_LOSS, "f(margins_P, *, beta): return margins_P", "is called as 'def loss"),
    ],
)
def test_a_function_that_cannot_serve_is_refused_on_a_tiny_batch(
    mine: Path, option: Option, body: str, reason: str
) -> None:
    mine.write_text(f"def {body}\n")
    with pytest.raises(ConfigurationError, match=reason):
        load_option(option, f"{mine}:f")
