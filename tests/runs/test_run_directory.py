"""Access to a run directory: new runs, resumed runs, refusals and their messages, signals."""

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
from helpers.stoppable_runs import different_values, run_results
from helpers.tiny_models import World, source

from trivium.algorithms import grpo, sft
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.rollout_step import RolloutBatches
from trivium.algorithms.sft_config import SFTConfig
from trivium.cli import main
from trivium.config.base import dump
from trivium.errors import CheckpointError, ConfigurationError, TrainingError
from trivium.models.policy import Policy
from trivium.runs import run_directory
from trivium.runs.checkpoint import Checkpoints
from trivium.runs.run_directory import LOCK, directory_entries, lock_directory
from trivium.runs.signals import SIGNALS, Interrupted, SignalHandler
from trivium.runs.store import Run, is_finished, read_evaluations, read_events, read_metrics
from trivium.training.run_loop import Training

ROWS = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "completion": "ef"}]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def _default_signal_handlers() -> Iterator[None]:
    """Restore the default handlers: a background shell or nohup ignores some signals."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_config(world: World, directory: Path, **options: Any) -> SFTConfig:
    own = {"directory": str(directory), "checkpoints": {"steps": 1}} | options.pop("run", {})
    base = {"model": {"path": world.path}, "data": world.rows("rows.jsonl", ROWS), "run": own}
    return SFTConfig(**base | {"steps": 4, "examples_per_step": 1} | options)


def send_signal_after(
    monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM
) -> None:
    """Send a signal to this process at the end of a step."""
    log = Training.log

    def log_and_send_signal(training: Training, *arguments: Any) -> None:
        log(training, *arguments)
        if training.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Training, "log", log_and_send_signal)


@pytest.fixture
def stopped(world: World, tmp_path: Path) -> Path:
    """Directory of a run that SIGTERM stopped after its second step."""
    with pytest.MonkeyPatch.context() as patch:
        send_signal_after(patch, 2)
        with pytest.raises(Interrupted):
            sft.train(make_config(world, tmp_path / "run"))
    return tmp_path / "run"


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_and_stops_the_run_and_names_the_resume_command(
    world: World, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_results(sft.train(make_config(world, tmp_path / "uninterrupted")))
    run = tmp_path / "run"
    never = {"checkpoints": {"seconds": 1e9}}
    with monkeypatch.context() as patch:
        send_signal_after(patch, 2, number)
        with pytest.raises(Interrupted, match=f"saved at step 2; to resume: trivium resume {run}"):
            sft.train(make_config(world, run, run=never))
    assert len(read_metrics(run)) == 2
    assert [e["kind"] for e in read_events(run)] == ["interrupted"]
    sft.train(make_config(world, run, run=never))
    actual = run_results(run)
    assert different_values(expected["metrics"], actual["metrics"]) == []
    assert (
        different_values(expected["final/model.safetensors"], actual["final/model.safetensors"])
        == []
    )


def test_second_signal_ends_the_run_at_once_and_leaves_it_valid(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_results(sft.train(make_config(world, tmp_path / "uninterrupted")))
    log = Training.log

    def log_and_send_two_signals(training: Training, *arguments: Any) -> None:
        log(training, *arguments)
        if training.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal did not end the run")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "log", log_and_send_two_signals)
        with pytest.raises(KeyboardInterrupt) as caught:
            sft.train(make_config(world, tmp_path / "run"))
    assert not isinstance(caught.value, Interrupted)
    sft.train(make_config(world, tmp_path / "run"))
    assert different_values(expected, run_results(tmp_path / "run")) == []


def test_handlers_are_restored_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        default = signal.getsignal(signal.SIGINT)
        with SignalHandler() as handler:
            assert signal.getsignal(signal.SIGINT) != default
            os.kill(os.getpid(), signal.SIGHUP)
            assert handler.received is None
        assert signal.getsignal(signal.SIGINT) == default
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_during_sampling_aborts_it_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run: str) -> GRPOConfig:
        options = world.on_policy("letters", run={"directory": str(tmp_path / run)})
        return GRPOConfig(**options, steps_per_iteration=2)

    expected = run_results(grpo.train(config("uninterrupted")))
    sample, calls, finished = RolloutBatches.of_step, [], []

    def send_signal_in_second_call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            finished.append(arguments)
        return sample(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutBatches, "of_step", send_signal_in_second_call)
        with pytest.raises(Interrupted, match="saved at step 1"):
            grpo.train(config("run"))
    assert len(calls) == 2 and finished == []
    grpo.train(config("run"))
    assert different_values(expected, run_results(tmp_path / "run")) == []


def test_evaluation_due_at_a_stop_is_done_after_the_run_resumes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"data": world.prompts, "every": 1, "max_tokens": 5,
                  "rewards": world.reward("letters")}  # fmt: skip
    config = make_config(world, tmp_path / "run", evaluation=evaluation)
    with monkeypatch.context() as patch:
        send_signal_after(patch, 2)
        with pytest.raises(Interrupted):
            sft.train(config)
    assert [line["step"] for line in read_evaluations(tmp_path / "run")] == [0, 1]
    sft.train(config)
    assert [line["step"] for line in read_evaluations(tmp_path / "run")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"timeout": None}, {"fallback": 0.0}], ids=str)
def test_signal_during_a_reward_call_stops_the_run_and_is_no_reward_error(
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
    base = world.on_policy(run={"directory": str(tmp_path / "run")})
    base["rewards"] = [{"function": function, **options}]
    config = GRPOConfig(**base, steps_per_iteration=1)
    with pytest.raises(Interrupted, match="saved at step 0"):
        grpo.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    (line,) = read_metrics(grpo.train(config))
    assert line["rewards/slow/fallbacks"] == 0


# --- Resuming -------------------------------------------------------------------------------------


def test_same_command_resumes_a_stopped_run_and_refuses_a_finished_one(
    world: World, stopped: Path
) -> None:
    assert not is_finished(stopped)
    sft.train(make_config(world, stopped))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4]
    assert is_finished(stopped)
    with pytest.raises(ConfigurationError, match="holds a finished run"):
        sft.train(make_config(world, stopped))


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"steps": 5}, "steps: 4 → 5"),
        ({"optimizer": {"learning_rate": 1e-4}}, "optimizer.learning_rate: 2e-05 → 0.0001"),
        ({"run": {"seed": 3}}, "run.seed: 0 → 3"),
        ({"run": {"monitors": {"kl": {"limit": 3.0}}}}, "run.monitors.kl.limit: 10.0 → 3.0"),
    ],
)
def test_changed_configuration_is_refused_and_the_difference_is_named(
    world: World, stopped: Path, options: dict[str, Any], difference: str
) -> None:
    before = sorted(stopped.rglob("*"))
    with pytest.raises(
        ConfigurationError, match="a stopped run that differs from this command"
    ) as caught:
        sft.train(make_config(world, stopped, **options))
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith("  - ")] == [f"  - {difference}"]
    assert "--allow-changes" in lines[-1]
    assert sorted(stopped.rglob("*")) == before


def test_allowed_changes_are_logged_as_events(world: World, stopped: Path) -> None:
    sft.train(make_config(world, stopped, steps=5, run={"allow_changes": True}))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4, 5]
    (resumed,) = [e for e in read_events(stopped) if e["kind"] == "resumed"]
    assert (resumed["step"], resumed["changes"]) == (2, ["steps: 4 → 5"])


def test_finished_run_resumes_with_more_steps_if_changes_are_allowed(
    world: World, stopped: Path
) -> None:
    sft.train(make_config(world, stopped))
    sft.train(make_config(world, stopped, steps=6, run={"allow_changes": True}))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4, 5, 6]
    assert is_finished(stopped)


@pytest.mark.parametrize("name", ["rows.jsonl", "model/model.safetensors"])
def test_changed_data_or_model_is_refused(world: World, stopped: Path, name: str) -> None:
    config = make_config(world, stopped)
    path = world.directory / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    changed = path.parent if name.startswith("model") else path
    with pytest.raises(ConfigurationError, match=f"{changed}: its content changed"):
        sft.train(config)


@pytest.mark.parametrize(
    ("key", "message"),
    [("packages", "torch: version 0.1 → "), ("source", "trivium: its source code changed")],
)
def test_changed_code_is_refused(world: World, stopped: Path, key: str, message: str) -> None:
    record = json.loads((stopped / "run.json").read_text())
    record[key] = {**record[key], "torch": "0.1"} if key == "packages" else "0"
    (stopped / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigurationError, match=message):
        sft.train(make_config(world, stopped))


def test_settings_that_do_not_affect_results_may_change(world: World, stopped: Path) -> None:
    options = {"checkpoints": {"seconds": 5.0, "keep": 7}, "measure_memory": True}
    sft.train(make_config(world, stopped, run=options))
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


def test_run_without_progress_is_replaced(world: World, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "steps", lambda self: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            sft.train(make_config(world, tmp_path / "run"))
    assert (tmp_path / "run" / "run.json").exists()
    sft.train(make_config(world, tmp_path / "run", steps=2))
    assert len(read_metrics(tmp_path / "run")) == 2


def test_required_resume_of_a_missing_run_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run to resume"):
        sft.train(make_config(world, tmp_path / "missing", run={"resume": True}))
    assert not (tmp_path / "missing").exists()


def test_run_with_an_altered_log_is_not_resumed(world: World, stopped: Path) -> None:
    lines = (stopped / "metrics.jsonl").read_text().replace('"step": 1', '"step": 7')
    (stopped / "metrics.jsonl").write_text(lines)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: was shortened or altered"):
        sft.train(make_config(world, stopped))


def test_run_without_a_checkpoint_restarts_and_keeps_its_logs(world: World, stopped: Path) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes()
    shutil.rmtree(stopped / "checkpoints")
    sft.train(make_config(world, stopped))
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4]
    assert (stopped / "earlier-1" / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_killed_while_its_directory_is_cleared_can_restart(
    world: World, stopped: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the process at each rename or removal in turn."""
    shutil.rmtree(stopped / "checkpoints")
    lines = (stopped / "metrics.jsonl").read_bytes()
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "create", raising(Killed))
            for owner, name in ((Path, "rename"), (run_directory, "remove")):
                patch.setattr(owner, name, killed_after(getattr(owner, name)))
            with pytest.raises(Killed):
                sft.train(make_config(world, stopped, run={"overwrite": overwrite}))
        kills += 1
        if directory_entries(stopped) == []:
            break
    assert kills >= 3
    sft.train(make_config(world, stopped))
    assert is_finished(stopped)
    kept = [path.read_bytes() for path in stopped.glob("earlier-*/metrics.jsonl")]
    assert kept == ([] if overwrite else [lines])


class Killed(BaseException):
    """Ends a run as if its process were killed."""


def raising(error: type[BaseException]) -> Any:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


def killed_after(function: Any) -> Any:
    """Return a function that raises Killed after it has called ``function``."""

    def call_and_kill(*arguments: Any) -> Any:
        function(*arguments)
        raise Killed

    return call_and_kill


def test_run_that_failed_in_its_first_step_is_replaced_by_a_corrected_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sft, "loss", lambda *arguments: 1 / 0)
        patch.setattr(Training, "log", lambda *arguments: pytest.fail("a step was logged"))
        with pytest.raises(ZeroDivisionError):
            sft.train(make_config(world, tmp_path / "run"))
    (tmp_path / "run" / "events.jsonl").write_text('{"kind": "failed"}\n')
    sft.train(make_config(world, tmp_path / "run", steps=1))
    assert is_finished(tmp_path / "run")


@pytest.mark.parametrize("allow", [False, True])
def test_run_of_an_earlier_version_is_refused_and_left_alone(
    world: World, stopped: Path, allow: bool, capfd: Any
) -> None:
    record = json.loads((stopped / "run.json").read_text())
    for name in ("id", "inputs", "source", "from"):
        del record[name]
    (stopped / "run.json").write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match="an earlier version of trivium"):
        sft.train(make_config(world, stopped, run={"allow_changes": allow}))
    assert main(["resume", str(stopped)]) == 2
    assert "cannot be resumed" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


# --- One process at a time ------------------------------------------------------------------------


def test_two_processes_cannot_write_to_one_run(world: World, stopped: Path) -> None:
    before = (stopped / "metrics.jsonl").read_bytes()
    code = (
        "import sys, time; from pathlib import Path\n"
        "from trivium.runs.run_directory import lock_directory\n"
        "lock = lock_directory(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(stopped)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        for options in ({}, {"overwrite": True}):
            with pytest.raises(ConfigurationError, match="another process writes to this run"):
                sft.train(make_config(world, stopped, run=options))
    finally:
        holder.kill()
        holder.communicate()
    assert (stopped / "metrics.jsonl").read_bytes() == before
    sft.train(make_config(world, stopped))


def test_lock_is_released_when_its_process_ends(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from trivium.runs.run_directory import lock_directory\n"
        "lock = lock_directory(Path(sys.argv[1])); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / LOCK).exists()
    lock_directory(tmp_path).release()


# --- A full disk ----------------------------------------------------------------------------------


def test_training_continues_if_its_state_cannot_be_saved(
    world: World, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Checkpoints.write, []

    def disk_full_at_first(checkpoints: Checkpoints, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        return write(checkpoints, *arguments)

    monkeypatch.setattr(Checkpoints, "write", disk_full_at_first)
    run = sft.train(make_config(world, tmp_path / "run"))
    assert is_finished(run)
    assert [e["step"] for e in read_events(run) if e["kind"] == "not_saved"] == [1, 2]
    assert "cannot be saved: No space left on device; training continues" in caplog.text


def test_run_whose_model_cannot_be_written_fails_and_can_be_resumed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", disk_full)
        with pytest.raises(TrainingError, match=r"final: cannot be written: No space .* step 4"):
            sft.train(make_config(world, tmp_path / "run"))
    assert not is_finished(tmp_path / "run")
    sft.train(make_config(world, tmp_path / "run"))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


# --- The best checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "step"), [("lowest", 3), ("highest", 0)])
def test_checkpoint_and_model_of_the_best_evaluation_are_kept(
    world: World, tmp_path: Path, which: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([5.0, 4.0, 4.5, 1.0, 2.0])
    monkeypatch.setattr(sft, "validation_loss", lambda *arguments: next(values))
    evaluation = {"data": world.prompts, "every": 1, "max_tokens": 5,
                  "rewards": world.reward("letters")}  # fmt: skip
    own = {"checkpoints": {"steps": 1, "keep": 1, "best": "nll", "best_is": which}}
    config = make_config(
        world, tmp_path / "run", run=own, evaluation=evaluation,
        validation=world.rows("held-out.jsonl", ROWS),
    )  # fmt: skip
    run = sft.train(config)
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == sorted({f"{step:08d}", "00000004"})
    assert (run / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_best_by_a_metric_that_is_never_measured_is_refused(
    world: World, tmp_path: Path, held_out: bool
) -> None:
    own = {"checkpoints": {"best": "sampled"}}
    rows = {"validation": world.rows("held-out.jsonl", ROWS)} if held_out else {}
    with pytest.raises(ConfigurationError, match=r"run\.checkpoints\.best = sampled"):
        sft.train(make_config(world, tmp_path / "run", run=own, **rows))


def test_best_model_that_cannot_be_written_is_a_training_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    own = {"checkpoints": {"best": "nll", "best_is": "lowest"}}
    config = make_config(
        world, tmp_path / "run", run=own, validation=world.rows("held-out.jsonl", ROWS)
    )
    save = Policy.save
    monkeypatch.setattr(
        Policy, "save", lambda self, to: disk_full() if ".best" in to.name else save(self, to)
    )
    with pytest.raises(TrainingError, match=r"best: cannot be written: No space left"):
        sft.train(config)


# --- Disk use of a finished run -------------------------------------------------------------------


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_finished_run_keeps_one_checkpoint_and_continues_from_it(
    world: World, tmp_path: Path
) -> None:
    constant = {"optimizer": {"learning_rate": 1e-3, "schedule": "constant"}}
    long = make_config(world, tmp_path / "long", steps=6, **constant)
    expected = run_results(sft.train(long))
    own = {"checkpoints": {"steps": 1, "keep": 3}}
    run = sft.train(make_config(world, tmp_path / "run", run=own, **constant))
    assert saved_steps(run) == ["00000004"]
    sft.train(make_config(world, run, steps=6, run={"allow_changes": True}, **constant))
    assert saved_steps(run) == ["00000006"]
    found = run_results(run)["final/model.safetensors"]
    assert different_values(expected["final/model.safetensors"], found) == []


def test_finished_run_keeps_the_checkpoints_that_are_asked_for(
    world: World, tmp_path: Path
) -> None:
    kept = {"checkpoints": {"steps": 1, "keep": 3, "keep_finished": 2}}
    run = sft.train(make_config(world, tmp_path / "run", run=kept))
    assert saved_steps(run) == ["00000003", "00000004"]


def test_stopped_run_keeps_all_its_checkpoints(stopped: Path) -> None:
    assert saved_steps(stopped) == ["00000001", "00000002"]


def test_finished_run_without_checkpoints_is_not_started_again(
    world: World, tmp_path: Path
) -> None:
    none = {"checkpoints": {"steps": 1, "keep_finished": 0, "best": "nll", "best_is": "lowest"}}
    data = world.rows("held-out.jsonl", ROWS)
    run = sft.train(make_config(world, tmp_path / "run", run=none, validation=data))
    assert saved_steps(run) == []
    assert (run / "final" / "model.safetensors").exists()
    assert (run / "best" / "model.safetensors").exists()
    again = make_config(world, run, steps=6, run={"allow_changes": True}, validation=data)
    with pytest.raises(ConfigurationError, match=r"finished run.*model\.path=.*final: it kept no"):
        sft.train(again)
    assert len(read_metrics(run)) == 4


# --- From the command line ------------------------------------------------------------------------


def test_resume_command_needs_only_the_run_directory(
    stopped: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(stopped)]) == 0
    out, err = capfd.readouterr()
    assert f"written to {stopped}" in out
    assert f"resuming the run in {stopped} from step 2" in err.replace("\n", " ")
    assert main(["resume", str(stopped)]) == 2
    assert "holds a finished run" in capfd.readouterr().err
    assert main(["resume", str(stopped), "--allow-changes", "steps=5"]) == 0
    assert len(read_metrics(stopped)) == 5


def test_flags_of_a_training_command_set_configuration_keys(
    world: World, stopped: Path, tmp_path: Path, capfd: Any
) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(dump(make_config(world, tmp_path / "elsewhere")))
    assert main(["sft", str(config), "--resume"]) == 2
    assert "holds no run to resume" in capfd.readouterr().err
    arguments = ["sft", str(config), f"run.directory={stopped}", "steps=3"]
    assert main(arguments) == 2
    assert "steps: 4 → 3" in capfd.readouterr().err
    assert main([*arguments, "--allow-changes", "--resume"]) == 0


def test_interrupted_command_exits_with_128_plus_the_signal_number(
    world: World, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(dump(make_config(world, tmp_path / "run")))
    send_signal_after(monkeypatch, 1)
    assert main(["sft", str(config)]) == 128 + signal.SIGTERM
    err = capfd.readouterr().err
    assert "SIGTERM: saving and stopping" in err
    assert "stopped by SIGTERM, saved at step 1; to resume: trivium resume" in err
    assert "Traceback" not in err
