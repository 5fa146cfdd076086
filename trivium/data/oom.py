"""Passes over data that split it if it does not fit in memory; they know no model.

When memory runs out, the part is split in half and each half is tried, which gives the same numbers
up to rounding. A part that cannot be split ends the run. The next part is tried whole again, so a
result depends only on its own data and on memory. ``training.micro_batch`` does the same for
gradients.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trivium import distributed
from trivium.data.batch import Batch, Grouped, token_index
from trivium.errors import TrainingError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_MESSAGES = (
    "out of memory",  # CUDA, MPS and others
    "can't allocate memory",  # the CPU's allocator on Linux
    "not enough memory",  # and on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the device or the machine ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def release_caches() -> None:
    """Free the memory of unreachable objects and of the allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class OutOfMemory:
    """An out-of-memory failure and its message.

    ``grads_corrupted``: gradients were being accumulated when memory ran out.
    """

    reason: str
    grads_corrupted: bool = False

    @classmethod
    def of(cls, error: BaseException, *, grads_corrupted: bool = False) -> OutOfMemory:
        """Describe an out-of-memory error; raise any other error again."""
        if not is_out_of_memory(error):
            raise error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return cls(lines[0][:200], grads_corrupted)


_warned: list[int] = []
"""Sizes, in tokens, of parts whose split was logged; only a smaller one is logged again."""


def free_memory(part: Grouped, failure: OutOfMemory, *, whole_groups: bool = False) -> None:
    """Free the memory of a part that did not fit, and log that it will be split.

    Raises:
        TrainingError: the part cannot be split.
    """
    release_caches()
    if part.halves(whole_groups=whole_groups) is None:
        raise TrainingError(_too_large(part, failure))
    if not _warned or part.tokens < min(_warned):
        _warned.append(part.tokens)
        logger.warning(
            "memory ran out on a micro-batch of %d tokens, which is split in half: the result is "
            "the same, but the failed attempt costs time. Set tokens_per_micro_batch below %d to "
            "avoid it (%s)",
            part.tokens,
            part.tokens,
            failure.reason,
        )


def _too_large(part: Grouped, failure: OutOfMemory) -> str:
    [group] = part.groups
    responses = " and ".join(str(len(response)) for response in group.responses)
    return (
        f"a prompt of {len(group.prompt)} tokens with a response of {responses} tokens does not "
        f"fit in memory by itself ({failure.reason}): shorten prompts and responses (max_tokens, "
        "max_prompt_tokens, max_response_tokens), or set model.gradient_checkpointing: true, "
        "model.dtype: bfloat16 or model.lora; docs/memory.md explains how to predict memory"
    )


def run_with_oom_split(
    data: Grouped,
    responses: Sequence[int],
    run: Callable[[Any], Result],
    *,
    whole_groups: bool = False,
) -> Iterator[tuple[list[int], Result]]:
    """Call ``run`` on these responses of ``data``, split into parts only if memory runs out.

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


def run_parts(
    data: Grouped, parts: Sequence[Sequence[int]], run: Callable[[Any], Result]
) -> list[tuple[list[int], Result]]:
    """Return ``run_with_oom_split`` of every part, in order; each process runs its share of them.

    The results must be tensors, or containers of them.
    """

    def run_own() -> list[list[tuple[list[int], Result]]]:
        own = distributed.own(parts)
        return [list(run_with_oom_split(data, responses, run)) for responses in own]

    by_rank = distributed.gather("scores", run_own, plan=[list(part) for part in parts])
    return list(chain(*distributed.in_order(by_rank, len(parts))))


def _attempt(run: Callable[[Any], Result], part: Grouped) -> Result | OutOfMemory:
    """Call ``run``; return an out-of-memory failure instead of raising it.

    Returning drops the error and, with its frames, the tensors that they hold.
    """
    try:
        return run(part)
    except (RuntimeError, MemoryError) as error:
        return OutOfMemory.of(error)


class LogprobModel(Protocol):
    """A model that scores response tokens: the policy or the reference."""

    def logprobs(self, batch: Batch) -> Tensor: ...


def score_logprobs(model: LogprobModel, data: Grouped, parts: Sequence[Sequence[int]]) -> Tensor:
    """Return ``score_all`` of a model's log-probs, ``[T]``."""
    (logprobs_T,) = score_all(data, parts, lambda batch: (model.logprobs(batch),))
    return logprobs_T


@torch.no_grad()
def score_all(
    data: Grouped, parts: Sequence[Sequence[int]], score: Callable[[Batch], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return per-token scores of all these responses, ``[T]`` each, by micro-batch.

    Given the micro-batches of a later optimizer step, the results are bit-identical to those of
    this step with unchanged weights, so ρ is exactly 1 before the first update. (If memory runs out
    in only one of the two passes, they are equal up to rounding.)
    """
    lengths_N = data.lengths_N
    pieces, order = [], []
    for part, scores in run_parts(data, parts, lambda d: score(Batch.of(d.groups))):
        pieces.append(scores)
        order.append(token_index(lengths_N, torch.tensor(part)))
    back = torch.cat(order).argsort()
    return tuple(torch.cat(xs)[back.to(xs[0].device)] for xs in zip(*pieces, strict=True))
