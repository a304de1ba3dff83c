"""Bad storage, bad numbers, ranks that differ: real full disks, real infinities."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dogvae.config import Config, Safety
from dogvae.console import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.train import loop
from tests.conftest import start_ranks
from tests.faults.bench import StopAt, differing, final, job, records, train

CPU = torch.device("cpu")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]).returncode:
        pytest.skip("only root can mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class FillAndFree(StopAt):
    """Fills the disk after some steps, to the last byte, and frees it later."""

    def __init__(self, disk: Path, fill: int, free: int) -> None:
        super().__init__()
        self._disk, self._fill, self._free, self._step = disk / "filler", fill, free, 0

    def stopping(self) -> bool:
        self._step += 1
        if self._step == self._fill:
            with self._disk.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        if self._step == self._free:
            self._disk.unlink()
        return False


def test_full_disk_does_not_stop_training(dataset: Path, disk: Path, tmp_path: Path) -> None:
    """Full from within the second epoch to within the fourth: noted, and in the end nothing is missing."""
    config = job(dataset)
    train(config, tmp_path / "whole")
    observer = FillAndFree(disk, fill=20, free=45)
    assert loop(config, Storage(disk / "run"), CPU, observer)
    assert any("could not be written" in note and "No space" in note for note in observer.notes)
    assert "checkpoints can be written again" in observer.notes
    assert differing(final(tmp_path / "whole"), final(disk / "run")) == []
    assert records(disk / "run") == records(tmp_path / "whole")
    assert not list((disk / "run").rglob("*.partial"))


def test_patience_ends_with_what_is_left(dataset: Path, disk: Path) -> None:
    """The disk stays full: the run ends, says since which step, and the checkpoint before still serves."""
    observer = FillAndFree(disk, fill=20, free=-1)
    with pytest.raises(RunFailed, match=r"no checkpoint could be written .* of step 13"):
        loop(job(dataset, epochs=200), Storage(disk / "run"), CPU, observer, Safety(patience_s=2))
    (disk / "filler").unlink()
    train(job(dataset, epochs=2), disk / "run")
    assert [r["epoch"] for r in records(disk / "run")] == [0, 1]


def test_too_small_a_disk_is_told_before_the_first_step(dataset: Path, disk: Path) -> None:
    with pytest.raises(UsageError, match=r"--runs: .* has \d+ MB free, the checkpoints need \d+ MB"):
        loop(job(dataset, width=16), Storage(disk / "run"), CPU, StopAt())


def test_storage_that_is_no_folder(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"--runs: .* cannot be written to"):
        loop(job(dataset), Storage(tmp_path / "file/run"), CPU, StopAt())


def _elsewhere(rank: int, init: str, config: Config, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    with pytest.raises(UsageError, match="storage that all nodes share"):
        loop(config, Storage(f"{folder}/{rank}"), CPU, StopAt())
    dist.destroy_process_group()


def test_storage_that_is_not_shared(dataset: Path, tmp_path: Path) -> None:
    """Two nodes, each with its own folder of that name: both ranks say so before a step is made."""
    start_ranks(_elsewhere, 2, str(tmp_path / "init"), job(dataset), str(tmp_path))
    assert not list(tmp_path.rglob("step-*"))
    assert not list(tmp_path.rglob(".probe-*"))


def test_numbers_that_stay_bad_end_the_run(dataset: Path, tmp_path: Path) -> None:
    """beta is so large that the loss overflows: the message says where, and what to do."""
    config = job(dataset, beta=3e38, kl_warmup=0.0)
    with pytest.raises(RunFailed, match=r"epoch 1, step 5: .* 5 steps in a row .* learning rate .*--lr"):
        loop(config, Storage(tmp_path / "run"), CPU, StopAt(), Safety(max_skipped=5))


def test_skipped_steps_in_a_row_are_counted_over_a_stop(dataset: Path, tmp_path: Path) -> None:
    """Stopped after four of them and resumed, the run ends where it would have."""
    config = job(dataset, beta=3e38, kl_warmup=0.0)
    assert not loop(config, Storage(tmp_path / "run"), CPU, StopAt(4), Safety(max_skipped=6))
    with pytest.raises(RunFailed, match=r"epoch 1, step 6: .* 6 steps in a row"):
        loop(config, Storage(tmp_path / "run"), CPU, StopAt(), Safety(max_skipped=6))


def _drift(rank: int, init: str, config: Config, out: str) -> None:
    from dogvae import train as module

    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    run = module._Run(config, Storage(out), CPU, StopAt(), Safety())
    with torch.no_grad():
        if rank == 1:
            run.trainer.model.encoder.layers[0].weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(RunFailed, match="epoch 1: the workers' weights have drifted apart"):
        run.train()
    dist.destroy_process_group()


def test_ranks_that_drift_apart_end_the_run(dataset: Path, tmp_path: Path) -> None:
    start_ranks(_drift, 2, str(tmp_path / "init"), job(dataset), str(tmp_path / "run"))
    assert not list(tmp_path.rglob("step-*"))
