"""Who may write to a run's directory: what begins, goes on, or is refused, and with which words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.stoppable_runs import outcome, same
from helpers.tiny_models import World, source

from trivium.algorithms import grpo, sft
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.cli import main
from trivium.config.base import dump
from trivium.errors import CheckpointError, ConfigurationError, TrainingError
from trivium.models.policy import Policy
from trivium.runs import run_directory as claim_module
from trivium.runs.checkpoint import Checkpoints
from trivium.runs.run_directory import LOCK, contents, locked
from trivium.runs.signals import SIGNALS, Interrupted, Stopping
from trivium.runs.store import Run, is_finished, read_evaluations, read_events, read_metrics
from trivium.training.run_loop import Training

ROWS = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "completion": "ef"}]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Also in a shell's background or behind nohup, which let them be ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config_of(world: World, directory: Path, **options: Any) -> SFTConfig:
    own = {"directory": str(directory), "checkpoints": {"steps": 1}} | options.pop("run", {})
    given = {"model": {"path": world.path}, "data": world.rows("rows.jsonl", ROWS), "run": own}
    return SFTConfig(**given | {"steps": 4, "examples_per_step": 1} | options)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Let a signal come at the end of a step."""
    log = Training.log

    def and_signal(training: Training, *given: Any) -> None:
        log(training, *given)
        if training.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Training, "log", and_signal)


@pytest.fixture
def stopped(world: World, tmp_path: Path) -> Path:
    """A run that SIGTERM stopped after its second step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            sft.train(config_of(world, tmp_path / "run"))
    return tmp_path / "run"


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_stops_and_tells_how_to_go_on(
    world: World, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(sft.train(config_of(world, tmp_path / "whole")))
    run = tmp_path / "run"
    never = {"checkpoints": {"seconds": 1e9}}
    with monkeypatch.context() as patch:
        stop_after(patch, 2, number)
        with pytest.raises(Interrupted, match=f"saved at step 2; to go on: trivium resume {run}"):
            sft.train(config_of(world, run, run=never))
    assert len(read_metrics(run)) == 2
    assert [e["kind"] for e in read_events(run)] == ["interrupted"]
    sft.train(config_of(world, run, run=never))
    assert same(whole["metrics"], outcome(run)["metrics"]) == []
    assert same(whole["final/model.safetensors"], outcome(run)["final/model.safetensors"]) == []


def test_second_signal_ends_at_once_and_leaves_a_valid_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(sft.train(config_of(world, tmp_path / "whole")))
    log = Training.log

    def two_signals(training: Training, *given: Any) -> None:
        log(training, *given)
        if training.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal did not end the run")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "log", two_signals)
        with pytest.raises(KeyboardInterrupt) as caught:
            sft.train(config_of(world, tmp_path / "run"))
    assert not isinstance(caught.value, Interrupted)
    sft.train(config_of(world, tmp_path / "run"))
    assert same(whole, outcome(tmp_path / "run")) == []


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        usual = signal.getsignal(signal.SIGINT)
        with Stopping() as stopping:
            assert signal.getsignal(signal.SIGINT) != usual
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.asked is None
        assert signal.getsignal(signal.SIGINT) == usual
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sampling_is_given_up_where_a_step_may_take_long(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run: str) -> GRPOConfig:
        given = world.on_policy("letters", run={"directory": str(tmp_path / run)})
        return GRPOConfig(**given, steps_per_iteration=2)

    whole = outcome(grpo.train(config("whole")))
    sample, calls = grpo.sample, []

    def signalled(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return sample(*given)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "sample", signalled)
        with pytest.raises(Interrupted, match="saved at step 1"):
            grpo.train(config("run"))
    assert time.monotonic() - began < 50
    grpo.train(config("run"))
    assert same(whole, outcome(tmp_path / "run")) == []


def test_stopped_run_does_not_evaluate_before_it_stops_but_when_it_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"data": world.prompts, "every": 1, "max_tokens": 5,
                  "rewards": world.reward("letters")}  # fmt: skip
    config = config_of(world, tmp_path / "run", evaluation=evaluation)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            sft.train(config)
    assert [line["step"] for line in read_evaluations(tmp_path / "run")] == [0, 1]
    sft.train(config)
    assert [line["step"] for line in read_evaluations(tmp_path / "run")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"timeout": None}, {"fallback": 0.0}], ids=str)
def test_signal_during_a_reward_stops_the_run_and_is_no_fault_of_the_reward(
    world: World, tmp_path: Path, options: dict[str, Any]
) -> None:
    code = """
import os, signal, time
def slow(responses):
    if not os.path.exists(__file__ + ".seen"):
        open(__file__ + ".seen", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    return [float(len(r)) for r in responses]
"""
    function = f"{source(tmp_path / 'slow.py', code)}:slow"
    given = world.on_policy(run={"directory": str(tmp_path / "run")})
    given["rewards"] = [{"function": function, **options}]
    config = GRPOConfig(**given, steps_per_iteration=1)
    with pytest.raises(Interrupted, match="saved at step 0"):
        grpo.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    (line,) = read_metrics(grpo.train(config))
    assert line["rewards/slow/fallbacks"] == 0


# --- Going on -------------------------------------------------------------------------------------


def test_same_command_goes_on_and_a_finished_run_is_left_alone(world: World, stopped: Path) -> None:
    assert not is_finished(stopped)
    sft.train(config_of(world, stopped))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4]
    assert is_finished(stopped)
    with pytest.raises(ConfigurationError, match="holds a finished run"):
        sft.train(config_of(world, stopped))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 5}, "steps: 4 → 5"),
        ({"optimizer": {"learning_rate": 1e-4}}, "optimizer.learning_rate: 2e-05 → 0.0001"),
        ({"run": {"seed": 3}}, "run.seed: 0 → 3"),
        ({"run": {"monitors": {"kl": {"limit": 3.0}}}}, "run.monitors.kl.limit: 10.0 → 3.0"),
    ],
)
def test_changed_configuration_is_refused_with_the_difference(
    world: World, stopped: Path, options: dict[str, Any], told: str
) -> None:
    before = sorted(stopped.rglob("*"))
    with pytest.raises(ConfigurationError, match="this command is not the same") as caught:
        sft.train(config_of(world, stopped, **options))
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith("  - ")] == [f"  - {told}"]
    assert "--allow-changes" in lines[-1]
    assert sorted(stopped.rglob("*")) == before


def test_changes_may_be_allowed_and_are_kept_in_the_events(world: World, stopped: Path) -> None:
    sft.train(config_of(world, stopped, steps=5, run={"allow_changes": True}))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4, 5]
    (resumed,) = [e for e in read_events(stopped) if e["kind"] == "resumed"]
    assert (resumed["step"], resumed["changes"]) == (2, ["steps: 4 → 5"])


def test_finished_run_goes_on_where_a_change_gives_it_more_to_do(
    world: World, stopped: Path
) -> None:
    sft.train(config_of(world, stopped))
    sft.train(config_of(world, stopped, steps=6, run={"allow_changes": True}))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4, 5, 6]
    assert is_finished(stopped)


@pytest.mark.parametrize("what", ["rows.jsonl", "model/model.safetensors"])
def test_changed_data_or_model_is_refused(world: World, stopped: Path, what: str) -> None:
    config = config_of(world, stopped)
    path = world.directory / what
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    told = str(path.parent if what.startswith("model") else path)
    with pytest.raises(ConfigurationError, match=f"{told}: its content changed"):
        sft.train(config)


@pytest.mark.parametrize(
    ("key", "told"),
    [("packages", "torch: version 0.1 → "), ("source", "trivium: its source code changed")],
)
def test_changed_code_is_refused(world: World, stopped: Path, key: str, told: str) -> None:
    record = json.loads((stopped / "run.json").read_text())
    record[key] = {**record[key], "torch": "0.1"} if key == "packages" else "0"
    (stopped / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigurationError, match=told):
        sft.train(config_of(world, stopped))


def test_settings_that_decide_nothing_may_change(world: World, stopped: Path) -> None:
    options = {"checkpoints": {"seconds": 5.0, "keep": 7}, "measure_memory": True}
    sft.train(config_of(world, stopped, run=options))
    assert is_finished(stopped)


def test_run_of_another_kind_is_refused(world: World, stopped: Path) -> None:
    from trivium.algorithms import reward_model
    from trivium.algorithms.reward_model_config import RewardModelConfig

    pairs = world.rows("pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    config = RewardModelConfig(
        model={"path": world.path}, pairs=pairs, run={"directory": str(stopped)}
    )
    with pytest.raises(ConfigurationError, match="holds a run of sft, not reward-model"):
        reward_model.train(config)


def test_run_that_did_nothing_yet_is_replaced(world: World, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "steps", lambda self: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            sft.train(config_of(world, tmp_path / "run"))
    assert (tmp_path / "run" / "run.json").exists()
    sft.train(config_of(world, tmp_path / "run", steps=2))
    assert len(read_metrics(tmp_path / "run")) == 2


def test_insisting_on_a_run_that_is_not_there_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run to go on with"):
        sft.train(config_of(world, tmp_path / "nothing", run={"resume": True}))
    assert not (tmp_path / "nothing").exists()


def test_log_that_was_altered_is_told_and_not_gone_on_from(world: World, stopped: Path) -> None:
    lines = (stopped / "metrics.jsonl").read_text().replace('"step": 1', '"step": 7')
    (stopped / "metrics.jsonl").write_text(lines)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: was shortened or altered"):
        sft.train(config_of(world, stopped))


def test_run_without_any_saved_state_begins_anew_and_loses_no_line(
    world: World, stopped: Path
) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes()
    shutil.rmtree(stopped / "checkpoints")
    sft.train(config_of(world, stopped))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4]
    assert (stopped / "earlier-1" / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_killed_anywhere_while_it_is_cleared_can_begin_again(
    world: World, stopped: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single renaming or removal on the way, one after the other."""
    shutil.rmtree(stopped / "checkpoints")
    lines = (stopped / "metrics.jsonl").read_bytes()
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "create", raising(Killed))
            for where, name in ((Path, "rename"), (claim_module, "remove")):
                patch.setattr(where, name, once_and_killed(getattr(where, name)))
            with pytest.raises(Killed):
                sft.train(config_of(world, stopped, run={"overwrite": overwrite}))
        kills += 1
        if contents(stopped) == []:
            break
    assert kills >= 3
    sft.train(config_of(world, stopped))
    assert is_finished(stopped)
    kept = [path.read_bytes() for path in stopped.glob("earlier-*/metrics.jsonl")]
    assert kept == ([] if overwrite else [lines])


class Killed(BaseException):
    """As if the process had been killed there."""


def raising(error: type[BaseException]) -> Any:
    def fail(*given: Any) -> Any:
        raise error

    return fail


def once_and_killed(act: Any) -> Any:
    """Do it, and be killed right after."""

    def acting(*given: Any) -> Any:
        act(*given)
        raise Killed

    return acting


def test_run_that_failed_before_its_first_step_gives_way_to_a_corrected_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sft, "loss", lambda *given: 1 / 0)
        patch.setattr(Training, "log", lambda *given: pytest.fail("a step was logged"))
        with pytest.raises(ZeroDivisionError):
            sft.train(config_of(world, tmp_path / "run"))
    (tmp_path / "run" / "events.jsonl").write_text('{"kind": "failed"}\n')
    sft.train(config_of(world, tmp_path / "run", steps=1))
    assert is_finished(tmp_path / "run")


@pytest.mark.parametrize("allow", [False, True])
def test_run_of_an_earlier_version_is_told_and_left_alone(
    world: World, stopped: Path, allow: bool, capfd: Any
) -> None:
    record = json.loads((stopped / "run.json").read_text())
    for name in ("id", "inputs", "source", "from"):
        del record[name]
    (stopped / "run.json").write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match="an earlier version of trivium"):
        sft.train(config_of(world, stopped, run={"allow_changes": allow}))
    assert main(["resume", str(stopped)]) == 2
    assert "cannot be resumed" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


# --- One process at a time ------------------------------------------------------------------------


def test_two_processes_cannot_write_to_one_run(world: World, stopped: Path) -> None:
    before = (stopped / "metrics.jsonl").read_bytes()
    code = (
        "import sys, time; from pathlib import Path; from trivium.runs.run_directory import locked\n"
        "lock = locked(Path(sys.argv[1])); print('taken', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(stopped)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "taken\n"
        for options in ({}, {"overwrite": True}):
            with pytest.raises(ConfigurationError, match="another process writes to this run"):
                sft.train(config_of(world, stopped, run=options))
    finally:
        holder.kill()
        holder.communicate()
    assert (stopped / "metrics.jsonl").read_bytes() == before
    sft.train(config_of(world, stopped))


def test_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from trivium.runs.run_directory import locked\n"
        "lock = locked(Path(sys.argv[1])); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / LOCK).exists()
    locked(tmp_path).release()


# --- A full disk ----------------------------------------------------------------------------------


def test_run_goes_on_where_its_state_cannot_be_saved(
    world: World, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Checkpoints.write, []

    def full_at_first(checkpoints: Checkpoints, *given: Any) -> Any:
        calls.append(given)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        return write(checkpoints, *given)

    monkeypatch.setattr(Checkpoints, "write", full_at_first)
    run = sft.train(config_of(world, tmp_path / "run"))
    assert is_finished(run)
    assert [e["step"] for e in read_events(run) if e["kind"] == "not_saved"] == [1, 2]
    assert "cannot be saved: No space left on device; the run goes on" in caplog.text


def test_model_that_cannot_be_written_is_told_and_nothing_is_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", full)
        with pytest.raises(TrainingError, match=r"final: cannot be written: No space .* step 4"):
            sft.train(config_of(world, tmp_path / "run"))
    assert not is_finished(tmp_path / "run")
    sft.train(config_of(world, tmp_path / "run"))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


# --- The best -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "step"), [("lowest", 3), ("highest", 0)])
def test_best_evaluation_keeps_its_checkpoint_and_model(
    world: World, tmp_path: Path, which: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([5.0, 4.0, 4.5, 1.0, 2.0])
    monkeypatch.setattr(sft, "validation_loss", lambda *given: next(values))
    evaluation = {"data": world.prompts, "every": 1, "max_tokens": 5,
                  "rewards": world.reward("letters")}  # fmt: skip
    own = {"checkpoints": {"steps": 1, "keep": 1, "best": "nll", "best_is": which}}
    config = config_of(
        world, tmp_path / "run", run=own, evaluation=evaluation,
        validation=world.rows("held-out.jsonl", ROWS),
    )  # fmt: skip
    run = sft.train(config)
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == sorted({f"{step:08d}", "00000004"})
    assert (run / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_best_by_a_number_that_is_never_measured_is_refused(
    world: World, tmp_path: Path, held_out: bool
) -> None:
    own = {"checkpoints": {"best": "sampled"}}
    rows = {"validation": world.rows("held-out.jsonl", ROWS)} if held_out else {}
    with pytest.raises(ConfigurationError, match=r"run\.checkpoints\.best = sampled"):
        sft.train(config_of(world, tmp_path / "run", run=own, **rows))


def test_best_model_that_cannot_be_written_is_told_without_a_traceback(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    own = {"checkpoints": {"best": "nll", "best_is": "lowest"}}
    config = config_of(
        world, tmp_path / "run", run=own, validation=world.rows("held-out.jsonl", ROWS)
    )
    save = Policy.save
    monkeypatch.setattr(
        Policy, "save", lambda self, to: full() if ".best" in to.name else save(self, to)
    )
    with pytest.raises(TrainingError, match=r"best: cannot be written: No space left"):
        sft.train(config)


# --- From the command line ------------------------------------------------------------------------


def test_command_line_goes_on_with_a_run_by_its_directory_alone(
    stopped: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(stopped)]) == 0
    out, err = capfd.readouterr()
    assert f"written to {stopped}" in out
    assert f"going on with the run in {stopped} from step 2" in err.replace("\n", " ")
    assert main(["resume", str(stopped)]) == 2
    assert "holds a finished run" in capfd.readouterr().err
    assert main(["resume", str(stopped), "--allow-changes", "steps=5"]) == 0
    assert len(read_metrics(stopped)) == 5


def test_flags_of_a_training_command_stand_for_settings(
    world: World, stopped: Path, tmp_path: Path, capfd: Any
) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(dump(config_of(world, tmp_path / "elsewhere")))
    assert main(["sft", str(config), "--resume"]) == 2
    assert "holds no run to go on with" in capfd.readouterr().err
    given = ["sft", str(config), f"run.directory={stopped}", "steps=3"]
    assert main(given) == 2
    assert "steps: 4 → 3" in capfd.readouterr().err
    assert main([*given, "--allow-changes", "--resume"]) == 0


def test_interrupted_command_exits_with_128_and_the_signals_number(
    world: World, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(dump(config_of(world, tmp_path / "run")))
    stop_after(monkeypatch, 1)
    assert main(["sft", str(config)]) == 128 + signal.SIGTERM
    err = capfd.readouterr().err
    assert "SIGTERM: saving and stopping" in err
    assert "stopped by SIGTERM, saved at step 1; to go on: trivium resume" in err
    assert "Traceback" not in err
