"""A node that is announced to go: real nodes that go, come and are cut off are in tests/cluster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dogvae.config import Safety
from dogvae.storage import Storage
from dogvae.training.loop import loop
from tests.support.runs import StopAt, job


class Endangered(StopAt):
    """Is told of a node that will go after some steps; the node takes the process along some steps later."""

    def __init__(self, told: int, gone: int) -> None:
        super().__init__()
        self._told, self._gone, self._step = told, gone, 0

    def stopping(self) -> bool:
        self._step += 1
        time.sleep(0.15)  # so that the second between two questions is a few steps
        return False

    def preempted(self) -> bool:
        return self._step >= self._told

    def progress(self, epoch: int, step: int, steps: int) -> None:
        if self._step == self._gone:
            raise SystemExit


def test_at_most_one_step_is_lost_to_a_node_that_goes_with_notice(dataset: Path, tmp_path: Path) -> None:
    """Told during step 12, gone during step 26: there is a checkpoint of step 25 or 26, none was due otherwise."""
    config = job(dataset, epochs=40)
    observer = Endangered(told=12, gone=25)
    with pytest.raises(SystemExit):
        loop(config, Storage(tmp_path), torch.device("cpu"), observer, Safety(checkpoint_s=3600))
    assert any("about to go" in note for note in observer.notes)
    time.sleep(0.5)
    saved = max(int(f.name[5:14]) for f in (tmp_path / "checkpoints").glob("step-*"))
    assert saved in (25, 26)
