"""A rehearsal: a method's models without data, loaded and used stage by stage, each with its peak.

What all methods share: loading, an optimizer in the state of a run's second step, and which
micro-batches are worth running.
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
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reference import Reference, frozen_copy
from trivium.models.reward_model import RewardModel
from trivium.rollout.sampling import Sampling
from trivium.training.experience import MicroBatches
from trivium.training.optimizer import Optimizer
from trivium.training.optimizer_config import OptimizerConfig

SAMPLER = "sampler"
KERNELS = 20 << 20
"""Bytes of oneDNN's kernels after a few steps, as measured: 10 to 28 MiB."""

Loaded = TypeVar("Loaded", Policy, RewardModel)


class Rehearsal:
    """The models of one run and the stages seen so far."""

    def __init__(self, kind: str, lengths: Lengths) -> None:
        self.kind, self.lengths = kind, lengths
        self.run = DryRun()
        self.stages: list[Stage] = []
        self.updated: list[tuple[str, nn.Module]] = []
        self.beside: Counter[Tag] = Counter()
        self._copy: Policy | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside is one stage; models that are resident before it count too, and what
        is sampled beside it."""
        ledger = self.run.ledger
        ledger.restart()
        with self.run:
            yield
        self.stages.append(Stage.of(name, ledger.at_peak + self.beside))

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

    def reference(self, policy: Policy, *, asked: bool = True) -> Reference:
        """Copy the policy, unless its adapters can be switched off or nothing will be asked."""
        with self.run, FakeCopies():
            reference = Reference(policy, asked=asked)
            if reference._copy is not None:
                self.run.adopt(reference._copy.model, "reference")
        if asked:
            self.stages.append(Stage.of("load reference", self.run.ledger.bytes))
        return reference

    def optimizer(
        self, sets: Sequence[tuple[str, OptimizerConfig, list[nn.Parameter]]]
    ) -> Optimizer:
        """The optimizer as it is after a first step: moments and gradients are there."""
        ledger = self.run.ledger
        with self.run:
            optimizer = Optimizer([(config, parameters) for _, config, parameters in sets], 1)
            for role, _, parameters in sets:
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
                    ledger.tag([parameter.grad], role, GRADIENTS)
            optimizer.adamw.step()
            for role, _, parameters in sets:
                for parameter in parameters:
                    ledger.tag(optimizer.adamw.state[parameter].values(), role, OPTIMIZER)
        return optimizer

    def groups(self, count: int, responses: int) -> list[Group]:
        """``count`` groups with the data's lengths in turn."""
        prompts, lengths = cycle(self.lengths.prompts), cycle(self.lengths.responses)
        return [
            Group([0] * next(prompts), [[0] * n for n in islice(lengths, responses)])
            for _ in range(count)
        ]

    def sampler(self, policy: Policy, prompts: int, samples: int, sampling: Sampling) -> None:
        """A copy of the policy answers prompts, beside all stages that follow."""
        with self.run, FakeCopies():
            self._copy = frozen_copy(policy)
            self.run.adopt(self._copy.model, SAMPLER)
        self.rollout("rollout", self._copy, prompts, samples, sampling, role=SAMPLER)
        needed = self.run.ledger.at_peak
        self.beside = Counter({(SAMPLER, k): needed[(SAMPLER, k)] for k in (ACTIVATIONS, CACHE)})

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
        """The stage in which the policy answers prompts."""
        lengths = list(islice(cycle(self.lengths.prompts), prompts))
        tokens = min(max(self.lengths.responses), sampling.max_tokens)
        with self.stage(name):
            self.run.ledger.working = role
            dry_rollout(self.run, policy, role, lengths, samples, tokens, sampling)

    def score(
        self, name: str, data: Grouped, parts: MicroBatches, *scores: Callable[[Batch], object]
    ) -> None:
        """A stage of forward passes without gradient; none where nothing is to be scored."""
        if not scores:
            return
        with self.stage(name), torch.no_grad():
            for part in heaviest(data, parts):
                for score in scores:
                    score(Batch.of(data.select(part).groups))

    def _loaded(self, role: str, load: Callable[[], Loaded]) -> Loaded:
        """Load a model; until its weights are copied, the mapped file is in memory as well."""
        loaded = load()
        at_peak = Counter(self.run.ledger.bytes)
        at_peak[(role, ACTIVATIONS)] += at_peak[(role, PARAMETERS)]
        self.stages.append(Stage.of(f"load {role}", at_peak))
        return loaded


def heaviest(data: Grouped, parts: MicroBatches) -> MicroBatches:
    """The first micro-batch and, of the others, the ones with the longest line and with the
    largest table of attention.

    The first runs without gradients and the others beside them, so either may need more; of equals
    the last is taken.
    """

    def line(number: int) -> tuple[int, int]:
        groups = data.select(parts[number]).groups
        return sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups), number

    def table(number: int) -> tuple[int, int]:
        groups = data.select(parts[number]).groups
        longest = max(len(r) for g in groups for r in g.responses)
        keys = longest + max(len(g.prompt) for g in groups)
        return len(parts[number]) * longest * keys, number

    others = range(1, len(parts)) or range(1)
    return [parts[i] for i in sorted({0, max(others, key=line), max(others, key=table)})]
