"""Upload of a run's model to the Hub, against a fake: what is asked first, sent, and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from helpers.tiny_models import World
from huggingface_hub.errors import LocalTokenNotFoundError

from trivium.algorithms import sft
from trivium.algorithms.sft_config import SFTConfig
from trivium.cli import main
from trivium.errors import TrainingError
from trivium.runs.store import is_finished

ROWS = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "completion": "ef"}]


class FakeHub:
    """The Hub's client: records what it is asked, and holds what was uploaded."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}
        self.files: set[str] = set()
        self.role = "write"
        self.failure: Exception | None = None

    def whoami(self) -> dict[str, Any]:
        self.calls.append("whoami")
        if self.role == "nobody":
            raise LocalTokenNotFoundError("Token is required, but no token found.")
        auth = {"accessToken": {"role": self.role}}
        return {"name": "someone", "orgs": [{"name": "club"}], "auth": auth}

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append("create_repo")
        self.created = {"name": name, **options}
        return f"https://huggingface.co/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append("upload_folder")
        if self.failure is not None:
            raise self.failure
        folder = Path(options["folder_path"])
        self.files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        self.uploaded = options


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Path of a configuration of SFT whose run is in ``run``, with this as the directory."""
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path)
    config = {
        "model": {"path": world.path},
        "data": world.rows("rows.jsonl", ROWS),
        "steps": 1,
        "run": {"directory": "run"},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    return "sft.yaml"


def test_push_uploads_the_final_model_with_its_card_to_a_private_repository(
    hub: FakeHub, settings: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", settings, "--push", "club/my-model", "run.seed=3"]) == 0
    assert hub.calls == ["whoami", "create_repo", "upload_folder"]
    assert hub.created == {"name": "club/my-model", "private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.files
    assert not any(name.startswith(("checkpoints", "metrics")) for name in hub.files)
    assert hub.uploaded["repo_id"] == "club/my-model"
    assert "*.safetensors" in hub.uploaded["delete_patterns"]
    assert "uploaded to https://huggingface.co/club/my-model" in capfd.readouterr().err
    assert yaml.safe_load(Path("run/config.yaml").read_text())["run"]["seed"] == 3


@pytest.mark.parametrize(
    ("role", "repository", "message"),
    [
        ("nobody", "club/model", "does not accept the login (Token is required"),
        ("nobody", "club/model", "hf auth login"),
        ("read", "club/model", "may only read"),
        ("write", "stranger/model", "someone is logged in, who may not write for stranger"),
        ("write", "stranger/model", "name one of someone, club as the owner"),
        ("write", "model", "write OWNER/NAME"),
        ("write", "a/b/c", "write OWNER/NAME"),
        ("write", "./model", "write OWNER/NAME"),
    ],
)
def test_push_that_cannot_work_is_refused_before_the_run(
    hub: FakeHub,
    settings: str,
    role: str,
    repository: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.role = role
    assert main(["sft", settings, "--push", repository]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert repository in error
    assert not Path("run/metrics.jsonl").exists()
    assert "create_repo" not in hub.calls


def test_failed_upload_leaves_a_finished_run_that_push_uploads_again(
    hub: FakeHub, settings: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.failure = OSError("502 Server Error\nmore")
    assert main(["sft", settings, "--push=club/model"]) == 2
    error = capfd.readouterr().err
    assert "could not be uploaded to club/model: 502 Server Error; the run is" in error
    assert "trivium push run club/model" in error
    assert is_finished(Path("run"))
    hub.failure = None
    assert main(["push", "run", "club/model"]) == 0
    assert "README.md" in hub.files
    assert "uploaded to https://huggingface.co/club/model" in capfd.readouterr().out


def test_setting_pushes_from_python_too(hub: FakeHub, settings: str) -> None:
    config = yaml.safe_load(Path(settings).read_text())
    config["run"]["push"] = "someone/model"
    sft.train(SFTConfig.model_validate(config))
    assert hub.calls == ["create_repo", "upload_folder"]
    hub.failure = ValueError("no")
    config["run"]["overwrite"] = True
    with pytest.raises(TrainingError, match="could not be uploaded"):
        sft.train(SFTConfig.model_validate(config))


def test_stopped_run_is_pushed_when_it_is_resumed(hub: FakeHub, settings: str) -> None:
    assert main(["sft", settings]) == 0
    assert hub.calls == []
    assert main(["resume", "run", "--push", "club/model", "--allow-changes", "steps=2"]) == 0
    assert hub.calls == ["whoami", "create_repo", "upload_folder"]
    assert "| steps | 2 |" in Path("run/final/README.md").read_text()


@pytest.mark.parametrize("spoil", ["unfinished", "no model", "no run"])
def test_only_a_finished_run_with_a_model_is_pushed(
    hub: FakeHub, settings: str, spoil: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", settings]) == 0
    if spoil == "unfinished":
        Path("run/events.jsonl").write_text("")
    elif spoil == "no model":
        Path("run/final").rename("run/other")
    else:
        Path("run/run.json").unlink()
    assert main(["push", "run", "club/model"]) == 2
    error = capfd.readouterr().err
    assert "create_repo" not in hub.calls
    assert ("holds no finished run" in error) == (spoil != "no run")
