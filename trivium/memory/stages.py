"""Memory prediction for every training command, stage by stage, from its configuration.

Each command is set up like its ``train`` function, with models that hold no data, and its own loss
and optimizer step run on the largest micro-batches. The memory of the process itself (interpreter,
libraries) and of the texts is not included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch

from trivium.algorithms import dpo, grpo, ppo, sft
from trivium.algorithms.dpo import PairData
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo import GRPOExperience
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo import PPOExperience
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.reward_update_config import RewardUpdateConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.algorithms.supervision import Supervision
from trivium.config.base import Configuration
from trivium.data.batch import Grouped
from trivium.errors import ConfigurationError, ModelError
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.hf.loading import trained_parameters
from trivium.maths.aggregation import token_mean
from trivium.memory.batches import (
    demonstrations,
    labeled_steps,
    largest_micro_batches,
    preference_pairs,
    rankings,
    zeros,
)
from trivium.memory.report import Lengths, Memory
from trivium.memory.simulator import Simulator, heaviest
from trivium.models.critic import Critic, SeparateCritic, SharedCritic
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.models.reward_model import RewardModel
from trivium.rewards.learned import OUTCOME, PROCESS, TOKENS_PER_PASS, reward_model_config
from trivium.rewards.reward import RewardConfig
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling
from trivium.training.experience import Minibatch
from trivium.training.micro_batch import Loss, MicroBatch
from trivium.training.optimizer import Optimizer
from trivium.training.options import AGGREGATION, load_option
from trivium.training.protocols import Updates
from trivium.training.reward_losses import reward_loss
from trivium.training.setup import OnPolicyComponents

EVALUATION_TOKENS_PER_PASS = 16384
"""Maximum number of tokens in a forward pass of the evaluation's log-probs."""


def predict(kind: str, config: Configuration, lengths: Lengths) -> Memory:
    """Predict the memory of a run of ``kind`` (a training command) with ``config``, in bytes.

    Raises:
        ModelError: a checkpoint's configuration cannot be read.
        ModelError: the model's computation depends on values, as in a mixture of experts.
        ConfigurationError: there is no such kind.
    """
    if kind not in PREDICTORS:
        raise ConfigurationError(
            f"there is no memory prediction for {kind!r}: use one of {', '.join(PREDICTORS)}"
        )
    simulator = Simulator(kind, lengths)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        PREDICTORS[kind](simulator, config)
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the memory of {kind} cannot be predicted for these models, because their computation "
            f"depends on more than shapes ({reason}): run it and read the measured peak"
        ) from None
    finally:
        logger.disabled = was_disabled
    return simulator.memory()


def predict_sft(simulator: Simulator, config: SFTConfig) -> None:
    """Simulate SFT: one model with gradients and optimizer state."""
    reward_models = load_learned(
        simulator, () if config.evaluation is None else config.evaluation.rewards
    )
    policy = simulator.policy(config.model)
    optimizer = simulator.optimizer(
        [("policy", config.optimizer, trained_parameters(policy.model))]
    )
    reference = simulator.reference(policy) if config.measure_kl else None
    with simulator.averaged(policy, config.ema_decay):
        evaluate(simulator, config.evaluation, policy, reference, reward_models, None)
    data = demonstrations(simulator, config.examples_per_step)
    maximum = config.data.max_response_tokens
    with simulator.stage("update"):
        parts = heaviest(data, data.split(config.tokens_per_micro_batch))
        aggregation = load_option(AGGREGATION, config.aggregation)
        weighted = data.split_with_token_weights(parts, aggregation, maximum)
        optimizer.step([MicroBatch(part, partial(sft.loss, policy)) for part in weighted])
    if simulator.lengths.held_out:
        data = demonstrations(simulator, simulator.lengths.held_out)
        parts = data.split(config.tokens_per_micro_batch)
        simulator.score("validation", data, parts, policy.logprobs)


def predict_reward_model(simulator: Simulator, config: RewardModelConfig) -> None:
    """Simulate reward-model training: one scorer with gradients and optimizer state."""
    model = simulator.scorer(config.model, "reward model")
    parameters = trained_parameters(model.model)
    optimizer = simulator.optimizer([("reward model", config.optimizer, parameters)])
    make_data = labeled_steps if config.rankings is None else rankings
    make_data = make_data if config.pairs is None else preference_pairs
    loss = partial(reward_loss, model, total=1, center=0.0)
    with simulator.stage("update"):
        data = make_data(simulator, config.examples_per_step)
        step(optimizer, data, config.tokens_per_micro_batch, loss)
    if simulator.lengths.held_out:
        data = make_data(simulator, simulator.lengths.held_out)
        with simulator.stage("validation"), torch.no_grad():
            parts = data.split(config.tokens_per_micro_batch, whole_groups=True)
            for part in heaviest(data, parts):
                loss(data.select(part))


def predict_dpo(simulator: Simulator, config: DPOConfig) -> None:
    """Simulate DPO: the policy with gradients and optimizer state, and the reference if needed."""
    online, evaluation = config.online, config.evaluation
    reward_models = load_learned(simulator, () if online is None else online.rewards)
    policy = simulator.policy(config.model, config.temperature)
    reference = simulator.reference(policy, enabled=config.needs_reference)
    quality = load_learned(simulator, evaluation_rewards(evaluation)) or reward_models
    data = PairData(simulator.groups(config.pairs_per_step, 2))
    parts = data.split(config.tokens_per_micro_batch, whole_groups=True)
    if online is None and not config.reference_free:
        simulator.score("log-probs", data, parts, policy.logprobs)
    optimizer = simulator.optimizer(
        [("policy", config.optimizer, trained_parameters(policy.model))]
    )
    sampling = None if config.online is None else config.online.sampling
    with simulator.averaged(policy, config.ema_decay):
        evaluate(simulator, evaluation, policy, reference, quality, sampling)
    if online is not None:
        samples = online.responses_per_prompt
        simulator.rollout("rollout", policy, config.pairs_per_step, samples, online.sampling)
        score_learned(simulator, reward_models, config.pairs_per_step * samples)
        reference_scores = [] if config.reference_free else [reference.logprobs]
        simulator.score("log-probs", data, parts, *reference_scores)
    if not config.reference_free:
        data = PairData(data.groups, ref_logprobs_T=zeros(data))
    with simulator.stage("update"):
        weighted = [data.select(part) for part in heaviest(data, parts)]
        loss = partial(dpo.loss, dpo.Objective.of(config), policy, total=len(data.groups))
        optimizer.step([MicroBatch(part, loss) for part in weighted])


def predict_ppo(simulator: Simulator, config: PPOConfig) -> None:
    """Simulate PPO: actor and critic with optimizer state, the reference, and learned rewards."""
    reward_models = load_learned(simulator, config.rewards)
    policy = simulator.policy(config.model, config.sampling.temperature)
    reference = simulator.reference(
        policy, enabled=config.beta > 0 or config.evaluation is not None
    )
    quality = load_learned(simulator, evaluation_rewards(config.evaluation)) or reward_models
    critic = load_critic(simulator, config, policy)
    optimizer = simulator.optimizer(
        [
            ("policy", config.optimizer, trained_parameters(policy.model)),
            ("critic", config.critic.optimizer, critic.parameters()),
        ]
    )
    trained = reward_optimizer(simulator, config.reward_update, reward_models)
    sample(simulator, config, policy, reference, quality)
    score_learned(simulator, reward_models, config.prompts_per_step * config.responses_per_prompt)
    data = Grouped(simulator.groups(config.prompts_per_step, config.responses_per_prompt))
    parts = largest_micro_batches(config, data)
    reference_scores = [reference.logprobs] if config.beta > 0 else []
    actor_critic = [partial(critic.score, policy)]
    policy_pass_skipped = config.beta == 0 < config.sampler_tolerance and not config.asynchronous
    if isinstance(critic, SeparateCritic) and policy_pass_skipped:
        actor_critic = [critic.values, *[policy.logprobs] * (config.minibatches > 1)]
    simulator.score("log-probs", data, parts, *actor_critic, *reference_scores)
    with simulator.stage("update"):
        z = zeros(data)
        experience = PPOExperience(
            groups=data.groups,
            advantages_T=z,
            loss_mask_T=torch.ones_like(z, dtype=torch.bool),
            sampler_logprobs_T=z,
            old_logprobs_T=z,
            ref_logprobs_T=z,
            old_values_T=z,
            targets_T=z,
        )
        objective, returns = ppo.Objective.of(config), ppo.Returns.of(config)
        unused = components(policy, reference)
        losses = ppo.Learner.of(config, objective, returns, unused, critic).losses(True)
        weighted = experience.split_with_token_weights(
            parts, objective.aggregation, objective.max_length
        )
        micro_batches = [MicroBatch(part, loss) for part in weighted for loss in losses]
        if config.pretraining is not None:
            texts = demonstrations(simulator, config.pretraining.examples_per_step)
            text_batches = heaviest(texts, texts.split(config.tokens_per_micro_batch))
            weighted_texts = texts.split_with_token_weights(text_batches, token_mean)
            micro_batches += [
                MicroBatch(part, partial(sft.loss, policy)) for part in weighted_texts
            ]
        optimizer.step(micro_batches)
    update_rewards(simulator, config.reward_update, config.rewards, reward_models, trained)


def predict_grpo(simulator: Simulator, config: GRPOConfig) -> None:
    """Simulate GRPO: the policy with optimizer state, the reference, and learned rewards."""
    reward_models = load_learned(simulator, config.rewards)
    policy = simulator.policy(config.model, config.sampling.temperature)
    reference = simulator.reference(
        policy, enabled=config.beta > 0 or config.evaluation is not None
    )
    quality = load_learned(simulator, evaluation_rewards(config.evaluation)) or reward_models
    optimizer = simulator.optimizer(
        [("policy", config.optimizer, trained_parameters(policy.model))]
    )
    trained = reward_optimizer(simulator, config.reward_update, reward_models)
    sample(simulator, config, policy, reference, quality)
    score_learned(simulator, reward_models, config.prompts_per_step * config.responses_per_prompt)
    data = Grouped(simulator.groups(config.prompts_per_step, config.responses_per_prompt))
    parts = largest_micro_batches(config, data)
    scores = [policy.logprobs] * (config.minibatches > 1) + [reference.logprobs] * (config.beta > 0)
    simulator.score("log-probs", data, parts, *scores)
    with simulator.stage("update"):
        z = zeros(data)
        experience = GRPOExperience(
            groups=data.groups,
            advantages_T=z,
            loss_mask_T=torch.ones_like(z, dtype=torch.bool),
            sampler_logprobs_T=z,
            ref_logprobs_T=z if config.beta > 0 else None,
        )
        minibatch = Minibatch([response for part in parts for response in part], parts)
        updates = Updates([minibatch])
        objective, supervision = grpo.Objective.of(config), Supervision.of(config)
        unused = components(policy, reference)
        learner = grpo.Learner.of(config, objective, supervision, unused)
        learner.update(optimizer, experience, updates)
    update_rewards(simulator, config.reward_update, config.rewards, reward_models, trained)


PREDICTORS: dict[str, Callable[[Simulator, Any], None]] = {
    "sft": predict_sft,
    "reward-model": predict_reward_model,
    "ppo": predict_ppo,
    "dpo": predict_dpo,
    "grpo": predict_grpo,
}


# --- Models ---------------------------------------------------------------------------------------


def evaluation_rewards(evaluation: EvaluationConfig | None) -> tuple[RewardConfig, ...]:
    """Return the rewards that the evaluation loads in addition to the training rewards."""
    return () if evaluation is None else evaluation.rewards


def load_learned(simulator: Simulator, rewards: Sequence[RewardConfig]) -> list[RewardModel]:
    """Load the reward models that the rewards name, each path once."""
    paths = {}
    for reward in rewards:
        if reward.function in (OUTCOME, PROCESS) and "path" in reward.arguments:
            config = reward_model_config(reward)
            paths[config.path] = config
    return [simulator.scorer(config, "reward model") for config in paths.values()]


def load_critic(simulator: Simulator, config: PPOConfig, policy: Policy) -> Critic:
    """Load the critic in the same way as ``actor_critic.make_critic``."""
    if config.critic.kind == "separate":
        return SeparateCritic(simulator.scorer(config.critic.model or config.model, "critic"))
    with simulator.run.building():
        critic = SharedCritic(policy)
    with simulator.run:
        simulator.run.adopt(critic.head, "critic")
    return critic


def components(policy: Policy, reference: Reference) -> OnPolicyComponents:
    """Return the components that a loss uses; the others are None."""
    unused = cast(Any, None)
    return OnPolicyComponents([], unused, policy, reference, unused, None, unused)


# --- Stages ---------------------------------------------------------------------------------------


def sample(
    simulator: Simulator,
    config: PPOConfig | GRPOConfig,
    policy: Policy,
    reference: Reference,
    reward_models: list[RewardModel],
) -> None:
    """Simulate the evaluation and the rollout of one step.

    With asynchronous sampling, the sampler's memory is held during all stages that follow.
    """
    request = (config.prompts_per_step, config.responses_per_prompt, config.sampling)
    if config.asynchronous:
        simulator.sampler(policy, *request)
    with simulator.averaged(policy, config.ema_decay):
        evaluate(simulator, config.evaluation, policy, reference, reward_models, config.sampling)
    if not config.asynchronous:
        simulator.rollout("rollout", policy, *request)


def score_learned(simulator: Simulator, reward_models: list[RewardModel], responses: int) -> None:
    """Simulate learned rewards of ``responses`` responses, each with its own copy of the prompt."""
    if reward_models:
        data = Grouped(simulator.groups(responses, 1))
        parts = data.split(TOKENS_PER_PASS)
        simulator.score("scoring", data, parts, *(model.scores for model in reward_models))


def evaluate(
    simulator: Simulator,
    config: EvaluationConfig | None,
    policy: Policy,
    reference: Reference | None,
    reward_models: list[RewardModel],
    training: Sampling | None,
) -> None:
    """Simulate an evaluation: rollout, learned rewards, and log-probs for the KL divergence."""
    if config is None:
        return
    prompts = config.prompts or LocalEngine(policy, ()).max_rows
    sampling = config.sampling(training)
    simulator.rollout("evaluation rollout", policy, prompts, config.samples, sampling)
    score_learned(simulator, reward_models, prompts * config.samples)
    if reference is not None:
        data = Grouped(simulator.groups(prompts, config.samples))
        scores = (policy.logprobs, reference.logprobs)
        simulator.score(
            "evaluation log-probs", data, data.split(EVALUATION_TOKENS_PER_PASS), *scores
        )


def step(
    optimizer: Optimizer,
    data: Grouped,
    max_tokens: int,
    loss: Loss,
) -> None:
    """Run one optimizer step on the largest micro-batches."""
    parts = heaviest(data, data.split(max_tokens, whole_groups=True))
    optimizer.step([MicroBatch(data.select(part), loss) for part in parts])


def reward_optimizer(
    simulator: Simulator, config: RewardUpdateConfig | None, reward_models: list[RewardModel]
) -> Optimizer | None:
    """Return the optimizer of a learned reward that is updated during training."""
    if config is None or not reward_models:
        return None
    parameters = trained_parameters(reward_models[0].model)
    return simulator.optimizer([("reward model", config.optimizer, parameters)])


def update_rewards(
    simulator: Simulator,
    config: RewardUpdateConfig | None,
    rewards: Sequence[RewardConfig],
    reward_models: list[RewardModel],
    optimizer: Optimizer | None,
) -> None:
    """Simulate an update of the learned reward."""
    if config is None or optimizer is None:
        return
    process = any(reward.function == PROCESS for reward in rewards)
    make_data = labeled_steps if process else preference_pairs
    with simulator.stage("reward update"):
        data = make_data(simulator, config.examples_per_step)
        loss = partial(reward_loss, reward_models[0], total=1, center=0.0)
        step(optimizer, data, config.tokens_per_micro_batch, loss)
