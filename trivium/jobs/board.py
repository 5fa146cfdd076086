"""Progress of a comparison's jobs: a live table, or plain lines if the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Lock

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from trivium.monitoring.progress import duration


class Board:
    """Progress table with one row per job: its state or last line of output, and its time."""

    def __init__(self, names: Sequence[str]) -> None:
        self.console = Console()
        self.state = dict.fromkeys(names, "waiting")
        self.start_times: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.lock = Lock()
        self.live = Live(get_renderable=self._table, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def start(self, name: str) -> None:
        """Mark the job as started."""
        with self.lock:
            self.start_times[name] = time.perf_counter()
            self.state[name] = "starting"
        self._line(f"{name}: started")

    def update(self, name: str, text: str) -> None:
        """Set the job's state to its last line of output."""
        with self.lock:
            self.state[name] = text

    def finish(self, name: str, seconds: float, remark: str = "done") -> None:
        """Mark the job as finished after ``seconds``."""
        with self.lock:
            self.seconds[name] = seconds
            self.state[name] = remark
        self._line(f"{name}: {remark}, {duration(seconds)}")

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(escape(text), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("job", "time", ""):
            table.add_column(heading, no_wrap=True)
        with self.lock:
            for name, state in self.state.items():
                elapsed = self.seconds.get(name)
                if elapsed is None and name in self.start_times:
                    elapsed = time.perf_counter() - self.start_times[name]
                style = "green" if name in self.seconds else "dim" if elapsed is None else ""
                shown = "" if elapsed is None else duration(elapsed)
                table.add_row(name, shown, escape(state), style=style)
        return table
