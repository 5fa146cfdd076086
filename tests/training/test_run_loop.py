"""Run loop: step numbers, logging, evaluation, budget, trackers, monitors."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_models import World, metrics_of

from trivium.algorithms import grpo, sft
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.config.base import Configuration
from trivium.errors import ConfigurationError, NonFiniteError
from trivium.hf.model_config import ModelConfig
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.monitoring.metrics import EVALUATIONS, METRICS, derived, metric, table
from trivium.runs.budget import BudgetConfig, BudgetTracker
from trivium.runs.store import (
    RunConfig,
    read_evaluations,
    read_events,
    read_metrics,
    read_outcomes,
    read_samples,
)
from trivium.training.experience import WeightedGroups
from trivium.training.run_loop import Training
from trivium.training.startup import prepare_run


class MinimalConfig(Configuration):
    """The settings that every training command has, and one more."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig(path="none", device="cpu")
    answer: int = 42


@dataclass
class FakeEvaluator:
    """An evaluator that counts its calls."""

    every: int = 2
    calls: list[int] = field(default_factory=list)

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def evaluate(self) -> FakeEvaluator:
        self.calls.append(len(self.calls))
        return self

    def record(self) -> dict[str, Any]:
        return {"n": 2, "greedy": 0.5, "kl": None}

    def samples(self, prompts: int) -> list[dict[str, Any]]:
        return [{"drawn": "greedy", "index": i} for i in range(prompts)]

    def outcomes(self) -> dict[str, Any]:
        return {"index": [0, 1], "greedy": [0.0, 1.0]}

    def state_dict(self) -> list[int]:
        return self.calls

    def load_state_dict(self, state: list[int]) -> None:
        self.calls = state


def make_training(path: Path, total: int, evaluator: Any = None, **options: Any) -> Training:
    config = MinimalConfig(run=RunConfig(directory=path / "run", **options))
    return Training(prepare_run("test", config), total, evaluator=evaluator)


def run_steps(training: Training, **metrics: float) -> list[int]:
    """Run all steps with equal metrics, and return their numbers."""
    with training:
        steps = []
        for step in training.steps():
            training.log(metrics)
            steps.append(step)
    return steps


def test_steps_are_numbered_from_one_across_iterations(tmp_path: Path) -> None:
    pairs = []
    with make_training(tmp_path, 5) as run:
        for iteration in run.iterations(2):
            for step in run.steps(until=2 * (iteration + 1)):
                run.log({})
                pairs.append((iteration, step))
    assert pairs == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5)]
    assert [line["step"] for line in read_metrics(run.path)] == [1, 2, 3, 4, 5]
    assert read_events(run.path)[-1]["kind"] == "finished"


def test_evaluation_runs_when_due_and_once_after_the_last_step(
    tmp_path: Path,
) -> None:
    evaluator = FakeEvaluator()
    run = make_training(tmp_path, 4, evaluator, samples=1)
    run_steps(run)
    assert [r["step"] for r in read_evaluations(run.path)] == [0, 2, 4]
    assert [r["step"] for r in read_outcomes(run.path)] == [0, 2, 4]
    assert [(r["step"], r["index"]) for r in read_samples(run.path)] == [(0, 0), (2, 0), (4, 0)]
    assert evaluator.calls == [0, 1, 2]


def test_last_evaluation_runs_even_if_it_is_not_due(tmp_path: Path) -> None:
    run = make_training(tmp_path, 3, FakeEvaluator(every=2))
    run_steps(run)
    assert [r["step"] for r in read_evaluations(run.path)] == [0, 2, 3]


def test_failed_run_is_neither_evaluated_nor_marked_finished(tmp_path: Path) -> None:
    run = make_training(tmp_path, 3, FakeEvaluator(every=9))
    with pytest.raises(RuntimeError), run:
        for _ in run.steps():
            raise RuntimeError
    assert [r["step"] for r in read_evaluations(run.path)] == [0]
    assert read_events(run.path) == []


def test_budget_ends_the_run_after_the_step_that_exhausts_it(tmp_path: Path) -> None:
    run = make_training(tmp_path, 9, FakeEvaluator(every=9), budget={"generated_tokens": 25})
    assert run_steps(run, **{"tokens/generated": 10.0}) == [1, 2, 3]
    assert run.stop_early
    kinds = [event["kind"] for event in read_events(run.path)]
    assert kinds == ["stopped", "finished"]
    assert "30 of 25 generated_tokens" in read_events(run.path)[0]["message"]
    assert [r["step"] for r in read_evaluations(run.path)] == [0, 3]


def test_fraction_spent_is_the_largest_of_all_limits() -> None:
    budget = BudgetTracker(BudgetConfig(trained_tokens=100, seconds=10))
    budget.add({"tokens/trained": 30.0, "time/total": 2.0})
    assert budget.fraction_spent() == 0.3 and not budget.exhausted
    budget.add({"time/total": 9.0})
    assert budget.fraction_spent() == 1.0 and budget.exhausted
    assert BudgetTracker(None).fraction_spent() == 0.0


def test_budget_without_a_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="budget is empty: give one of seconds, generated_tokens"):
        BudgetConfig()


def test_flops_are_those_of_the_step_alone(tmp_path: Path) -> None:
    flops.add(5.0)
    with make_training(tmp_path, 2) as run:
        for step in run.steps():
            flops.add(100.0 * step)
            run.log({})
        flops.add(7.0)
    assert [line["flops"] for line in read_metrics(run.path)] == [100.0, 200.0]


def test_rates_and_shares_follow_from_tokens_and_seconds() -> None:
    metrics = derived(
        {
            "time/total": 10.0,
            "time/rollout": 4.0,
            "time/update": 5.0,
            "tokens/generated": 80.0,
            "tokens/trained": 100.0,
        }
    )
    assert metrics == {
        "time_share/rollout": 0.4,
        "time_share/update": 0.5,
        "tokens/per_second": 10.0,
        "tokens/per_second/rollout": 20.0,
        "tokens/per_second/update": 20.0,
    }
    assert derived({"time/total": 0.0, "tokens/generated": 0.0}) == {}


def test_metric_without_a_definition_is_not_logged(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="reward/meen"):
        run_steps(make_training(tmp_path, 1), **{"reward/meen": 1.0})


def test_reward_names_are_inserted_into_metric_definitions() -> None:
    definition = metric("rewards/a/b {x}/std")
    assert definition is not None and definition.title == "std: a/b {x}"
    assert metric("rewards/a/median") is None
    assert metric("reward/mean") is METRICS["reward/mean"]


def test_docs_contain_the_table_of_metrics() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    text = page.read_text(encoding="utf-8")
    assert table(METRICS.values()) in text
    assert table(EVALUATIONS.values()) in text


def test_training_responses_are_kept_every_few_steps(tmp_path: Path) -> None:
    run = make_training(tmp_path, 5, samples_every=2)
    with run:
        for step in run.steps():
            run.log({}, lambda step=step: [{"drawn": "training", "number": step}])
    assert [row["number"] for row in read_samples(run.path)] == [1, 3, 5]


def test_all_metrics_reach_the_trackers(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("finished"),
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = make_training(tmp_path, 1, FakeEvaluator(every=1), trackers=("wandb",))
    run_steps(run, **{"reward/mean": 3.0})
    assert calls[0]["config"]["answer"] == 42 and calls[0]["name"] == "run"
    assert calls[1] == (0, {"evaluation/n": 2.0, "evaluation/greedy": 0.5})
    assert calls[2][0] == 1 and calls[2][1]["reward/mean"] == 3.0
    assert calls[-1] == "finished"


def test_missing_tracker_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("trivium.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'trivium\[trackio\]'"):
        make_training(tmp_path, 1, trackers=("trackio",))
    assert not (tmp_path / "run").exists()


# --- In a real loop -------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def make_config(world: World, **options: Any) -> GRPOConfig:
    return GRPOConfig(**(world.on_policy() | {"steps_per_iteration": 3} | options))


def test_budget_ends_all_iterations_of_grpo(world: World) -> None:
    run = world.run(budget={"generated_tokens": 150}, samples_every=1)
    config = make_config(world, iterations=3, steps_per_iteration=2, run=run)
    path = grpo.train(config)
    lines = read_metrics(path)
    spent = [line["tokens/generated"] for line in lines]
    assert sum(spent[:-1]) < 150 <= sum(spent)
    assert (path / "final" / "config.json").exists()


def test_schedule_follows_the_budget_if_it_ends_before_the_steps(world: World) -> None:
    optimizer = {"learning_rate": 1e-3, "schedule": "linear"}
    path = grpo.train(make_config(world, optimizer=optimizer, steps_per_iteration=100,
                                run=world.run(budget={"generated_tokens": 190})))  # fmt: skip
    lines = read_metrics(path)
    spent = 0.0
    for line in lines:
        assert line["learning_rate"] == pytest.approx(1e-3 * (1 - min(1.0, spent / 190)), rel=0.05)
        spent += line["tokens/generated"]
    assert len(lines) >= 2


def test_training_samples_have_advantages_and_log_ratios_of_every_token(world: World) -> None:
    path = grpo.train(make_config(world, beta=0.1, run=world.run(samples_every=1)))
    rows = read_samples(path)
    assert {row["drawn"] for row in rows} == {"training"}
    assert [row["step"] for row in rows] == [s for s in (1, 2, 3) for _ in range(3)]
    for row in rows:
        assert len(row["tokens"]) == len(row["advantages"]) == len(row["log_ratio"])
        assert len(row["tokens"]) == row["length"]
        assert row["kl"] == pytest.approx(sum(row["log_ratio"]), abs=1e-9)
        text = "".join(row["tokens"])
        assert text == row["response"] + "<eos>" * (row["finish_reason"] == "eos")
    group = [row["advantages"][0] for row in rows[:3]]
    assert sum(group) == pytest.approx(0.0, abs=1e-3)


def test_all_logged_metrics_are_defined_and_stages_add_up_to_the_step(world: World) -> None:
    path = grpo.train(make_config(world))
    (line, *_) = read_metrics(path)
    stages = sum(line[f"time/{stage}"] for stage in ("rollout", "scoring", "logprobs", "update"))
    assert 0.8 * line["time/total"] < stages <= line["time/total"]
    assert line["flops"] > 0
    assert metrics_of(path)[0].keys() <= {"step", *METRICS} | {
        "rewards/letters/mean", "rewards/letters/std", "rewards/letters/fallbacks",
    }  # fmt: skip


# --- Monitors -------------------------------------------------------------------------------------


def test_alarm_is_shown_and_logged_and_does_not_stop_by_default(
    tmp_path: Path, caplog: Any
) -> None:
    run = make_training(tmp_path, 3)
    assert run_steps(run, **{"policy/kl_old": 0.5}) == [1, 2, 3]
    alarms = [event for event in read_events(run.path) if event["kind"] == "alarm"]
    assert [(a["monitor"], a["step"], a["stops"]) for a in alarms] == [("kl_old", 1, False)]
    assert alarms[0]["why"] and alarms[0]["remedy"] and alarms[0]["value"] == 0.5
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_monitor_with_action_stop_ends_the_run_after_the_step(tmp_path: Path) -> None:
    run = make_training(tmp_path, 3, monitors={"kl_old": {"action": "stop"}})
    assert run_steps(run, **{"policy/kl_old": 0.5}) == [1]
    assert [event["kind"] for event in read_events(run.path)] == ["alarm", "stopped", "finished"]


def test_monitors_see_evaluations_before_the_first_step(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    run = make_training(tmp_path, 2, FakeEvaluator(every=1))
    run._monitors.evaluated = lambda step, *_: calls.append(("evaluated", step)) or []
    run._monitors.observe = lambda step, metrics: calls.append(("observed", step)) or []
    run_steps(run)
    assert calls == [(name, n) for n in (0, 1, 2) for name in ("observed", "evaluated")][1:]


def test_monitors_see_the_rewards_of_every_held_out_prompt(tmp_path: Path) -> None:
    evaluator = FakeEvaluator(every=1)
    right = [float(k < 150) for k in range(200)]
    worse = [float(k < 100) for k in range(200)]
    evaluator.outcomes = lambda: {"greedy": right if len(evaluator.calls) < 3 else worse}
    run = make_training(tmp_path, 3, evaluator)
    run_steps(run)
    (alarm,) = [event for event in read_events(run.path) if event["kind"] == "alarm"]
    assert (alarm["monitor"], alarm["step"]) == ("held_out_quality", 2)


def test_monitors_see_updates_of_the_reward_model(tmp_path: Path) -> None:
    run = make_training(tmp_path, 4, monitors={"learned_reward": {"action": "stop"}})
    with run:
        for _ in run.steps():
            run.event("reward_update", accuracy=0.5, labels=64.0, loss=0.7)
            run.log({})
    kinds = [event["kind"] for event in read_events(run.path)]
    assert kinds == [*["reward_update"] * 3, "alarm", "stopped", "finished"]


def test_control_characters_of_a_reward_name_are_escaped(tmp_path: Path, caplog: Any) -> None:
    run = make_training(tmp_path, 1)
    run_steps(run, **{"rewards/\x1b[31mevil/fallbacks": 3.0})
    (alarm, _) = read_events(run.path)
    assert alarm["kind"] == "alarm" and "\x1b" not in alarm["message"]
    assert "\x1b" not in caplog.text


# --- Failures -------------------------------------------------------------------------------------


def test_nonfinite_batch_is_saved_and_the_failure_is_logged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = sft.loss

    def nan_loss(policy: Policy, groups: WeightedGroups) -> Any:
        value, observed = loss(policy, groups)
        return value * float("nan"), observed

    monkeypatch.setattr(sft, "loss", nan_loss)
    rows = world.rows("rows.jsonl", [{"prompt": "a", "completion": "bc"}])
    run = world.run()
    config = SFTConfig(model={"path": world.path}, data=rows, steps=2, run=run)
    with pytest.raises(NonFiniteError, match=r"The batch is in .*non-finite") as caught:
        sft.train(config)
    saved = Path(run["directory"]) / "non-finite"
    assert "bc" in (saved / "batch.json").read_text()
    assert (saved / "micro-batch-000.safetensors").exists()
    (failed,) = [e for e in read_events(saved.parent) if e["kind"] == "failed"]
    assert failed["message"] == str(caught.value)
    assert not (saved.parent / "final").exists()
