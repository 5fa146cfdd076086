"""Scoring overlapped with sampling: finished groups are scored while others are still sampled.

A thread calls the rewards that allow this (``while_sampling``) for several groups at a time. The
groups of each call do not depend on the speed of the calls. The result equals that of one call for
all responses: values are put in order and checked for the whole batch (``component``). If a call
fails, the reward is called again for all responses after sampling. Rewards that must see all
responses in one call are excluded.

Overlapping hides the time that a reward waits for a server, another process or another device.
Python code that computes holds the GIL and gains nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from trivium.rewards.component import CheckedValue, Component, columns_of

if TYPE_CHECKING:
    from trivium.data.prompts import Prompt
    from trivium.data.response import Response

CALLS_PER_BATCH = 8
"""Number of calls per reward and rollout batch."""

ScoringBatch = list[tuple[int, "list[Response]"]]
"""Groups that are scored in one call: prompt indices and responses."""


class OverlappedScoring:
    """Context manager that scores the groups of one batch while the batch is sampled.

    After an exit with an error, no further call starts. A running call cannot be ended. It is
    abandoned, like a call that exceeds its timeout, and its result is discarded.

    Args:
        components: rewards to call.
        prompts: prompts of the batch.
        columns: columns of all prompts; by default those of ``prompts``, which may be a share of
            them.
    """

    def __init__(
        self,
        components: Sequence[Component],
        prompts: Sequence[Prompt],
        columns: Collection[str] | None = None,
    ) -> None:
        self._prompts = prompts
        self._columns = columns_of(prompts) if columns is None else columns
        self._size = math.ceil(len(prompts) / CALLS_PER_BATCH)
        self._pending: ScoringBatch = []
        self._seen_indices: set[int] = set()
        self._active = {component.name: component for component in components}
        self._results: dict[str, dict[int, list[CheckedValue]]] = {
            name: {} for name in self._active
        }
        self._seconds_left = {c.name: c.config.timeout or 0.0 for c in components}
        self._queue: SimpleQueue[ScoringBatch | None] = SimpleQueue()
        self._canceled, self._done = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> OverlappedScoring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._canceled.set()
        self._queue.put(None)

    def add(self, index: int, group: list[Response]) -> None:
        """Add a finished group; it is scored when there are enough groups for a call."""
        if self._active:
            self._seen_indices.add(index)
            self._pending.append((index, group))
            if len(self._pending) >= self._size:
                self._submit()

    def results(self, responses: Sequence[list[Response]]) -> dict[str, list[CheckedValue]]:
        """Wait for the calls and return the values of all responses, by reward.

        Rewards with a failed call are omitted. If no group was added before, return no rewards.
        """
        if self._thread is None:
            return {}
        for index, group in enumerate(responses):
            if index not in self._seen_indices:
                self.add(index, group)
        self._submit()
        self._queue.put(None)
        self._done.wait()
        if self._error is not None:
            raise self._error
        indices = range(len(responses))
        return {
            name: [entry for index in indices for entry in self._results[name][index]]
            for name in self._active
        }

    def _submit(self) -> None:
        if self._pending:
            self._queue.put(self._pending)
            self._pending = []
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="trivium scoring")
            self._thread.start()

    def _run(self) -> None:
        try:
            while (batch := self._queue.get()) is not None:
                for component in list(self._active.values()):
                    if self._canceled.is_set():
                        return
                    self._score(component, batch)
        except BaseException as error:  # `results` raises the error in the caller's thread.
            self._error = error
        finally:
            self._done.set()

    def _score(self, component: Component, batch: ScoringBatch) -> None:
        """Call one reward; all its calls for a batch share one timeout."""
        name = component.name
        prompts = [self._prompts[index] for index, group in batch for _ in group]
        flat = [response for _, group in batch for response in group]
        start = time.monotonic()
        values = None
        if self._seconds_left[name] > 0:
            values = component.score_subset(prompts, flat, self._columns, self._seconds_left[name])
        self._seconds_left[name] -= time.monotonic() - start
        if values is None:
            del self._active[name]
            return
        remaining = iter(values)
        self._results[name] |= {index: [next(remaining) for _ in group] for index, group in batch}
