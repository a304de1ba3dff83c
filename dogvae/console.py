"""What the user sees while something runs: one live line on a terminal, plain lines elsewhere, one-line errors."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

PLAIN_INTERVAL_S = 10.0  # how often a log file hears of progress; a terminal is redrawn at once


def clock(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def say(message: str) -> None:
    """Print one line at once, also when stdout is a pipe."""
    print(message, flush=True)


def warn(message: str) -> None:
    """Print one line of warning on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Progress:
    """A progress line with the time left: live on a terminal, a plain line every `plain_interval_s` elsewhere.

    Use as a context manager; call `update(done, total, text)` as often as you like. `done` counts in any unit;
    the time left comes from the share done since the first update. `note(line)` prints a lasting line above it.
    """

    def __init__(self, title: str, plain_interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._title = title
        self._plain_interval_s = plain_interval_s
        self._started: tuple[float, float] | None = None  # (time, done) at the first update: a resumed run starts late
        self._last_plain = time.monotonic()
        self._live = None
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, ProgressColumn, TextColumn
            from rich.progress import Progress as RichProgress

            console = Console()
            bar: list[ProgressColumn] = [BarColumn(bar_width=20)] if console.width >= 120 else []
            self._live = RichProgress(*bar, TextColumn("{task.fields[text]}"), console=console)
            self._task = self._live.add_task(title, total=None, text="")

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: float, total: float, text: str, milestone: bool = False) -> None:
        """Say that `done` of `total` is done; `text` is what stands behind the bar. A log hears every milestone."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, done)
        since, first = self._started
        if done > first:
            left = f"{clock((now - since) * (total - done) / (done - first))} left"
            # On a narrow terminal the end of the line is cut off: what is left stands in front.
            text = f"{left}, {text}" if self._live else f"{text}, {left}"
        if self._live:
            self._live.update(self._task, completed=done, total=total, text=text)
        elif milestone or now - self._last_plain >= self._plain_interval_s:
            self._last_plain = now
            say(f"{self._title}: {text}")

    def restart(self) -> None:
        """What comes now is another piece of work: its time left is reckoned from here."""
        self._started = None

    def note(self, line: str) -> None:
        """Print a lasting line above the live one."""
        if self._live:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            say(line)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The stop signals received meanwhile; the first is only noted, the second ends the program at once."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) > 1:
            raise SystemExit(128 + signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except SystemExit as error:
        if len(received) > 1:  # Ray, waiting for a result, makes a 1 of it
            raise SystemExit(128 + received[1]) from error
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
