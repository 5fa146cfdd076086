"""Configuration of ``trivium evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import MAX_TOKENS
from trivium.evaluation.selection import ANSWER
from trivium.hf.model_config import ModelConfig, scoring_model_conflicts
from trivium.rewards.reward_config import RewardConfigs, scores_steps
from trivium.rollout.sampling import StopTexts, StopTokens


class EvaluateConfig(Configuration):
    """Configuration of ``trivium evaluate``."""

    model: ModelConfig
    """The model to evaluate."""
    reference: ModelConfig | None = None
    """The reference policy for the KL divergence; null: no KL divergence is measured."""
    data: PromptsConfig
    """Held-out prompts."""
    rewards: RewardConfigs = Field(min_length=1)
    """Rewards whose weighted sum measures quality."""
    samples: int = Field(default=1, ge=1)
    """Sampled responses per prompt, in addition to the greedy response."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled responses, and of both models in the KL divergence."""
    max_tokens: int = Field(default=MAX_TOKENS, ge=1)
    """Maximum number of tokens per response."""
    stop: StopTexts = ()
    """Texts that end a response."""
    stop_tokens: StopTokens = ()
    """Token ids that end a response, in addition to the model's EOS."""
    pass_threshold: float | None = None
    """Minimum reward of a response that passes, for pass@k. If null, pass@k is measured only if
    every reward is 0 or 1."""
    vote: Annotated[str, ANSWER] | None = None
    """Final answers for a majority vote of the samples: number (after #### or A:), boxed, or your
    own file.py:function; null: no vote."""
    rerank: RewardConfigs = ()
    """Rewards that each choose one of the samples (best of N), such as a process reward model's
    minimum over steps."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Seed of the sampled responses."""
    output: Path | None = None
    """The .json file to write the results to."""
    overwrite: bool = False
    """Replace the output file if it exists; false: an existing file is an error."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from scoring_model_conflicts("reference", self.reference)
        chosen = [name for name in ("vote", "rerank") if getattr(self, name)]
        if chosen and self.samples == 1:
            yield (
                chosen[0],
                "samples is 1, which leaves nothing to choose from: set samples, as in samples=16",
            )
        for reward in self.rerank:
            if reward.weight != 1:
                yield (
                    "rerank",
                    f"{reward.label} has the weight {reward.weight:g}, and each reward chooses "
                    "alone: leave weight out",
                )
            if scores_steps(reward):
                yield (
                    "rerank",
                    f"{reward.label} scores steps, and a response is chosen by one score: set "
                    "aggregate to minimum or product in the arguments of a process reward model",
                )

    @field_validator("output")
    @classmethod
    def _json(cls, output: Path | None) -> Path | None:
        if output is not None and output.suffix != ".json":
            raise ValueError(f"write a name that ends in .json, such as {output.stem}.json")
        return output
