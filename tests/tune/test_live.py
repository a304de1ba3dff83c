"""The console of a running search: its table, its lines, and how signals and the time budget stop it."""

from __future__ import annotations

import io
import math
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.support.searches import EPOCHS, SPACE, entry, record
from tune import live
from tune.live import SearchProgress
from tune.search_folder import Entry

Capture = pytest.CaptureFixture[str]


class Clock:
    """Replaces `time`: only `sleep` moves it on, and then calls `meanwhile` with the new time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.meanwhile: Callable[[float], None] = lambda now: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def empty(known: Sequence[Entry] = (), trials: int = 6) -> SearchProgress:
    return SearchProgress(trials, EPOCHS, list(SPACE), known)


def put(progress: SearchProgress, one: Entry, losses: Sequence[float | None] = ()) -> None:
    progress.entries[one.number] = one
    for epoch, loss in enumerate(losses):
        progress.record(one.number, record(epoch, loss))


def busy() -> SearchProgress:
    """Six of 24 trials, one of each kind."""
    progress = empty(trials=24)
    put(progress, entry(0, "done"), [700.0, 520.4, 530.0, 540.0, 550.0, 560.0, 570.0, 580.0])
    put(progress, entry(1, "running", lr=0.00213), [610.0, 480.6, None])
    put(progress, entry(2, "failed", "bad numbers", lr=0.01), [190.0])
    put(progress, entry(3, "stopped", latent_dim=8, samples=1), [12600.0, 12345.0])
    put(progress, entry(4, "running", lr=0.000123))
    put(progress, entry(5, "waiting", lr=0.0001), [math.nan])
    return progress


def shown(progress: SearchProgress, width: int, height: int = 100) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(progress._table(height))
    return console.export_text().rstrip("\n").split("\n")


# --- lines and table


def test_trial_is_described_with_its_best_loss_and_why_it_failed() -> None:
    progress = busy()
    assert [progress._describe(progress.entries[number]) for number in range(6)] == [
        "trial 0 (latent_dim 32, lr 0.001, samples 10) done after epoch 8, loss 520",
        "trial 1 (latent_dim 32, lr 0.0021, samples 10) running after epoch 3, loss 481",
        "trial 2 (latent_dim 32, lr 0.01, samples 10) failed after epoch 1, loss 190: bad numbers",
        "trial 3 (latent_dim 8, lr 0.001, samples 1) stopped after epoch 2, loss 12,345",
        "trial 4 (latent_dim 32, lr 0.00012, samples 10) running after epoch 0",
        "trial 5 (latent_dim 32, lr 0.0001, samples 10) waiting after epoch 1",
    ]


def test_summary_counts_trials_and_names_the_best(clock: Clock) -> None:
    progress = empty()
    clock.now += 60
    put(progress, entry(0, "running"), [512.3])
    assert progress._summary() == "0 of 6 trials ended, 1 running, best so far: 512 by trial 0"
    progress = busy()
    clock.now += 60  # 3 of 24 in a minute
    told = "3 of 24 trials ended, 1 of them early, 1 failed, 2 running, about 7:00 left, best so far: 481 by trial 1"
    assert progress._summary() == told


def test_time_left_counts_only_trials_that_ended_in_this_attempt(clock: Clock) -> None:
    known = [entry(0, "done"), entry(1, "stopped", lr=0.002), entry(2, "failed", "why", lr=0.003), entry(3, lr=0.004)]
    progress = empty(known)
    clock.now += 90
    assert progress._summary() == "3 of 6 trials ended, 1 of them early, 1 failed, 0 running"
    put(progress, entry(3, "done", lr=0.004), [500.0])
    assert "4 of 6 trials ended, 1 of them early, 1 failed, 0 running, about 3:00 left" in progress._summary()


def test_table_has_a_line_for_each_trial_best_first_failed_last() -> None:
    header, *lines, counts = shown(busy(), 100)
    assert header.split() == ["trial", "latent_dim", "lr", "samples", "epoch", "loss", "reconstruction", "KL", "state"]
    rows = ["1 32 0.0021 10 3/8 481 380 101 running", "0 32 0.001 10 8/8 520 419 101 done",
            "3 8 0.001 1 2/8 12,345 12,244 101 stopped", "4 32 0.00012 10 0/8 running",
            "5 32 0.0001 10 1/8 waiting", "2 32 0.01 10 1/8 190 90 100 failed"]  # fmt: skip
    assert [line.split() for line in lines] == [row.split() for row in rows]
    assert counts.startswith("3 of 24 trials ended")
    assert [line.split()[0] for line in shown(busy(), 60)[1:7]] == list("103452")  # narrow: cut, but not wrapped


@pytest.mark.parametrize(("height", "numbers"), [(100, "103452"), (2, "10"), (0, "1"), (-3, "1")])
def test_low_terminal_shows_the_best_trials(height: int, numbers: str) -> None:
    lines = shown(busy(), 120, height)
    assert [line.split()[0] for line in lines[1 : 1 + len(numbers)]] == list(numbers)
    assert lines[1 + len(numbers)].startswith("3 of 24 trials ended")


# --- following a search


class FakeEvents:
    """Counts the requests to stop."""

    def __init__(self) -> None:
        self.stops = 0
        self.stop = SimpleNamespace(remote=self._stop)

    def _stop(self) -> None:
        self.stops += 1


def ends_at(clock: Clock, seconds: float) -> Future[None]:
    """A search that ends by itself after so many seconds."""
    fit: Future[None] = Future()
    clock.meanwhile = lambda now: fit.set_result(None) if now > 1000 + seconds and not fit.done() else None
    return fit


def test_trials_are_announced_once_except_those_that_ended_in_an_earlier_attempt(clock: Clock, capsys: Capture) -> None:
    known = [entry(0, "done"), entry(1, "stopped", lr=0.002), entry(2, lr=0.003), entry(3, "failed", "why", lr=0.004)]
    progress, events = empty(known), FakeEvents()
    fit: Future[None] = Future()

    def meanwhile(now: float) -> None:
        number = round((now - 1000) / 0.2) - 1
        put(progress, entry(number, "done", lr=0.001 * (number + 1)), [500.0 - number] * EPOCHS)
        progress.ended(number)
        if number == 3:
            progress.note("trial 3 has lost its process")
            fit.set_result(None)

    clock.meanwhile = meanwhile
    assert progress.follow(fit, events, None) is None
    told = capsys.readouterr().out.splitlines()
    assert [line.partition("; ")[0] for line in told] == [
        "trial 2 (latent_dim 32, lr 0.003, samples 10) done after epoch 8, loss 498",
        "trial 3 has lost its process",
        "trial 3 (latent_dim 32, lr 0.004, samples 10) done after epoch 8, loss 497",
    ]
    assert told[-1].endswith("best so far: 497 by trial 3")
    assert events.stops == 0


def test_quiet_search_prints_a_line_every_minute(clock: Clock, capsys: Capture) -> None:
    empty().follow(ends_at(clock, 200), FakeEvents(), None)
    assert capsys.readouterr().out == 3 * "0 of 6 trials ended, 0 running\n"


@pytest.mark.parametrize(("end", "status", "stops"), [(50, 0, 1), (9, None, 0)])
def test_time_budget_stops_a_longer_search_once(
    end: float, status: int | None, stops: int, clock: Clock, capsys: Capture
) -> None:
    events = FakeEvents()
    assert empty().follow(ends_at(clock, end), events, 10.0) == status
    told = "time is up: stopping after a checkpoint of each trial; Ctrl-C stops at once\n"
    assert (capsys.readouterr().out, events.stops) == (told * stops, stops)
    assert clock.now == pytest.approx(1000 + end, abs=0.5)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_the_trials_to_stop(signum: signal.Signals, clock: Clock, capsys: Capture) -> None:
    fit: Future[None] = Future()
    events = FakeEvents()
    clock.meanwhile = lambda now: fit.set_result(None) if events.stops else signal.raise_signal(signum)
    before = signal.getsignal(signum)
    assert empty().follow(fit, events, 10.0) == signum
    told = "stopping after a checkpoint of each trial; Ctrl-C again stops at once\n"
    assert (capsys.readouterr().out, events.stops) == (told, 1)
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("budget_s", [None, 10.0])
def test_second_signal_or_a_signal_after_the_time_budget_exits_at_once(budget_s: float | None, clock: Clock) -> None:
    events = FakeEvents()

    def meanwhile(now: float) -> None:
        if budget_s is None or events.stops:
            signal.raise_signal(signal.SIGINT)

    clock.meanwhile = meanwhile
    with pytest.raises(KeyboardInterrupt):
        empty().follow(Future(), events, budget_s)
    assert events.stops == 1


def test_error_of_the_search_is_raised(clock: Clock) -> None:
    fit: Future[None] = Future()
    fit.set_exception(RuntimeError("Ray has gone"))
    with pytest.raises(RuntimeError, match="Ray has gone"):
        empty().follow(fit, FakeEvents(), None)


def test_terminal_gets_the_table(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    assert busy().follow(ends_at(clock, 1), FakeEvents(), None) is None
    assert "reconstruction" in screen.getvalue()
    assert "12,345" in screen.getvalue()
