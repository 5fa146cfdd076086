"""Direct Preference Optimization (Rafailov et al. 2023), offline and online.

    h    = log π_θ(y_w|x)/π_ref(y_w|x) − log π_θ(y_l|x)/π_ref(y_l|x)
    L(θ) = −E log σ(β h)

Neither β nor the reference bounds how far the policy moves. Evaluations therefore *sample*
responses to held-out prompts, and report their KL, length and reward. Online DPO samples its pairs
from the current policy, and a reward decides which response is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from trivium.algorithms.dpo_config import DPOConfig
from trivium.data.batch import Batch, Grouped
from trivium.data.group import Group
from trivium.data.oom import score_logprobs
from trivium.data.preferences import load_preferences
from trivium.data.prompt_forms import with_arguments_of
from trivium.data.prompts import load_prompts
from trivium.errors import TrainingError
from trivium.evaluation.evaluator import Evaluator
from trivium.hf.loading import context_length, load_tokenizer, trained_parameters
from trivium.maths.advantages import equal_groups
from trivium.maths.objectives import PreferenceLoss, preference_gradient_weight
from trivium.maths.ragged import segment_mean, segment_sum
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.training.ema import WeightAverage, evaluated_with
from trivium.training.experience import epoch_batch, num_steps
from trivium.training.micro_batch import LossOutput, MicroBatch
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.options import PREFERENCE_LOSS, load_option
from trivium.training.policy_metrics import update_metrics
from trivium.training.reference_cache import cached_logprobs
from trivium.training.reward_losses import pair_accuracy
from trivium.training.run_loop import Training
from trivium.training.setup import load_rewards, local_engine, max_prompt_length
from trivium.training.startup import prepare_run


@dataclass(frozen=True)
class PairData(Grouped):
    """Preference pairs: each group holds the chosen and the rejected response, in this order."""

    ref_logprobs_T: Tensor | None = None

    def select_pairs(self, pairs: list[int]) -> PairData:
        """Return only these pairs (ascending)."""
        return self.select([2 * p + side for p in pairs for side in (0, 1)])


def train(config: DPOConfig) -> Path:
    """Run DPO; return the run's directory, with the policy in ``final``."""
    prepared = prepare_run("dpo", config)
    objective = Objective.of(config)
    source = Offline(config) if config.online is None else Online(config)
    policy = Policy.load(config.model, temperature=config.temperature)
    reference = Reference(policy, enabled=config.needs_reference)
    evaluator = make_evaluator(config, policy, reference)
    source.prepare(policy, reference)
    trained = [(config.optimizer, trained_parameters(policy.model))]
    ema = WeightAverage.of(policy, config.ema_decay)
    with Training(prepared, source.steps, evaluator=evaluated_with(evaluator, ema)) as training:
        optimizer = Optimizer(trained, source.steps, training.budget_spent, ema)
        training.track_state(policy=policy, optimizer=optimizer, ema=ema)
        for step in training.steps():
            pairs, metrics = source.pairs(step)
            training.stages.begin()
            if pairs is not None:
                max_tokens = config.tokens_per_micro_batch
                result = optimizer.step(micro_batches(objective, policy, pairs, max_tokens))
                training.stages.lap("update")
                metrics |= step_metrics(objective, result)
                metrics["tokens/trained"] = float(pairs.lengths_N.sum())
            training.log(metrics)
        if optimizer.steps == 0:
            raise TrainingError(
                f"none of {training.step} steps found a pair: all responses to a prompt always got "
                "the same reward, so nothing was learned. Choose other prompts, raise "
                "online.responses_per_prompt, or reward in finer grades"
            )
        training.save(final=policy, ema=ema)
    return training.path


class Offline:
    """Pairs from a file, which the reference scores once, before training."""

    def __init__(self, config: DPOConfig) -> None:
        assert config.data is not None, "checked by the configuration"
        self.config = config
        context = context_length(config.model)
        preferences = load_preferences(config.data, load_tokenizer(config.model), context)
        self.data = PairData([p.group for p in preferences])
        self.steps = num_steps(config.epochs, len(self.data.groups), config.pairs_per_step)

    def prepare(self, policy: Policy, reference: Reference) -> None:
        # The policy has not been trained yet, so its log-probs are the reference's.
        score = cached_logprobs if self.config.reference_cache else score_logprobs
        self.data = with_reference(self.config, self.data, partial(score, policy))

    def pairs(self, step: int) -> tuple[PairData | None, dict[str, float]]:
        size, seed = self.config.pairs_per_step, self.config.run.seed
        index = epoch_batch(len(self.data.groups), size, step - 1, seed=seed)
        return self.data.select_pairs(sorted(set(index))), {}


class Online:
    """Pairs sampled from the current policy and ranked by a reward."""

    def __init__(self, config: DPOConfig) -> None:
        assert config.online is not None, "checked by the configuration"
        self.config, self.online = config, config.online
        tokenizer = load_tokenizer(config.model)
        limit = max_prompt_length(context_length(config.model), self.online.sampling.max_tokens)
        self.prompts = load_prompts(self.online.data, tokenizer, limit)
        self.rewards, _ = load_rewards(self.online.rewards, self.prompts, tokenizer)
        self.steps = self.online.steps

    def prepare(self, policy: Policy, reference: Reference) -> None:
        self.engine = local_engine(policy)
        policy.stop_tokens = self.online.sampling.stop_tokens
        self.score = partial(score_logprobs, reference)

    def pairs(self, step: int) -> tuple[PairData | None, dict[str, float]]:
        seed = self.config.run.seed
        index = epoch_batch(len(self.prompts), self.config.pairs_per_step, step - 1, seed=seed)
        rollouts = roll_out(
            self.engine,
            self.rewards,
            [self.prompts[i] for i in index],
            self.online.responses_per_prompt,
            self.online.sampling,
            seed=seed,
            step=step,
        )
        groups = best_and_worst(rollouts)
        metrics = rollouts.metrics() | {
            "group/equal_rewards": 1 - len(groups) / len(index),
            "pairs/found": float(len(groups)),
        }
        if not groups:
            return None, metrics
        start = time.perf_counter()
        pairs = with_reference(self.config, PairData(groups), self.score)
        metrics["time/logprobs"] = time.perf_counter() - start
        return pairs, metrics


def best_and_worst(rollouts: Rollouts) -> list[Group]:
    """Return the best and the worst response of each group as a pair; ties yield no pair."""
    pairs = []
    for prompt, responses, totals, equal in zip(
        rollouts.prompts,
        rollouts.responses,
        rollouts.totals_N.split(rollouts.sizes_G.tolist()),
        equal_groups(rollouts.totals_N, rollouts.sizes_G).tolist(),
        strict=True,
    ):
        best, worst = int(totals.argmax()), int(totals.argmin())
        if not equal:
            pairs.append(Group(prompt.tokens, [responses[best].tokens, responses[worst].tokens]))
    return pairs


def with_reference(config: DPOConfig, data: PairData, score: Callable[..., Tensor]) -> PairData:
    """Return the pairs with the reference's log-probs of every response token."""
    if config.reference_free:
        return data
    parts = data.split(config.tokens_per_micro_batch, whole_groups=True)
    return replace(data, ref_logprobs_T=score(data, parts))


@dataclass(frozen=True)
class Objective:
    """Functions and constants of L(θ), and how log-ratios are reduced to margins."""

    loss: PreferenceLoss
    beta: float
    label_smoothing: float
    target_margin: float
    length_normalized: bool
    sft_coefficient: float

    @property
    def settings(self) -> dict[str, float]:
        """Keyword arguments of the loss."""
        return {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "target_margin": self.target_margin,
        }

    @classmethod
    def of(cls, config: DPOConfig) -> Objective:
        """Return the objective of a configuration; a user's own loss is checked here."""
        return cls(
            loss=load_option(PREFERENCE_LOSS, config.loss),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            target_margin=config.target_margin,
            length_normalized=config.length_normalized,
            sft_coefficient=config.sft_coefficient,
        )


def micro_batches(
    objective: Objective, policy: Policy, pairs: PairData, max_tokens: int
) -> list[MicroBatch]:
    """Return the micro-batches of one optimizer step."""
    parts = pairs.split(max_tokens, whole_groups=True)
    pair_loss = partial(loss, objective, policy, total=len(pairs.groups))
    return [MicroBatch(pairs.select(part), pair_loss, whole_groups=True) for part in parts]


def loss(objective: Objective, policy: Policy, pairs: PairData, total: int) -> LossOutput:
    """``1/total Σ_p {−log σ(β h) − c_SFT log π(y_w|x)/|y_w|}`` of one micro-batch.

    The first term is that of ``loss: sigmoid``.
    """
    logprobs_T = policy.logprobs(Batch.of(pairs.groups))
    ref_T = pairs.ref_logprobs_T
    lengths_N = pairs.lengths_N.to(logprobs_T.device)
    log_ratio_T = logprobs_T if ref_T is None else logprobs_T - ref_T
    reduce = segment_mean if objective.length_normalized else segment_sum
    chosen_P, rejected_P = reduce(log_ratio_T, lengths_N).view(-1, 2).unbind(1)
    margins_P = chosen_P - rejected_P
    loss_P = objective.loss(margins_P, **objective.settings)
    if objective.sft_coefficient:
        mean_logprobs_N = segment_mean(logprobs_T, lengths_N)
        loss_P = loss_P - objective.sft_coefficient * mean_logprobs_N[0::2]
    summed_N = segment_sum(logprobs_T.detach(), lengths_N)
    return loss_P.sum() / total, {
        "margin_P": margins_P.detach(),
        "chosen_P": chosen_P.detach(),
        "rejected_P": rejected_P.detach(),
        "logprobs_chosen_P": summed_N[0::2],
        "logprobs_rejected_P": summed_N[1::2],
    }


def step_metrics(objective: Objective, result: StepResult) -> dict[str, float]:
    """Return implicit rewards, margin, accuracy, gradient weight, and log-probs of one step."""
    observed, beta = result.observed, objective.beta
    margin_P = observed["margin_P"]
    weight_P = preference_gradient_weight(objective.loss, margin_P, **objective.settings)
    return update_metrics([result]) | {
        "implicit_reward/chosen": beta * float(observed["chosen_P"].mean()),
        "implicit_reward/rejected": beta * float(observed["rejected_P"].mean()),
        "implicit_reward/margin": beta * float(margin_P.mean()),
        "implicit_reward/accuracy": float(pair_accuracy(margin_P).mean()),
        "implicit_reward/gradient_weight": float(weight_P.mean()),
        "logprobs/chosen": float(observed["logprobs_chosen_P"].mean()),
        "logprobs/rejected": float(observed["logprobs_rejected_P"].mean()),
    }


def make_evaluator(config: DPOConfig, policy: Policy, reference: Reference) -> Evaluator | None:
    """Return the evaluator; by default its rewards are those that rank the online pairs."""
    if config.evaluation is None:
        return None
    training = config.online.sampling if config.online is not None else None
    max_tokens = config.evaluation.sampling(training).max_tokens
    limit = max_prompt_length(policy.context_length, max_tokens)
    training_data = config.online.data if config.online is not None else config.data
    data = with_arguments_of(config.evaluation.data, training_data)
    prompts = load_prompts(data, policy.tokenizer, limit)
    rewards_config = config.evaluation.rewards or (config.online.rewards if config.online else ())
    rewards, _ = load_rewards(rewards_config, prompts, policy.tokenizer)
    return Evaluator(
        config.evaluation,
        prompts,
        rewards,
        local_engine(policy),
        policy,
        reference,
        training=training,
    )
