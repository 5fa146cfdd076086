"""Status of every rank, which names the one that ended, froze or failed.

Ranks write it to the store of their launcher, twice a second, from a thread. When an exchange
fails, the status says which rank is the cause; and where nothing else notices a lost rank, the
thread ends its process. One rank prints the message. What ranks exchange is in ``distributed``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from trivium.errors import TrainingError

BEAT_SECONDS, DEAD_SECONDS, FROZEN_SECONDS = 0.5, 3.0, 60.0
"""Time between two reports of a rank; time without one after which it has ended, if a connection
broke; and if nothing else is wrong. The last one allows for C code that holds up Python's threads.
"""
GRACE_SECONDS = 10.0
"""Time that a rank has to notice by itself that another one is lost."""
_TOLD = "trivium/told"


class RankStatus:
    """The status of this rank, and of the others as the store has it.

    Args:
        store: the launcher's store.
        rank, size: this rank, and their number.
        disconnect: closes this rank's connections, so that no other rank waits for it.

    Attributes:
        at: what this rank exchanges with the others, or exchanged last.
    """

    def __init__(self, store: Any, rank: int, size: int, disconnect: Callable[[], None]) -> None:
        self._store, self._rank, self._disconnect = store, rank, disconnect
        self._keys = [f"trivium/rank/{r}" for r in range(size)]
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="trivium ranks")
        self._own: dict[str, Any] = {"beat": 0, "failed": None, "waits": False, "left": False}
        self._last = [(b"", time.monotonic())] * size
        self._noticed: float | None = None
        self.at = "the start"
        self._publish()

    def start(self) -> None:
        """Report from now on that this rank is alive, and watch the others."""
        self._thread.start()

    def leave(self) -> None:
        """Report that this rank has finished."""
        self._stopped.set()
        # A thread that the interpreter's end finds inside the store's C++ code aborts the process.
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS)
        with suppress(RuntimeError):
            self._publish(left=True)

    def lost(self, what: str, error: RuntimeError) -> TrainingError:
        """Return the error for an exchange that failed: it names the rank that caused it."""
        reason = str(error).strip().splitlines()[0]
        try:
            self._publish(waits=True)
            gone = self._find_lost()
        except RuntimeError:  # The store ended with rank 0, where the launcher does not hold it.
            gone = {0: ""}
        named = [_named(r, text) for r, text in gone.items() if text]
        if gone:
            return TrainingError(named[0] if named else _ended([*gone], what))
        places = ", ".join(f"rank {r} at {status['at']}" for r, status in self._others())
        return TrainingError(f"{what}: the ranks no longer reach each other ({reason}); {places}")

    def _find_lost(self) -> dict[int, str]:
        """Return the ranks that failed, with their messages, or those that are silent."""
        before, start = self._read(), time.monotonic()
        while True:
            time.sleep(BEAT_SECONDS / 5)
            failed = {r: x["failed"] for r, x in self._others() if x["failed"]}
            if failed:
                return failed
            now = self._read()
            silent = [
                r
                for r, x in self._others()
                if x["left"] or (now[r] == before[r] and not x["waits"])
            ]
            # On a busy machine, a rank that lives may be late.
            waited = time.monotonic() - start
            if waited > DEAD_SECONDS and (len(silent) < 2 or waited > 2 * DEAD_SECONDS):
                return dict.fromkeys(silent, "")

    def prints(self, message: str) -> bool:
        """Return whether this rank prints the message that ends the run: rank 0 if it can."""
        try:
            self._publish(failed=message)
            if self._rank > 0:
                self._disconnect()  # Rank 0 may wait for this one.
                end = time.monotonic() + GRACE_SECONDS / 2
                while time.monotonic() < end and not self._store.check([_TOLD]):
                    time.sleep(BEAT_SECONDS / 5)
            first = self._store.add(_TOLD, 1) == 1
            if self._rank == 0:
                time.sleep(BEAT_SECONDS)  # The store may end with this rank: the others look there.
            return first
        except RuntimeError:
            return self._rank <= 1

    def _publish(self, **changes: Any) -> None:
        with self._lock:
            self._own |= {**changes, "at": self.at}
            self._store.set(self._keys[self._rank], json.dumps(self._own))

    def _read(self) -> list[bytes]:
        return self._store.multi_get(self._keys)

    def _others(self) -> list[tuple[int, dict[str, Any]]]:
        found = [json.loads(data) for data in self._read()]
        return [(r, status) for r, status in enumerate(found) if r != self._rank]

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beat += 1
            with suppress(RuntimeError):  # Without its store, this rank learns of it otherwise.
                self._publish(beat=beat)
                self._end_if_lost()

    def _end_if_lost(self) -> None:
        """End the process if another rank is lost and this rank's main thread does not notice."""
        now = time.monotonic()
        new = self._read()
        self._last = [
            old if old[0] == data else (data, now)
            for old, data in zip(self._last, new, strict=True)
        ]
        lost = {r: status["failed"] for r, status in self._others() if status["failed"]}
        for r, status in self._others():
            if now - self._last[r][1] > FROZEN_SECONDS and not status["left"]:
                lost.setdefault(r, "")
        if not lost:
            self._noticed = None
            return
        self._noticed = self._noticed or now
        if now - self._noticed > GRACE_SECONDS and self._own["failed"] is None:
            reasons = [_named(r, text) for r, text in lost.items() if text]
            message = (reasons or [_ended([*lost], self.at)])[0]
            if self.prints(message):
                print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(1)


def _named(rank: int, text: str) -> str:
    """Return a rank's message with its name, unless it names another one."""
    return text if text.startswith("rank ") else f"rank {rank}: {text}"


def _ended(ranks: Sequence[int], what: str) -> str:
    names = " and ".join(map(str, ranks))
    return (
        f"rank {names} ended without a message, or answers no longer (was it killed, or is it out "
        f"of memory?), and the others waited for it: {what}. The last checkpoint is complete, and "
        "the same command resumes the run"
    )
