"""Names of the experiment trackers that a configuration may list."""

from __future__ import annotations

from typing import Literal

TrackerName = Literal["tensorboard", "wandb", "trackio"]
