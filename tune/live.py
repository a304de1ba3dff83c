"""The console while a search runs: a live table on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from dogvae.console import clock, say
from dogvae.jupyter import cell_output
from dogvae.signals import stop_signals
from tune.search_folder import Entry

PLAIN_INTERVAL_S = 60.0
NOTEBOOK = 30, 110  # rows and columns of the table there
ENDED = ("done", "stopped", "failed")


class SearchProgress:
    """The states and losses of all trials. Ray Tune's thread updates them; the main thread prints them.

    `known` are the trials of an earlier attempt. Those that had ended are not announced again.
    """

    def __init__(self, trials: int, epochs: int, parameters: list[str], known: Sequence[Entry]) -> None:
        self._trials, self._epochs, self._parameters = trials, epochs, parameters
        self.entries: dict[int, Entry] = {entry.number: entry for entry in known}
        self._best: dict[int, dict[str, Any]] = {}
        self._epochs_done: dict[int, int] = {}
        self._to_announce: list[int] = []
        self._notes: list[str] = []
        self._known = {entry.number: entry for entry in known}
        self._began = time.monotonic()
        self.stopping = False

    def record(self, number: int, record: dict[str, Any]) -> None:
        """Add an epoch of a trial: a line of its metrics.jsonl."""
        self._epochs_done[number] = record["epoch"] + 1
        loss, best = record["val_loss"], self._best.get(number)
        if loss is not None and math.isfinite(loss) and (best is None or loss < best["val_loss"]):
            self._best[number] = record

    def epochs_of(self, number: int) -> int:
        """How many epochs a trial has done."""
        return self._epochs_done.get(number, 0)

    def ended(self, number: int) -> None:
        """Announce that a trial has ended."""
        if number not in self._known or self._known[number].state not in ("done", "stopped"):
            self._to_announce.append(number)

    def note(self, line: str) -> None:
        """Print a line that stays on the console."""
        self._notes.append(line)

    def any_running(self) -> bool:
        """Whether a trial is training or saving its checkpoint."""
        return any(entry.state == "running" for entry in self.entries.values())

    def follow(self, fit: Future[Any], events: Any, budget_s: float | None) -> int | None:
        """Print the progress until `fit` is done; returns what `tune.search.run` does, raises what `fit` does."""
        end = math.inf if budget_s is None else self._began + budget_s
        show = self._live if sys.stdout.isatty() else self._notebook if cell_output() else self._plain
        with stop_signals() as received:
            show(fit, events, received, end)
        fit.result()
        return received[0] if received else None

    def _request_stop(self, events: Any, received: list[int], end: float) -> str | None:
        """After a signal or the end of the time, ask all trials to stop: once. Returns the line to print."""
        if self.stopping or not (received or time.monotonic() > end):
            return None
        self.stopping = True
        events.stop.remote()
        if not received:
            received.append(0)  # counts as the first signal: `stop_signals` exits at the next one
            return "time is up: stopping after a checkpoint of each trial; Ctrl-C stops at once"
        return "stopping after a checkpoint of each trial; Ctrl-C again stops at once"

    def _say_news(self, events: Any, received: list[int], end: float) -> None:
        """Pass on the wish to stop, and print what is new."""
        if line := self._request_stop(events, received, end):
            say(line)
        while self._notes:
            say(self._notes.pop(0))

    def _plain(self, fit: Future[Any], events: Any, received: list[int], end: float) -> None:
        printed = time.monotonic()
        while True:
            last = fit.done()
            self._say_news(events, received, end)
            while self._to_announce:
                say(f"{self._describe(self.entries[self._to_announce.pop(0)])}; {self._summary()}")
                printed = time.monotonic()
            if time.monotonic() - printed > PLAIN_INTERVAL_S:
                say(self._summary())
                printed = time.monotonic()
            if last:
                return
            time.sleep(0.2)

    def _live(self, fit: Future[Any], events: Any, received: list[int], end: float) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console()
        with Live(console=console, auto_refresh=False) as live:
            while True:
                last = fit.done()
                if line := self._request_stop(events, received, end):
                    console.print(line)
                while self._notes:
                    console.print(self._notes.pop(0), highlight=False, markup=False)
                live.update(self._table(console.height - 4), refresh=True)
                if last:
                    return
                time.sleep(0.5)

    def _notebook(self, fit: Future[Any], events: Any, received: list[int], end: float) -> None:
        from rich.console import Console

        cell, (rows, columns) = cell_output(), NOTEBOOK
        assert cell
        while True:
            last = fit.done()
            self._say_news(events, received, end)
            text = io.StringIO()
            Console(file=text, width=columns, force_terminal=False, force_jupyter=False).print(self._table(rows))
            cell.show(text.getvalue())
            if last:
                cell.flush()
                return
            time.sleep(0.5)

    def _table(self, height: int) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for title in ("trial", *self._parameters, "epoch", "loss", "reconstruction", "KL", "state"):
            table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
        for number in self._ranked()[: max(1, height)]:
            entry, best = self.entries[number], self._best.get(number)
            values = [_short(entry.setting.get(name)) for name in self._parameters]
            names = ("val_loss", "val_reconstruction", "val_kl")
            numbers = [f"{best[name]:,.0f}" for name in names] if best else ["", "", ""]
            style = "bold" if entry.state == "running" else "dim" if entry.state == "stopped" else None
            epochs = f"{self.epochs_of(number)}/{self._epochs}"
            table.add_row(str(number), *values, epochs, *numbers, entry.state, style=style)
        return Group(table, Text(self._counts(), style="italic", no_wrap=True, overflow="ellipsis"))

    def _ranked(self) -> list[int]:
        """Trial numbers, best loss first, failed trials last."""

        def order(number: int) -> tuple[bool, float, int]:
            failed = self.entries[number].state == "failed"
            return failed, self._best[number]["val_loss"] if number in self._best else math.inf, number

        return sorted(list(self.entries), key=order)  # a copy: the other thread may add a trial meanwhile

    def _describe(self, entry: Entry) -> str:
        setting = ", ".join(f"{name} {_short(entry.setting[name])}" for name in self._parameters)
        best = self._best.get(entry.number)
        loss = f", loss {best['val_loss']:,.0f}" if best else ""
        why = f": {entry.reason}" if entry.reason else ""
        return f"trial {entry.number} ({setting}) {entry.state} after epoch {self.epochs_of(entry.number)}{loss}{why}"

    def _summary(self) -> str:
        ranked = self._ranked()
        if not ranked or ranked[0] not in self._best:
            return self._counts()
        return f"{self._counts()}, best so far: {self._best[ranked[0]]['val_loss']:,.0f} by trial {ranked[0]}"

    def _counts(self) -> str:
        entries = list(self.entries.values())
        count = {state: sum(entry.state == state for entry in entries) for state in (*ENDED, "running")}
        ended = sum(count[state] for state in ENDED)
        parts = [f"{ended} of {self._trials} trials ended"]
        parts += [f"{count['stopped']} of them early"] * bool(count["stopped"])
        parts += [f"{count['failed']} failed"] * bool(count["failed"]) + [f"{count['running']} running"]
        if fresh := sum(entry.state in ENDED and entry != self._known.get(entry.number) for entry in entries):
            left = (time.monotonic() - self._began) * (self._trials - ended) / fresh
            parts.append(f"about {clock(left)} left")
        return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
