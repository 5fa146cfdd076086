"""The memory of every method, stage by stage, predicted from its configuration.

Each method is set up as its ``train`` sets it up, with models that hold no data, and its own loss and
optimizer step are run on the largest micro-batches. Left out: the process itself (interpreter,
libraries) and the texts.
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
from trivium.config.base import Configuration
from trivium.data.batch import Grouped
from trivium.errors import ConfigurationError, ModelError
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.memory.report import Lengths, Memory
from trivium.memory.simulator import Rehearsal, heaviest
from trivium.models.critic import Critic, SeparateCritic, SharedCritic
from trivium.models.loading import trained_parameters
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.models.reward_model import RewardModel
from trivium.rewards.learned import OUTCOME, PROCESS, TOKENS_PER_PASS
from trivium.rewards.learned import _model_of as model_of
from trivium.rewards.reward import RewardConfig
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling
from trivium.training.experience import MicroBatches, Minibatch, WeightedGroups, plan_updates
from trivium.training.micro_batch import Loss, MicroBatch
from trivium.training.optimizer import Optimizer
from trivium.training.protocols import Updates
from trivium.training.reward_losses import LabeledSteps, Pairs, labeled_step_loss, pair_loss
from trivium.training.setup import OnPolicyComponents

SCORED = 16384
"""Tokens per pass of the evaluation's log-probs."""


def predict(kind: str, config: Configuration, lengths: Lengths) -> Memory:
    """The memory of a run of ``kind`` (a training command's name) with ``config``, in bytes.

    Raises:
        ModelError: a checkpoint's configuration cannot be read.
        ModelError: what the model computes depends on numbers, as where experts are chosen.
        ConfigurationError: there is no such kind.
    """
    if kind not in METHODS:
        raise ConfigurationError(
            f"there is no memory prediction for {kind!r}: the kinds are {', '.join(METHODS)}"
        )
    method = Rehearsal(kind, lengths)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logged, logger.disabled = logger.disabled, True
    try:
        METHODS[kind](method, config)
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the memory of {kind} cannot be predicted for these models, as what they compute "
            f"depends on more than shapes ({reason}): run it and read the measured peak"
        ) from None
    finally:
        logger.disabled = logged
    return method.memory()


def predict_sft(method: Rehearsal, config: SFTConfig) -> None:
    """One model; its gradients and moments."""
    judges = load_learned(method, () if config.evaluation is None else config.evaluation.rewards)
    policy = method.policy(config.model)
    optimizer = method.optimizer([("policy", config.optimizer, trained_parameters(policy.model))])
    reference = method.reference(policy) if config.measure_kl else None
    evaluate(method, config.evaluation, policy, reference, judges, None)
    data = demonstrations(method, config.examples_per_step)
    maximum = config.data.max_response_tokens
    with method.stage("update"):
        parts = heaviest(data, data.split(config.tokens_per_micro_batch))
        works = data.split_with_token_weights(parts, config.aggregation, maximum)
        optimizer.step([MicroBatch(part, partial(sft.loss, policy)) for part in works])
    if method.lengths.held_out:
        data = demonstrations(method, method.lengths.held_out)
        parts = data.split(config.tokens_per_micro_batch)
        method.score("validation", data, parts, policy.logprobs)


def predict_reward_model(method: Rehearsal, config: RewardModelConfig) -> None:
    """One scorer; its gradients and moments."""
    model = method.scorer(config.model, "reward model")
    parameters = trained_parameters(model.model)
    optimizer = method.optimizer([("reward model", config.optimizer, parameters)])
    make = preference_pairs if config.pairs is not None else labeled_steps
    with method.stage("update"):
        data = make(method, config.examples_per_step)
        step(optimizer, data, config.tokens_per_micro_batch, partial(reward_model_loss, model))
    if method.lengths.held_out:
        data = make(method, method.lengths.held_out)
        with method.stage("validation"), torch.no_grad():
            parts = data.split(config.tokens_per_micro_batch, whole_groups=True)
            for part in heaviest(data, parts):
                reward_model_loss(model, data.select(part))


def predict_dpo(method: Rehearsal, config: DPOConfig) -> None:
    """The policy with gradients and moments, and the reference where it is asked again."""
    online, evaluation = config.online, config.evaluation
    judges = load_learned(method, () if online is None else online.rewards)
    policy = method.policy(config.model, config.temperature)
    reference = method.reference(policy, asked=config.asks_reference)
    quality = load_learned(method, own_rewards(evaluation)) or judges
    data = PairData(method.groups(config.pairs_per_step, 2))
    parts = data.split(config.tokens_per_micro_batch, whole_groups=True)
    if online is None and not config.reference_free:
        method.score("log-probs", data, parts, policy.logprobs)
    optimizer = method.optimizer([("policy", config.optimizer, trained_parameters(policy.model))])
    sampling = None if config.online is None else config.online.sampling
    evaluate(method, evaluation, policy, reference, quality, sampling)
    if online is not None:
        samples = online.responses_per_prompt
        method.rollout("rollout", policy, config.pairs_per_step, samples, online.sampling)
        score_learned(method, judges, config.pairs_per_step * samples)
        compared = [] if config.reference_free else [reference.logprobs]
        method.score("log-probs", data, parts, *compared)
    if not config.reference_free:
        data = PairData(data.groups, ref_logprobs_T=zeros(data))
    with method.stage("update"):
        works = [data.select(part) for part in heaviest(data, parts)]
        loss = partial(dpo.loss, config, policy, total=len(data.groups))
        optimizer.step([MicroBatch(part, loss) for part in works])


def predict_ppo(method: Rehearsal, config: PPOConfig) -> None:
    """Actor and critic with gradients and moments, the reference, and learned rewards."""
    judges = load_learned(method, config.rewards)
    policy = method.policy(config.model, config.sampling.temperature)
    reference = method.reference(policy, asked=config.beta > 0 or config.evaluation is not None)
    quality = load_learned(method, own_rewards(config.evaluation)) or judges
    critic = load_critic(method, config, policy)
    optimizer = method.optimizer(
        [
            ("policy", config.optimizer, trained_parameters(policy.model)),
            ("critic", config.critic.optimizer, critic.parameters()),
        ]
    )
    trained = reward_optimizer(method, config.reward_update, judges)
    sample(method, config, policy, reference, quality)
    score_learned(method, judges, config.prompts_per_step * config.responses_per_prompt)
    data = Grouped(method.groups(config.prompts_per_step, config.responses_per_prompt))
    parts = chosen(config, data)
    compared = [reference.logprobs] if config.beta > 0 else []
    actor_critic = [partial(critic.score, policy)]
    spared = config.beta == 0 < config.sampler_tolerance and not config.asynchronous
    if isinstance(critic, SeparateCritic) and spared:
        actor_critic = [critic.values, *[policy.logprobs] * (config.minibatches > 1)]
    method.score("log-probs", data, parts, *actor_critic, *compared)
    with method.stage("update"):
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
        works = experience.split_with_token_weights(
            parts, config.aggregation, config.sampling.max_tokens
        )
        learned = ppo.losses(config, on_policy(policy, reference), critic, actor=True)
        work = [MicroBatch(part, loss) for part in works for loss in learned]
        if config.pretraining is not None:
            texts = demonstrations(method, config.pretraining.examples_per_step)
            cut = heaviest(texts, texts.split(config.tokens_per_micro_batch))
            made = texts.split_with_token_weights(cut, "token_mean")
            work += [MicroBatch(part, partial(sft.loss, policy)) for part in made]
        optimizer.step(work)
    update_rewards(method, config.reward_update, config.rewards, judges, trained)


def predict_grpo(method: Rehearsal, config: GRPOConfig) -> None:
    """The policy with gradients and moments, the reference, and learned rewards."""
    judges = load_learned(method, config.rewards)
    policy = method.policy(config.model, config.sampling.temperature)
    reference = method.reference(policy, asked=config.beta > 0 or config.evaluation is not None)
    quality = load_learned(method, own_rewards(config.evaluation)) or judges
    optimizer = method.optimizer([("policy", config.optimizer, trained_parameters(policy.model))])
    trained = reward_optimizer(method, config.reward_update, judges)
    sample(method, config, policy, reference, quality)
    score_learned(method, judges, config.prompts_per_step * config.responses_per_prompt)
    data = Grouped(method.groups(config.prompts_per_step, config.responses_per_prompt))
    parts = chosen(config, data)
    scores = [policy.logprobs] * (config.minibatches > 1) + [reference.logprobs] * (config.beta > 0)
    method.score("log-probs", data, parts, *scores)
    with method.stage("update"):
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
        grpo.update(config, on_policy(policy, reference), optimizer, experience, updates)
    update_rewards(method, config.reward_update, config.rewards, judges, trained)


METHODS: dict[str, Callable[[Rehearsal, Any], None]] = {
    "sft": predict_sft,
    "reward-model": predict_reward_model,
    "ppo": predict_ppo,
    "dpo": predict_dpo,
    "grpo": predict_grpo,
}


# --- Data -----------------------------------------------------------------------------------------


def zeros(data: Grouped) -> torch.Tensor:
    """A number per response token."""
    return torch.zeros(int(data.lengths_N.sum()))


def demonstrations(method: Rehearsal, count: int) -> WeightedGroups:
    """Demonstrations of which every token is learned."""
    groups = method.groups(count, 1)
    tokens = sum(len(g.responses[0]) for g in groups)
    return WeightedGroups(groups, loss_mask_T=torch.ones(tokens, dtype=torch.bool))


def preference_pairs(method: Rehearsal, count: int) -> Pairs:
    """Pairs of a chosen and a rejected response."""
    return Pairs.of(method.groups(count, 2))


def labeled_steps(method: Rehearsal, count: int) -> LabeledSteps:
    """Responses of one step each."""
    groups = method.groups(count, 1)
    ends = [[len(g.responses[0]) - 1] for g in groups]
    return LabeledSteps.of(groups, ends, [[1.0]] * count)


def chosen(config: PPOConfig | GRPOConfig, data: Grouped) -> MicroBatches:
    """The largest micro-batches of the first epoch's largest optimizer step."""
    steps = plan_updates(
        data,
        epochs=1,
        minibatches=config.minibatches,
        max_tokens=config.tokens_per_micro_batch,
        seed=config.run.seed,
        step=0,
    )
    return heaviest(data, max(steps, key=lambda step: len(step.responses)).parts)


# --- Models ---------------------------------------------------------------------------------------


def own_rewards(evaluation: EvaluationConfig | None) -> tuple[RewardConfig, ...]:
    """The rewards that the evaluation loads besides the training's."""
    return () if evaluation is None else evaluation.rewards


def load_learned(method: Rehearsal, rewards: Sequence[RewardConfig]) -> list[RewardModel]:
    """The reward models that the rewards name, each path once."""
    paths = {}
    for reward in rewards:
        if reward.function in (OUTCOME, PROCESS) and "path" in reward.arguments:
            config = model_of(reward)
            paths[config.path] = config
    return [method.scorer(config, "reward model") for config in paths.values()]


def load_critic(method: Rehearsal, config: PPOConfig, policy: Policy) -> Critic:
    """The critic as ``actor_critic.make_critic`` makes it."""
    if config.critic.kind == "separate":
        return SeparateCritic(method.scorer(config.critic.model or config.model, "critic"))
    with method.run.building():
        critic = SharedCritic(policy)
    with method.run:
        method.run.adopt(critic.head, "critic")
    return critic


def on_policy(policy: Policy, reference: Reference) -> OnPolicyComponents:
    """The parts that a loss asks for."""
    nothing = cast(Any, None)
    return OnPolicyComponents([], nothing, policy, reference, nothing, None, nothing)


# --- Stages ---------------------------------------------------------------------------------------


def sample(
    method: Rehearsal,
    config: PPOConfig | GRPOConfig,
    policy: Policy,
    reference: Reference,
    judges: list[RewardModel],
) -> None:
    """Evaluation, and a step's responses; sampled ahead, they go on beside all that follows."""
    request = (config.prompts_per_step, config.responses_per_prompt, config.sampling)
    if config.asynchronous:
        method.sampler(policy, *request)
    evaluate(method, config.evaluation, policy, reference, judges, config.sampling)
    if not config.asynchronous:
        method.rollout("rollout", policy, *request)


def score_learned(method: Rehearsal, judges: list[RewardModel], responses: int) -> None:
    """Learned rewards of so many responses, each with its own copy of the prompt."""
    if judges:
        data = Grouped(method.groups(responses, 1))
        parts = data.split(TOKENS_PER_PASS)
        method.score("scoring", data, parts, *(judge.scores for judge in judges))


def evaluate(
    method: Rehearsal,
    config: EvaluationConfig | None,
    policy: Policy,
    reference: Reference | None,
    judges: list[RewardModel],
    training: Sampling | None,
) -> None:
    """Held-out prompts: sampled, scored, and compared with the reference."""
    if config is None:
        return
    prompts = config.prompts or LocalEngine(policy, ()).max_rows
    sampling = config.sampling(training)
    method.rollout("evaluation rollout", policy, prompts, config.samples, sampling)
    score_learned(method, judges, prompts * config.samples)
    if reference is not None:
        data = Grouped(method.groups(prompts, config.samples))
        scores = (policy.logprobs, reference.logprobs)
        method.score("evaluation log-probs", data, data.split(SCORED), *scores)


def step(
    optimizer: Optimizer,
    data: Grouped,
    max_tokens: int,
    loss: Loss,
) -> None:
    """One optimizer step on the largest micro-batches."""
    parts = heaviest(data, data.split(max_tokens, whole_groups=True))
    optimizer.step([MicroBatch(data.select(part), loss) for part in parts])


def reward_model_loss(
    model: RewardModel, data: Grouped
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of pairs or of labeled steps."""
    if isinstance(data, LabeledSteps):
        return labeled_step_loss(model, data, 1)
    return pair_loss(model, cast(Pairs, data), 1, 0.0)


def reward_optimizer(
    method: Rehearsal, config: RewardUpdateConfig | None, judges: list[RewardModel]
) -> Optimizer | None:
    """The optimizer of a learned reward that is trained further."""
    if config is None or not judges:
        return None
    parameters = trained_parameters(judges[0].model)
    return method.optimizer([("reward model", config.optimizer, parameters)])


def update_rewards(
    method: Rehearsal,
    config: RewardUpdateConfig | None,
    rewards: Sequence[RewardConfig],
    judges: list[RewardModel],
    optimizer: Optimizer | None,
) -> None:
    """Train the learned reward further."""
    if config is None or optimizer is None:
        return
    process = any(reward.function == PROCESS for reward in rewards)
    make = labeled_steps if process else preference_pairs
    with method.stage("reward update"):
        data = make(method, config.examples_per_step)
        loss = partial(reward_model_loss, judges[0])
        step(optimizer, data, config.tokens_per_micro_batch, loss)
