"""What the demo shows while its methods run: a live board, or plain lines when piped."""

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
    """One line per method: waiting, what it said last, or how long it took."""

    def __init__(self, names: Sequence[str]) -> None:
        self.console = Console()
        self.state = dict.fromkeys(names, "waiting")
        self.since: dict[str, float] = {}
        self.taken: dict[str, float] = {}
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
        """The method's process starts."""
        with self.lock:
            self.since[name] = time.perf_counter()
            self.state[name] = "starting"
        self._line(f"{name}: started")

    def tell(self, name: str, text: str) -> None:
        """The method said something."""
        with self.lock:
            self.state[name] = text

    def finish(self, name: str, seconds: float, remark: str = "done") -> None:
        """The method is done."""
        with self.lock:
            self.taken[name] = seconds
            self.state[name] = remark
        self._line(f"{name}: {remark}, {duration(seconds)}")

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(escape(text), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("method", "time", ""):
            table.add_column(heading, no_wrap=True)
        with self.lock:
            for name, state in self.state.items():
                spent = self.taken.get(name)
                if spent is None and name in self.since:
                    spent = time.perf_counter() - self.since[name]
                style = "green" if name in self.taken else "dim" if spent is None else ""
                shown = "" if spent is None else duration(spent)
                table.add_row(name, shown, escape(state), style=style)
        return table
