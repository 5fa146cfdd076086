"""The model card of a run: every fact and figure is that of the run's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_models import World

from trivium.algorithms import grpo, sft
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.config.base import dump, load_configuration
from trivium.monitoring.metrics import METRICS
from trivium.runs.model_card import SHOWN, model_card
from trivium.runs.store import Run

ROWS = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "completion": "ef"}]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def sft_config(world: World, **options: Any) -> SFTConfig:
    base = {"model": {"path": world.path}, "data": world.rows("rows.jsonl", ROWS)}
    return SFTConfig.model_validate(base | {"steps": 2, "run": world.run()} | options)


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def tables(card: str) -> dict[str, Sequence[str]]:
    """Return the cells of every table's rows by the row's first cell."""
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def record_run(directory: Path, config: Any, kind: str, metrics: Sequence[dict[str, float]]) -> Run:
    """Write a run with these metrics, one step each."""
    directory.mkdir()
    run = Run.create(directory, kind, config)
    for step, row in enumerate(metrics, 1):
        run.log(step, row)
    return run


def test_every_finished_run_has_a_card_with_its_base_data_method_and_command(world: World) -> None:
    evaluation = {"data": world.prompts, "max_tokens": 4}
    config = GRPOConfig.model_validate(
        world.on_policy(steps_per_iteration=2, evaluation=evaluation, beta=0.25)
    )
    run = grpo.train(config)
    card = (run / "final" / "README.md").read_text()
    facts = tables(card)
    assert facts["base"] == [f"`{world.path}`"]
    assert facts["data: `data`"] == [f"`{world.prompts['path']}`"]
    assert facts["data: `evaluation.data`"] == [f"`{world.prompts['path']}`"]
    assert facts["method"][0].startswith("GRPO, ")
    assert "`beta: 0.25`" in facts["method"][0]
    assert facts["rewards"] == [f"`{world.rewards}:letters` × 1"]
    assert facts["steps"] == ["2"]
    assert facts["weights"] == ["all; saved in float32"]
    assert "trivium grpo config.yaml" in card
    written = card.split("```yaml\n")[1].split("```")[0]
    (world.directory / "again.yaml").write_text(written)
    assert dump(load_configuration(GRPOConfig, world.directory / "again.yaml")) == dump(config)


def test_figures_are_those_of_the_first_and_last_evaluation_and_steps(
    world: World, tmp_path: Path
) -> None:
    rewards = [0.0] * 10 + [9.0] * 4 + [1.0, 3.0] * 5
    rows = [{"reward/mean": r, "loss": 0.5, "gradient_norm": 7.0} for r in rewards]
    run = record_run(tmp_path / "run", sft_config(world), "sft", rows)
    run.evaluation(0, {"n": 8, "greedy": 0.25, "greedy_low": 0.125, "greedy_high": 0.5})
    run.evaluation(12, {"n": 8, "greedy": 0.99, "kl": 5.0})
    run.evaluation(24, {"n": 8, "greedy": 0.5, "kl": 0.0625})
    card = model_card(run.path, sft_config(world))
    assert "after step 0 | after step 24" in card
    found = tables(card)
    assert found["held-out reward, greedy"] == ["0.25 [0.125, 0.5]", "0.5"]
    assert found["KL to the reference"] == ["–", "0.0625"]
    assert "first 10 steps, mean | last 10 steps, mean" in card
    assert found[METRICS["reward/mean"].title] == ["0", "2"]
    assert found[METRICS["loss"].title] == ["0.5", "0.5"]
    assert METRICS["gradient_norm"].title not in found


@pytest.mark.parametrize(
    ("seconds", "time"), [(0.25, "0.25 s"), (59, "59 s"), (90, "1.5 min"), (5400, "1.5 h")]
)
def test_time_is_in_the_unit_that_fits(
    world: World, tmp_path: Path, seconds: float, time: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(world)
    monkeypatch.setattr(Run, "elapsed", lambda run: seconds)
    run = record_run(tmp_path / "run", config, "sft", [{"loss": 1.0}])
    assert tables(model_card(run.path, config))["time"] == [time]


def test_shown_metrics_exist() -> None:
    assert set(SHOWN) <= set(METRICS)


def test_run_that_stopped_early_says_so(world: World, tmp_path: Path) -> None:
    run = record_run(tmp_path / "run", sft_config(world), "sft", [{"loss": 1.0}])
    run.event("stopped", "the budget is spent", step=1)
    assert tables(model_card(run.path, sft_config(world)))["steps"] == ["1 (the budget is spent)"]


def test_names_on_the_hub_are_metadata_and_local_paths_are_not(
    world: World, tmp_path: Path
) -> None:
    config = sft_config(world)
    run = record_run(tmp_path / "run", config, "sft", [{"loss": 1.0}])
    assert not {"base_model", "datasets"} & metadata(model_card(run.path, config)).keys()
    hub = sft_config(
        world,
        model={"path": "someone/model", "revision": "v1"},
        data={"path": "someone/rows", "split": "train"},
    )
    card = model_card(run.path, hub)
    assert metadata(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trivium", "sft"],
        "base_model": "someone/model",
        "base_model_relation": "finetune",
        "datasets": ["someone/rows"],
    }
    assert tables(card)["base"] == ["`someone/model` at v1"]
    assert tables(card)["data: `data`"] == ["`someone/rows`, train"]


@pytest.mark.parametrize("form", ["adapter", "both"])
def test_card_of_adapters_names_them_and_their_base(world: World, form: str) -> None:
    model = {"path": world.path, "lora": {"rank": 3, "dora": True, "save": form}}
    run = sft.train(sft_config(world, model=model))
    card = (run / "final" / "README.md").read_text()
    adapters = form == "adapter"
    assert metadata(card)["library_name"] == ("peft" if adapters else "transformers")
    assert ("LoRA adapters trained by" in card) == adapters
    assert "More Information Needed" not in card
    assert not (run / "final" / "adapter" / "README.md").exists()
    assert tables(card)["weights"] == ["LoRA of rank 3, DoRA; saved in float32"]
    if adapters:
        assert (run / "final" / "adapter_config.json").is_file()
        again = sft_config(world, model={"path": str(run / "final")})
        facts = tables(model_card(run, again))
        assert facts["base"] == [f"`{Path(world.path).resolve()}`"]
        assert facts["adapters at the start"] == [f"`{run / 'final'}`"]


def test_text_of_a_setting_cannot_break_the_table(world: World, tmp_path: Path) -> None:
    odd = tmp_path / "a|b`c.jsonl"
    odd.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = sft_config(world, data={"path": str(odd)})
    run = record_run(tmp_path / "run", config, "sft", [{"loss": 1.0}])
    line = next(x for x in model_card(run.path, config).splitlines() if "data: `data`" in x)
    assert line == f"| data: `data` | `{tmp_path}/a\\|b'c.jsonl` |"


def test_reward_models_are_classifiers_on_the_hub(world: World, tmp_path: Path) -> None:
    config = sft_config(world)
    run = record_run(tmp_path / "run", config, "reward-model", [{"loss": 1.0}])
    assert metadata(model_card(run.path, config))["pipeline_tag"] == "text-classification"
