"""Progress display of a long job: a live bar on a terminal, plain lines in a file or a pipe.

It shows the step, the rate, the time left and a few headline metrics. The run's files hold all
metrics.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as Live
from rich.text import Text

from trivium import distributed

HEADLINES = (
    "reward/mean",
    "implicit_reward/accuracy",
    "kl/response",
    "nll",
    "loss",
    "length/mean",
    "policy/entropy",
)
_MAX_SHOWN = 4
_WINDOW = 20
"""Number of last steps that the rate is measured over."""


class Progress:
    """Context manager that shows the progress of `total` steps, `done` of them done before.

    Call `advance` after every step. Without a terminal it writes a line at the first step, then at
    most one line per `every` seconds, and a line at the last step.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        every: float = 5.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = printable(title)
        self.total = total
        self.done = done
        self._every = every
        self._console = console or Console()
        self._clock = clock
        self._metrics: Mapping[str, float] = {}
        self._times: deque[float] = deque(maxlen=_WINDOW + 1)
        self._written: float | None = None
        self._pending = False
        self._live: Live | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        self._times.append(self._clock())
        if _is_live(self._console):
            live = Live(BarColumn(bar_width=16), _Status(self), console=self._console)
            self._task = live.add_task("", total=self.total, completed=self.done)
            live.start()
            self._live = live
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._pending:
            self._write()

    def advance(self, metrics: Mapping[str, float] | None = None) -> None:
        """Count one step as done and show its metrics."""
        self.done += 1
        self._metrics = metrics or {}
        self._times.append(self._clock())
        if self._live is not None:
            self._live.update(self._task, completed=self.done)
            return
        self._pending = True
        due = self._written is None or self._times[-1] - self._written >= self._every
        if due or self.done == self.total:
            self._write()

    def status(self) -> str:
        """Return one line with the steps, the rate, the time left and the headline metrics."""
        steps = f"{self.title} {self.done}/{self.total}"
        parts = [steps, *self._rate_and_time_left(), *headlines(self._metrics)]
        return "  ".join(parts)

    def _rate_and_time_left(self) -> list[str]:
        steps, seconds = len(self._times) - 1, self._times[-1] - self._times[0]
        if steps == 0 or seconds <= 0:
            return []
        per_step = seconds / steps
        rate = f"{per_step:.1f} s/step" if per_step >= 1 else f"{1 / per_step:.1f} steps/s"
        since_last = self._clock() - self._times[-1]
        left = max(0.0, (self.total - self.done) * per_step - since_last)
        return [rate, f"{duration(left)} left"] if self.done < self.total else [rate]

    def _write(self) -> None:
        if distributed.rank() > 0:
            return
        file = self._console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        file.write(self.status().encode(encoding, "replace").decode(encoding) + "\n")
        file.flush()
        self._written = self._times[-1]
        self._pending = False


class _Status(ProgressColumn):
    """Status text beside the bar; the time left counts down between steps."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.status(), no_wrap=True, overflow="ellipsis")


def headlines(metrics: Mapping[str, float]) -> list[str]:
    """Return the headline metrics as text; if there are none, the first metrics."""
    names = [name for name in HEADLINES if name in metrics] or list(metrics)
    return [f"{printable(name)} {metrics[name]:.3g}" for name in names[:_MAX_SHOWN]]


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, as in `2 h 05 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02} min"


def printable(text: str) -> str:
    """Replace control characters by spaces, so that a terminal does not act on the text."""
    return "".join(character if character.isprintable() else " " for character in text)


def _is_live(console: Console) -> bool:
    """Return whether to redraw in place. Colors can be forced on a pipe, which cannot redraw."""
    if distributed.rank() > 0:
        return False
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal
