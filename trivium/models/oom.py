"""Forward passes over parts of the data, in halves where a part does not fit the memory.

Where memory runs out, the part is cut in two and both halves go the same way: the same numbers up
to rounding, for some time. What does not fit even alone ends the run. Nothing is remembered: the
next part is tried whole, so that a result depends on its own data and memory alone. Gradients are
``training.micro_batch``'s business.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trivium.data.batch import Batch, Grouped, token_index
from trivium.errors import TrainingError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_WORDS = (
    "out of memory",  # CUDA, MPS and others
    "can't allocate memory",  # the CPU's allocator on Linux
    "not enough memory",  # and on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the device or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def release_caches() -> None:
    """Give back what is held by garbage and by the allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out, and in whose words; ``grads_corrupted`` where gradients were being added up."""

    reason: str
    grads_corrupted: bool = False

    @classmethod
    def of(cls, error: BaseException, *, grads_corrupted: bool = False) -> OutOfMemory:
        """Raises any other error."""
        if not is_out_of_memory(error):
            raise error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return cls(lines[0][:200], grads_corrupted)


_told: list[int] = []
"""Sizes, in tokens, whose division was told; only smaller ones are told again."""


def free_memory(part: Grouped, no_room: OutOfMemory, *, whole_groups: bool = False) -> None:
    """Free the memory that a part held which did not fit, and tell that it will be halved.

    Raises:
        TrainingError: it cannot be halved.
    """
    release_caches()
    if part.halves(whole_groups=whole_groups) is None:
        raise TrainingError(_too_large(part, no_room))
    if not _told or part.tokens < min(_told):
        _told.append(part.tokens)
        logger.warning(
            "memory ran out on a micro-batch of %d tokens, which is done in halves instead: the "
            "result is the same, but the failed try costs time. Set tokens_per_micro_batch below "
            "%d to spare it (%s)",
            part.tokens,
            part.tokens,
            no_room.reason,
        )


def _too_large(part: Grouped, no_room: OutOfMemory) -> str:
    [group] = part.groups
    responses = " and ".join(str(len(response)) for response in group.responses)
    return (
        f"a prompt of {len(group.prompt)} tokens and its response of {responses} tokens do not fit "
        f"the memory even alone ({no_room.reason}): shorten prompts and responses (max_tokens, "
        "max_prompt_tokens, max_response_tokens), or set model.gradient_checkpointing: true, "
        "model.dtype: bfloat16 or model.lora; docs/memory.md says how to predict what a run needs"
    )


def run_with_oom_split(
    data: Grouped,
    responses: Sequence[int],
    run: Callable[[Any], Result],
    *,
    whole_groups: bool = False,
) -> Iterator[tuple[list[int], Result]]:
    """``run`` on these responses of ``data``: at once, or in as many parts as the memory asks for.

    Yields the responses of each part, in order, with its result.
    """
    waiting = [list(responses)]
    while waiting:
        chosen = waiting.pop()
        part = data.select(chosen)
        result = _attempt(run, part)
        if isinstance(result, OutOfMemory):
            free_memory(part, result, whole_groups=whole_groups)
            halves = part.halves(whole_groups=whole_groups) or ()
            waiting += [[chosen[i] for i in half] for half in reversed(halves)]
        else:
            yield chosen, result


def _attempt(run: Callable[[Any], Result], part: Grouped) -> Result | OutOfMemory:
    """Returning drops the error and, with its frames, the tensors that it held."""
    try:
        return run(part)
    except (RuntimeError, MemoryError) as error:
        return OutOfMemory.of(error)


class Scores(Protocol):
    """A policy, or the reference."""

    def logprobs(self, batch: Batch) -> Tensor: ...


def score_logprobs(model: Scores, data: Grouped, parts: Sequence[Sequence[int]]) -> Tensor:
    """``score_all`` of a model's log-probs, ``[T]``."""
    (logprobs_T,) = score_all(data, parts, lambda batch: (model.logprobs(batch),))
    return logprobs_T


@torch.no_grad()
def score_all(
    data: Grouped, parts: Sequence[Sequence[int]], score: Callable[[Batch], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Per-token scores of all these responses, ``[T]`` each, computed micro-batch by micro-batch.

    Given the micro-batches of a later optimizer step, the results are bit-equal to what that step
    computes with unchanged weights, so that ρ is exactly 1 before the first update. (Where memory
    runs out in one of the two passes only, they are equal up to rounding.)
    """
    lengths_N = data.lengths_N
    pieces, order = [], []
    for responses in parts:
        for part, scores in run_with_oom_split(
            data, responses, lambda d: score(Batch.of(d.groups))
        ):
            pieces.append(scores)
            order.append(token_index(lengths_N, torch.tensor(part)))
    back = torch.cat(order).argsort()
    return tuple(torch.cat(xs)[back.to(xs[0].device)] for xs in zip(*pieces, strict=True))
