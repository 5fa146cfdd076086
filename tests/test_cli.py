"""The command line: dispatch of commands, error messages, and output to a pipe."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_models import STILL, World

import trivium
import trivium.demo
from trivium.cli import main
from trivium.commands import COMMANDS
from trivium.config.base import load_configuration
from trivium.models.policy import Policy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def sample_settings(world: World, **options: Any) -> dict[str, Any]:
    return {
        "model": {"path": world.path},
        "data": world.prompts,
        "sampling": {"max_tokens": 4},
        "output": "responses.jsonl",
        **options,
    }


def settings_of(name: str, world: World) -> dict[str, Any]:
    """Return a configuration of two steps for a training command."""
    pairs = [{"prompt": "abc", "chosen": "a" * n, "rejected": "b" * n} for n in (1, 2, 3, 4)]
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    shared = {"model": {"path": world.path}, "run": world.run(), "optimizer": STILL}
    loop = {**world.on_policy(), "prompts_per_step": 2, "responses_per_prompt": 2}
    return {
        "sft": {**shared, "data": world.rows("sft.jsonl", texts), "steps": 2},
        "reward-model": {
            **shared,
            "pairs": world.rows("pairs.jsonl", pairs),
            "examples_per_step": 2,
            "held_out_share": 0.0,
        },
        "dpo": {**shared, "data": world.rows("pairs.jsonl", pairs), "pairs_per_step": 2},
        "ppo": {**loop, "steps": 2, "epochs": 1},
        "grpo": {**loop, "steps_per_iteration": 2},
    }[name]


# --- Commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "reward-model", "ppo", "dpo", "grpo"])
def test_training_command_writes_a_run_and_prints_its_directory(
    name: str, world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(name, world)
    assert main([name, write(here / "config.yaml", settings)]) == 0
    out, err = capsys.readouterr()
    run = Path(settings["run"]["directory"])
    assert out.splitlines()[-1] == f"written to {run}"
    assert f"{name} 2/2" in out
    assert (run / "final" / "model.safetensors").is_file()
    assert json.loads((run / "run.json").read_text())["kind"] == name
    assert "rows read" in err


def test_settings_on_the_command_line_override_the_file(world: World, here: Path) -> None:
    config = write(here / "config.yaml", settings_of("grpo", world))
    assert main(["grpo", config, "steps_per_iteration=1", "run.directory=mine", "beta=0.5"]) == 0
    assert len((here / "mine" / "metrics.jsonl").read_text().splitlines()) == 1
    assert yaml.safe_load((here / "mine" / "config.yaml").read_text())["beta"] == 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_example_in_the_help_of_a_command_is_a_valid_configuration(name: str, here: Path) -> None:
    command = COMMANDS[name]
    path = here / "example.yaml"
    path.write_text(command.example)
    load_configuration(command.config_class(), path, command.arguments.split())


def test_fields_option_lists_all_settings_without_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "--fields"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "pairs_per_prompt: whole number >= 1 or null, default 1\n    Maximum" in out
    assert "candidates.0.response: text of length >= 1, required" in out


def test_demo_receives_its_directory_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(trivium.demo, "run", lambda *a, **k: calls.append((a, k)))
    assert main(["demo", "--quick", "--directory", "there", "--seed", "3", "4"]) == 0
    assert main(["demo"]) == 0
    assert calls == [
        ((Path("there"),), {"quick": True, "seeds": (3, 4)}),
        ((Path("runs/demo"),), {"quick": False, "seeds": (0,)}),
    ]


def test_help_and_unreadable_files_do_not_import_torch(here: Path) -> None:
    (here / "bad.yaml").write_text("model: {path: model\ndata: 3")
    code = (
        "import sys, trivium\n"
        "from trivium.cli import main\n"
        "assert main([]) == 0\n"
        "for arguments in (['grpo', 'bad.yaml'], ['grpo', 'none.yaml'], ['gropo']):\n"
        "    assert main(arguments) == 2\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not valid YAML" in done.stderr


# --- Rewards beside the configuration -------------------------------------------------------------


def test_reward_file_is_found_in_the_current_directory_before_the_configuration_s(
    world: World, here: Path
) -> None:
    (here / "configs").mkdir()
    settings = sample_settings(world, rewards=[{"function": "mine.py:score"}])
    config = write(here / "configs" / "sample.yaml", settings)
    (here / "configs" / "mine.py").write_text("def score(responses): return [2.0] * len(responses)")
    assert main(["sample", config]) == 0
    (here / "mine.py").write_text("def score(responses): return [1.0] * len(responses)")
    assert main(["sample", config, "output=again.jsonl"]) == 0
    rewards = [
        {json.loads(line)["reward"] for line in (here / name).read_text().splitlines()}
        for name in ("responses.jsonl", "again.jsonl")
    ]
    assert rewards == [{2.0}, {1.0}]


# --- Error messages -------------------------------------------------------------------------------


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail, and return its message on stderr."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    return err


def test_unknown_command_is_reported_with_the_most_similar_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert error_of(capsys, "gpro") == "error: `gpro` is not a command: did you mean `grpo`?\n"
    assert "the commands are sft, reward-model" in error_of(capsys, "frobnicate")


def test_all_faults_of_a_configuration_are_reported_together(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(here / "grpo.yaml", {"model": {"path": "m"}, "data": 3, "betta": 1})
    message = error_of(capsys, "grpo", path, "clip_low=2")
    assert f"{path}: found 4 faults" in message
    assert "did you mean `beta`?" in message
    assert "argument `clip_low=2`" in message


def test_setting_with_dashes_is_reported_with_the_right_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["grpo", "grpo.yaml", "--run.seed=3"])
    assert stop.value.code == 2
    assert "settings have no dashes: write run.seed=3" in capsys.readouterr().err


def test_missing_model_or_data_file_is_reported_without_a_traceback(
    world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(here / "sample.yaml", sample_settings(world))
    assert "no checkpoint directory ./none" in error_of(capsys, "sample", path, "model.path=./none")
    assert "none.jsonl: there is no such file" in error_of(
        capsys, "sample", path, "data.path=none.jsonl"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": "float99"},
            "arguments.dtype = \"float99\": it must be 'float32', 'bfloat16' or",
        ),
        ({"pth": 3}, "takes no `pth` (did you mean 'path'?)"),
    ],
)
def test_wrong_argument_of_a_learned_reward_is_reported_without_a_traceback(
    arguments: dict[str, Any],
    message: str,
    world: World,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reward = {
        "function": "reward_model",
        "arguments": {"path": world.reward_model(), **arguments},
    }
    path = write(here / "sample.yaml", sample_settings(world, rewards=[reward]))
    assert main(["sample", path]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_interruption_exits_with_status_130(
    world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "stop.py").write_text("def score(responses): raise KeyboardInterrupt")
    # Without a timeout the function runs in the main thread, which receives the interrupt.
    reward = {"function": "stop.py:score", "timeout": None}
    path = write(here / "sample.yaml", sample_settings(world, rewards=[reward]))
    assert main(["sample", path]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_unexpected_error_keeps_its_traceback(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Policy, "load", broken)
    with pytest.raises(ZeroDivisionError):
        main(["sample", write(here / "sample.yaml", sample_settings(world))])


def test_closed_pipe_is_not_an_error() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "trivium"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=buffered,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_message_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "grpo", "\x1b[31mred\x07.yaml")
    assert "[31mred" in message
    assert message.isascii()
    assert all(c.isprintable() or c == "\n" for c in message)


# --- Output ---------------------------------------------------------------------------------------


def test_output_to_a_pipe_is_unwrapped_and_has_no_control_codes(
    world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = here / ("long" * 30)
    long.mkdir()
    path = write(long / "sample.yaml", sample_settings(world, output=str(long / "r.jsonl")))
    assert main(["sample", path]) == 0
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert out.splitlines()[-1] == f"written to {long / 'r.jsonl'}"
    assert err == f"{world.prompts['path']}: 4 rows read, 4 kept\n"


def test_library_notices_are_silenced_and_trivium_warnings_are_shown(
    world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of("sft", world)
    settings["model"] = {
        "path": world.path,
        "lora": {"rank": 2},
        "gradient_checkpointing": True,
    }
    settings["data"] = world.rows(
        "some.jsonl", [{"prompt": "a", "completion": text} for text in ("b", "", "c")]
    )
    assert main(["sft", write(here / "sft.yaml", settings)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: ")
    assert "3 rows read, 2 kept; 1 dropped" in err
    assert len(err.splitlines()) == 1


def test_notice_about_images_is_silenced_and_other_messages_of_its_logger_are_shown(
    world: World, here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices = logging.getLogger("transformers.utils.import_utils")
    monkeypatch.setattr(notices, "handlers", [caplog.handler])
    caplog.set_level("WARNING", logger=notices.name)
    (here / "noisy.py").write_text(
        "import logging\n"
        "def score(responses):\n"
        "    logger = logging.getLogger('transformers.utils.import_utils')\n"
        "    logger.warning('`X` requires torchvision (not installed); falling back to `Y`')\n"
        "    logger.warning('something else')\n"
        "    return [0.0] * len(responses)\n"
    )
    rewards = [{"function": "noisy.py:score"}]
    assert (
        main(["sample", write(here / "sample.yaml", sample_settings(world, rewards=rewards))]) == 0
    )
    assert "something else" in caplog.text
    assert "torchvision" not in caplog.text


def test_command_line_restores_the_logging_configuration(here: Path) -> None:
    logger = logging.getLogger("trivium")
    before = (logger.level, list(logger.handlers))
    main(["grpo", "none.yaml"])
    assert (logger.level, logger.handlers) == before


# --- The Python interface -------------------------------------------------------------------------


def test_every_public_name_exists_and_matches_the_type_checking_imports() -> None:
    tree = ast.parse(Path(trivium.__file__).read_text())
    [type_checking] = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in type_checking.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported.pop("maths") == ("trivium", "maths")
    functions = {
        name: tuple(COMMANDS[command].function.split(":"))
        for name, command in trivium._COMMAND_FUNCTIONS.items()
    }
    assert imported == trivium._MODULE_AND_ATTRIBUTE | functions
    assert sorted(trivium.__all__) == sorted([*imported, "maths"]) == sorted(dir(trivium))
    for name in trivium.__all__:
        assert getattr(trivium, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'grop'"):
        _ = trivium.grop


def test_command_is_one_function_call_with_a_configuration(world: World, here: Path) -> None:
    config = trivium.SampleConfig(
        model=trivium.ModelConfig(path=world.path),
        data=trivium.PromptsConfig(**world.prompts),
        sampling=trivium.Sampling(max_tokens=3),
        output=here / "responses.jsonl",
    )
    assert trivium.sample(config) == here / "responses.jsonl"
    run = trivium.grpo(trivium.GRPOConfig.model_validate(world.on_policy(steps_per_iteration=1)))
    assert len(trivium.read_metrics(run)) == 1
