"""Upload of a finished run's model to the Hugging Face Hub.

What can fail is asked before the run: the login, and whether it may write. A failed upload leaves
the run finished, and can be repeated by `trivium push`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.errors import ConfigurationError, DataError, TrainingError
from trivium.runs.store import is_finished, read_run, repository_fault

_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_config.json"]
"""Files of an earlier model that must not stay beside those of this one."""


def require_writable(repository: str) -> None:
    """Raise unless somebody is logged in to the Hub who may write for the repository's owner.

    Raises:
        ConfigurationError: nobody is logged in, the Hub does not answer, the login may only read,
            or the owner is somebody else.
    """
    place = f"run.push = {repository}"
    try:
        found = _hub().whoami()
    except _failures() as error:
        raise ConfigurationError(
            f"{place}: the Hub does not accept the login ({_reason(error)}): log in with "
            "`hf auth login`, or leave the push out and upload later with `trivium push`"
        ) from None
    role = found.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigurationError(
            f"{place}: the login's token may only read: log in with one that may write"
        )
    owner = repository.partition("/")[0]
    owners = [found["name"], *(organization["name"] for organization in found.get("orgs", []))]
    if owner not in owners:
        raise ConfigurationError(
            f"{place}: {found['name']} is logged in, who may not write for {owner}: name one of "
            f"{', '.join(owners)} as the owner"
        )


def push(run: Path, repository: str) -> str:
    """Upload a run's ``final`` to a repository, which is created private; return its address.

    Raises:
        TrainingError: the upload failed.
    """
    hub = _hub()
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=run / "final",
            commit_message=f"Upload the model of {run.resolve().name}",
            delete_patterns=_REPLACED,
        )
    except _failures() as error:
        raise TrainingError(
            f"{run / 'final'} could not be uploaded to {repository}: {_reason(error)}; the run is "
            f"finished, so upload it again with `trivium push {run} {repository}`"
        ) from error
    return str(address)


def push_finished(run: Path, repository: str) -> str:
    """Upload the model of a finished run; return its address.

    Raises:
        ConfigurationError: the repository's name is wrong, or the login may not write there.
        DataError: the directory holds no finished run with a model.
        TrainingError: the upload failed.
    """
    if fault := repository_fault(repository):
        raise ConfigurationError(f"{repository}: {fault}")
    read_run(run)
    if not is_finished(run) or not (run / "final").is_dir():
        raise DataError(
            f"{run}: holds no finished run with a model in final/: resume it with "
            f"`trivium resume {run}`, or name another run"
        )
    require_writable(repository)
    return push(run, repository)


def _hub() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


def _failures() -> tuple[type[Exception], ...]:
    import httpx2

    return (OSError, ValueError, RuntimeError, httpx2.HTTPError)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
