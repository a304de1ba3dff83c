"""Bad storage, bad numbers, ranks that differ: real full disks, real infinities."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dogvae.config import Config, Safety
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.loop import loop
from dogvae.training.step import Trainer
from tests.conftest import start_ranks
from tests.support.runs import StopAt, differing, final, job, records, train

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
        loop(job(dataset, width=16), Storage(disk / "run"), CPU, StopAt(), Safety(patience_s=2))


def test_storage_that_is_no_folder(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=f"--runs: .* cannot be written to from {socket.gethostname()}: "):
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


def poisoned(bad: set[int], image: int, seen: list[Tensor]) -> Callable[..., None]:
    """`Trainer.step`, but that one image of some steps, counted over all epochs, holds no numbers.

    What each step adds to the sums goes to `seen`.
    """
    step = Trainer.step

    def changed(self: Trainer, images: Tensor, n: int, epoch: int, number: int, steps: int) -> None:
        if epoch * steps + number in bad:
            images = images.float()
            images[image] = math.nan
        before = self.sums.over_ranks()
        step(self, images, n, epoch, number, steps)
        seen.append(self.sums.over_ranks() - before)

    return changed


def _one_is_poisoned(rank: int, init: str, config: Config, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    Trainer.step = poisoned({3} if rank else set(), 0, [])  # type: ignore[method-assign]
    assert loop(config, Storage(out), CPU, StopAt())
    dist.destroy_process_group()


def test_bad_numbers_on_one_rank_skip_the_step_on_all(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has them, in the fourth step: both go on alike, as one rank does. Of 13 steps 12 count."""
    config, seen = job(dataset, epochs=2), list[Tensor]()
    start_ranks(_one_is_poisoned, 2, str(tmp_path / "init"), config, str(tmp_path / "two"))
    monkeypatch.setattr(Trainer, "step", poisoned({3}, 4, seen))  # rank 1 has the latter four of a batch of 8
    train(config, tmp_path / "one")
    ours, theirs = records(tmp_path / "two"), records(tmp_path / "one")
    assert [line["skipped_steps"] for line in ours] == [line["skipped_steps"] for line in theirs] == [1, 0]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("val_loss", "train_loss", "train_kl", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3 if "loss" in name else 1e-2)
    images, total, _, _, norm, _ = torch.stack(seen[:13]).sum(dim=0).tolist()
    assert images == 92
    assert theirs[0]["train_loss"] == pytest.approx(total / 92)
    assert theirs[0]["gradient_norm"] == pytest.approx(norm / 12)


def test_only_bad_steps_in_a_row_end_the_run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve of them, but never three in a row, do not."""
    monkeypatch.setattr(Trainer, "step", poisoned({i for i in range(18) if i % 3}, 0, []))
    train(job(dataset, epochs=2), tmp_path, safety=Safety(max_skipped=3))
    assert [line["skipped_steps"] for line in records(tmp_path)] == [8, 4]


def test_epoch_of_nothing_but_bad_steps(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has no training loss, and the next one goes on."""
    monkeypatch.setattr(Trainer, "step", poisoned(set(range(13)), 0, []))
    train(job(dataset, epochs=2), tmp_path, safety=Safety(max_skipped=14))
    first, second = records(tmp_path)
    assert (first["skipped_steps"], first["gradient_norm"], first["train_loss"]) == (13, 0, None)
    assert second["skipped_steps"] == 0
    assert second["train_loss"] > 0


class Patient(StopAt):
    """Waits after an epoch, until its checkpoint must be on the disk."""

    def epoch(self, record: dict[str, Any]) -> None:
        time.sleep(0.5)


def test_message_about_bad_numbers_says_what_is_true(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 16 on, in the second of four epochs: where it ended, the learning rate there, what is left; and the
    same again when it is resumed.
    """
    monkeypatch.setattr(Trainer, "step", poisoned(set(range(15, 99)), 0, []))
    share = (18 / 13 - 1) / (4 - 1)  # of the cosine, after one epoch of warm-up
    lr = 2e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
    for _ in range(2):
        with pytest.raises(RunFailed) as error:
            loop(job(dataset), Storage(tmp_path), CPU, Patient(), Safety(max_skipped=3))
        assert str(error.value) == (
            "epoch 2, step 18: the gradients of 3 steps in a row were not finite, at learning rate "
            f"{lr:.2g}; the last good checkpoint is of step 13. Try a lower --lr, or --grad-clip"
        )


def test_skipped_steps_in_a_row_are_counted_over_a_stop(dataset: Path, tmp_path: Path) -> None:
    """Stopped after four of them and resumed, the run ends where it would have."""
    config = job(dataset, beta=3e38, kl_warmup=0.0)
    assert not loop(config, Storage(tmp_path / "run"), CPU, StopAt(4), Safety(max_skipped=6))
    with pytest.raises(RunFailed, match=r"epoch 1, step 6: .* 6 steps in a row"):
        loop(config, Storage(tmp_path / "run"), CPU, StopAt(), Safety(max_skipped=6))


def _no_more_patience(rank: int, init: str, config: Config, out: str) -> None:
    from dogvae.training import loop as module

    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    run = module._Run(config, Storage(out), CPU, StopAt(), Safety())

    def save(*args: object) -> None:
        raise RunFailed("no checkpoint could be written")

    run.checkpoints.save = save  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="no checkpoint could be written"):
        run.train()
    dist.destroy_process_group()


def test_end_of_patience_is_the_same_on_all_ranks(dataset: Path, tmp_path: Path) -> None:
    """Only rank 0 writes; an error that the others did not share would count as a lost worker, and be retried."""
    start_ranks(_no_more_patience, 2, str(tmp_path / "init"), job(dataset), str(tmp_path / "run"))


def _drift(rank: int, init: str, config: Config, out: str) -> None:
    from dogvae.training import loop as module

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
