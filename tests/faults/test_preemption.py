"""A node that is announced to leave. Tests with real nodes are in tests/hosts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dogvae.config import Safety
from dogvae.storage import Storage
from dogvae.training.loop import loop
from tests.support.command import wait_until
from tests.support.runs import StopAt, job


class LeavingNode(StopAt):
    """The node is announced to leave after `announced` steps, and ends the process after `gone` steps."""

    def __init__(self, announced: int, gone: int) -> None:
        super().__init__()
        self._announced, self._gone, self._step = announced, gone, 0

    def stopping(self) -> bool:
        self._step += 1
        time.sleep(0.02)  # so that the loop asks again after a few steps
        return False

    def preempted(self) -> bool:
        return self._step >= self._announced

    def progress(self, epoch: int, step: int, steps: int) -> None:
        if self._step == self._gone:
            raise SystemExit


def test_a_node_that_leaves_with_notice_costs_at_most_one_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves during step 26, when the checkpoint of step 25 has been saved. No checkpoint is due otherwise."""
    monkeypatch.setattr("dogvae.training.loop.PREEMPTION_INTERVAL_S", 0.1)
    config = job(dataset, epochs=40)
    observer = LeavingNode(announced=12, gone=25)
    with pytest.raises(SystemExit):
        loop(config, Storage(tmp_path), torch.device("cpu"), observer, Safety(checkpoint_s=3600))
    assert any("about to go" in note for note in observer.notes)
    wait_until(lambda: list((tmp_path / "checkpoints").glob("step-000000025-*")), 10)  # written in the background
    assert not list((tmp_path / "checkpoints").glob("step-000000026-*"))
