"""Scoring groups that have ended while others are still sampled, so that waiting costs no time.

A thread calls the rewards that allow it (``while_sampling``) for some groups at a time, always the
same ones, however fast the calls are. What comes of it is what one call for all responses gives:
values are put in order, what they mean is judged for the batch as a whole (``component``), and
where any call fails, the reward is called once more for everything, as if it had not been called
before. Left out: sampling, and rewards that must see all responses in one call.

A thread gains what a reward spends waiting, for a server, another process or another device.
Python code that computes holds the interpreter's lock meanwhile and gains nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from trivium.rewards.component import Component, Entry, columns_of

if TYPE_CHECKING:
    from trivium.data.prompts import Prompt
    from trivium.rollout.engine import Response

CALLS_PER_BATCH = 8
"""How many calls a batch is cut into."""

ScoringBatch = list[tuple[int, "list[Response]"]]
"""Groups that are scored in one call: the places of their prompts, and their responses."""


class OverlappedScoring:
    """The scoring of one batch of groups while it is sampled.

    A context manager: left early, it begins no further call. A call that goes on cannot be ended;
    it is given up, as one past its limit is, and nobody reads its result.

    Args:
        components: the rewards to call.
        prompts: the batch's prompts.
    """

    def __init__(self, components: Sequence[Component], prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._columns = columns_of(prompts)
        self._size = math.ceil(len(prompts) / CALLS_PER_BATCH)
        self._waiting: ScoringBatch = []
        self._told: set[int] = set()
        self._working = {component.name: component for component in components}
        self._found: dict[str, dict[int, list[Entry]]] = {name: {} for name in self._working}
        self._left = {c.name: c.config.timeout or 0.0 for c in components}
        self._queue: SimpleQueue[ScoringBatch | None] = SimpleQueue()
        self._given_up, self._done = threading.Event(), threading.Event()
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
        self._given_up.set()
        self._queue.put(None)

    def add(self, place: int, group: list[Response]) -> None:
        """Take a group that has ended, to score it once there are enough for a call."""
        if self._working:
            self._told.add(place)
            self._waiting.append((place, group))
            if len(self._waiting) >= self._size:
                self._send()

    def found(self, responses: Sequence[list[Response]]) -> dict[str, list[Entry]]:
        """What the calls gave for all responses, by reward, once they are done.

        Left out are rewards of which a call failed, and all where no group was taken early.
        """
        if self._thread is None:
            return {}
        for place, group in enumerate(responses):
            if place not in self._told:
                self.add(place, group)
        self._send()
        self._queue.put(None)
        self._done.wait()
        if self._error is not None:
            raise self._error
        places = range(len(responses))
        return {
            name: [entry for place in places for entry in self._found[name][place]]
            for name in self._working
        }

    def _send(self) -> None:
        if self._waiting:
            self._queue.put(self._waiting)
            self._waiting = []
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="trivium scoring")
            self._thread.start()

    def _work(self) -> None:
        try:
            while (helping := self._queue.get()) is not None:
                for component in list(self._working.values()):
                    if self._given_up.is_set():
                        return
                    self._score(component, helping)
        except BaseException as error:  # Whatever it is must reach who waits, not end a thread.
            self._error = error
        finally:
            self._done.set()

    def _score(self, component: Component, helping: ScoringBatch) -> None:
        """Call one reward; all its calls for a batch share one limit."""
        name = component.name
        prompts = [self._prompts[place] for place, group in helping for _ in group]
        flat = [response for _, group in helping for response in group]
        began = time.monotonic()
        entries = None
        if self._left[name] > 0:
            entries = component.score_subset(prompts, flat, self._columns, self._left[name])
        self._left[name] -= time.monotonic() - began
        if entries is None:
            del self._working[name]
            return
        of_one = iter(entries)
        self._found[name] |= {place: [next(of_one) for _ in group] for place, group in helping}
