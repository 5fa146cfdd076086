"""TRIVIUM_FAST_PATH=off runs the whole suite on the modules of transformers."""

from __future__ import annotations

import os

from trivium.hf.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel
from trivium.rewards.reward_config import LearnedArguments, ProcessArguments

FAST_PATH = os.environ.get("TRIVIUM_FAST_PATH", "auto")
MODELS = (Policy, RewardModel)


def set_default_of_configurations() -> None:
    """Make ``FAST_PATH`` the default of every configuration of a model, in this process."""
    for config in (ModelConfig, LearnedArguments, ProcessArguments):
        config.model_fields["fast_path"].default = FAST_PATH
        config.model_rebuild(force=True)


def set_default_of_models() -> None:
    """Make ``FAST_PATH`` the default of models that are built without a configuration."""
    for model in MODELS:
        model.__init__.__kwdefaults__["fast_path"] = FAST_PATH


# Before other configurations are built, which keep the default of the models in them.
set_default_of_configurations()
