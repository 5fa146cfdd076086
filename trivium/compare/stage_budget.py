"""Which stages of a method spend a comparison's budget, and what ends them."""

from __future__ import annotations

from trivium.jobs.budget import MethodBudget
from trivium.jobs.job import Settings

UNLIMITED_STEPS = 1_000_000


def spends_currency(command: str, settings: Settings, budget: MethodBudget | None) -> bool:
    """Return whether a stage can spend the budget's currency."""
    if budget is None:
        return False
    sampled = ("pairs", "sample", "label-steps")
    if budget.currency == "generated_tokens":
        return command in (*sampled, "ppo", "grpo") or bool(settings.get("online"))
    return budget.currency != "trained_tokens" or command not in sampled


def remove_step_limit(command: str, settings: Settings, *, own: bool = True) -> Settings:
    """Return settings without a limit of steps, so that only the budget ends the stage.

    Args:
        command: the stage's command.
        settings: the stage's settings.
        own: keep a number of steps that the settings name.
    """

    def unlimited(section: Settings, name: str) -> Settings:
        return section if own and name in section else {**section, name: UNLIMITED_STEPS}

    if command == "grpo":
        iterates = settings.get("iterations") is not None
        if iterates:
            return unlimited(settings, "iterations")
        return unlimited(settings, "steps_per_iteration")
    if command == "ppo":
        return unlimited(settings, "steps")
    if command == "dpo" and settings.get("online"):
        return {**settings, "online": unlimited(settings["online"], "steps")}
    return settings
