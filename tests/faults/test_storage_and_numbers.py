"""Bad storage, non-finite numbers and ranks that differ: real full disks, real NaNs."""

from __future__ import annotations

import math
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dogvae.config import Config, Safety
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.loop import _Run, loop
from dogvae.training.step import Trainer
from tests.support.ranks import on_ranks
from tests.support.runs import StopAt, differing, final, job, records, train

CPU = torch.device("cpu")


# --- storage


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]).returncode:
        pytest.skip("only root can mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class FillAndFree(StopAt):
    """Fills the disk to the last byte after `fill` steps, and frees it after `free` steps."""

    def __init__(self, disk: Path, fill: int, free: int) -> None:
        super().__init__()
        self._filler, self._fill, self._free, self._step = disk / "filler", fill, free, 0

    def stopping(self) -> bool:
        self._step += 1
        if self._step == self._fill:
            with self._filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        if self._step == self._free:
            self._filler.unlink()
        return False


def test_full_disk_does_not_stop_training(dataset: Path, alone: dict[str, Path], disk: Path) -> None:
    """Full from the second epoch to the fourth. The problem is noted, and in the end nothing is missing."""
    observer = FillAndFree(disk, fill=20, free=45)
    assert loop(job(dataset), Storage(disk / "run"), CPU, observer)
    assert any("could not be written" in note and "No space" in note for note in observer.notes)
    assert "checkpoints can be written again" in observer.notes
    assert differing(final(alone["default"]), final(disk / "run")) == []
    assert records(disk / "run") == records(alone["default"])
    assert not list((disk / "run").rglob("*.partial"))


def test_disk_that_stays_full_ends_the_run_which_can_be_resumed(dataset: Path, disk: Path) -> None:
    observer = FillAndFree(disk, fill=20, free=-1)
    with pytest.raises(RunFailed, match=r"no checkpoint could be written .* of step 13"):
        loop(job(dataset, epochs=200), Storage(disk / "run"), CPU, observer, Safety(patience_s=2))
    (disk / "filler").unlink()
    train(job(dataset, epochs=2), disk / "run")
    assert [r["epoch"] for r in records(disk / "run")] == [0, 1]


def test_too_small_a_disk_is_refused_before_the_first_step(dataset: Path, disk: Path) -> None:
    with pytest.raises(UsageError, match=r"--runs: .* has \d+ MB free, the checkpoints need \d+ MB"):
        loop(job(dataset, width=16), Storage(disk / "run"), CPU, StopAt(), Safety(patience_s=2))


def test_file_in_place_of_the_storage_folder_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match=f"--runs: .* cannot be written to from {socket.gethostname()}: "):
        loop(job(dataset), Storage(tmp_path / "file/run"), CPU, StopAt())


def _train_in_own_folder(rank: int, config: Config, folder: str) -> None:
    with pytest.raises(UsageError, match="storage that all nodes share"):
        loop(config, Storage(f"{folder}/{rank}"), CPU, StopAt())


def test_storage_that_is_not_shared_is_refused_on_all_ranks(dataset: Path, tmp_path: Path) -> None:
    on_ranks(2, _train_in_own_folder, job(dataset), str(tmp_path))
    assert not list(tmp_path.rglob("step-*"))
    assert not list(tmp_path.rglob(".probe-*"))


# --- non-finite numbers


def poisoned(steps_with_nan: set[int], image: int, added: list[Tensor]) -> Callable[..., None]:
    """`Trainer.step`, but in some steps, counted over all epochs, one image is NaN.

    What each step adds to the sums is appended to `added`.
    """
    step = Trainer.step

    def changed(self: Trainer, images: Tensor, n: int, epoch: int, number: int, steps: int) -> None:
        if epoch * steps + number in steps_with_nan:
            images = images.float()
            images[image] = math.nan
        before = self.sums.over_ranks()
        step(self, images, n, epoch, number, steps)
        added.append(self.sums.over_ranks() - before)

    return changed


def _train_with_nan_on_rank_1(rank: int, config: Config, out: str) -> None:
    Trainer.step = poisoned({3} if rank else set(), 0, [])  # type: ignore[method-assign]
    assert loop(config, Storage(out), CPU, StopAt())


def test_nan_on_one_rank_skips_the_step_on_all(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth of 13 steps: two ranks go on as one rank does."""
    config, added = job(dataset, epochs=2), list[Tensor]()
    on_ranks(2, _train_with_nan_on_rank_1, config, str(tmp_path / "two"))
    monkeypatch.setattr(Trainer, "step", poisoned({3}, 4, added))  # of 8 images, rank 1 has the last four
    train(config, tmp_path / "one")
    two, one = records(tmp_path / "two"), records(tmp_path / "one")
    assert [line["skipped_steps"] for line in two] == [line["skipped_steps"] for line in one] == [1, 0]
    for a, b in zip(two, one, strict=True):
        for name in ("val_loss", "train_loss", "train_kl", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3 if "loss" in name else 1e-2)
    images, total, _, _, norm, _ = torch.stack(added[:13]).sum(dim=0).tolist()
    assert images == 92
    assert one[0]["train_loss"] == pytest.approx(total / 92)
    assert one[0]["gradient_norm"] == pytest.approx(norm / 12)


@pytest.mark.parametrize(
    ("skipped", "max_skipped", "counts"),
    [
        pytest.param({i for i in range(18) if i % 3}, 3, [8, 4], id="never three in a row"),
        pytest.param(set(range(13)), 14, [13, 0], id="a whole epoch"),
    ],
)
def test_run_goes_on_after_fewer_skipped_steps_in_a_row_than_allowed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: set[int], max_skipped: int, counts: Any
) -> None:
    monkeypatch.setattr(Trainer, "step", poisoned(skipped, 0, []))
    train(job(dataset, epochs=2), tmp_path, safety=Safety(max_skipped=max_skipped))
    first, second = records(tmp_path)
    assert [first["skipped_steps"], second["skipped_steps"]] == counts
    assert (first["train_loss"] is None) == (first["gradient_norm"] == 0) == (counts[0] == 13)
    assert second["train_loss"] > 0


class Patient(StopAt):
    """Waits after each epoch until its checkpoint is on the disk."""

    wants_saved = True


def test_too_many_skipped_steps_in_a_row_end_the_run_with_a_message(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 16 on, in the second of four epochs. The resumed run ends in the same way."""
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


def test_skipped_steps_in_a_row_are_counted_over_an_interruption(dataset: Path, tmp_path: Path) -> None:
    """beta is so large that the loss overflows."""
    config = job(dataset, beta=3e38, kl_warmup=0.0)
    assert not loop(config, Storage(tmp_path / "run"), CPU, StopAt(4), Safety(max_skipped=6))
    with pytest.raises(RunFailed, match=r"epoch 1, step 6: .* 6 steps in a row"):
        loop(config, Storage(tmp_path / "run"), CPU, StopAt(), Safety(max_skipped=6))


# --- ranks that differ


def _fail_to_save_on_rank_0(rank: int, config: Config, out: str) -> None:
    run = _Run(config, Storage(out), CPU, StopAt(), Safety(), None)

    def save(*args: object) -> None:
        raise RunFailed("no checkpoint could be written")

    run.checkpoints.save = save  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="no checkpoint could be written"):
        run.train()


def _change_a_weight_on_rank_1(rank: int, config: Config, out: str) -> None:
    run = _Run(config, Storage(out), CPU, StopAt(), Safety(), None)
    with torch.no_grad():
        if rank == 1:
            next(run.trainer.model.parameters())[0, 0, 0, 0] += 1e-6
    with pytest.raises(RunFailed, match="epoch 1: the workers' weights have drifted apart"):
        run.train()


@pytest.mark.parametrize("fault", [_fail_to_save_on_rank_0, _change_a_weight_on_rank_1])
def test_failure_of_one_rank_ends_the_run_on_all_ranks(
    dataset: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    """With the same error: a rank that did not raise it would count as a lost worker, and be restarted."""
    on_ranks(2, fault, job(dataset), str(tmp_path / "run"))
    assert not list(tmp_path.rglob("step-*"))
