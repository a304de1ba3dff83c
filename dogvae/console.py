"""Output of a running command: a live line on a terminal or in a notebook, plain lines in a log file or a pipe."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from dogvae.jupyter import cell_output

WAITING_INTERVAL_S = 1.0
PLAIN_INTERVAL_S = 10.0  # between two plain lines of progress; a terminal is redrawn at every update


def clock(seconds: float) -> str:
    """Seconds as `1:15` (75) or `1:01:40` (3700)."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def explained_text(explained: float | None) -> str:
    """`val_explained` in words; None, which JSON has for NaN, and NaN mean that it is not defined."""
    if explained is None or math.isnan(explained):
        return "not defined (the images do not differ)"
    return f"{explained:.3f}"


def say(message: str) -> None:
    """Print one line and flush it, so that it also passes a pipe at once."""
    print(message, flush=True)


def warn(message: str) -> None:
    """Print one line of warning on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show `text` and the seconds on a terminal while the block runs, after the first second; then erase it.

    It is for work without a count, that prints nothing itself. The line goes to stderr: stdout may hold an answer.
    """
    if not sys.stderr.isatty():
        yield
        return
    ended, began = threading.Event(), time.monotonic()

    def show() -> None:
        while not ended.wait(WAITING_INTERVAL_S):
            print(f"\r\x1b[K{text} {clock(time.monotonic() - began)}", end="", file=sys.stderr, flush=True)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Progress:
    """A progress line with the time left: live on a terminal or in a notebook, else plain lines.

    There is a plain line every `plain_interval_s` seconds.

    Use it as a context manager and call `update(done, total, text)` as often as you like; `done` has any unit. The time
    left is computed from the progress since the first update. `note(line)` prints a permanent line above.
    """

    def __init__(self, title: str, plain_interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._title = title
        self._plain_interval_s = plain_interval_s
        self._started: tuple[float, float] | None = None  # (time, done) at the first update; a resumed run has done > 0
        self._last_plain = time.monotonic()
        self._live = None
        self._cell = cell_output()
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
        elif self._cell:
            self._cell.flush()

    def update(self, done: float, total: float, text: str, milestone: bool = False) -> None:
        """Show that `done` of `total` is done, with `text` behind the bar. A log gets a line for every `milestone`."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, done)
        since, first = self._started
        if done > first:
            left = f"{clock((now - since) * (total - done) / (done - first))} left"
            # A narrow terminal cuts off the end of the line, so the time left comes first there.
            text = f"{left}, {text}" if self._live else f"{text}, {left}"
        if self._live:
            self._live.update(self._task, completed=done, total=total, text=text)
        elif self._cell:
            self._cell.show(f"{self._title}: {text}")
        elif milestone or now - self._last_plain >= self._plain_interval_s:
            self._last_plain = now
            say(f"{self._title}: {text}")

    def restart(self) -> None:
        """Start to measure anew: the next update begins another piece of work."""
        self._started = None

    def note(self, line: str) -> None:
        """Print a permanent line above the live one."""
        if self._live:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            say(line)
