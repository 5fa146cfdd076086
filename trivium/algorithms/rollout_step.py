"""Which prompts a step of PPO or GRPO answers, how often, and when: at once or a step ahead."""

from __future__ import annotations

from typing import Any

from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.training.experience import epoch_batch
from trivium.training.setup import OnPolicyComponents

OnPolicy = PPOConfig | GRPOConfig


def roll_out_batch(config: OnPolicy, parts: OnPolicyComponents, number: int) -> Rollouts:
    """Responses to batch ``number`` of the prompts (from 0), with their rewards."""
    return roll_out(parts.engine, parts.rewards, **_request(config, parts, number))


def sample_ahead(config: OnPolicy, parts: OnPolicyComponents, number: int) -> None:
    """Begin to sample the responses of a later ``roll_out_batch`` from the policy as it is."""
    assert parts.ahead is not None, "an asynchronous run's parts sample ahead"
    parts.ahead.begin(**_request(config, parts, number))


def _request(config: OnPolicy, parts: OnPolicyComponents, number: int) -> dict[str, Any]:
    seed = config.run.seed
    index = epoch_batch(len(parts.prompts), config.prompts_per_step, number, seed=seed)
    return {
        "prompts": [parts.prompts[i] for i in index],
        "samples": config.responses_per_prompt,
        "sampling": config.sampling,
        "seed": seed,
        # PPO's random numbers are those of its steps, which are numbered from 1.
        "step": number + 1 if isinstance(config, PPOConfig) else number,
    }
