"""Every pipeline that comes with Trivium runs end to end, scaled down to a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trivium.cli import main
from trivium.pipelines.recipes import RECIPES, list_recipes
from trivium.report.pipeline import collect

SMALL = "task={problems: 64, held_out: 8, labels: 8}"
SFT = "stages.sft.steps=2"
FAMILY = ("deepseekmath", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce-pp", "gdpo")
SMALL_GRPO = [SFT, "stages.grpo.steps_per_iteration=1", "stages.grpo.prompts_per_step=8"]
SMALL_PAIRS = [
    SFT,
    "stages.pairs.data.limit=8",
    "stages.pairs.rewards=[{function: letters.py:different}]",
    "stages.pairs.keep_truncated=true",
    "stages.dpo.epochs=1.0",
]
CHANGES = {
    "dpo": SMALL_PAIRS,
    "ipo": SMALL_PAIRS,
    "dpo-online": [
        SFT,
        "stages.dpo.online.steps=1",
        "stages.dpo.online.rewards=[{function: letters.py:different}]",
        "stages.dpo.pairs_per_step=4",
    ],
    "instructgpt": [
        SFT,
        "stages.comparisons.data.limit=8",
        "stages.comparisons.rewards=[{function: letters.py:different}]",
        "stages.comparisons.keep_truncated=true",
        "stages.ppo.steps=1",
        "stages.ppo.prompts_per_step=8",
        "stages.ppo.pretraining.examples_per_step=4",
    ],
    **dict.fromkeys(FAMILY, SMALL_GRPO),
    "zephyr": [
        "stages.judge.epochs=1.0",
        "stages.dsft.epochs=0.1",
        "stages.feedback.data.limit=4",
        "stages.feedback.keep_truncated=true",
        "stages.dpo.epochs=1.0",
    ],
    "tulu2": [
        "stages.sft.epochs=0.1",
        "stages.feedback.data.limit=8",
        "stages.feedback.rewards=[{function: letters.py:different}]",
        "stages.feedback.keep_truncated=true",
        "stages.dpo.epochs=1.0",
    ],
    "r1-zero": [
        "stages.pretraining.steps=2",
        "stages.grpo.steps_per_iteration=1",
        "stages.grpo.prompts_per_step=2",
    ],
    "r1": [
        "stages.cold-start.steps=2",
        "stages.reasoning.steps_per_iteration=1",
        "stages.reasoning.prompts_per_step=2",
        "stages.rejection={command: sample, model: {path: '${reasoning}'}, data: {limit: 8}}",
        "stages.sft.epochs=0.1",
        "stages.pairs.data.limit=8",
        "stages.pairs.rewards=[{function: letters.py:different}]",
        "stages.pairs.keep_truncated=true",
        "stages.grpo.steps_per_iteration=1",
        "stages.grpo.prompts_per_step=2",
    ],
    "math-shepherd": [
        "stages.label-steps.data={path: '${task}', split: train, limit: 8}",
        "stages.label-steps.solutions=null",
        "stages.reward-model.epochs=1.0",
        *SMALL_GRPO,
    ],
}
"""Settings of each recipe that scale its stages down. An untrained model solves no problem, so that
pairs are ranked by their number of different characters."""


def test_every_pipeline_has_a_scaled_down_run() -> None:
    assert set(CHANGES) == {name for name in list_recipes() if "/" not in name}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one directory for all recipes, so that those with an equal SFT stage train it once."""
    place = tmp_path_factory.mktemp("recipes")
    code = "def different(responses): return [float(len(set(r))) for r in responses]\n"
    (place / "letters.py").write_text(code)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_runs_end_to_end(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    recipe = str(RECIPES / f"{name}.yaml")
    settings = [SMALL, *CHANGES[name], "sampling.max_tokens=8", "directory=run"]
    assert main(["run", recipe, *settings]) == 0, capsys.readouterr().err
    stages = collect(Path("run"))["stages"]
    assert {stage["state"] for stage in stages} == {"finished"}
    evaluation = json.loads(Path("run/evaluate/evaluation.json").read_text())
    assert evaluation["n"] == 8 and evaluation["kl"] is not None
    assert stages[-1]["evaluation"]["greedy"] == evaluation["greedy"]
