"""Simulation of a run: models without data, loaded and used stage by stage, and each stage's peak.

This module holds what all training commands share: loading models, an optimizer in the state of a
run's second step, and the choice of micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import TypeVar

import torch
from torch import nn

from trivium.data.batch import Batch, Grouped
from trivium.data.group import Group
from trivium.hf.loading import trained_parameters
from trivium.hf.model_config import ModelConfig
from trivium.memory.dry_run import (
    ACTIVATIONS,
    CACHE,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    DryRun,
    FakeCopies,
    Tag,
)
from trivium.memory.report import Lengths, Memory, Stage
from trivium.memory.rollout import dry_rollout
from trivium.memory.shapes import weightless_policy, weightless_scorer
from trivium.models.policy import Policy
from trivium.models.reference import Reference, frozen_copy
from trivium.models.reward_model import RewardModel
from trivium.rollout.sampling import Sampling
from trivium.training.ema import WeightAverage
from trivium.training.experience import MicroBatches
from trivium.training.optimizer import Optimizer
from trivium.training.optimizer_config import OptimizerConfig

SAMPLER = "sampler"
KERNELS = 20 << 20
"""Bytes of oneDNN's kernels after a few steps; 10 to 28 MiB were measured."""

Loaded = TypeVar("Loaded", Policy, RewardModel)


class Simulator:
    """Models of one simulated run, and the stages so far."""

    def __init__(self, kind: str, lengths: Lengths) -> None:
        self.kind, self.lengths = kind, lengths
        self.run = DryRun()
        self.stages: list[Stage] = []
        self.concurrent: Counter[Tag] = Counter()
        self._sampler_policy: Policy | None = None
        self._average: WeightAverage | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the block inside as one stage.

        Its memory includes the models loaded before and the concurrent sampler.
        """
        ledger = self.run.ledger
        ledger.reset_peak()
        with self.run:
            yield
        self.stages.append(Stage.of(name, ledger.at_peak + self.concurrent))

    def memory(self) -> Memory:
        return Memory(self.kind, tuple(self.stages), KERNELS if self.run.uses_onednn else 0)

    def policy(self, config: ModelConfig, temperature: float = 1.0) -> Policy:
        """Load the policy."""
        return self._loaded(
            "policy", lambda: weightless_policy(self.run, config, "policy", temperature)
        )

    def scorer(self, config: ModelConfig, role: str) -> RewardModel:
        """Load a reward model or a critic."""
        return self._loaded(role, lambda: weightless_scorer(self.run, config, role))

    def reference(self, policy: Policy, *, enabled: bool = True) -> Reference:
        """Copy the policy, unless it has adapters or ``enabled`` is False."""
        with self.run, FakeCopies():
            reference = Reference(policy, enabled=enabled)
            if reference.frozen_policy is not None:
                self.run.adopt(reference.frozen_policy.model, "reference")
        if enabled:
            self.stages.append(Stage.of("load reference", self.run.ledger.bytes))
        return reference

    def optimizer(
        self, sets: Sequence[tuple[str, OptimizerConfig, list[nn.Parameter]]]
    ) -> Optimizer:
        """Return the optimizer after a first step, so that moments and gradients are allocated."""
        ledger = self.run.ledger
        with self.run:
            optimizer = Optimizer([(config, parameters) for _, config, parameters in sets], 1)
            for role, _, parameters in sets:
                for parameter in parameters:
                    master = optimizer.masters.of.get(parameter, parameter)
                    master.grad = torch.empty_like(master)
                    ledger.tag([master.grad], role, GRADIENTS)
                    if master is not parameter:
                        ledger.tag([master], role, OPTIMIZER)
            for torch_optimizer in optimizer.by_kind.values():
                torch_optimizer.step()
            for role, _, parameters in sets:
                for parameter in parameters:
                    ledger.tag(optimizer.state_of(parameter).values(), role, OPTIMIZER)
        return optimizer

    @contextmanager
    def averaged(self, policy: Policy, decay: float | None) -> Iterator[None]:
        """Hold the moving average of the policy's weights from now on, if there is a decay.

        Inside the block, in which the model has the averaged weights, its own are held, too.
        """
        own = []
        if decay is not None:
            with self.run:
                self._average = WeightAverage(policy, decay)
                own = [p.detach().clone() for p in trained_parameters(policy.model)]
            self.run.ledger.tag(self._average.average, "policy", OPTIMIZER)
            self.run.ledger.tag(own, "policy", PARAMETERS)
        yield
        own.clear()

    def groups(self, count: int, responses: int) -> list[Group]:
        """Return ``count`` groups that cycle through the lengths of the data."""
        prompts, lengths = cycle(self.lengths.prompts), cycle(self.lengths.responses)
        return [
            Group([0] * next(prompts), [[0] * n for n in islice(lengths, responses)])
            for _ in range(count)
        ]

    def sampler(self, policy: Policy, prompts: int, samples: int, sampling: Sampling) -> None:
        """Simulate a rollout by a copy of the policy, concurrent with all stages that follow."""
        with self.run, FakeCopies():
            self._sampler_policy = frozen_copy(policy)
            self.run.adopt(self._sampler_policy.model, SAMPLER)
        self.rollout("rollout", self._sampler_policy, prompts, samples, sampling, role=SAMPLER)
        at_peak = self.run.ledger.at_peak
        self.concurrent = Counter(
            {(SAMPLER, kind): at_peak[(SAMPLER, kind)] for kind in (ACTIVATIONS, CACHE)}
        )

    def rollout(
        self,
        name: str,
        policy: Policy,
        prompts: int,
        samples: int,
        sampling: Sampling,
        *,
        role: str = "policy",
    ) -> None:
        """Simulate a stage in which the policy samples responses to prompts."""
        lengths = list(islice(cycle(self.lengths.prompts), prompts))
        tokens = min(max(self.lengths.responses), sampling.max_tokens)
        with self.stage(name):
            self.run.ledger.active_role = role
            dry_rollout(self.run, policy, role, lengths, samples, tokens, sampling)

    def score(
        self, name: str, data: Grouped, parts: MicroBatches, *scores: Callable[[Batch], object]
    ) -> None:
        """Simulate a stage of forward passes without gradients; no stage if there are no scores."""
        if not scores:
            return
        with self.stage(name), torch.no_grad():
            for part in heaviest(data, parts):
                for score in scores:
                    score(Batch.of(data.select(part).groups))

    def _loaded(self, role: str, load: Callable[[], Loaded]) -> Loaded:
        """Load a model; the mapped file is in memory, too, until the weights are copied."""
        loaded = load()
        at_peak = Counter(self.run.ledger.bytes)
        at_peak[(role, ACTIVATIONS)] += at_peak[(role, PARAMETERS)]
        self.stages.append(Stage.of(f"load {role}", at_peak))
        return loaded


def heaviest(data: Grouped, parts: MicroBatches) -> MicroBatches:
    """Return the micro-batches that can have the largest memory, in their order.

    These are the first micro-batch, and of the others the one with the longest packed sequence and
    the one with the largest attention matrix. The first runs before gradients are allocated and the
    others after, so either can need more. Of equal micro-batches the last is chosen.
    """

    def sequence_length(number: int) -> tuple[int, int]:
        groups = data.select(parts[number]).groups
        return sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups), number

    def attention_size(number: int) -> tuple[int, int]:
        groups = data.select(parts[number]).groups
        longest = max(len(r) for g in groups for r in g.responses)
        keys = longest + max(len(g.prompt) for g in groups)
        return len(parts[number]) * longest * keys, number

    others = range(1, len(parts)) or range(1)
    longest = max(others, key=sequence_length)
    return [parts[i] for i in sorted({0, longest, max(others, key=attention_size)})]
