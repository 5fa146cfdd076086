"""A step that is not finite: what is wrong first, in words, and the batch on disk to study."""

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
from trivium.runs.nonfinite import MicroBatchRecord, NonFiniteReport, first_fault, save_for_study
from trivium.training import optimizer as optimizer_module
from trivium.training.micro_batch import MicroBatch
from trivium.training.optimizer import Optimizer, OptimizerConfig
from trivium.training.reward_losses import LabeledSteps

GROUPS = [Group([1, 2], [[3, 4], [5]]), Group([6], [[7, 8, 9], [2, 3]])]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True, kw_only=True)
class Given(Grouped):
    advantages_T: Tensor
    weights_T: Tensor | None = None


def seen(loss: float = 0.5, /, **values: list[float]) -> MicroBatchRecord:
    given = {"advantages_T": torch.ones(8)}
    return MicroBatchRecord(
        GROUPS, given, {name: torch.tensor(x) for name, x in values.items()}, loss
    )


def ones_but(at: int, value: float) -> list[float]:
    return [value if i == at else 1.0 for i in range(8)]


def fault(*parts: MicroBatchRecord) -> str:
    return first_fault(NonFiniteReport(3, [1.0], list(parts)))


# --- what is wrong first ------------------------------------------------------------------------


def test_token_is_named_by_micro_batch_response_place_and_id() -> None:
    found = fault(seen(logprobs_T=ones_but(0, 1.0)), seen(NAN, logprobs_T=ones_but(5, NAN)))
    assert "the log-prob is nan (micro-batch 1, response 2, token 2 with the id 9)" in found
    assert "learning_rate" in found


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({"entropy_T": ones_but(0, NAN), "logprobs_T": ones_but(7, -INF)}, "log-prob is -inf"),
        ({"logprobs_T": ones_but(0, 200.0), "old_logprobs_T": ones_but(0, 0.0)}, "ratio π/π_old"),
        ({"logprobs_T": ones_but(0, NAN), "ref_logprobs_T": ones_but(0, NAN)}, "the reference is"),
        ({"value_loss_T": ones_but(3, INF)}, "value loss is inf"),
        ({"margin_P": [1.0, NAN]}, "margin is nan (micro-batch 0, pair 1)"),
        ({"score_P": [INF, NAN]}, "score is inf (micro-batch 0, pair 0)"),
        ({"logit_S": [1.0, 1.0, NAN]}, "logit is nan (micro-batch 0, labeled step 2)"),
    ],
)
def test_cause_comes_before_its_effect(values: dict[str, list[float]], first: str) -> None:
    assert first in fault(seen(NAN, **values))


def test_ratio_of_a_far_token_is_named_where_both_log_probs_are_finite() -> None:
    found = fault(seen(NAN, logprobs_T=ones_but(4, 99.0), old_logprobs_T=ones_but(4, -1.0)))
    assert "ratio π/π_old is inf (micro-batch 0, response 2, token 1 with the id 8)" in found
    assert "epochs or minibatches" in found


def test_advantage_that_is_not_finite_points_at_the_rewards() -> None:
    part = Given(GROUPS, advantages_T=torch.tensor(ones_but(2, INF)))
    found = fault(MicroBatchRecord.of(part, {"logprobs_T": torch.full((8,), NAN)}, NAN))
    assert "advantage is inf (micro-batch 0, response 1, token 0 with the id 5)" in found
    assert "rewards" in found


def test_entries_of_learned_tokens_are_counted_among_all_tokens() -> None:
    weights_T = torch.tensor([0.0, 1, 1, 0, 0, 1, 1, 0])
    part = Given(GROUPS, advantages_T=torch.ones(8), weights_T=weights_T)
    found = fault(
        MicroBatchRecord.of(part, {"logprobs_T": torch.tensor([1.0, 1.0, NAN, 1.0])}, NAN)
    )
    assert "(micro-batch 0, response 2, token 2 with the id 9)" in found


def test_tokens_without_a_label_are_no_fault() -> None:
    groups = [Group([1], [[2, 3, 4]])]
    part = LabeledSteps.of(groups, [[2]], [[1.0]])
    assert "First, the loss" in fault(
        MicroBatchRecord.of(part, {"logit_S": torch.tensor([0.5])}, INF)
    )


def test_loss_and_gradient_are_named_where_all_they_are_made_of_is_finite() -> None:
    assert "the loss of micro-batch 1 is inf" in fault(seen(), seen(INF))
    assert "Each loss is finite and the gradient is not" in fault(seen(), seen())


# --- from an optimizer step to the disk ---------------------------------------------------------


def failed(x: float = 1.0) -> tuple[NonFiniteError, nn.Parameter, Optimizer]:
    weight = nn.Parameter(torch.tensor([x]))
    whole = Given(GROUPS, advantages_T=torch.tensor(ones_but(6, NAN)))

    def loss(part: Given) -> tuple[Tensor, Mapping[str, Tensor]]:
        scaled_T = weight * part.advantages_T
        return scaled_T.sum(), {"logprobs_T": -part.advantages_T.abs()}

    work = [MicroBatch(whole.select([0, 1]), loss), MicroBatch(whole.select([2, 3]), loss)]
    optimizer = Optimizer([(OptimizerConfig(), [weight])], 1)
    with pytest.raises(NonFiniteError) as error:
        optimizer.step(work)
    return error.value, weight, optimizer


def test_step_that_is_not_finite_carries_its_batch_and_moves_nothing() -> None:
    error, weight, optimizer = failed()
    assert isinstance(error, TrainingError)
    assert "at optimizer step 0 the loss is nan and the gradient norm nan" in str(error)
    assert "advantage is nan (micro-batch 1, response 1, token 0 with the id 2)" in str(error)
    assert weight.tolist() == [1.0] and not optimizer.adamw.state and optimizer.steps == 0
    losses = [part.loss for part in error.evidence.micro_batches]
    assert losses[0] == 3.0 and math.isnan(losses[1])


def test_saved_batch_holds_tokens_texts_losses_and_every_tensor(tmp_path: Path) -> None:
    error, _, _ = failed()
    place = save_for_study(error, tmp_path, letters_tokenizer())
    assert place == tmp_path / "non-finite"
    assert str(error).endswith(f"The batch is in {place}")

    def reject(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads((place / "batch.json").read_text(), parse_constant=reject)
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
    tensors = load_file(place / second["file"])
    assert set(tensors) == {"given.advantages_T", "observed.logprobs_T"}
    expected = torch.tensor([1.0, 1, 1, NAN, 1])
    torch.testing.assert_close(tensors["given.advantages_T"], expected, equal_nan=True)


def test_later_batch_replaces_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        error, _, _ = failed()
        assert save_for_study(error, tmp_path) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["non-finite"]
    assert len(list((tmp_path / "non-finite").iterdir())) == 3
    record = json.loads((tmp_path / "non-finite" / "batch.json").read_text())
    assert record["micro_batches"][0]["groups"][0]["prompt"] == {"tokens": [1, 2]}


def test_disk_that_refuses_does_not_hide_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error, _, _ = failed()
    before = str(error)
    (tmp_path / "run").write_text("a file where a directory should be")
    assert save_for_study(error, tmp_path / "run") is None
    assert "cannot be saved" in caplog.text
    assert str(error) == before


def test_training_that_diverges_names_the_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    monkeypatch.setattr(optimizer_module, "lr_multiplier", lambda *given: 1e30)
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "b", "completion": "fgh"}]
    optimizer = {"learning_rate": 1.0, "schedule": "constant"}
    config = sft.SFTConfig(
        model={"path": world.path}, data=world.rows("rows.jsonl", rows), run=world.run(),
        optimizer=optimizer, steps=3,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"step 1 .* log-prob is .*token \d") as error:
        sft.train(config)
    assert save_for_study(error.value, tmp_path / "run1") == tmp_path / "run1" / "non-finite"
