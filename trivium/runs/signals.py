"""Ctrl-C and its like: the first asks a run to save and stop, the second ends it at once.

A signal may come anywhere. It is only noted, and obeyed where the run's state is one to save, or
where what is being done can be given up because nothing of the state depends on it yet.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def name_of(number: int) -> str:
    """What a user calls the signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal, with its state saved.

    Attributes:
        signal: which one; a shell sees 128 more as exit status.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class GivenUp(KeyboardInterrupt):
    """What was going on is given up, because the run is to stop.

    An interrupt like any other to what it breaks off: a reward's call must not take it for a fault.
    """


class Stopping:
    """Listens for signals while it is entered; in another thread than the main one, for none.

    Attributes:
        asked: the signal that asked the run to stop, if any did.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._can_give_up = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def can_give_up(self) -> Iterator[None]:
        """What is done here may be given up: then GivenUp is raised in the middle of it."""
        if self.asked is not None:
            raise GivenUp
        self._can_give_up = True
        try:
            yield
        finally:
            self._can_give_up = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
        _tell(f"{name_of(number)}: saving and stopping; once more ends the run at once")
        if self._can_give_up:
            self._can_give_up = False
            raise GivenUp


def _tell(message: str) -> None:
    """Past Python's streams, which the signal may have come in the middle of writing to."""
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
