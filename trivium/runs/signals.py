"""Signal handling: the first Ctrl-C saves and stops a run, the second ends the process at once.

A signal may arrive at any time. The handler only records it. The run stops at its next save point,
or at once during sampling, which changes no saved state and can be aborted.
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

from trivium import distributed

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def signal_name(number: int) -> str:
    """Return the name of a signal as users know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved.

    Attributes:
        signal: number of the signal. The exit status of the command is 128 plus this number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class SamplingAborted(KeyboardInterrupt):
    """Sampling was aborted because a signal asked the run to stop.

    It is a KeyboardInterrupt, so that an interrupted reward call does not count as a failed one.
    """


class SignalHandler:
    """Context manager that records signals. Outside the main thread it does nothing.

    Attributes:
        received: number of the first signal received; None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._can_abort = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Mark a block of code that a signal aborts at once.

        Raises:
            SamplingAborted: a signal arrives inside the block, or arrived before it.
        """
        if self.received is not None and distributed.may_be_aborted():
            raise SamplingAborted
        self._can_abort = True
        try:
            yield
        finally:
            self._can_abort = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if distributed.rank() == 0:
            _write_to_stderr(
                f"{signal_name(number)}: saving and stopping; a second signal ends the run at once"
            )
        # While processes exchange results, one of them alone must not leave.
        if self._can_abort and distributed.may_be_aborted():
            self._can_abort = False
            raise SamplingAborted


def _write_to_stderr(message: str) -> None:
    """Write to the file descriptor: the signal may have interrupted a write to Python's stream."""
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
