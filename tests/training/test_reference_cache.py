"""The reference's log-probs of pairs on disk: the same bits, for the same question only."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World, checkpoint, metrics_of, perturb
from safetensors.torch import load_file, save_file
from torch import Tensor

from trivium.algorithms import dpo
from trivium.algorithms.dpo_config import DPOConfig
from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.data.oom import score_logprobs
from trivium.hf.model_config import LoraConfig, ModelConfig
from trivium.models.policy import Policy
from trivium.runs.provenance import differences, environment
from trivium.training import reference_cache
from trivium.training.reference_cache import cache_key, cached_logprobs

ROWS = [
    {"prompt": p, "chosen": c, "rejected": r}
    for p, c, r in (("a", "bc", "d"), ("bc", "e", "fgh"), ("d", "a", "b"), ("e", "cc", "dd"))
]
GROUPS = [Group([1, 2], [[3], [4, 5]]), Group([6], [[7, 8, 9], [1]])]
PARTS = [[0, 1], [2, 3]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The responses of every pass without gradients."""
    seen: list[int] = []
    hidden = Policy.hidden

    def counted(policy: Policy, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            seen.append(len(batch.lengths_N))
        return hidden(policy, batch)

    monkeypatch.setattr(Policy, "hidden", counted)
    return seen


def config_of(world: World, **options: Any) -> DPOConfig:
    given = {"model": {"path": world.path}, "data": world.rows("pairs.jsonl", ROWS)}
    given |= {"run": world.run(), "optimizer": {"learning_rate": 0.01}, "pairs_per_step": 2}
    return DPOConfig(**(given | options))


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "model.safetensors")


def files() -> list[Path]:
    return sorted((Path(os.environ["TRIVIUM_CACHE"]) / "reference").glob("*.safetensors"))


def policy_of(path: str, **options: Any) -> Policy:
    return Policy.load(ModelConfig(path=path, **options))


# --- Through the loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_second_run_scores_nothing_and_ends_with_the_same_bits(
    world: World, passes: list[int], lora: dict[str, int] | None
) -> None:
    model = {"path": world.path, "lora": lora}
    without = dpo.train(config_of(world, model=model, reference_cache=False))
    assert files() == [] and sum(passes) == 8
    first = dpo.train(config_of(world, model=model))
    assert len(files()) == 1 and sum(passes) == 16
    second = dpo.train(config_of(world, model=model))
    assert len(files()) == 1 and sum(passes) == 16
    for run in (first, second):
        assert metrics_of(run) == metrics_of(without)
        for name, tensor in weights(without).items():
            assert torch.equal(weights(run)[name], tensor)


def test_runs_that_vary_what_is_made_of_the_margin_share_one_file(
    world: World, passes: list[int]
) -> None:
    for options in ({"beta": 0.1}, {"beta": 0.5}, {"loss": "ipo"}, {"epochs": 2.0}):
        dpo.train(config_of(world, **options))
    assert sum(passes) == 8
    assert len(files()) == 1


def test_reference_free_run_keeps_nothing(world: World) -> None:
    dpo.train(config_of(world, reference_free=True))
    assert files() == []


# --- What it depends on ---------------------------------------------------------------------------


def key(policy: Policy, groups: list[Group] = GROUPS, parts: list[list[int]] = PARTS) -> str:
    return cache_key(policy, Grouped(groups), parts)


def test_same_model_under_another_name_is_the_same(world: World, tmp_path: Path) -> None:
    assert key(policy_of(world.path)) == key(policy_of(world.path))
    copied = checkpoint(tmp_path / "elsewhere", spread=0.2)
    assert key(policy_of(copied)) == key(policy_of(world.path))


def test_anything_that_could_change_a_bit_makes_another_key(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = policy_of(world.path)
    other = policy_of(world.path)
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0].add_(1e-6)
    epsilon = policy_of(checkpoint(tmp_path / "epsilon", spread=0.2, rms_norm_eps=1e-3))
    rotated = policy_of(world.path)
    next(rotated.model.buffers()).mul_(1.1)
    keys = [
        key(usual),
        key(other),
        key(epsilon),
        key(rotated),
        key(policy_of(world.path, dtype="float64")),
        key(Policy.load(ModelConfig(path=world.path), temperature=0.5)),
        key(usual, [Group([1, 2], [[3], [4, 5]]), Group([6], [[7, 8, 2], [1]])]),
        key(usual, [Group([1], [[2, 3], [4, 5]]), Group([6], [[7, 8, 9], [1]])]),
        key(usual, [Group([1, 2], [[3]]), Group([4, 5], [[6], [7, 8, 9], [1]])]),
        key(usual, GROUPS[::-1]),
        key(usual, GROUPS, [[0, 1, 2, 3]]),
        key(usual, GROUPS, [[0], [1], [2, 3]]),
    ]
    usual.shared = False
    keys.append(key(usual))
    usual.shared = True
    for place, name, value in (
        (torch, "get_num_threads", 7),
        (torch, "get_float32_matmul_precision", "medium"),
        (reference_cache, "source_digest", "another"),
        (reference_cache, "versions", {"torch": "0"}),
        (reference_cache, "_processor", "another"),
        (reference_cache, "numerics_state", {"matmul_backend": "another"}),
    ):
        with monkeypatch.context() as patch:
            constant = isinstance(value, property)
            patch.setattr(place, name, value if constant else lambda *_, value=value: value)
            keys.append(key(usual))
    assert len(set(keys)) == len(keys)


def test_adapters_that_are_not_trained_yet_do_not_matter(world: World) -> None:
    lora = LoraConfig(rank=2)
    one, other = (policy_of(world.path, lora=lora) for _ in range(2))
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if "lora_A" in name:
                parameter.add_(1.0)
    assert key(one) == key(other)
    with torch.no_grad():
        for parameter in other.model.parameters():
            if not parameter.requires_grad:
                parameter.add_(1e-6)
    assert key(one) != key(other)


def test_model_whose_code_came_with_it_is_always_asked(
    world: World, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(world.path)
    monkeypatch.setattr(type(policy.model), "__module__", "transformers_modules.mine")
    for _ in range(2):
        cached_logprobs(policy, Grouped(GROUPS), PARTS)
    assert sum(passes) == 8 and files() == []


def test_setting_does_not_keep_a_run_from_going_on(world: World) -> None:
    config = config_of(world)
    run = dpo.train(config)
    without = config.model_copy(update={"reference_cache": False})
    assert differences(environment(config), run, without) == []


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
        lambda data: b"",
        lambda data: pickle.dumps({"logprobs_T": [1.0]}),
        lambda data: b"\xff" * 64,
    ],
    ids=["torn", "last byte", "another byte", "empty", "pickle", "noise"],
)
def test_damaged_file_is_reported_and_the_pairs_are_scored_again(
    world: World, passes: list[int], caplog: pytest.LogCaptureFixture, harm: Any
) -> None:
    policy, data = policy_of(world.path), Grouped(GROUPS)
    expected_T = cached_logprobs(policy, data, PARTS)
    (path,) = files()
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    assert torch.equal(cached_logprobs(policy, data, PARTS), expected_T)
    assert sum(passes) == 8
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "is truncated or altered" in record.getMessage() and str(path) in record.getMessage()
    assert path.read_bytes() == whole


def test_file_of_another_key_is_not_taken_for_ones_own(world: World, passes: list[int]) -> None:
    policy, data = policy_of(world.path), Grouped(GROUPS)
    expected_T = cached_logprobs(policy, data, PARTS)
    (path,) = files()
    other = policy_of(world.path)
    perturb(other.model, seed=3, spread=0.1)
    path.rename(path.with_name(f"{key(other)}.safetensors"))
    found_T = cached_logprobs(other, data, PARTS)
    assert sum(passes) == 8
    assert torch.equal(found_T, score_logprobs(other, data, PARTS))
    assert not torch.equal(found_T, expected_T)


def test_file_without_its_parts_is_computed_again(world: World, passes: list[int]) -> None:
    policy, data = policy_of(world.path), Grouped(GROUPS)
    cached_logprobs(policy, data, PARTS)
    (path,) = files()
    save_file({"logprobs_T": torch.zeros(7)}, path)
    cached_logprobs(policy, data, PARTS)
    assert sum(passes) == 8


def test_cache_that_cannot_be_written_is_told_and_the_run_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "file"))
    run = dpo.train(config_of(world))
    assert (run / "final").is_dir()
    messages = [r.getMessage() for r in caplog.records if "TRIVIUM_CACHE" in r.getMessage()]
    assert len(messages) == 1
    assert "cannot be written" in messages[0] and "reference_cache: false" in messages[0]


def test_disk_that_is_full_leaves_no_half_a_file(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trivium.runs.files.flush_to_disk", full)
    cached_logprobs(policy_of(world.path), Grouped(GROUPS), PARTS)
    assert "No space left on device" in caplog.text
    directory = Path(os.environ["TRIVIUM_CACHE"]) / "reference"
    assert list(directory.iterdir()) == []


def test_no_home_is_told_and_the_pairs_are_scored(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(reference_cache, "cache_directory", none)
    policy, data = policy_of(world.path), Grouped(GROUPS)
    found_T = cached_logprobs(policy, data, PARTS)
    assert torch.equal(found_T, score_logprobs(policy, data, PARTS))
    assert "set TRIVIUM_CACHE" in caplog.text


def test_least_recently_used_files_are_evicted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, data = policy_of(world.path), Grouped(GROUPS)
    cuts = [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]]
    names = [f"{key(policy, GROUPS, cut)}.safetensors" for cut in cuts]
    cached_logprobs(policy, data, cuts[0])
    (path,) = files()
    monkeypatch.setattr(reference_cache, "MAX_BYTES", 2 * path.stat().st_size)
    os.utime(path, (1, 1))
    left_over = path.with_name(".x-12345678.partial")
    left_over.write_bytes(b"half")
    cached_logprobs(policy, data, cuts[1])
    assert sorted(p.name for p in files()) == sorted(names[:2])
    assert left_over.exists(), "another process may be writing it"
    os.utime(left_over, (1, 1))
    second = path.with_name(names[1])
    os.utime(second, (2, 2))
    cached_logprobs(policy, data, cuts[0])
    assert path.stat().st_mtime > 2, "reading is using"
    cached_logprobs(policy, data, cuts[2])
    assert sorted(p.name for p in files()) == sorted([names[0], names[2]])
    assert not left_over.exists()
    monkeypatch.setattr(reference_cache, "MAX_BYTES", 1)
    cached_logprobs(policy, data, cuts[1])
    assert [p.name for p in files()] == [names[1]], "the newest stays, however large it is"


def test_place_is_the_users_cache_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trivium.config.paths import cache_directory

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TRIVIUM_CACHE")
    assert cache_directory() == tmp_path / ".cache" / "trivium"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "trivium"
    monkeypatch.setenv("TRIVIUM_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"
