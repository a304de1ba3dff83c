"""The signs of life on a terminal: the line of work without a count, which is erased, and none in a pipe."""

from __future__ import annotations

import io
import sys
import time

import pytest

from dogvae import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_waiting_shows_its_text_on_a_terminal_until_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "WAITING_INTERVAL_S", 0.01)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.waiting("starting Ray"):
        while "starting Ray 0:00" not in terminal.getvalue():
            time.sleep(0.01)
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_waiting_shows_nothing_for_short_work_or_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.waiting("starting Ray"):
        pass
    assert "Ray" not in terminal.getvalue()
    monkeypatch.setattr(console, "WAITING_INTERVAL_S", 0.001)
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with console.waiting("starting Ray"):
        time.sleep(0.05)
    assert pipe.getvalue() == ""
