"""Settings of stages that a comparison or a pipeline writes once for all stages."""

from __future__ import annotations

from trivium.jobs.job import Settings
from trivium.rollout.sampling import Sampling


def evaluation_settings(
    evaluation: Settings, rewards: list[Settings] | None, sampling: Sampling
) -> Settings:
    """Return the evaluation settings of every stage.

    Settings that would otherwise default to those of each run are written out.
    """
    explicit = {
        **({} if rewards is None else {"rewards": rewards}),
        "at_start": False,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "stop_tokens": list(sampling.stop_tokens),
    }
    return {**explicit, **evaluation}


def evaluate_settings(evaluation: Settings, temperature: float) -> Settings:
    """Return the settings of `trivium evaluate` that measure like an evaluation during training."""
    copied = ("rewards", "max_tokens", "stop", "stop_tokens", "samples", "pass_threshold", "seed")
    settings: Settings = {name: evaluation[name] for name in copied if name in evaluation}
    if "data" in evaluation:
        settings["data"] = {**evaluation["data"]}
        if evaluation.get("prompts") is not None:
            settings["data"]["limit"] = evaluation["prompts"]
    return settings | {"temperature": temperature}


def template_arguments(shared: Settings) -> Settings:
    """Return the template arguments of the shared prompts, for data with the same prompts."""
    data = shared.get("data", {})
    return {key: data[key] for key in ("template_arguments",) if key in data}
