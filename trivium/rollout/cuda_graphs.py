"""Growing rows on a GPU, where a token of all of them is one call: the replay of a CUDA graph.

A small batch's token is hundreds of kernels, each of which takes a GPU less time than launching it
takes the CPU. A graph is recorded once and repeats them on the same memory, so neither shapes nor
addresses may change: strips are looked at as far as they reach, masks hide what is not written yet,
and tokens and their places are copied to where the graph reads them. When strips are moved or
lengthened, a new graph is recorded.

Left out: the head and the drawing of tokens, whose result the CPU waits for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from trivium.models import flops
from trivium.models.equivalence import HALF_PRECISION_TOL, is_precise, states_match
from trivium.models.policy import Policy
from trivium.rollout.kv_cache import Grid, KVCache

logger = logging.getLogger(__name__)

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]
"""From a step to what repeats its operations on the same memory; both return the same tensor."""


class GraphedCache(KVCache):
    """A ``KVCache`` that records its steps and replays them.

    Args:
        policy, apart: as there.
        record: how a step is recorded. It is a pure function of what is in memory.
    """

    idle_share = 1 / 2
    """A recording costs several steps, an idle slot little: weights are read once for all."""

    def __init__(self, policy: Policy, *, shared_prefix: bool = True, record: Record) -> None:
        super().__init__(policy, shared_prefix=shared_prefix)
        self.record = record
        self._recorded: tuple[Grid, int] | None = None

    def _step(self, tokens_S: Tensor, at_S: Tensor, used: int, aligned: bool) -> Tensor:
        if self._recorded != (self.grid, self.response_capacity):
            self._given = [x.to(self.device) for x in (tokens_S, at_S)]
            self._replay = self.record(self._whole_step)
            self._recorded = self.grid, self.response_capacity
        for held_S, x_S in zip(self._given, (tokens_S, at_S), strict=True):
            held_S.copy_(x_S)
        return self._replay()

    def _whole_step(self) -> Tensor:
        """One that looks at whole strips, wherever in them rows are."""
        tokens_S, at_S = self._given
        return super()._step(tokens_S, at_S, self.response_capacity, aligned=False)


class CudaGraphs:
    """Records steps as CUDA graphs. They share memory: only the newest is ever replayed.

    The one before must live until the next is recorded, or else their memory is let go.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            step()  # What libraries set up at their first call cannot be recorded.
            # Other threads, which may be learning meanwhile, do as they like.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                found = step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


@torch.no_grad()
def graphs_work(policy: Policy, record: Callable[[torch.device], Record] = CudaGraphs) -> bool:
    """Whether rows of this policy grow by graphs as they do without: compared on a few tokens.

    Only a lean pass is recorded; what the code of other families asks of the CPU is not known.
    """
    name = type(policy.model).__name__
    if not policy.has_decode_model:
        logger.warning("%s is sampled without CUDA graphs: it has no lean pass", name)
        return False
    try:
        with flops.apart():
            works = _agree(KVCache(policy), GraphedCache(policy, record=record(policy.device)))
        reason: object = "hidden states differ"
    except Exception as error:  # Recording fails in many ways, and none may end a run.
        works, reason = False, error.__context__ or error
    if not works:
        logger.warning("%s is sampled without CUDA graphs: %.500s", name, reason)
    return works


def _agree(plain: KVCache, graphed: GraphedCache) -> bool:
    for cache in (plain, graphed):
        cache.admit([[1, 0, 1], [0]], 2)
    for token in (0, 1, 0):
        expected, found = (cache.advance(torch.full((4,), token)) for cache in (plain, graphed))
        if not states_match(found, expected, 1e-3 if is_precise(expected) else HALF_PRECISION_TOL):
            return False
    return True
