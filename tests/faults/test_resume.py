"""An interrupted and resumed run equals an uninterrupted one bit for bit; with another number of ranks, nearly."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dogvae import rng
from dogvae.config import Safety
from dogvae.data.dataset import Dataset, epoch_order
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training import run_folder
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.loop import loop
from dogvae.training.metrics import read
from dogvae.training.step import Trainer
from tests.conftest import WriteDataset
from tests.support.runs import (
    SIZE,
    TRAIN,
    VAL,
    VARIANTS,
    StopAt,
    differing,
    final,
    job,
    latest,
    make_dataset,
    records,
    train,
)
from tests.support.storage import UnreliableStorage

CPU = torch.device("cpu")
LOSSES = ("val_loss", "train_loss", "train_reconstruction")


def assert_equal(run: Path, whole: Path) -> None:
    """The same tensors and records, bit for bit."""
    assert differing(final(whole), final(run)) == []
    assert records(run) == records(whole)


def assert_close(run: Path, whole: Path, epochs: int = 4) -> None:
    lines = records(run)
    assert len(lines) == epochs
    for got, expected in zip(lines, records(whole), strict=False):
        for name in (*LOSSES, "train_kl", "gradient_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-3 if name in LOSSES else 1e-2)


@pytest.mark.parametrize(
    ("variant", "stop_at"), [("default", n) for n in (1, 13, 14, 51)] + [("notebook", n) for n in (1, 5, 13, 38)]
)
def test_run_stopped_after_any_step_resumes_to_the_same_bits(
    dataset: Path, alone: dict[str, Path], tmp_path: Path, variant: str, stop_at: int
) -> None:
    """After the first step, within epochs of 13 steps, at their ends, and before the very last step."""
    config = job(dataset, **VARIANTS[variant])
    train(config, tmp_path, stop_at=stop_at)
    assert len(records(tmp_path)) < config.epochs
    train(config, tmp_path)
    assert_equal(tmp_path, alone[variant])


@pytest.mark.slow
def test_three_ranks_resume_to_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    """Sums of three depend on their order, which must not depend on how long a process has lived."""
    config = job(dataset)
    train(config, tmp_path / "whole", 3)
    train(config, tmp_path / "parts", 3, stop_at=20)
    train(config, tmp_path / "parts", 3)
    assert differing(final(tmp_path / "whole"), final(tmp_path / "parts")) == []
    for got, expected in zip(records(tmp_path / "parts"), records(tmp_path / "whole"), strict=True):
        # From the interruption on, rank 0 holds the sums of all ranks, so the last digit may differ.
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_number_of_ranks_may_change_within_epochs(dataset: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    config = job(dataset)
    train(config, tmp_path, 1, stop_at=20)
    train(config, tmp_path, 3, stop_at=9)
    train(config, tmp_path, 2)
    assert_close(tmp_path, alone["default"])


def test_two_ranks_count_each_image_once_over_an_interruption(
    dataset: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    """With a checkpoint after every step."""
    config = job(dataset)
    train(config, tmp_path, 2, stop_at=18, safety=Safety(checkpoint_s=0))
    train(config, tmp_path, 2, stop_at=9)
    assert_close(tmp_path, alone["default"], epochs=2)


def test_run_resumes_from_a_scheduled_checkpoint_within_an_epoch(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def save_and_wait(self: Checkpoints, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        save(self, tensors, meta)
        self.wait()  # a busy disk leaves out what is no longer the newest

    monkeypatch.setattr(Checkpoints, "save", save_and_wait)
    config = job(dataset, epochs=1)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_at=12, safety=Safety(checkpoint_steps=5))
    files = sorted((tmp_path / "parts/checkpoints").iterdir())
    assert [int(f.name[5:14]) for f in files] == [10, 12]
    files[-1].unlink()
    train(config, tmp_path / "parts")
    assert_equal(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("lines", [3, None])
def test_metrics_of_a_resumed_run_are_those_of_its_checkpoint(
    dataset: Path, alone: dict[str, Path], tmp_path: Path, lines: int | None
) -> None:
    """A kill left a line without a checkpoint, or the file is lost."""
    train(job(dataset), tmp_path, stop_at=30)
    path = tmp_path / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 2
    path.unlink()
    if lines:
        path.write_text("".join((alone["default"] / "metrics.jsonl").read_text().splitlines(keepends=True)[:lines]))
    train(job(dataset), tmp_path)
    assert_equal(tmp_path, alone["default"])


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(
    dataset: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    config = job(dataset)
    train(config, tmp_path, stop_at=33)
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    train(config, tmp_path)
    assert_equal(tmp_path, alone["default"])


def test_dataset_may_move_during_an_interruption(dataset: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    config = job(dataset)
    train(config, tmp_path / "run", stop_at=20)
    train(config.replace(data=str(shutil.copytree(dataset, tmp_path / "moved"))), tmp_path / "run")
    assert_equal(tmp_path / "run", alone["default"])


# --- what is refused


def test_checkpoint_of_other_settings_or_other_data_is_refused(
    dataset: Path, write_dataset: WriteDataset, tmp_path: Path
) -> None:
    config = job(dataset, epochs=1)
    train(config, tmp_path / "run")
    with pytest.raises(UsageError, match=r"latent_dim 4, not 8; beta 1.0, not 2.0"):
        train(job(dataset, epochs=2, latent_dim=8, beta=2.0), tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (TRAIN, 3, SIZE, SIZE), np.uint8)
    other = job(write_dataset([noise], [noise[:VAL]]), epochs=2)
    with pytest.raises(UsageError, match=f"fingerprint {config.fingerprint}, not {other.fingerprint}"):
        train(other, tmp_path / "run")
    with pytest.raises(UsageError, match="not what this run was trained on"):
        train(other.replace(data=str(dataset)), tmp_path / "elsewhere")
    damaged = make_dataset(tmp_path / "damaged")
    (shard,) = damaged.glob("train-*.npy")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"train-00000\.npy"):
        train(job(damaged, epochs=2), tmp_path / "run")


def replace_checkpoint(run: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    shutil.rmtree(run / "checkpoints")
    checkpoints = Checkpoints(Storage(run))
    checkpoints.save(tensors, meta)
    checkpoints.wait()


def test_checkpoints_of_earlier_versions(dataset: Path, tmp_path: Path) -> None:
    """One with settings that were removed is resumed. One with other random streams would end with other weights."""
    train(job(dataset, epochs=1), tmp_path)
    tensors, meta = latest(tmp_path)
    assert meta["streams"] == rng.VERSION
    removed = {"compile": "auto", "gradient_compression": "none", "norm": "batch"}
    replace_checkpoint(tmp_path, tensors, {**meta, "config": {**meta["config"], **removed}})
    train(job(dataset, epochs=2), tmp_path)
    assert [line["epoch"] for line in records(tmp_path)] == [0, 1]
    replace_checkpoint(tmp_path, tensors, {name: value for name, value in meta.items() if name != "streams"})  # 0.1
    with pytest.raises(UsageError, match="drew other random numbers"):
        train(job(dataset, epochs=2), tmp_path)


def test_open_old_refuses_other_settings_and_data(dataset: Path, write_dataset: WriteDataset, tmp_path: Path) -> None:
    """Only the number of epochs and the path of the same data may change."""
    config = job(dataset, epochs=1)
    run = Storage(tmp_path) / "run"
    run_folder.save_config(run, config)
    moved = str(shutil.copytree(dataset, tmp_path / "moved"))
    storage, opened = run_folder.open_old(str(tmp_path), "run", {"epochs": 7, "beta": 1.0}, moved)
    assert opened == config.replace(epochs=7, data=moved)
    assert storage.uri == run.uri
    with pytest.raises(UsageError, match=r"--beta: this run has 1\.0, not 2\.0"):
        run_folder.open_old(str(tmp_path), "run", {"beta": 2.0}, None)
    noise = np.zeros((9, 3, SIZE, SIZE), np.uint8)
    with pytest.raises(UsageError, match=r"--data: .*its fingerprint differs"):
        run_folder.open_old(str(tmp_path), "run", {}, str(write_dataset([noise], [noise])))
    with pytest.raises(UsageError, match="--name run --resume"):
        run_folder.open_new(str(tmp_path), "run")


def test_run_is_finished_with_the_checkpoint_of_its_last_epoch(dataset: Path, tmp_path: Path) -> None:
    config, run = job(dataset, epochs=2), Storage(tmp_path)
    assert not run_folder.is_finished(run, config)
    train(config, tmp_path)
    assert run_folder.is_finished(run, config)
    assert not run_folder.is_finished(run, config.replace(epochs=3))
    max((tmp_path / "checkpoints").iterdir()).unlink()
    assert not run_folder.is_finished(run, config)


# --- what the loop records and saves


def test_each_epoch_has_its_own_order_and_mean_losses(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an interruption: images in the order of (seed, epoch), means over the steps of that epoch."""
    seen: list[Tensor] = []
    added: list[Tensor] = []
    step = Trainer.step

    def watched(self: Trainer, images: Tensor, *args: Any) -> None:
        before = self.sums.over_ranks()
        step(self, images, *args)
        seen.append(images)
        added.append(self.sums.over_ranks() - before)

    monkeypatch.setattr(Trainer, "step", watched)
    config = job(dataset, epochs=3, seed=3)
    train(config, tmp_path, stop_at=20)
    train(config, tmp_path)
    order = np.concatenate([epoch_order(TRAIN, 3, epoch) for epoch in range(3)])
    assert torch.equal(torch.cat(seen), Dataset(dataset).train.gather(order))
    for line, steps in zip(records(tmp_path), torch.stack(added).split(13), strict=True):
        images, total, reconstruction, kl, norm, _ = steps.sum(dim=0).tolist()
        assert images == TRAIN
        means = [line[f"train_{name}"] for name in ("loss", "reconstruction", "kl")]
        assert means == pytest.approx([total / TRAIN, reconstruction / TRAIN, kl / TRAIN])
        assert line["gradient_norm"] == pytest.approx(norm / 13)


class Clock(StopAt):
    """Time that passes only with steps: 10 seconds with each."""

    perf_counter = staticmethod(time.perf_counter)
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def progress(self, epoch: int, step: int, steps: int) -> None:
        self.now += 10


@pytest.mark.parametrize(
    ("safety", "steps"),
    [
        (Safety(), [6, 12, 13, 19, 25, 26]),
        (Safety(checkpoint_s=35), [4, 8, 12, 13, 17, 21, 25, 26]),
        (Safety(checkpoint_s=35, checkpoint_steps=5), [5, 10, 13, 15, 20, 25, 26]),
    ],
)
def test_checkpoints_are_saved_on_schedule_and_after_each_epoch(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safety: Safety, steps: list[int]
) -> None:
    """Only those after an epoch have a validation loss."""
    made: dict[int, float | None] = {}
    save = Checkpoints.save

    def watched(self: Checkpoints, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        made[meta["step"]] = meta.get("val_loss")
        save(self, tensors, meta)

    clock = Clock()
    monkeypatch.setattr("dogvae.training.loop.time", clock)
    monkeypatch.setattr(Checkpoints, "save", watched)
    assert loop(job(dataset, epochs=2), Storage(tmp_path), CPU, clock, safety)
    assert list(made) == steps
    assert {step: loss for step, loss in made.items() if loss} == {
        13 * line["epoch"] + 13: line["val_loss"] for line in records(tmp_path)
    }


def test_checkpoint_within_an_epoch_does_not_inherit_a_loss_from_the_resumed_one(dataset: Path, tmp_path: Path) -> None:
    train(job(dataset, epochs=1), tmp_path)
    train(job(dataset, epochs=2), tmp_path, stop_at=3)
    saved = latest(tmp_path)
    assert (saved.meta["step"], saved.meta["val_loss"]) == (16, None)


class EndsProcess(StopAt):
    """Takes a second longer for the first epoch, and ends the process after it, as a search does with a trial."""

    wants_saved = True

    def progress(self, epoch: int, step: int, steps: int) -> None:
        time.sleep(step == 1)

    def epoch(self, record: dict[str, Any]) -> None:
        raise SystemExit


def test_seconds_continue_from_the_checkpoint(dataset: Path, tmp_path: Path) -> None:
    config = job(dataset, epochs=2)
    with pytest.raises(SystemExit):
        loop(config, Storage(tmp_path), CPU, EndsProcess())
    train(config, tmp_path, stop_at=4)
    train(config, tmp_path)
    first, second = (line["seconds"] for line in read(Storage(tmp_path)))
    assert 1 < first < second


def test_observer_can_have_each_epoch_saved_before_it_is_called(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        loop(job(dataset), UnreliableStorage(tmp_path, delay_s=0.2), CPU, EndsProcess())
    assert [r["epoch"] for r in records(tmp_path)] == [0]
    assert latest(tmp_path).meta["step"] == 13
