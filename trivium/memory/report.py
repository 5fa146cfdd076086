"""What a prediction says: the models of each stage and the bytes that each of them needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from trivium.memory.dry_run import ACTIVATIONS, CACHE, GRADIENTS, OPTIMIZER, PARAMETERS, Tag


@dataclass(frozen=True)
class Lengths:
    """Token counts of the data, used in turn: (96,) is one length, (20, 96) a mix of two.

    Attributes:
        prompts: of prompts.
        responses: of responses; for preference pairs chosen and rejected in turn.
        held_out: held-out examples of SFT and reward models, whose loss is computed (0: none).
    """

    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    held_out: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not self.responses or min(self.prompts + self.responses) < 1:
            raise ValueError(
                f"lengths of prompts {self.prompts} and responses {self.responses}: give at least "
                "one of each, all of them 1 or more tokens"
            )


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of one model at a stage's peak.

    ``activations`` is all that is not one of the others: what autograd keeps, masks, logits of a
    chunk, temporaries of the optimizer, the mapped file while a checkpoint is loaded.
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
    """One stage of a method, at the moment when it needs most."""

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
        """Bytes of all models together."""
        return sum(model.total for model in self.models)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs, stage by stage, above those of the process itself.

    ``kernels`` is what oneDNN keeps, where it multiplies: code that it makes for shapes it meets.
    """

    kind: str
    stages: tuple[Stage, ...]
    kernels: int = 0

    @property
    def peak(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bytes(self) -> int:
        """The largest total of any stage, and what is kept at all times."""
        return self.peak.total + self.kernels
