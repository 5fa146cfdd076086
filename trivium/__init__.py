"""Align language models by PPO, DPO and GRPO.

Each command is a function of its configuration: ``trivium.grpo(trivium.GRPOConfig(...))``, or with
a file, ``trivium.grpo(trivium.load_configuration(trivium.GRPOConfig, Path("grpo.yaml")))``. The
package also exports the components of the commands. A name's module is imported on first use.
"""

from __future__ import annotations

from functools import partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium import maths
    from trivium.algorithms.critic_config import CriticConfig
    from trivium.algorithms.dpo import train as dpo
    from trivium.algorithms.dpo_config import DPOConfig, OnlinePairsConfig
    from trivium.algorithms.grpo import train as grpo
    from trivium.algorithms.grpo_config import GRPOConfig
    from trivium.algorithms.ppo import train as ppo
    from trivium.algorithms.ppo_config import AdaptiveKLConfig, PPOConfig
    from trivium.algorithms.pretraining_config import PretrainingMixConfig
    from trivium.algorithms.reward_model import train as reward_model
    from trivium.algorithms.reward_model_config import RewardModelConfig
    from trivium.algorithms.reward_update_config import RewardUpdateConfig
    from trivium.algorithms.sft import train as sft
    from trivium.algorithms.sft_config import SFTConfig
    from trivium.commands.evaluate import run as evaluate
    from trivium.commands.evaluate_config import EvaluateConfig
    from trivium.commands.label_steps import run as label_steps
    from trivium.commands.label_steps_config import LabelStepsConfig
    from trivium.commands.pairs import run as pairs
    from trivium.commands.pairs_config import CandidateConfig, PairsConfig
    from trivium.commands.sample import run as sample
    from trivium.commands.sample_config import SampleConfig
    from trivium.compare.config import CompareConfig
    from trivium.compare.run import run as run_comparison
    from trivium.config.base import Configuration, load_configuration
    from trivium.data.batch import Batch
    from trivium.data.demonstrations import DemonstrationsConfig, load_demonstrations
    from trivium.data.group import Group
    from trivium.data.preferences import (
        PreferencesConfig,
        StepLabelsConfig,
        load_preferences,
        load_step_labels,
    )
    from trivium.data.prompts import Prompt, PromptsConfig, load_prompts
    from trivium.data.rankings import RankingsConfig, RewardPairsConfig, load_rankings
    from trivium.data.response import Response
    from trivium.errors import (
        ConfigurationError,
        DataError,
        ModelError,
        RewardError,
        TrainingError,
        TriviumError,
    )
    from trivium.evaluation.evaluation_config import EvaluationConfig
    from trivium.evaluation.evaluator import Evaluator
    from trivium.hf.loading import load_tokenizer
    from trivium.hf.model_config import LoraConfig, ModelConfig
    from trivium.models.critic import SeparateCritic, SharedCritic
    from trivium.models.policy import Policy
    from trivium.models.reference import Reference
    from trivium.models.reward_model import RewardModel
    from trivium.monitoring.monitor_config import MonitorsConfig
    from trivium.monitoring.monitors import Monitors
    from trivium.pipelines.config import PipelineConfig
    from trivium.pipelines.run import run as run_pipeline
    from trivium.report.run import write as write_report
    from trivium.rewards.reward import Rewards, Scores
    from trivium.rewards.reward_config import RewardConfig
    from trivium.rollout.engine import Engine
    from trivium.rollout.local_engine import LocalEngine
    from trivium.rollout.rollouts import Rollouts, roll_out
    from trivium.rollout.sampling import Sampling
    from trivium.runs.budget import BudgetConfig
    from trivium.runs.store import (
        RunConfig,
        read_evaluations,
        read_events,
        read_metrics,
        read_run,
        read_samples,
    )
    from trivium.training.optimizer_config import OptimizerConfig

_MODULES = {
    "trivium.algorithms.critic_config": ("CriticConfig",),
    "trivium.algorithms.dpo_config": ("DPOConfig", "OnlinePairsConfig"),
    "trivium.algorithms.grpo_config": ("GRPOConfig",),
    "trivium.training.optimizer_config": ("OptimizerConfig",),
    "trivium.algorithms.ppo_config": ("AdaptiveKLConfig", "PPOConfig"),
    "trivium.algorithms.pretraining_config": ("PretrainingMixConfig",),
    "trivium.algorithms.reward_model_config": ("RewardModelConfig",),
    "trivium.algorithms.reward_update_config": ("RewardUpdateConfig",),
    "trivium.algorithms.sft_config": ("SFTConfig",),
    "trivium.commands.evaluate_config": ("EvaluateConfig",),
    "trivium.commands.label_steps_config": ("LabelStepsConfig",),
    "trivium.commands.pairs_config": ("CandidateConfig", "PairsConfig"),
    "trivium.commands.sample_config": ("SampleConfig",),
    "trivium.compare.config": ("CompareConfig",),
    "trivium.config.base": ("Configuration", "load_configuration"),
    "trivium.data.batch": ("Batch",),
    "trivium.data.demonstrations": ("DemonstrationsConfig", "load_demonstrations"),
    "trivium.data.group": ("Group",),
    "trivium.data.preferences": (
        "PreferencesConfig",
        "StepLabelsConfig",
        "load_preferences",
        "load_step_labels",
    ),
    "trivium.data.prompts": ("Prompt", "PromptsConfig", "load_prompts"),
    "trivium.data.rankings": ("RankingsConfig", "RewardPairsConfig", "load_rankings"),
    "trivium.data.response": ("Response",),
    "trivium.errors": (
        "ConfigurationError",
        "DataError",
        "ModelError",
        "RewardError",
        "TrainingError",
        "TriviumError",
    ),
    "trivium.models.critic": ("SeparateCritic", "SharedCritic"),
    "trivium.hf.loading": ("load_tokenizer",),
    "trivium.hf.model_config": ("LoraConfig", "ModelConfig"),
    "trivium.models.policy": ("Policy",),
    "trivium.models.reference": ("Reference",),
    "trivium.models.reward_model": ("RewardModel",),
    "trivium.pipelines.config": ("PipelineConfig",),
    "trivium.report.run": ("write as write_report",),
    "trivium.rewards.reward": ("Rewards", "Scores"),
    "trivium.rewards.reward_config": ("RewardConfig",),
    "trivium.rollout.engine": ("Engine",),
    "trivium.rollout.local_engine": ("LocalEngine",),
    "trivium.rollout.rollouts": ("Rollouts", "roll_out"),
    "trivium.rollout.sampling": ("Sampling",),
    "trivium.runs.budget": ("BudgetConfig",),
    "trivium.evaluation.evaluator": ("Evaluator",),
    "trivium.evaluation.evaluation_config": ("EvaluationConfig",),
    "trivium.monitoring.monitor_config": ("MonitorsConfig",),
    "trivium.monitoring.monitors": ("Monitors",),
    "trivium.runs.store": (
        "RunConfig",
        "read_evaluations",
        "read_events",
        "read_metrics",
        "read_run",
        "read_samples",
    ),
}
_COMMAND_FUNCTIONS = {
    "dpo": "dpo",
    "evaluate": "evaluate",
    "grpo": "grpo",
    "label_steps": "label-steps",
    "pairs": "pairs",
    "ppo": "ppo",
    "reward_model": "reward-model",
    "run_comparison": "compare",
    "run_pipeline": "run",
    "sample": "sample",
    "sft": "sft",
}
"""Command of each function. The function runs the command's preflight checks first."""
_MODULE_AND_ATTRIBUTE = {
    entry.split()[-1]: (module, entry.split()[0])
    for module, entries in _MODULES.items()
    for entry in entries
}


def __getattr__(name: str) -> Any:
    if name == "maths":
        value: Any = import_module("trivium.maths")
    elif name in _COMMAND_FUNCTIONS:
        command = import_module("trivium.commands").COMMANDS[_COMMAND_FUNCTIONS[name]]
        value = wraps(command.load())(partial(command.run))
    elif name in _MODULE_AND_ATTRIBUTE:
        module, attribute = _MODULE_AND_ATTRIBUTE[name]
        value = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module 'trivium' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AdaptiveKLConfig",
    "Batch",
    "BudgetConfig",
    "CandidateConfig",
    "CompareConfig",
    "Configuration",
    "ConfigurationError",
    "CriticConfig",
    "DPOConfig",
    "DataError",
    "DemonstrationsConfig",
    "Engine",
    "EvaluateConfig",
    "EvaluationConfig",
    "Evaluator",
    "GRPOConfig",
    "Group",
    "LabelStepsConfig",
    "LocalEngine",
    "LoraConfig",
    "ModelConfig",
    "ModelError",
    "Monitors",
    "MonitorsConfig",
    "OnlinePairsConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PairsConfig",
    "PipelineConfig",
    "Policy",
    "PreferencesConfig",
    "PretrainingMixConfig",
    "Prompt",
    "PromptsConfig",
    "RankingsConfig",
    "Reference",
    "Response",
    "RewardConfig",
    "RewardError",
    "RewardModel",
    "RewardModelConfig",
    "RewardPairsConfig",
    "RewardUpdateConfig",
    "Rewards",
    "Rollouts",
    "RunConfig",
    "SFTConfig",
    "SampleConfig",
    "Sampling",
    "Scores",
    "SeparateCritic",
    "SharedCritic",
    "StepLabelsConfig",
    "TrainingError",
    "TriviumError",
    "dpo",
    "evaluate",
    "grpo",
    "label_steps",
    "load_configuration",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "load_rankings",
    "load_step_labels",
    "load_tokenizer",
    "maths",
    "pairs",
    "ppo",
    "read_evaluations",
    "read_events",
    "read_metrics",
    "read_run",
    "read_samples",
    "reward_model",
    "roll_out",
    "run_comparison",
    "run_pipeline",
    "sample",
    "sft",
    "write_report",
]
