"""Result of a prediction: the models of each stage and the bytes of each model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from trivium.memory.dry_run import ACTIVATIONS, CACHE, GRADIENTS, OPTIMIZER, PARAMETERS, Tag

RELIABLE = 1 << 30
"""Bytes from which a prediction is within a tenth of the measured peak."""
LIBRARIES = 110 << 20
"""Bytes that small runs used at most beyond their prediction: library code that is first used
during the run, and the heaps of several threads."""


@dataclass(frozen=True)
class Lengths:
    """Token counts of the data, used in rotation: (96,) is one length, (20, 96) alternates two.

    Attributes:
        prompts: lengths of prompts.
        responses: lengths of responses; for preference pairs, chosen and rejected alternate.
        held_out: number of held-out examples of SFT and reward models (0: none).
        count: number of prompts, pairs or demonstrations in the data, held-out ones included.
    """

    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    held_out: int = 0
    count: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not self.prompts or not self.responses or min(self.prompts + self.responses) < 1:
            raise ValueError(
                f"prompt lengths {self.prompts} and response lengths {self.responses}: give at "
                "least one of each, all of them 1 or more tokens"
            )


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of one model at a stage's peak.

    ``activations`` is the rest: tensors saved by autograd, masks, logits of a chunk, temporary
    tensors of the optimizer, and the mapped file while a checkpoint is loaded.
    """

    role: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    cache: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.cache


@dataclass(frozen=True)
class Stage:
    """One stage of a run, at its peak."""

    name: str
    models: tuple[ModelMemory, ...]

    @classmethod
    def of(cls, name: str, bytes_of: Counter[Tag]) -> Stage:
        roles = dict.fromkeys(role for (role, _), size in bytes_of.items() if size)
        kinds = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, CACHE)
        return cls(
            name, tuple(ModelMemory(r, *(bytes_of[(r, kind)] for kind in kinds)) for r in roles)
        )

    @property
    def total(self) -> int:
        """Total bytes of all models."""
        return sum(model.total for model in self.models)


@dataclass(frozen=True)
class Memory:
    """Bytes of a run by stage, in addition to those of the process itself.

    ``kernels`` are the bytes of the code that oneDNN generates for each shape, if it is in use.
    """

    kind: str
    stages: tuple[Stage, ...]
    kernels: int = 0

    @property
    def peak(self) -> Stage:
        """Stage with the largest total."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bytes(self) -> int:
        """Largest total of any stage, plus the kernels."""
        return self.peak.total + self.kernels

    @property
    def accuracy(self) -> str:
        """How far the measured peak may be from the prediction, in words."""
        if self.bytes >= RELIABLE:
            return "±10 %"
        return f"±10 %, and up to {LIBRARIES >> 20} MiB more for libraries and threads"
