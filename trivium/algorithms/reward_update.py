"""Train the learned reward further while the policy moves away from its training data.

An optional step of GRPO's outer loop (Shao et al. 2024, algorithm 1, line 11), which serves PPO as
well. A labeler, for example a verifier, labels the policy's own responses; the reward model learns
from them and from a share of earlier ones (replay).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivium.algorithms.reward_update_config import RewardUpdateConfig
from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.errors import ConfigurationError
from trivium.hf.loading import trained_parameters
from trivium.hf.saving import SaveCheck
from trivium.maths.advantages import equal_groups
from trivium.rewards.reward import Rewards, Scores
from trivium.rollout.rollouts import Rollouts, score_groups
from trivium.serialization import serializable
from trivium.training.micro_batch import Loss, MicroBatch
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.reward_losses import (
    LabeledSteps,
    Pairs,
    labeled_step_loss,
    pair_accuracy,
    pair_loss,
    step_accuracy,
)
from trivium.training.setup import OnPolicyComponents


@serializable
@dataclass(frozen=True)
class Example:
    """A pair (chosen first), or one response with its step ends and labels."""

    group: Group
    ends: tuple[int, ...] = ()
    labels: tuple[float, ...] = ()


class RewardUpdate:
    """Collects labeled examples from rollouts and trains the one learned reward on them."""

    def __init__(
        self, config: RewardUpdateConfig, components: OnPolicyComponents, *, seed: int
    ) -> None:
        assert len(components.learned.models) == 1, "checked by the configuration"
        self.config = config
        self.tokenizer = components.policy.tokenizer
        (self.model,) = components.learned.models.values()
        if self.model.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ConfigurationError(
                "reward_update learns from the policy's tokens, but the reward model has another "
                "vocabulary: train one from the policy's base model"
            )
        self.labeler = Rewards([config.labeler], tokenizer=self.tokenizer)
        self.labeler.check(sorted({c for prompt in components.prompts for c in prompt.columns}))
        parameters = trained_parameters(self.model.model)
        self.optimizer = Optimizer([(config.optimizer, parameters)], total_steps=1)
        self.process = components.learned.is_process
        self.separators = components.learned.separators
        self.random = random.Random(seed)
        self.fresh: list[Example] = []
        self.archive: list[Example] = []

    @classmethod
    def of(
        cls, config: RewardUpdateConfig | None, components: OnPolicyComponents, *, seed: int
    ) -> RewardUpdate | None:
        """Return the update of a configuration; None without one."""
        return None if config is None else cls(config, components, seed=seed)

    def due(self, step: int) -> bool:
        """Return whether PPO updates the reward model after this step."""
        return step % self.config.every == 0

    def collect(self, rollouts: Rollouts) -> None:
        """Label a rollout batch and keep the examples that the reward model can learn from."""
        scores = score_groups(self.labeler, rollouts.prompts, rollouts.responses)
        if self.process:
            scores = replace(scores, steps=self._labels_at_step_ends(rollouts, scores))
        labeled = Rollouts(rollouts.prompts, rollouts.responses, scores, {})
        self.fresh += (
            self._labeled_steps(labeled) if self.process else contrasts(labeled, self.random)
        )

    def train(self) -> dict[str, float]:
        """Run one update on fresh and replayed examples; the accuracy is that before learning."""
        self.random.shuffle(self.fresh)
        fresh = self.fresh[: self.config.examples]
        replayed = min(len(self.archive), round(self.config.replay * len(fresh)))
        examples = fresh + self.random.sample(self.archive, replayed)
        self.archive += fresh
        self.fresh = []
        results: list[StepResult] = []
        for _ in range(self.config.epochs):
            self.random.shuffle(examples)
            for at in range(0, len(examples), self.config.examples_per_step):
                results.append(self._step(examples[at : at + self.config.examples_per_step]))
        return {
            "fresh": float(len(fresh)),
            "replayed": float(replayed),
            "loss": sum(r.loss for r in results) / max(1, len(results)),
            **self._accuracy(results[:1]),
        }

    def save(self, directory: Path) -> SaveCheck:
        """Write the reward model."""
        return self.model.save(directory)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of model, optimizer, random choices and collected examples."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.getstate(),
            "fresh": self.fresh,
            "archive": self.archive,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.setstate(state["random"])
        self.fresh, self.archive = state["fresh"], state["archive"]

    def _step(self, examples: Sequence[Example]) -> StepResult:
        groups = [e.group for e in examples]
        if self.process:
            ends, labels = [list(e.ends) for e in examples], [list(e.labels) for e in examples]
            steps = LabeledSteps.of(groups, ends, labels)
            return self._optimize(steps, partial(labeled_step_loss, self.model, total=steps.count))
        loss = partial(pair_loss, self.model, total=len(groups), center=self.config.center)
        return self._optimize(Pairs.of(groups), loss)

    def _optimize(self, data: Grouped, loss: Loss) -> StepResult:
        parts = data.split(self.config.tokens_per_micro_batch, whole_groups=True)
        micro_batches = [MicroBatch(data.select(part), loss, whole_groups=True) for part in parts]
        return self.optimizer.step(micro_batches)

    def _accuracy(self, results: Sequence[StepResult]) -> dict[str, float]:
        """Return the accuracy of the first optimizer step, and the number of labels it is of."""
        if not results:
            return {"accuracy": float("nan"), "labels": 0.0}
        observed = results[0].observed
        if self.process:
            right = step_accuracy(observed["logit_S"], observed["label_S"])
        else:
            right = pair_accuracy(observed["margin_P"])
        return {"accuracy": float(right.mean()), "labels": float(len(right))}

    def _labels_at_step_ends(
        self, rollouts: Rollouts, scores: Scores
    ) -> list[list[tuple[int, float]]]:
        """Return labels at the characters where the process reward model scores a step.

        A labeler may place a step's end after the separator; the model scores before it.
        """
        if scores.steps is None:
            raise ConfigurationError(
                "reward_update.labeler scores whole responses, but the learned reward is a process "
                "reward model: name a labeler that returns ((start, end), label) pairs"
            )
        labels = [label for steps in scores.steps for _, label in steps]
        wrong = [label for label in labels if not 0 <= label <= 1]
        if wrong:
            raise ConfigurationError(
                f"reward_update.labeler labels a step {wrong[0]:g}: a process reward model learns "
                "the probability that a step is right, so labels must be in [0, 1]"
            )
        (separator,) = self.separators
        return [
            [(step_end(response.text, end, separator), label) for end, label in steps]
            for response, steps in zip(rollouts.flat, scores.steps, strict=True)
        ]

    def _labeled_steps(self, labeled: Rollouts) -> list[Example]:
        """Return every response with the labels of its steps."""
        steps = labeled.steps(self.tokenizer, closing=False)
        counts = steps.counts_N.tolist()
        groups = [Group(g.prompt, [r]) for g in labeled.groups for r in g.responses]
        ends, labels = steps.ends_S.split(counts), steps.rewards_S.split(counts)
        rows = zip(groups, ends, labels, strict=True)
        return [Example(g, tuple(e.tolist()), tuple(v.tolist())) for g, e, v in rows if len(e)]


def step_end(text: str, end: int, separator: str) -> int:
    """Return the end of a step's text, without separators and trailing space."""
    before, step = "", text[:end]
    while step != before:
        before, step = step, step.removesuffix(separator).rstrip()
    return len(step) or end


def contrasts(labeled: Rollouts, rng: random.Random) -> list[Example]:
    """Return one random pair of a best and a worst response for each group with unequal labels."""
    pairs = []
    totals_G = labeled.totals_N.split(labeled.sizes_G.tolist())
    equal_G = equal_groups(labeled.totals_N, labeled.sizes_G).tolist()
    for group, totals, equal in zip(labeled.groups, totals_G, equal_G, strict=True):
        if equal:
            continue
        best, worst = float(totals.max()), float(totals.min())
        chosen = rng.choice(torch.nonzero(totals == best)[:, 0].tolist())
        rejected = rng.choice(torch.nonzero(totals == worst)[:, 0].tolist())
        responses = [group.responses[chosen], group.responses[rejected]]
        pairs.append(Example(Group(group.prompt, responses)))
    return pairs
