"""Key-value cache for GPUs whose decoding step is one call: the replay of a CUDA graph.

A token of a small batch takes hundreds of kernels, each of which runs for less time than the CPU
needs to launch it. A graph is recorded once and repeats them on the same memory, so shapes and
addresses must not change: the step reads whole slots, masks hide what is not written yet, and
tokens and their places are copied to where the graph reads them. After the cache is compacted or
extended, a new graph is recorded.

The head and the drawing of tokens are not part of the graph: the CPU waits for their result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from trivium.models import flops
from trivium.models.equivalence import rounding_of, states_match
from trivium.models.policy import Policy
from trivium.rollout.kv_cache import KVCache, SlotGrid

logger = logging.getLogger(__name__)

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]
"""Maps a step to a function that repeats its operations on the same memory; both return the same
tensor."""


class GraphedCache(KVCache):
    """A ``KVCache`` that records its steps and replays them.

    Args:
        policy: the policy that computes the rows.
        record: records a step, which is a pure function of the contents of memory.
    """

    idle_share = 1 / 2
    """A recording costs several steps, an idle slot little: weights are read once for all slots."""

    def __init__(self, policy: Policy, record: Record) -> None:
        super().__init__(policy)
        self.record = record
        self._recorded: tuple[SlotGrid, int] | None = None

    def _step(self, tokens_S: Tensor, place_S: Tensor, used: int, aligned: bool) -> Tensor:
        if self._recorded != (self.grid, self.response_capacity):
            self._inputs = [x.to(self.device) for x in (tokens_S, place_S)]
            self._replay = self.record(self._full_step)
            self._recorded = self.grid, self.response_capacity
        for input_S, x_S in zip(self._inputs, (tokens_S, place_S), strict=True):
            input_S.copy_(x_S)
        return self._replay()

    def _full_step(self) -> Tensor:
        """Compute a step that reads whole slots, wherever their last tokens are."""
        tokens_S, place_S = self._inputs
        return super()._step(tokens_S, place_S, self.response_capacity, aligned=False)


class CudaGraphs:
    """Records steps as CUDA graphs. They share memory: only the newest may be replayed.

    The previous graph must live until the next one is recorded, or their memory is freed.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            step()  # Libraries initialize on their first call, which cannot be recorded.
            # Other threads, such as a training thread, may use the GPU freely meanwhile.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@torch.no_grad()
def graphs_work(policy: Policy, record: Callable[[torch.device], Record] = CudaGraphs) -> bool:
    """Return whether recorded steps compute what plain steps do, compared on a few tokens.

    The step is the policy's own forward pass, in which some families wait for the GPU; those
    cannot be recorded.
    """
    name = type(policy.model).__name__
    try:
        with flops.apart():
            caches = KVCache(policy), GraphedCache(policy, record(policy.device))
            works = _agree(*caches, rounding_of(policy.backbone))
        reason: object = "hidden states differ"
    except Exception as error:  # Recording fails in many ways, and none may end a run.
        works, reason = False, error.__context__ or error
    if not works:
        logger.warning("%s is sampled without CUDA graphs: %.500s", name, reason)
    return works


def _agree(plain: KVCache, graphed: GraphedCache, rounding: float) -> bool:
    for cache in (plain, graphed):
        cache.admit([[1, 0, 1], [0]], 2)
    for token in (0, 1, 0):
        expected, found = (cache.advance(torch.full((4,), token)) for cache in (plain, graphed))
        if not states_match(found, expected, rounding):
            return False
    return True
