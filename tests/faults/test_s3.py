"""Runs on an object store: a real S3 server on this machine, interrupted, resumed, and silent for a while."""

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
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.loop import loop
from tests.support.runs import StopAt, differing, final, job, train
from tests.support.s3 import Server

CPU = torch.device("cpu")


def test_interrupted_and_resumed_on_s3(
    s3: Server, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = job(dataset)
    train(config, tmp_path / "whole")
    run = Storage(s3.uri("runs")) / "run"
    assert not loop(config, run, CPU, StopAt(20), Safety(checkpoint_steps=5))
    assert loop(config, run, CPU, StopAt())
    saved = Checkpoints(run).latest()
    assert saved is not None
    assert differing(saved.tensors, final(tmp_path / "whole")) == []
    assert [r["epoch"] for r in metrics.read(run)] == [0, 1, 2, 3]
    names = run.names()
    assert "metrics.jsonl" in names
    assert sum(name.startswith("events.") for name in names) == 2
    assert not [name for name in names if name.startswith(".probe")]
    assert len(run.names("checkpoints")) in (2, 3)
    assert not list(tmp_path.glob("dogvae-events-*"))


class Silence(StopAt):
    """Stops the server after some steps, and says how many more were made before it answered again."""

    def __init__(self, server: Server, at: int, seconds: float) -> None:
        super().__init__()
        self._server, self._at, self._seconds, self._step = server, at, seconds, 0
        self.meanwhile: int | None = None

    def stopping(self) -> bool:
        self._step += 1
        if self._step == self._at:
            self._server.stop()
            threading.Timer(self._seconds, self._again).start()
        time.sleep(0.02)
        return False

    def _again(self) -> None:
        self.meanwhile = self._step - self._at
        self._server.go_on()


def test_storage_that_is_silent_for_a_while_does_not_stop_training(s3: Server, dataset: Path, tmp_path: Path) -> None:
    """For 1.5 seconds, over the ends of epochs: training goes on all the time, and in the end nothing is missing."""
    config = job(dataset, epochs=8)
    train(config, tmp_path / "whole")
    run = Storage(s3.uri("silent")) / "run"
    observer = Silence(s3, at=20, seconds=1.5)
    assert loop(config, run, CPU, observer, Safety(checkpoint_steps=5))
    assert observer.meanwhile is not None
    assert observer.meanwhile > 20  # more than an epoch and some checkpoints
    saved = Checkpoints(run).latest()
    assert saved is not None
    assert differing(saved.tensors, final(tmp_path / "whole")) == []
    assert [r["epoch"] for r in metrics.read(run)] == list(range(8))
