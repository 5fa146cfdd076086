"""Optimizer steps that are not finite: the first cause in words, and the batch on the disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World, letters_tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn

from trivium.algorithms import sft
from trivium.data.batch import Group, Grouped
from trivium.errors import NonFiniteError, TrainingError
from trivium.runs.nonfinite import (
    MicroBatchRecord,
    NonFiniteReport,
    describe_first_nonfinite,
    save_nonfinite_batch,
)
from trivium.training import optimizer as optimizer_module
from trivium.training.micro_batch import MicroBatch
from trivium.training.optimizer import Optimizer, OptimizerConfig
from trivium.training.reward_losses import LabeledSteps

GROUPS = [Group([1, 2], [[3, 4], [5]]), Group([6], [[7, 8, 9], [2, 3]])]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True, kw_only=True)
class Advantages(Grouped):
    advantages_T: Tensor
    weights_T: Tensor | None = None


def record_of(loss: float = 0.5, /, **observed: list[float]) -> MicroBatchRecord:
    inputs = {"advantages_T": torch.ones(8)}
    tensors = {name: torch.tensor(values) for name, values in observed.items()}
    return MicroBatchRecord(GROUPS, inputs, tensors, loss)


def ones_except(at: int, value: float) -> list[float]:
    return [value if i == at else 1.0 for i in range(8)]


def describe(*records: MicroBatchRecord) -> str:
    return describe_first_nonfinite(NonFiniteReport(3, [1.0], list(records)))


# --- The first cause ------------------------------------------------------------------------------


def test_token_is_named_by_micro_batch_response_position_and_id() -> None:
    message = describe(
        record_of(logprobs_T=ones_except(0, 1.0)), record_of(NAN, logprobs_T=ones_except(5, NAN))
    )
    assert "the log-prob is nan (micro-batch 1, response 2, token 2 with the id 9)" in message
    assert "learning_rate" in message


@pytest.mark.parametrize(
    ("values", "first"),
    [
        (
            {"entropy_T": ones_except(0, NAN), "logprobs_T": ones_except(7, -INF)},
            "log-prob is -inf",
        ),
        (
            {"logprobs_T": ones_except(0, 200.0), "old_logprobs_T": ones_except(0, 0.0)},
            "ratio π/π_old",
        ),
        (
            {"logprobs_T": ones_except(0, NAN), "ref_logprobs_T": ones_except(0, NAN)},
            "the reference is",
        ),
        ({"value_loss_T": ones_except(3, INF)}, "value loss is inf"),
        ({"margin_P": [1.0, NAN]}, "margin is nan (micro-batch 0, pair 1)"),
        ({"score_P": [INF, NAN]}, "score is inf (micro-batch 0, pair 0)"),
        ({"logit_S": [1.0, 1.0, NAN]}, "logit is nan (micro-batch 0, labeled step 2)"),
    ],
)
def test_cause_is_named_before_its_effect(values: dict[str, list[float]], first: str) -> None:
    assert first in describe(record_of(NAN, **values))


def test_infinite_ratio_of_two_finite_log_probs_is_named() -> None:
    message = describe(
        record_of(NAN, logprobs_T=ones_except(4, 99.0), old_logprobs_T=ones_except(4, -1.0))
    )
    assert "ratio π/π_old is inf (micro-batch 0, response 2, token 1 with the id 8)" in message
    assert "epochs or minibatches" in message


def test_nonfinite_advantage_points_to_the_rewards() -> None:
    data = Advantages(GROUPS, advantages_T=torch.tensor(ones_except(2, INF)))
    message = describe(MicroBatchRecord.of(data, {"logprobs_T": torch.full((8,), NAN)}, NAN))
    assert "advantage is inf (micro-batch 0, response 1, token 0 with the id 5)" in message
    assert "rewards" in message


def test_position_of_a_trained_token_counts_all_tokens() -> None:
    weights_T = torch.tensor([0.0, 1, 1, 0, 0, 1, 1, 0])
    data = Advantages(GROUPS, advantages_T=torch.ones(8), weights_T=weights_T)
    message = describe(
        MicroBatchRecord.of(data, {"logprobs_T": torch.tensor([1.0, 1.0, NAN, 1.0])}, NAN)
    )
    assert "(micro-batch 0, response 2, token 2 with the id 9)" in message


def test_tokens_without_a_label_are_not_reported() -> None:
    groups = [Group([1], [[2, 3, 4]])]
    data = LabeledSteps.of(groups, [[2]], [[1.0]])
    assert "First, the loss" in describe(
        MicroBatchRecord.of(data, {"logit_S": torch.tensor([0.5])}, INF)
    )


def test_loss_or_gradient_is_named_if_all_of_its_terms_are_finite() -> None:
    assert "the loss of micro-batch 1 is inf" in describe(record_of(), record_of(INF))
    assert "Every loss is finite and the gradient is not" in describe(record_of(), record_of())


# --- From an optimizer step to the disk -----------------------------------------------------------


def failed_step(x: float = 1.0) -> tuple[NonFiniteError, nn.Parameter, Optimizer]:
    weight = nn.Parameter(torch.tensor([x]))
    batch = Advantages(GROUPS, advantages_T=torch.tensor(ones_except(6, NAN)))

    def loss(data: Advantages) -> tuple[Tensor, Mapping[str, Tensor]]:
        scaled_T = weight * data.advantages_T
        return scaled_T.sum(), {"logprobs_T": -data.advantages_T.abs()}

    micro_batches = [MicroBatch(batch.select([0, 1]), loss), MicroBatch(batch.select([2, 3]), loss)]
    optimizer = Optimizer([(OptimizerConfig(), [weight])], 1)
    with pytest.raises(NonFiniteError) as error:
        optimizer.step(micro_batches)
    return error.value, weight, optimizer


def test_nonfinite_step_reports_its_batch_and_changes_no_weight() -> None:
    error, weight, optimizer = failed_step()
    assert isinstance(error, TrainingError)
    assert "at optimizer step 0 the loss is nan and the gradient norm nan" in str(error)
    assert "advantage is nan (micro-batch 1, response 1, token 0 with the id 2)" in str(error)
    assert weight.tolist() == [1.0] and not optimizer.state_of(weight) and optimizer.steps == 0
    losses = [record.loss for record in error.report.micro_batches]
    assert losses[0] == 3.0 and math.isnan(losses[1])


def test_saved_batch_holds_tokens_texts_losses_and_every_tensor(tmp_path: Path) -> None:
    error, _, _ = failed_step()
    directory = save_nonfinite_batch(error, tmp_path, letters_tokenizer())
    assert directory == tmp_path / "non-finite"
    assert str(error).endswith(f"The batch is in {directory}")

    def reject(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((directory / "batch.json").read_text(), parse_constant=reject)
    assert record["optimizer_step"] == 0
    assert record["gradient_norms"] == ["NaN"]
    first, second = record["micro_batches"]
    assert (first["loss"], second["loss"]) == (3.0, "NaN")
    decode = letters_tokenizer().decode
    assert first["groups"] == [
        {
            "prompt": {"tokens": [1, 2], "text": decode([1, 2])},
            "responses": [
                {"tokens": [3, 4], "text": decode([3, 4])},
                {"tokens": [5], "text": decode([5])},
            ],
        }
    ]
    tensors = load_file(directory / second["file"])
    assert set(tensors) == {"inputs.advantages_T", "observed.logprobs_T"}
    expected = torch.tensor([1.0, 1, 1, NAN, 1])
    torch.testing.assert_close(tensors["inputs.advantages_T"], expected, equal_nan=True)


def test_saved_batch_replaces_an_earlier_one(tmp_path: Path) -> None:
    for _ in range(2):
        error, _, _ = failed_step()
        assert save_nonfinite_batch(error, tmp_path) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["non-finite"]
    assert len(list((tmp_path / "non-finite").iterdir())) == 3
    record = json.loads((tmp_path / "non-finite" / "batch.json").read_text())
    assert record["micro_batches"][0]["groups"][0]["prompt"] == {"tokens": [1, 2]}


def test_batch_that_cannot_be_saved_does_not_hide_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error, _, _ = failed_step()
    before = str(error)
    (tmp_path / "run").write_text("a file where a directory should be")
    assert save_nonfinite_batch(error, tmp_path / "run") is None
    assert "cannot be saved" in caplog.text
    assert str(error) == before


def test_error_of_a_diverging_run_names_the_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    monkeypatch.setattr(optimizer_module, "lr_multiplier", lambda *arguments: 1e30)
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "b", "completion": "fgh"}]
    optimizer = {"learning_rate": 1.0, "schedule": "constant"}
    config = sft.SFTConfig(
        model={"path": world.path}, data=world.rows("rows.jsonl", rows), run=world.run(),
        optimizer=optimizer, steps=3,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"step 1 .* log-prob is .*token \d") as error:
        sft.train(config)
    assert save_nonfinite_batch(error.value, tmp_path / "run1") == tmp_path / "run1" / "non-finite"
