"""Build the components of on-policy loops: cheap parts first, so that mistakes show early.

The configuration has been checked already. Tokenizer, data and rewards come before models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trivium.data.chat import end_tokens
from trivium.data.prompt_forms import with_arguments_of
from trivium.data.prompts import Prompt, PromptsConfig, load_prompts
from trivium.errors import ConfigurationError
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.evaluation.evaluator import Evaluator as ResponseEvaluator
from trivium.hf.adapters import unwrap_peft
from trivium.hf.loading import context_length, load_tokenizer
from trivium.hf.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.learned import LearnedRewards
from trivium.rewards.reward import RewardConfig, Rewards
from trivium.rollout.async_engine import AsyncEngine
from trivium.rollout.engine import Engine
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling
from trivium.training.ema import WeightAverage, evaluated_with
from trivium.training.protocols import Evaluator


@dataclass(frozen=True)
class OnPolicyComponents:
    """Prompts, rewards, models and engines of a run that samples while it trains."""

    prompts: list[Prompt]
    rewards: Rewards
    policy: Policy
    reference: Reference
    engine: Engine
    evaluator: Evaluator | None
    learned: LearnedRewards
    ema: WeightAverage | None = None

    @property
    def async_engine(self) -> AsyncEngine | None:
        """The engine, if it can sample ahead."""
        return self.engine if isinstance(self.engine, AsyncEngine) else None

    @property
    def for_training(self) -> dict[str, Any]:
        """Arguments of ``Training``: the evaluator, and objects that checkpoints refer to."""
        return {"evaluator": self.evaluator, "shared_objects": self.prompts}

    @property
    def tracked(self) -> dict[str, Any]:
        """Objects whose state is part of a checkpoint, the policy first."""
        return {
            "policy": self.policy,
            "reference": self.reference,
            "ahead": self.async_engine,
            "ema": self.ema,
        }

    def close(self) -> None:
        """Stop sampling ahead."""
        if self.async_engine is not None:
            self.async_engine.close()


def build_components(
    model: ModelConfig,
    data: PromptsConfig,
    rewards: Sequence[RewardConfig],
    evaluation: EvaluationConfig | None,
    sampling: Sampling,
    *,
    with_reference: bool = True,
    asynchronous: bool = False,
    ema_decay: float | None = None,
) -> OnPolicyComponents:
    """Load everything that a loop over rollouts needs.

    The reference holds a model only if the loop (``with_reference``) or an evaluation needs it.
    Evaluation samples from the current policy, even if training samples ahead.
    """
    if not rewards:
        raise ConfigurationError("rewards is empty: name at least one, as file.py:function")
    tokenizer = load_tokenizer(model)
    context = context_length(model)
    prompts = load_prompts(data, tokenizer, max_prompt_length(context, sampling.max_tokens))
    scorers, learned = load_rewards(rewards, prompts, tokenizer)
    held_out = None
    if evaluation is not None:
        limit = max_prompt_length(context, evaluation.sampling(sampling).max_tokens)
        held_out = load_prompts(with_arguments_of(evaluation.data, data), tokenizer, limit)
    policy = Policy.load(model, tokenizer, temperature=sampling.temperature)
    policy.stop_tokens = sampling.stop_tokens
    reference = Reference(policy, enabled=with_reference or evaluation is not None)
    engine, ema = local_engine(policy), WeightAverage.of(policy, ema_decay)
    evaluator = None
    if evaluation is not None and held_out is not None:
        quality = scorers
        if evaluation.rewards:
            quality, _ = load_rewards(evaluation.rewards, held_out, tokenizer)
        evaluator = ResponseEvaluator(
            evaluation, held_out, quality, engine, policy, reference, training=sampling
        )
    sampler = AsyncEngine(engine) if asynchronous else engine
    evaluator = evaluated_with(evaluator, ema)
    return OnPolicyComponents(prompts, scorers, policy, reference, sampler, evaluator, learned, ema)


def max_prompt_length(context: int | None, max_tokens: int) -> int | None:
    """Return how many tokens of the model's context are left for a prompt."""
    return None if context is None else context - max_tokens


def load_rewards(
    configs: Sequence[RewardConfig],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Rewards, LearnedRewards]:
    """Load rewards and check them against the prompts' columns; also return the learned ones."""
    learned = LearnedRewards(configs, tokenizer)
    rewards = Rewards(configs, functions=learned.functions, tokenizer=tokenizer)
    rewards.check(sorted({column for prompt in prompts for column in prompt.columns}))
    return rewards, learned


def local_engine(policy: Policy) -> LocalEngine:
    """Return the engine in this process, which ends responses at the checkpoint's EOS tokens."""
    generation = getattr(unwrap_peft(policy.model), "generation_config", None)
    return LocalEngine(policy, end_tokens(policy.tokenizer, generation))
