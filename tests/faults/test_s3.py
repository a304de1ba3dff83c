"""Runs on an object store: a real S3 server on this machine, with interruptions, and silent for a while."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from dogvae.config import Safety
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.loop import loop
from tests.support.runs import StopAt, differing, final, job, train
from tests.support.s3 import Server

CPU = torch.device("cpu")


def test_run_on_s3_resumes_to_the_same_bits(
    s3: Server, dataset: Path, alone: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = Storage(s3.uri("runs")) / "run"
    train(job(dataset), run, stop_at=20, safety=Safety(checkpoint_steps=5))
    train(job(dataset), run)
    assert differing(final(run), final(alone["default"])) == []
    assert [r["epoch"] for r in metrics.read(run)] == [0, 1, 2, 3]
    names = run.names()
    assert "metrics.jsonl" in names
    assert sum(name.startswith("events.") for name in names) == 2
    assert not [name for name in names if name.startswith(".probe")]
    assert len(run.names("checkpoints")) == 2  # the last one is also the best
    assert not list(tmp_path.glob("dogvae-events-*"))


class Silence(StopAt):
    """Stops the server after some steps, for a time, and counts the steps that are made meanwhile."""

    def __init__(self, server: Server, at: int, seconds: float) -> None:
        super().__init__()
        self._server, self._at, self._seconds, self._step = server, at, seconds, 0
        self.meanwhile = 0

    def stopping(self) -> bool:
        self._step += 1
        if self._step == self._at:
            self._server.stop()
            threading.Timer(self._seconds, self._go_on).start()
        time.sleep(0.02)
        return False

    def _go_on(self) -> None:
        self.meanwhile = self._step - self._at
        self._server.go_on()


def test_training_goes_on_while_s3_is_silent(s3: Server, dataset: Path, tmp_path: Path) -> None:
    """For 3 seconds, over the ends of epochs. In the end nothing is missing."""
    config = job(dataset, epochs=8)
    train(config, tmp_path / "whole")
    run = Storage(s3.uri("silent")) / "run"
    observer = Silence(s3, at=20, seconds=3)
    assert loop(config, run, CPU, observer, Safety(checkpoint_steps=5))
    assert observer.meanwhile > 20  # more than an epoch and some checkpoints
    assert differing(final(run), final(tmp_path / "whole")) == []
    assert [r["epoch"] for r in metrics.read(run)] == list(range(8))
