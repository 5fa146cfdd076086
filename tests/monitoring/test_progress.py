"""Progress display of a run: live, in a pipe, and with untrusted text."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from trivium.monitoring.progress import Progress, duration, headlines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def piped(**options: Any) -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, **options)


def test_piped_progress_writes_the_first_the_last_and_some_steps_between(clock: Clock) -> None:
    file, console = piped()
    with Progress("grpo", 12, every=6.0, console=console, clock=clock) as progress:
        for _ in range(12):
            clock.now += 2.0
            progress.advance({"loss": clock.now})
        written = file.getvalue()
    assert file.getvalue() == written
    assert written.splitlines() == [
        "grpo 1/12  2.0 s/step  22 s left  loss 2",
        "grpo 4/12  2.0 s/step  16 s left  loss 8",
        "grpo 7/12  2.0 s/step  10 s left  loss 14",
        "grpo 10/12  2.0 s/step  4 s left  loss 20",
        "grpo 12/12  2.0 s/step  loss 24",
    ]


def test_piped_progress_ends_with_the_last_step_if_the_run_fails(clock: Clock) -> None:
    file, console = piped()
    with (
        pytest.raises(RuntimeError),
        Progress("sft", 9, console=console, clock=clock) as progress,
    ):
        for _ in range(3):
            clock.now += 0.25
            progress.advance()
        raise RuntimeError
    assert file.getvalue().splitlines() == [
        "sft 1/9  4.0 steps/s  2 s left",
        "sft 3/9  4.0 steps/s  2 s left",
    ]


def test_rate_is_measured_over_the_recent_steps(clock: Clock) -> None:
    _, console = piped()
    with Progress("sft", 100, console=console, clock=clock) as progress:
        for seconds in [100.0] * 5 + [0.5] * 20:
            clock.now += seconds
            progress.advance()
        assert progress.status() == "sft 25/100  2.0 steps/s  38 s left"
        clock.now += 8
        assert progress.status() == "sft 25/100  2.0 steps/s  30 s left"
        clock.now += 1000
        assert progress.status() == "sft 25/100  2.0 steps/s  0 s left"


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "truecolor"}])
def test_piped_progress_writes_no_control_codes(options: dict[str, Any], clock: Clock) -> None:
    file, console = piped(**options)
    title = "a [red]b[/red] [/oops] \x1b[31m\r\n\x9b"
    with Progress(title, 2, console=console, clock=clock) as progress:
        for _ in range(2):
            clock.now += 1
            progress.advance({"reward/[bold]\x07": 1.0})
    text = file.getvalue()
    assert "\x1b" not in text
    assert text.count("\n") == 2
    assert all(character.isprintable() for line in text.splitlines() for character in line)
    assert "[red]b[/red] [/oops]" in text
    assert "reward/[bold]" in text


def test_piped_progress_uses_the_encoding_of_its_file(clock: Clock) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress("猫", 1, console=Console(file=file), clock=clock) as progress:
        progress.advance()
    file.seek(0)
    assert file.read() == "? 1/1\n"


def test_live_progress_shows_markup_as_plain_text(clock: Clock) -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress("a [red]b[/red]", 2, console=console, clock=clock) as progress:
        for _ in range(2):
            clock.now += 1.0
            progress.advance({"reward/mean": 0.25, "reward/[bold]\x1b]0;x": 1.0})
    text = file.getvalue()
    assert "a [red]b[/red] 2/2  1.0 s/step  reward/mean 0.25" in text
    assert "\x1b]0;x" not in text
    assert "\x1b[2K" in text


def test_dumb_terminal_gets_plain_lines(clock: Clock) -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})
    with Progress("sft", 1, console=console, clock=clock) as progress:
        clock.now += 1.0
        progress.advance()
    assert file.getvalue() == "sft 1/1  1.0 s/step\n"


def test_headlines_are_the_headline_metrics_or_else_the_first() -> None:
    metrics = {"time/x": 1.0, "loss": 0.12345, "kl/response": math.nan, "reward/mean": 2.0}
    assert headlines(metrics) == ["reward/mean 2", "kl/response nan", "loss 0.123"]
    assert headlines({f"m{n}": float(n) for n in range(9)}) == ["m0 0", "m1 1", "m2 2", "m3 3"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360000, "100 h 00 min"),
    ],
)
def test_duration_has_the_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
