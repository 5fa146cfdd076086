"""Comparisons: planning, budgets, verdict, measurements, and complete runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_models import World, source

from trivium.compare.config import CompareConfig
from trivium.compare.gradient_snr import signal_to_noise
from trivium.compare.plan import base_paths, make_plan
from trivium.compare.result import _best_of_record
from trivium.compare.risk import pair_agreement, similarity
from trivium.compare.run import compare, run
from trivium.compare.stage_budget import UNLIMITED_STEPS
from trivium.config.base import load_configuration
from trivium.errors import ConfigurationError, DataError, TrainingError
from trivium.jobs.job import Job, with_budget
from trivium.jobs.scheduler import spent
from trivium.jobs.stages import stage_record
from trivium.jobs.validation import validate_jobs

SHARED = {
    "model": {"path": "base-${seed}"},
    "data": {"path": "prompts.jsonl"},
    "rewards": [{"function": "gsm8k"}],
    "sampling": {"max_tokens": 12, "stop": ["\n"]},
    "evaluation": {"data": {"path": "test.jsonl"}, "prompts": 7, "samples": 2},
    "directory": "out",
}
GRPO = {"name": "GRPO", "stages": [{"command": "grpo"}]}
DPO = {"name": "DPO", "stages": [{"command": "pairs"}, {"command": "dpo"}]}
RLHF = {
    "name": "PPO, learned",
    "stages": [{"command": "pairs"}, {"command": "reward-model"}, {"command": "ppo"}],
}


def make_config(*methods: dict[str, Any], **options: Any) -> CompareConfig:
    return CompareConfig.model_validate({**SHARED, "methods": list(methods), **options})


# --- The plan -------------------------------------------------------------------------------------


def test_shared_settings_are_filled_in_for_every_stage() -> None:
    plan = make_plan(make_config(GRPO, RLHF, seeds=[3]))
    validate_jobs(plan.jobs)
    grpo = plan.jobs["grpo/seed-3/grpo"].settings
    assert grpo["model"] == {"path": "base-3"}
    assert grpo["sampling"] == {"max_tokens": 12, "stop": ["\n"]}
    assert grpo["run"] == {"directory": "out/runs/grpo/seed-3/grpo", "seed": 3, "overwrite": True}
    held_out = grpo["evaluation"]
    assert held_out["rewards"] == [{"function": "gsm8k"}] and held_out["max_tokens"] == 12
    assert held_out["stop"] == ["\n"] and not held_out["at_start"]
    pairs, model, ppo = (plan.jobs[f"ppo-learned/seed-3/{s}"] for s in
                         ("pairs", "reward-model", "ppo"))  # fmt: skip
    assert pairs.settings["output"] == "out/runs/ppo-learned/seed-3/pairs/rows.jsonl"
    assert model.settings["pairs"] == {"path": pairs.settings["output"]}
    assert "evaluation" not in model.settings
    learned = {"path": "out/runs/ppo-learned/seed-3/reward-model/final"}
    assert ppo.settings["rewards"] == [{"function": "reward_model", "arguments": learned}]
    assert ppo.settings["evaluation"]["rewards"] == [{"function": "gsm8k"}], "not the learned one"
    assert ppo.settings["model"] == {"path": "base-3"}
    assert ppo.dependencies == (pairs.name, model.name)


def test_template_arguments_of_the_prompts_reach_all_data_that_holds_them() -> None:
    form = {"template_arguments": {"enable_thinking": False}}
    sampled = {"name": "r", "stages": [{"command": "sample"}, {"command": "sft"}]}
    plan = make_plan(make_config(DPO, RLHF, sampled, data={"path": "prompts.jsonl", **form}))
    validate_jobs(plan.jobs)
    for job in plan.jobs.values():
        given = [job.settings.get(key) for key in ("data", "pairs")]
        given.append(job.settings.get("evaluation", {}).get("data"))
        for data in filter(None, given):
            assert data["template_arguments"] == {"enable_thinking": False}, job.name


def test_process_reward_model_aggregates_steps_by_product() -> None:
    steps = {"command": "reward-model", "name": "judge", "settings": {"steps": {"path": "s.jsonl"}}}
    plan = make_plan(make_config({"name": "p", "stages": [steps, {"command": "ppo"}]}))
    (reward,) = plan.jobs["p/seed-0/ppo"].settings["rewards"]
    assert reward["function"] == "process_reward_model"
    assert reward["arguments"] == {"path": "out/runs/p/seed-0/judge/final", "aggregate": "product"}


def test_a_stage_starts_from_the_policy_of_the_previous_training_stage() -> None:
    best = {"command": "sample", "settings": {"samples": 4, "minimum_reward": 1.0}}
    method = {"name": "r", "stages": [best, {"command": "sft"}, {"command": "grpo"}]}
    plan = make_plan(make_config(method))
    validate_jobs(plan.jobs)
    rows = {"path": "out/runs/r/seed-0/sample/rows.jsonl", "columns": {"completion": "response"}}
    assert plan.jobs["r/seed-0/sft"].settings["data"] == rows
    assert plan.jobs["r/seed-0/grpo"].settings["model"] == {"path": "out/runs/r/seed-0/sft/final"}


def test_stage_settings_override_defaults_and_stage_names_resolve_to_outputs() -> None:
    stages = [
        {"command": "pairs", "name": "mine", "settings": {"samples": 3}},
        {"command": "dpo", "settings": {"data": {"path": "${mine}"}, "beta": 0.3}},
    ]
    plan = make_plan(make_config({"name": "d", "stages": stages}))
    assert plan.jobs["d/seed-0/mine"].settings["samples"] == 3
    dpo = plan.jobs["d/seed-0/dpo"].settings
    assert dpo["data"]["path"] == "out/runs/d/seed-0/mine/rows.jsonl" and dpo["beta"] == 0.3


def test_a_path_after_a_stage_s_output_is_refused_with_the_stage_s_directory() -> None:
    stages = [
        {"command": "pairs", "name": "mine"},
        {"command": "dpo", "settings": {"data": {"path": "${mine}/rows.jsonl"}}},
    ]
    with pytest.raises(ConfigurationError, match=r"write \$\{mine\} for it, or \$\{mine.directory"):
        make_plan(make_config({"name": "d", "stages": stages}))


def test_an_undefined_variable_is_refused_with_the_defined_ones() -> None:
    stages = [{"command": "dpo", "settings": {"data": {"path": "${pears}/rows.jsonl"}}}]
    with pytest.raises(ConfigurationError, match=r"method d: \$\{pears\} .* use one of \$\{seed\}"):
        make_plan(make_config({"name": "d", "stages": stages}))


def test_identical_stages_of_several_methods_share_one_job() -> None:
    plan = make_plan(make_config(DPO, RLHF, seeds=[0, 1]))
    assert [name for name in plan.jobs if name.endswith("pairs")] == [
        "dpo/seed-0/pairs",
        "dpo/seed-1/pairs",
    ]
    model = plan.jobs["ppo-learned/seed-1/reward-model"]
    assert model.settings["pairs"] == {"path": "out/runs/dpo/seed-1/pairs/rows.jsonl"}
    assert plan.runs[3].jobs[0] == "dpo/seed-1/pairs"


def test_base_paths_have_every_seed_and_no_variable() -> None:
    assert base_paths(make_config(GRPO, seeds=[3, 4])) == "base-3, base-4"
    assert base_paths(make_config(GRPO, seeds=[3, 4], model={"path": "base"})) == "base"


def test_a_base_shared_by_all_seeds_is_evaluated_once() -> None:
    fixed = make_plan(make_config(GRPO, seeds=[0, 1], model={"path": "base"}))
    assert fixed.base_jobs == {0: "base/base-seed-0", 1: "base/base-seed-0"}
    own = make_plan(make_config(GRPO, seeds=[0, 1]))
    assert len(set(own.base_jobs.values())) == 2
    settings = own.jobs["base/base-seed-1"].settings
    assert settings["model"] == {"path": "base-1"} and settings["data"]["limit"] == 7


def test_varied_values_run_with_the_first_seed_only() -> None:
    method = {**GRPO, "vary": {"optimizer.learning_rate": [0.1, 0.2]}}
    plan = make_plan(make_config(method, seeds=[5, 6]))
    assert len(plan.runs) == 4
    varied = [r for r in plan.runs if r.varied is not None]
    rates = [plan.jobs[r.jobs[0]].settings["optimizer"]["learning_rate"] for r in varied]
    assert rates == [0.1, 0.2] and {r.seed for r in varied} == {5}
    assert len({plan.jobs[r.jobs[0]].directory for r in plan.runs}) == 4


def test_best_of_measures_quality_and_reward_of_the_same_responses() -> None:
    plan = make_plan(make_config({"name": "best", "best_of": 4}))
    (first,) = {plan.jobs[name].name for name in plan.runs[0].jobs}
    assert plan.jobs[first].settings["samples"] == 4, "equal rewards: one job"
    other = {**SHARED["evaluation"], "rewards": [{"function": "length"}]}
    apart = make_plan(make_config({"name": "best", "best_of": 4}, evaluation=other))
    quality, reward = (apart.jobs[name].settings for name in apart.runs[0].jobs)
    assert quality["rewards"] == [{"function": "length"}]
    assert reward["rewards"] == [{"function": "gsm8k"}]
    assert quality["seed"] == reward["seed"]


# --- Recipes as methods ---------------------------------------------------------------------------

RECIPE = {"name": "InstructGPT", "recipe": "instructgpt"}


def test_a_recipe_takes_the_shared_sections_of_the_comparison_and_keeps_its_stages() -> None:
    plan = make_plan(make_config(RECIPE, seeds=[3]))
    configs = validate_jobs(plan.jobs)
    assert len(configs) == 5
    directory = "out/runs/instructgpt/seed-3"
    stages = ["sft", "comparisons", "reward-model", "ppo"]
    assert plan.runs[0].jobs == tuple(f"instructgpt/seed-3/{name}" for name in stages)
    sft, comparisons, model, ppo = (plan.jobs[name].settings for name in plan.runs[0].jobs)
    assert sft["model"] == {"path": "base-3"} and sft["data"] == {"path": "prompts.jsonl"}
    assert sft["run"]["seed"] == 3 and sft["run"]["directory"] == f"{directory}/sft"
    assert comparisons["model"]["path"] == f"{directory}/sft/final"
    assert comparisons["rewards"] == [{"function": "gsm8k"}]
    assert comparisons["sampling"] == {"max_tokens": 12, "stop": ["\n"]}
    assert model["pairs"] == {"path": f"{directory}/comparisons/rows.jsonl"}
    assert ppo["rewards"][0]["arguments"] == {"path": f"{directory}/reward-model/final"}
    assert ppo["beta"] == 0.02, "the recipe's own setting"


def test_the_last_stage_of_a_recipe_is_measured_like_every_other_method() -> None:
    plan = make_plan(make_config(GRPO, RECIPE))
    grpo = plan.jobs["grpo/seed-0/grpo"].settings
    ppo = plan.jobs["instructgpt/seed-0/ppo"].settings
    assert ppo["evaluation"] == grpo["evaluation"]
    assert "evaluation" not in plan.jobs["instructgpt/seed-0/sft"].settings
    assert not any(
        job.command == "evaluate" for job in plan.jobs.values() if "base" not in job.name
    )


def test_equal_stages_of_recipes_share_one_job() -> None:
    changed = {**RECIPE, "name": "other", "changes": {"stages.ppo.beta": 0.5}}
    plan = make_plan(make_config(RECIPE, changed))
    first, second = (run.jobs for run in plan.runs)
    assert first[:3] == second[:3] and first[3] != second[3]
    ppo = plan.jobs["other/seed-0/ppo"]
    assert ppo.settings["beta"] == 0.5
    assert ppo.settings["model"]["path"] == "out/runs/instructgpt/seed-0/sft/final"
    assert ppo.dependencies == second[:3]


def test_the_budget_of_a_recipe_ends_its_last_stage_and_counts_the_earlier_ones() -> None:
    budget = {"currency": "generated_tokens", "amount": 100}
    plan = make_plan(make_config(RECIPE, budget=budget))
    jobs = [plan.jobs[name] for name in plan.runs[0].jobs]
    assert [job.budget is not None for job in jobs] == [False, False, False, True]
    assert jobs[3].settings["steps"] == UNLIMITED_STEPS
    assert jobs[3].previous_stages == tuple(job.name for job in jobs[:3])
    assert with_budget(jobs[3], 30.0).settings["run"]["budget"] == {"generated_tokens": 70.0}


def test_a_setting_of_a_recipe_s_last_stage_can_vary() -> None:
    plan = make_plan(make_config({**RECIPE, "vary": {"optimizer.learning_rate": [0.1, 0.2]}}))
    finals = [plan.jobs[run.jobs[-1]] for run in plan.runs]
    assert [f.settings["optimizer"]["learning_rate"] for f in finals] == [5e-4, 0.1, 0.2]
    assert len({run.jobs[0] for run in plan.runs}) == 1


def test_the_built_in_task_is_that_of_the_comparison(tmp_path: Path) -> None:
    task = {"model": {"path": "${task}/base"}, "data": {"path": "${task}", "split": "train"}}
    plan = make_plan(make_config(RECIPE, **task, seeds=[4, 5]))
    for seed in (4, 5):
        sft = plan.jobs[f"instructgpt/seed-{seed}/sft"].settings
        assert sft["model"]["path"] == "out/task/base" and sft["data"]["path"] == "out/task"


def test_a_recipe_from_a_file_finds_its_reward_functions_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(responses): return [1.0 for _ in responses]\n")
    stages = {"grpo": {"rewards": [{"function": "mine.py:f"}]}, "evaluate": None}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    plan = make_plan(make_config({"name": "mine", "recipe": str(tmp_path / "mine.yaml")}))
    rewards = plan.jobs["mine/seed-0/grpo"].settings["rewards"]
    assert rewards == [{"function": f"{tmp_path / 'mine.py'}:f"}]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"evaluate": None}, "ends with an evaluation, which trains no policy"),
        ({"sft": None, "pairs": None}, "ends with pairs, which trains no policy"),
        (
            {"dpo": {"data": {"path": "${pears}"}}},
            r"method m: stage dpo: data.path names \$\{pears",
        ),
        (
            {"pairs": None, "grpo": {"model": {"path": "${pairs}"}}},
            "method m: stage grpo: model.path is the output of pairs, rows of data",
        ),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(
    stages: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    with pytest.raises(ConfigurationError, match=message):
        make_plan(make_config({"name": "m", "recipe": str(tmp_path / "m.yaml")}))


def test_an_unknown_recipe_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigurationError, match=r"method m: instructgtp: .* mean instructgpt"):
        make_plan(make_config({"name": "m", "recipe": "instructgtp"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": [{"name": "x"}]}, "give one of stages, recipe or best_of"),
        ({"methods": [{**GRPO, "recipe": "dpo"}]}, "give one of stages, recipe or best_of"),
        ({"methods": [{**GRPO, "changes": {"a": 1}}]}, "changes are those of a recipe"),
        (
            {"methods": [{"name": "x", "stages": [{"command": "dpo", "name": "task"}]}]},
            "the stage name 'task' is the name of something else",
        ),
        ({"methods": [{"name": "x", "stages": [{"command": "pairs"}]}]}, "trains no policy"),
        ({"methods": [GRPO, GRPO]}, "two methods are called GRPO"),
        ({"methods": [GRPO, {**GRPO, "name": "grpo!"}]}, "become the directory names"),
        ({"methods": [GRPO], "seeds": [1, 1]}, "a seed appears twice"),
        ({"methods": [GRPO], "credit": 1}, "at least 2, or 0"),
        ({"methods": [GRPO], "rewards": []}, "should have at least 1 item"),
        ({"methods": [{"name": "x", "best_of": 2, "vary": {"beta": [1]}}]}, "best_of has none"),
        ({"methods": [{**GRPO, "vary": {"beta": []}}]}, "at least one value"),
        (
            {"methods": [{"name": "x", "stages": [{"command": "dpo"}, {"command": "dpo"}]}]},
            "two stages are called dpo",
        ),
        (
            {"methods": [{"name": "x", "stages": [{"command": "dpo", "name": "../y"}]}]},
            "cannot be a directory name",
        ),
    ],
)
def test_invalid_comparisons_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig.model_validate({**SHARED, **options})


def test_errors_of_all_stages_are_reported_before_any_job_runs() -> None:
    stages = [{"command": "grpo", "settings": {"betta": 1, "epochs": 0}}]
    with pytest.raises(ConfigurationError) as caught:
        validate_jobs(make_plan(make_config({"name": "x", "stages": stages}, GRPO)).jobs)
    assert "found 2 errors" in str(caught.value)
    assert "x/seed-0/grpo: `betta` is not a known key: did you mean `beta`?" in str(caught.value)
    assert "x/seed-0/grpo: epochs = 0: must be" in str(caught.value)


def test_renamed_keys_of_a_stage_are_refused_with_the_new_name() -> None:
    stages = [{"command": "grpo", "settings": {"baseline": "mean"}}]
    with pytest.raises(ConfigurationError, match="`baseline` is now `advantage`"):
        validate_jobs(make_plan(make_config({"name": "x", "stages": stages}, GRPO)).jobs)


def test_reward_files_are_resolved_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def good(prompts, responses): return [1.0 for _ in prompts]")
    own = [{"function": "mine.py:good"}]
    stages = [{"command": "grpo", "settings": {"rewards": own}}]
    settings = {**SHARED, "rewards": own, "methods": [{"name": "x", "stages": stages}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    plan = make_plan(load_configuration(CompareConfig, tmp_path / "c.yaml"))
    anywhere = f"{tmp_path.resolve() / 'mine.py'}:good"
    grpo = plan.jobs["x/seed-0/grpo"].settings
    assert grpo["rewards"][0]["function"] == anywhere
    assert grpo["evaluation"]["rewards"][0]["function"] == anywhere


# --- Budgets --------------------------------------------------------------------------------------


def jobs_with_budget(currency: str, *methods: dict[str, Any]) -> dict[str, Job]:
    return make_plan(make_config(*methods, budget={"currency": currency, "amount": 1000})).jobs


def test_stages_without_a_share_split_the_rest_and_the_last_gets_the_remainder() -> None:
    stages = [{"command": "pairs", "share": 0.3}, {"command": "reward-model"}, {"command": "ppo"}]
    jobs = jobs_with_budget("seconds", {"name": "r", "stages": stages})
    pairs, model, ppo = (jobs[f"r/seed-0/{s}"] for s in ("pairs", "reward-model", "ppo"))
    assert with_budget(pairs, 0).settings["budget"] == {"seconds": 300}
    budget = with_budget(model, 300).settings["run"]["budget"]
    assert budget["seconds"] == pytest.approx(350)
    assert with_budget(ppo, 610.5).settings["run"]["budget"] == {"seconds": 389.5}
    with pytest.raises(ConfigurationError, match="spent 1,001 of 1,000 seconds"):
        with_budget(ppo, 1001)


def test_the_budget_applies_only_to_stages_that_spend_its_currency() -> None:
    jobs = jobs_with_budget("generated_tokens", DPO)
    assert with_budget(jobs["dpo/seed-0/pairs"], 0).settings["budget"] == {"generated_tokens": 1000}
    assert jobs["dpo/seed-0/dpo"].budget is None
    jobs = jobs_with_budget("trained_tokens", DPO)
    assert jobs["dpo/seed-0/pairs"].budget is None
    assert with_budget(jobs["dpo/seed-0/dpo"], 0).settings["run"]["budget"] == {
        "trained_tokens": 1000
    }


def test_rollout_loops_have_no_step_limit_under_a_budget() -> None:
    jobs = jobs_with_budget("flops", GRPO, RLHF)
    assert jobs["grpo/seed-0/grpo"].settings["steps_per_iteration"] == UNLIMITED_STEPS
    assert jobs["ppo-learned/seed-0/ppo"].settings["steps"] == UNLIMITED_STEPS
    own = {"name": "own", "stages": [{"command": "ppo", "settings": {"steps": 9}}]}
    assert jobs_with_budget("flops", own)["own/seed-0/ppo"].settings["steps"] == 9
    assert "steps" not in make_plan(make_config(RLHF)).jobs["ppo-learned/seed-0/ppo"].settings


# --- Best of n ------------------------------------------------------------------------------------


def test_best_of_takes_the_response_with_the_highest_training_reward(tmp_path: Path) -> None:
    def job(name: str, sampled: list[list[float]]) -> Job:
        place = tmp_path / name
        place.mkdir()
        record = {"outcomes": {"index": [0, 1], "sampled": sampled}, "length": 5.0, "n": 2}
        (place / "evaluation.json").write_text(json.dumps(record))
        return Job(name, "evaluate", place, {})

    plan = make_plan(make_config({"name": "best", "best_of": 2}))
    quality = job("quality", [[0.0, 1.0], [0.5, 0.25]])
    reward = job("reward", [[3.0, 2.0], [7.0, 7.0]])
    jobs = {"quality": quality, "reward": reward}
    plan = type(plan)(jobs, [], {})
    method_run = make_plan(make_config({"name": "best", "best_of": 2})).runs[0]
    method_run = type(method_run)(method_run.method, 0, ("quality", "reward"))
    base = {"outcomes": {"index": [0, 1], "sampled": [[0.0], [0.0]]}}
    record = _best_of_record(plan, method_run, base)
    assert record["outcomes"]["greedy"] == [0.0, 0.375], "a tie is averaged"
    assert record["final"]["kl"] == pytest.approx(math.log(2) - 0.5)
    assert record["win_rate"]["mean"] == pytest.approx(0.75)


# --- Credit ---------------------------------------------------------------------------------------


def test_snr_estimate_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(50, dtype=torch.float64)
    mean[0] = 3.0
    ratios = []
    for _ in range(200):
        noise = torch.randn(8, 50, generator=generator, dtype=torch.float64)
        ratios.append(signal_to_noise(list(mean + noise))["snr"])
    assert sum(ratios) / len(ratios) == pytest.approx(9 / 50, rel=0.1)


def test_snr_does_not_depend_on_scale_and_counts_empty_batches() -> None:
    rng = random.Random(0)
    rows = [torch.tensor([1.0 + rng.gauss(0, 1) for _ in range(5)]) for _ in range(4)]
    one, other = signal_to_noise(rows), signal_to_noise([7 * row for row in rows])
    assert one["snr"] == pytest.approx(other["snr"])
    assert one["cosine"] == pytest.approx(other["cosine"])
    assert signal_to_noise([*rows, None])["empty"] == 1
    same = signal_to_noise([torch.ones(3), torch.ones(3)])
    assert same["cosine"] == pytest.approx(1.0)


# --- Risk -----------------------------------------------------------------------------------------


def test_agreement_is_counted_over_pairs_of_unequal_quality() -> None:
    assert pair_agreement([1, 0, 1], [5, 3, 3]) == [1.0, 0.5]
    assert pair_agreement([1, 0], [0, 1]) == [0.0]
    assert pair_agreement([1, 1], [0, 1]) == []


def test_ppo_advantage_names_the_configured_lambda(tmp_path: Path) -> None:
    job = Job("m/seed-0/ppo", "ppo", tmp_path, {"gae_lambda": 0.9, "rewards": []})
    record = stage_record(job, {})
    assert record["advantage"] == "GAE (λ = 0.9) from a critic, per token"
    assert record["hyperparameters"]["gae_lambda"] == 0.9


@pytest.mark.parametrize(
    ("command", "settings", "words"),
    [
        ("dpo", {"online": {"responses_per_prompt": 6}}, "during training, 6 per prompt"),
        ("dpo", {"online": {"steps": 3}}, "during training, 4 per prompt"),
        ("dpo", {"online": None}, "none"),
        ("ppo", {}, "during training, 1 per prompt"),
        ("grpo", {}, "during training, 8 per prompt"),
        ("pairs", {}, "once, 8 per prompt"),
        ("sample", {}, "once, 1 per prompt"),
        ("sample", {"samples": 3}, "once, 3 per prompt"),
    ],
)
def test_sampling_of_a_stage_is_read_from_its_settings_or_their_defaults(
    tmp_path: Path, command: str, settings: dict[str, Any], words: str
) -> None:
    record = stage_record(Job(f"m/{command}", command, tmp_path, settings), {})
    assert record["sampling"] == words


def test_settings_of_online_dpo_are_shown(tmp_path: Path) -> None:
    settings = {"beta": 0.2, "online": {"responses_per_prompt": 6, "steps": 3}}
    record = stage_record(Job("m/dpo", "dpo", tmp_path, settings), {})
    assert record["hyperparameters"]["responses_per_prompt"] == 6
    assert record["hyperparameters"]["beta"] == 0.2


def test_similarity_is_the_share_of_common_words_in_order() -> None:
    assert similarity("a b c", "a b c") == 1.0
    assert similarity("a b", "b a") == 0.5
    assert similarity("x", "y") == 0.0


# --- End to end -----------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def small_config(world: World, **options: Any) -> CompareConfig:
    rate = {"optimizer": {"learning_rate": 0.01}}
    settings = {
        "model": {"path": world.path},
        "data": world.prompts,
        "rewards": world.reward("letters"),
        "sampling": {"max_tokens": 6},
        "evaluation": {"data": world.prompts, "every": 1},
        "budget": {"currency": "generated_tokens", "amount": 300},
        "parallel": 2,
        "credit": 2,
        "risk": True,
        "memory": True,
        "directory": str(world.directory / "compare"),
        "methods": [
            {"name": "GRPO", "stages": [{"command": "grpo", "settings": rate}]},
            {
                "name": "DPO",
                "stages": [
                    {"command": "pairs", "settings": {"samples": 4, "keep_truncated": True}},
                    {"command": "dpo", "settings": rate},
                ],
            },
        ],
        **options,
    }
    return CompareConfig.model_validate(settings)


def test_comparison_runs_and_reuses_finished_jobs(world: World, capsys: Any) -> None:
    config = small_config(world)
    assert run(config) == config.directory
    out = capsys.readouterr().out
    assert "GRPO" in out and "Quality on 4 held-out prompts" in out
    result = json.loads((config.directory / "comparison.json").read_text())
    grpo, dpo = result["methods"]
    cost = grpo["runs"][0]["spent"]["generated_tokens"]
    assert 300 <= cost < 300 + 16 * 8 * 6
    lines = grpo["runs"][0]["curve"]
    assert lines[0]["generated_tokens"] == 0 and lines[-1]["generated_tokens"] == cost
    assert lines[-1]["greedy"] == grpo["runs"][0]["final"]["greedy"]
    assert dpo["stages"][0]["spent"]["generated_tokens"] > 0
    assert dpo["runs"][0]["curve"][1]["generated_tokens"] > 0, "pairs come before the first step"
    assert {record["method"] for record in result["credit"]} == {"GRPO", "DPO"}
    assert result["base"] == world.path
    assert result["verdict"]["budget"].startswith("a budget of 300 generated tokens for each")
    assert f"{cost:,.0f}" in result["verdict"]["sentences"][0]
    for method, gain in zip(result["methods"], result["gains"], strict=True):
        base = result["base_quality"]["greedy"]["mean"]
        assert gain["mean"] == pytest.approx(method["greedy"]["mean"] - base)
        assert method["greedy"]["over"] == "prompts" and len(method["greedy"]["seeds"]) == 1
    (coverage,) = result["risk"]["coverage"]
    assert coverage["method"] == "DPO" and coverage["responses"] == 16
    assert 0 <= coverage["final"] <= 1
    models = {"policy", "reference"}, {"policy"}
    for stage, roles in zip((grpo["stages"][0], dpo["stages"][1]), models, strict=True):
        assert stage["memory"]["measured_bytes"] > 0
        (update,) = [s for s in stage["memory"]["predicted"]["stages"] if s["name"] == "update"]
        assert {m["role"] for m in update["models"]} == roles
    again = compare(config)
    kept = capsys.readouterr().out
    assert kept.count("reused from an earlier run") == 6
    assert again["methods"] == result["methods"] and again["credit"] == result["credit"]


def test_recipes_are_compared_on_the_built_in_task_at_equal_budget(tmp_path: Path) -> None:
    small = {"stages.sft.steps": 2, "stages.grpo.prompts_per_step": 2}
    settings = {
        "directory": str(tmp_path / "out"),
        "model": {"path": "${task}/base"},
        "data": {"path": "${task}", "split": "train"},
        "rewards": [{"function": "gsm8k"}],
        "evaluation": {"data": {"path": "${task}", "split": "test"}},
        "sampling": {"max_tokens": 6},
        "task": {"problems": 64, "held_out": 4, "labels": 1},
        "budget": {"currency": "generated_tokens", "amount": 150},
        "methods": [
            {"name": name, "recipe": "deepseekmath", "changes": {**small, "stages.grpo.beta": beta}}
            for name, beta in (("low", 0.0), ("high", 0.5))
        ],
    }
    result = compare(CompareConfig.model_validate(settings))
    for method in result["methods"]:
        assert [stage["name"] for stage in method["stages"]] == ["sft", "grpo"]
        cost = method["runs"][0]["spent"]["generated_tokens"]
        assert 150 <= cost < 150 + 2 * 8 * 6, "the budget ends it, not its 40 steps"
        assert method["runs"][0]["final"]["n"] == 4
    low, high = result["methods"]
    assert low["stages"][0]["job"] == high["stages"][0]["job"], "one SFT model for both"


def test_a_failed_job_is_reported_with_its_log(world: World) -> None:
    reward = source(world.directory / "broken.py", "def score(responses): raise OSError('gone')\n")
    settings = {"rewards": [{"function": f"{reward}:score"}]}
    broken = {"name": "x", "stages": [{"command": "grpo", "settings": settings}]}
    with pytest.raises(TrainingError, match=r"x/seed-0/grpo failed; .*grpo.log ends with"):
        compare(small_config(world, methods=[broken], credit=0))


def test_data_of_every_stage_is_checked_before_any_job_runs(world: World) -> None:
    pairs = {"command": "dpo", "settings": {"data": {"path": "no.jsonl"}}}
    config = small_config(world, methods=[{"name": "x", "stages": [pairs]}], credit=0)
    with pytest.raises(DataError, match=r"no\.jsonl: there is no such file"):
        compare(config)
    assert not config.directory.exists()


def test_jobs_without_a_run_spent_nothing(tmp_path: Path) -> None:
    assert set(spent(Job("x", "evaluate", tmp_path, {})).values()) == {0.0}
