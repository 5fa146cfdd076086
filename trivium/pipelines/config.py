"""Configuration of a pipeline: named stages, and the settings that they share.

A stage is an ordinary command. In any text of a stage, ``${name}`` is the output of the earlier
stage of that name, ``${name.directory}`` its directory, and ``${task}`` the directory of the
built-in task's data and model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from trivium.config.base import Configuration, Conflict
from trivium.config.functions import nearest
from trivium.data.prompts import PromptsConfig
from trivium.hf.model_config import ModelConfig
from trivium.jobs.job import STAGE_COMMANDS, anchor_functions
from trivium.pipelines.task import TASK_DIRECTORY, TaskConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling

TASK, SEED = "task", "seed"
RESERVED = (TASK, SEED)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class PipelineConfig(Configuration):
    """Configuration of a pipeline."""

    is_template: ClassVar[bool] = True
    """Paths may contain ``${…}``."""

    title: str = "Pipeline"
    """Title of the report."""
    directory: Path = Path("runs/pipeline")
    """Output directory, with a directory for each stage; rerun the command to resume."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every stage, and of the built-in task."""
    task: TaskConfig = TaskConfig()
    """Size of the built-in task, which is written where something names ${task}: train.jsonl,
    test.jsonl and labels.jsonl, and an untrained model in base."""
    model: ModelConfig | None = None
    """Model of every stage that names none. A stage with its own model.path takes the other
    settings from here, except for revision."""
    data: PromptsConfig | None = None
    """Prompts and demonstrations of every stage that trains on or samples from them. A stage with
    its own data.path takes nothing from here."""
    rewards: RewardConfigs = ()
    """Rewards of every stage that names none."""
    sampling: Sampling = Sampling()
    """Sampling settings of every stage that names none."""
    evaluation: dict[str, Any] | None = None
    """Held-out evaluation at the end of every stage that trains a policy, and of `evaluate`. Its
    data takes what it does not name from data, its rewards are those above, and at_start is
    false. A stage with evaluation: null is not evaluated."""
    stages: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """The stages in order: the name of each, and its settings. Its command is its name, or its
    key command."""

    _directory: Path | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        self._directory = (context or {}).get("directory")

    @property
    def task_directory(self) -> Path:
        """Directory of the built-in task, ``${task}``."""
        return self.directory / TASK_DIRECTORY

    def command_of(self, name: str) -> str:
        """Return the command of a stage."""
        return str((self.stages[name] or {}).get("command", name))

    def stage_settings(self, name: str) -> dict[str, Any]:
        """Return the settings that a stage sets itself."""
        own = {k: v for k, v in (self.stages[name] or {}).items() if k != "command"}
        return anchor_functions(own, self._directory)

    def evaluation_settings(self) -> dict[str, Any] | None:
        """Return the shared evaluation, with reward files found from any directory."""
        return (
            None if self.evaluation is None else anchor_functions(self.evaluation, self._directory)
        )

    def conflicts(self) -> Iterator[Conflict]:
        commands = ", ".join(STAGE_COMMANDS)
        for name, settings in self.stages.items():
            command = self.command_of(name)
            if not _NAME.fullmatch(name) or name in RESERVED:
                reason = (
                    "is the name of something else"
                    if name in RESERVED
                    else "cannot be a directory name"
                )
                yield "stages", f"the stage name {name!r} {reason}: use letters, digits, dashes"
            elif command not in STAGE_COMMANDS:
                explicit = "command" in (settings or {})
                remedy = (
                    f"write one of {commands}" if explicit else f"add command, one of {commands}"
                )
                yield (
                    "stages",
                    f"stage {name}: {command!r} is no command that can be a stage"
                    f"{nearest(command, STAGE_COMMANDS)}: {remedy}",
                )
            for key in _own_places(settings or {}):
                yield "stages", f"stage {name}: {key} is set by the pipeline: leave it out"


def _own_places(settings: dict[str, Any]) -> Iterator[str]:
    """Yield the settings of a stage that would move its output."""
    run = settings.get("run")
    inside = run if isinstance(run, dict) else {}
    yield from (f"run.{key}" for key in ("directory", "overwrite", "resume") if key in inside)
    yield from (key for key in ("output", "overwrite") if key in settings)
