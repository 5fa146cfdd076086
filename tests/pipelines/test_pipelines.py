"""Pipelines: the plan, mistakes in it, reuse of finished stages, and interruption in any stage."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_models import World, rows
from safetensors.torch import load_file

from trivium.cli import main
from trivium.cli.parser import flags_last, make_parser
from trivium.commands import COMMANDS
from trivium.errors import ConfigurationError, TrainingError
from trivium.jobs import board
from trivium.jobs.job import STAGE_COMMANDS, Job
from trivium.jobs.record import inputs_of, status_of, write_done
from trivium.jobs.validation import validate_jobs
from trivium.pipelines.config import PipelineConfig
from trivium.pipelines.dry_run import plan
from trivium.pipelines.plan import make_jobs
from trivium.pipelines.products import product_faults
from trivium.pipelines.run import checked_jobs, run
from trivium.pipelines.task import names_task
from trivium.report.pipeline import collect

SHARED = {
    "model": {"path": "base", "dtype": "float32", "revision": "v1"},
    "data": {"path": "prompts", "split": "train", "limit": 9, "template": "{question}"},
    "rewards": [{"function": "gsm8k"}],
    "sampling": {"max_tokens": 12},
    "evaluation": {"data": {"split": "test"}, "samples": 2, "prompts": 7},
    "directory": "out",
    "seed": 5,
}
DPO = {
    "sft": {"steps": 3},
    "pairs": {"model": {"path": "${sft}"}},
    "dpo": {"model": {"path": "${sft}"}, "data": {"path": "${pairs}"}},
    "evaluate": {"model": {"path": "${dpo}"}, "reference": {"path": "${sft}"}},
}


def make_config(stages: dict[str, Any], **options: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({**SHARED, **options, "stages": stages})


def settings_of(stages: dict[str, Any], **options: Any) -> dict[str, dict[str, Any]]:
    jobs = make_jobs(make_config(stages, **options))
    validate_jobs(jobs)
    return {name: job.settings for name, job in jobs.items()}


# --- The plan -------------------------------------------------------------------------------------


def test_a_stage_uses_the_outputs_of_earlier_stages() -> None:
    jobs = make_jobs(make_config(DPO))
    assert jobs["pairs"].settings["model"]["path"] == "out/sft/final"
    assert jobs["dpo"].settings["data"] == {"path": "out/pairs/rows.jsonl"}
    assert jobs["evaluate"].settings["reference"] == {"path": "out/sft/final"}
    assert jobs["evaluate"].settings["output"] == "out/evaluate/evaluation.json"
    assert jobs["evaluate"].dependencies == ("dpo", "sft")
    assert jobs["sft"].dependencies == ()


def test_a_stage_can_mix_an_earlier_output_with_other_data() -> None:
    mixed = [{"path": "${pairs}", "weight": 1}, {"path": "more.jsonl", "weight": 3}]
    settings = settings_of({"pairs": None, "dpo": {"data": {"mixture": mixed}}})
    paths = [source["path"] for source in settings["dpo"]["data"]["mixture"]]
    assert paths == ["out/pairs/rows.jsonl", "more.jsonl"]
    own = settings_of({"sft": {"data": {"mixture": [{"path": "a"}, {"path": "b"}]}}})["sft"]
    assert own["data"] == {"mixture": [{"path": "a"}, {"path": "b"}]}, "nothing of the shared data"


def test_a_model_in_a_mixture_is_refused_by_its_place() -> None:
    stages = {"sft": None, "dpo": {"data": {"mixture": [{"path": "${sft}"}, {"path": "b"}]}}}
    jobs = make_jobs(make_config(stages))
    (fault,) = product_faults(jobs, validate_jobs(jobs))
    assert "stage dpo: data.mixture.0.path is the output of sft, a policy" in fault


def test_the_directory_of_a_stage_has_a_name_of_its_own() -> None:
    best = {"command": "grpo", "model": {"path": "${sft.directory}/best"}}
    assert settings_of({"sft": None, "best": best})["best"]["model"]["path"] == "out/sft/best"


def test_shared_settings_fill_the_sections_that_a_command_has() -> None:
    settings = settings_of(DPO)
    assert settings["sft"]["model"] == SHARED["model"]
    data = {"path": "prompts", "split": "train", "limit": 9, "template": "{question}"}
    assert settings["sft"]["data"] == settings["pairs"]["data"] == data
    assert settings["pairs"]["rewards"] == SHARED["rewards"]
    assert settings["pairs"]["sampling"] == {"max_tokens": 12}
    assert "sampling" not in settings["sft"] and "rewards" not in settings["dpo"]
    assert settings["sft"]["run"] == {"directory": "out/sft", "seed": 5, "overwrite": True}
    assert settings["pairs"]["seed"] == 5 and "seed" not in settings["dpo"]


def test_a_model_of_its_own_keeps_all_shared_settings_but_the_revision() -> None:
    assert settings_of(DPO)["dpo"]["model"] == {"path": "out/sft/final", "dtype": "float32"}


def test_held_out_data_is_a_split_of_the_shared_data_without_its_limit() -> None:
    settings = settings_of(DPO)
    held_out = {"path": "prompts", "split": "test", "template": "{question}"}
    evaluation = settings["dpo"]["evaluation"]
    assert evaluation["data"] == held_out and evaluation["rewards"] == SHARED["rewards"]
    assert not evaluation["at_start"] and evaluation["max_tokens"] == 12
    evaluate = settings["evaluate"]
    assert evaluate["data"] == {**held_out, "limit": 7} and evaluate["samples"] == 2
    assert evaluate["max_tokens"] == 12 and evaluate["temperature"] == 1.0
    assert "seed" not in evaluate, "every evaluation samples alike"


def test_settings_of_a_stage_come_before_the_shared_ones() -> None:
    own = {"data": {"limit": 3}, "evaluation": {"every": 4}, "run": {"seed": 8, "samples": 1}}
    settings = settings_of({"grpo": own, "sft": {"evaluation": None, "data": {"path": "mine"}}})
    assert settings["grpo"]["data"] == {**SHARED["data"], "limit": 3}
    assert settings["grpo"]["evaluation"]["every"] == 4
    assert settings["grpo"]["evaluation"]["samples"] == 2
    assert settings["grpo"]["run"]["seed"] == 8 and settings["grpo"]["run"]["samples"] == 1
    assert settings["sft"]["evaluation"] is None and settings["sft"]["data"] == {"path": "mine"}


def test_shared_rows_fill_sections_of_prompts_and_texts_inside_a_stage() -> None:
    ppo = {"pretraining": {"coefficient": 2.0}}
    online = {"online": {"steps": 4}}
    settings = settings_of({"ppo": ppo, "dpo": online})
    assert settings["ppo"]["pretraining"]["data"] == SHARED["data"]
    assert settings["dpo"]["online"]["data"] == SHARED["data"]
    assert settings["dpo"]["online"]["rewards"] == SHARED["rewards"]
    assert "data" not in settings["dpo"]
    assert "model" not in settings["ppo"].get("critic", {}), "the default is the actor"


def test_columns_of_the_shared_data_reach_only_sections_that_use_them() -> None:
    data = {**SHARED["data"], "columns": {"answer": "solution", "completion": "text"}}
    settings = settings_of({"sft": None, "grpo": None}, data=data)
    assert settings["sft"]["data"]["columns"] == {"completion": "text"}
    assert settings["grpo"]["data"]["columns"] == data["columns"]


def test_outputs_of_stages_are_rendered_like_the_shared_prompts() -> None:
    arguments = {"template_arguments": {"thinking": False}}
    stages = {
        **DPO,
        "best": {
            "command": "sft",
            "data": {"path": "${pairs}", "columns": {"completion": "chosen"}},
        },
        "rm": {"command": "reward-model", "pairs": {"path": "${pairs}"}},
        "other": {"command": "dpo", "data": {"path": "pairs.jsonl"}},
    }
    settings = settings_of(stages, data={**SHARED["data"], **arguments})
    rows_of_pairs = {"path": "out/pairs/rows.jsonl", **arguments}
    assert settings["dpo"]["data"] == settings["rm"]["pairs"] == rows_of_pairs
    assert settings["best"]["data"] == {**rows_of_pairs, "columns": {"completion": "chosen"}}
    assert settings["other"]["data"] == {"path": "pairs.jsonl"}
    assert settings["evaluate"]["data"]["template_arguments"] == {"thinking": False}


def test_candidates_in_rows_are_not_sampled() -> None:
    candidates = {"candidates": [{"response": "r", "score": "s"}]}
    pairs = settings_of({"pairs": candidates})["pairs"]
    assert not {"model", "rewards", "sampling"} & set(pairs) and pairs["data"] == SHARED["data"]


def test_the_built_in_task_is_written_only_where_a_stage_names_it() -> None:
    config = make_config(DPO, model={"path": "${task}/base"})
    assert names_task(config.task_directory, make_jobs(config))
    assert make_jobs(config)["sft"].settings["model"]["path"] == "out/task/base"
    other = make_config(DPO)
    assert not names_task(other.task_directory, make_jobs(other))


def test_every_command_with_an_output_can_be_a_stage() -> None:
    assert {
        "sft",
        "sample",
        "pairs",
        "label-steps",
        "reward-model",
        "ppo",
        "dpo",
        "grpo",
        "evaluate",
    } <= {*STAGE_COMMANDS}
    assert not {"run", "compare"} & {*STAGE_COMMANDS}
    for name in STAGE_COMMANDS:
        fields = COMMANDS[name].config_class().model_fields
        assert ("run" if COMMANDS[name].trains else "output") in fields


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"sft": None, "dpo": {"data": {"path": "${pairs}"}}, "pairs": None},
            "stage dpo: data.path names ${pairs}, a later stage: move pairs before dpo",
        ),
        (
            {"sft": None, "pairs": None, "dpo": {"data": {"path": "${pears}"}}},
            "stage dpo: data.path names ${pears}, and there is no such stage: did you mean "
            "${pairs}?",
        ),
        (
            {"grpo": {"model": {"path": "${x}"}}},
            "stage grpo: model.path names ${x}, and there is no such stage; it can name ${task}",
        ),
        (
            {"grpo": {"model": {"path": "${grpo}"}}},
            "stage grpo: model.path names ${grpo}, its own output",
        ),
        (
            {
                "grpo": {"model": {"path": "${sft}"}},
                "pairs": {"model": {"path": "${grpo}"}},
                "sft": {"data": {"path": "${pairs}"}},
            },
            "stage grpo: model.path names ${sft}, and sft needs the output of grpo: neither can "
            "be first",
        ),
        (
            {"pairs": None, "dpo": {"data": {"path": "${pairs}/rows.jsonl"}}},
            "write ${pairs} for it, or ${pairs.directory}/rows.jsonl for a file beside it",
        ),
        ({"dpo": None}, "stage dpo: give either data (preference pairs) or online"),
        ({"reward-model": None}, "stage reward-model: give either pairs or rankings (an"),
        ({"sft": {"betta": 1}}, "stage sft: `betta` is not a known key"),
        ({"sftt": None}, "stage sftt: 'sftt' is no command that can be a stage (did you mean"),
        ({"a": {"command": "compare"}}, "'compare' is no command that can be a stage: write one"),
        ({"a/b": {"command": "sft"}}, "the stage name 'a/b' cannot be a directory name"),
        ({"task": {"command": "sft"}}, "the stage name 'task' is the name of something else"),
        (
            {"sft": {"run": {"directory": "mine"}}},
            "stage sft: run.directory is set by the pipeline: leave it out",
        ),
        ({"pairs": {"output": "x"}}, "stage pairs: output is set by the pipeline"),
        (
            {"pairs": None, "grpo": {"model": {"path": "${pairs}"}}},
            "stage grpo: model.path is the output of pairs, rows of data, and needs a policy",
        ),
        (
            {"rm": {"command": "reward-model", "pairs": {"path": "p"}},
             "grpo": {"model": {"path": "${rm}"}}},
            "stage grpo: model.path is the output of rm, a reward model, and needs a policy",
        ),
        (
            {"sft": None, "ppo": {"rewards": [
                {"function": "reward_model", "arguments": {"path": "${sft}"}}]}},
            "rewards.0.arguments.path is the output of sft, a policy, and needs a reward model",
        ),
        (
            {"sft": None, "dpo": {"data": {"path": "${sft}"}}},
            "data.path is the output of sft, a policy, and needs rows of data",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_a_pipeline_is_one_clear_message(
    stages: dict[str, Any], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SHARED, "stages": stages}, sort_keys=False))
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_duplicate_stage_name_is_refused_with_both_lines(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("stages:\n  sft:\n    steps: 1\n  sft:\n    steps: 2\n")
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:4: `sft` is given twice, first at {path}:2; keep one" in error


def test_an_evaluation_without_held_out_data_is_refused_and_not_made_on_training_prompts() -> None:
    with pytest.raises(ConfigurationError, match="stage evaluate: `data` is missing"):
        checked_jobs(make_config({"evaluate": None}, evaluation=None))


def test_shared_settings_cannot_name_a_stage() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.path: \$\{sft\} is a stage's output"):
        make_jobs(make_config(DPO, model={"path": "${sft}"}))


def test_an_unknown_last_stage_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigurationError, match=r"--until pair: .* did you mean pairs"):
        checked_jobs(make_config(DPO), "pair")


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--until", "dpo", "r.yaml", "seed=1"],
        ["run", "r.yaml", "--until", "dpo", "seed=1"],
        ["run", "r.yaml", "--until=dpo", "seed=1", "--dry-run"],
        ["run", "r.yaml", "--dry-run", "seed=1", "--until", "dpo"],
    ],
)
def test_flags_of_a_pipeline_may_stand_between_settings(words: list[str]) -> None:
    parsed = make_parser().parse_args(flags_last(words))
    assert parsed.until == "dpo" and parsed.settings == ["seed=1"]
    assert str(parsed.config) == "r.yaml" and parsed.dry_run == ("--dry-run" in words)


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    other = tmp_path / "results"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"holds notes\.txt but no pipeline"):
        run(tiny_pipeline(world, other))
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


# --- Whether a stage runs again -------------------------------------------------------------------


def finished_job(tmp_path: Path, **settings: Any) -> Job:
    data = rows(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    given = {
        "model": {"path": "some/model"},
        "data": {"path": data},
        "run": {"directory": str(tmp_path / "sft"), "overwrite": True},
        **settings,
    }
    return Job("sft", "sft", tmp_path / "sft", given)


def test_a_finished_stage_is_kept_until_a_setting_an_input_or_its_output_changes(
    tmp_path: Path,
) -> None:
    job = finished_job(tmp_path)
    assert status_of(job).state == "new"
    job.product.mkdir(parents=True)
    write_done(job, inputs_of(job), 12.5)
    assert status_of(job).state == "finished" and status_of(job).seconds == 12.5
    assert status_of(finished_job(tmp_path, epochs=1.0)).state == "finished", "the default"
    changed = status_of(finished_job(tmp_path, epochs=2.0))
    assert changed.state == "changed" and changed.changes == ("epochs: 1.0 → 2.0",)
    kept = {"directory": str(tmp_path / "sft"), "checkpoints": {"seconds": 5.0}}
    assert status_of(finished_job(tmp_path, run=kept)).state == "finished"
    (tmp_path / "data.jsonl").write_text('{"prompt": "c", "completion": "d"}\n')
    changed = status_of(job)
    assert changed.changes == (f"{tmp_path / 'data.jsonl'}: its content changed",)
    job = finished_job(tmp_path)
    assert status_of(job).state == "finished"
    job.product.rmdir()
    assert status_of(job).changes == (f"{job.product} is missing",)


def test_a_model_card_does_not_count_as_an_input(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text("took 3 s")
    job = finished_job(tmp_path, model={"path": str(tmp_path / "base")})
    job.product.mkdir(parents=True)
    write_done(job, inputs_of(job), 1.0)
    (tmp_path / "base" / "README.md").write_text("took 4 s, on another day")
    assert status_of(job).state == "finished"
    (tmp_path / "base" / "config.json").write_text('{"a": 1}')
    assert status_of(job).changes == (f"{tmp_path / 'base'}: its content changed",)


# --- Complete runs --------------------------------------------------------------------------------

TINY = {"learning_rate": 1e-2}


def tiny_pipeline(world: World, directory: Path, **options: Any) -> PipelineConfig:
    """Return a pipeline of five commands, on a tiny model."""
    texts = world.rows("texts.jsonl", [{"prompt": "ab", "completion": "cd" * n} for n in (1, 2, 3)])
    loop = {"prompts_per_step": 2, "responses_per_prompt": 2, "optimizer": TINY}
    quick = {"run": {"checkpoints": {"seconds": 1e-9}}}
    reward = [{"function": "reward_model", "arguments": {"path": "${reward-model}"}}]
    sft = {"path": "${sft}"}
    stages = {
        "sft": {"data": texts, "steps": 2, "examples_per_step": 2, "optimizer": TINY, **quick},
        "pairs": {"model": sft, "samples": 4, "keep_truncated": True},
        "reward-model": {"model": sft, "pairs": {"path": "${pairs}"}, "examples_per_step": 2,
                         "held_out_share": 0.0, **quick},
        "ppo": {"model": sft, "rewards": reward, "critic": {"model": {"path": "${reward-model}"}},
                "steps": 2, **loop, **quick},
        "evaluate": {"model": {"path": "${ppo}"}, "reference": sft},
    }  # fmt: skip
    settings = {
        "model": {"path": world.path},
        "data": world.prompts,
        "rewards": world.reward("letters"),
        "sampling": {"max_tokens": 5},
        "evaluation": {"data": world.prompts},
        "directory": str(directory),
        "stages": stages,
    }
    return PipelineConfig.model_validate({**settings, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, PipelineConfig]:
    """Run the tiny pipeline once, without an interruption."""
    world = World(tmp_path_factory.mktemp("world"))
    config = tiny_pipeline(world, world.directory / "whole")
    run(config)
    return world, config


def results(directory: Path, stages: Any) -> dict[str, Any]:
    """Return the outputs of all stages, without values that measure time."""
    found: dict[str, Any] = {}
    for name in stages:
        for file in sorted((directory / name).rglob("final/*.safetensors")):
            found[f"{name}/{file.name}"] = load_file(file)
        for file in (directory / name / "rows.jsonl", directory / name / "evaluation.json"):
            if file.is_file():
                found[f"{name}/{file.name}"] = file.read_text().replace(str(directory), "")
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys() and len(one) >= 5
    for name, value in one.items():
        if isinstance(value, str):
            assert value == other[name], name
        else:
            assert value.keys() == other[name].keys()
            assert all(torch.equal(value[k], other[name][k]) for k in value), name


@pytest.mark.slow
def test_a_pipeline_interrupted_in_every_stage_gives_the_same_bits(
    finished: tuple[World, PipelineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, whole = finished
    config = tiny_pipeline(world, world.directory / "stopped")
    start = board.Board.start
    interrupted: list[str] = []

    def start_and_interrupt(self: board.Board, name: str) -> None:
        start(self, name)
        self.interrupt_at_output = name not in interrupted  # type: ignore[attr-defined]

    def interrupt(self: board.Board, name: str, text: str) -> None:
        if self.interrupt_at_output and text:  # type: ignore[attr-defined]
            self.interrupt_at_output = False  # type: ignore[attr-defined]
            interrupted.append(name)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(board.Board, "start", start_and_interrupt)
    monkeypatch.setattr(board.Board, "update", interrupt)
    for _ in config.stages:
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert interrupted == list(config.stages)
    run(config)
    assert_same(results(config.directory, config.stages), results(whole.directory, whole.stages))


def test_finished_stages_are_not_run_again_and_a_change_reruns_what_depends_on_it(
    finished: tuple[World, PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    world, config = finished
    run(config)
    assert capsys.readouterr().out.count("reused from an earlier run") == len(config.stages)
    stages = {**config.stages, "ppo": {**(config.stages["ppo"] or {}), "beta": 0.2}}
    shown = {
        s.job.name: s for s in plan(tiny_pipeline(world, config.directory, stages=stages)).stages
    }
    assert [name for name, stage in shown.items() if stage.runs] == ["ppo", "evaluate"]
    assert shown["ppo"].status.changes == ("beta: 0.05 → 0.2",)


def test_the_report_has_every_stage_with_its_results_and_links_to_its_own_page(
    finished: tuple[World, PipelineConfig],
) -> None:
    _, config = finished
    data = collect(config.directory)
    stages = {stage["name"]: stage for stage in data["stages"]}
    assert [*stages] == [*config.stages]
    assert {stage["state"] for stage in stages.values()} == {"finished"}
    evaluation = json.loads((config.directory / "evaluate" / "evaluation.json").read_text())
    assert stages["evaluate"]["evaluation"]["greedy"] == evaluation["greedy"]
    assert stages["pairs"]["counts"]["responses"] == 16
    assert stages["ppo"]["steps"] == 2 and stages["ppo"]["curves"]
    page = (config.directory / "report.html").read_text()
    for name, stage in stages.items():
        assert f'"name":"{name}"' in page.replace('": "', '":"')
        assert stage["report"] is None or (config.directory / stage["report"]).is_file()
    assert stages["pairs"]["report"] is None and stages["ppo"]["report"] == "ppo/report.html"


def test_a_failed_stage_is_reported_and_the_others_are_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    broken = tmp_path / "broken.py"
    broken.write_text("def score(responses): raise OSError('gone')\n")
    stages = {
        "sft": tiny_pipeline(world, tmp_path / "p").stages["sft"],
        "grpo": {"model": {"path": "${sft}"}, "steps_per_iteration": 1,
                 "rewards": [{"function": f"{broken}:score"}]},
    }  # fmt: skip
    config = tiny_pipeline(world, tmp_path / "p", stages=stages)
    with pytest.raises(TrainingError, match=r"grpo failed; .*grpo\.log ends with"):
        run(config)
    states = [stage["state"] for stage in collect(config.directory)["stages"]]
    assert states[0] == "finished" and states[1] in ("new", "stopped")
