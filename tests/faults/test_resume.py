"""Interrupted and resumed is the same as never interrupted, bit for bit; on other world sizes, nearly so."""

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
from dogvae.training import run_folder as runs
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.loop import loop
from dogvae.training.metrics import read
from dogvae.training.step import Trainer
from tests.conftest import WriteDataset
from tests.support.runs import SIZE, TRAIN, VAL, StopAt, differing, final, job, make_dataset, records, train


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The job on one rank, uninterrupted, with either norm."""
    out = {norm: tmp_path_factory.mktemp("alone") / norm for norm in ("batch", "group")}
    for norm, path in out.items():
        train(job(dataset, norm=norm), path)
    return out


@pytest.mark.parametrize(
    ("norm", "stop_at"), [("batch", n) for n in (1, 5, 13, 14, 38, 51)] + [("group", n) for n in (13, 38)]
)
def test_stopped_anywhere_and_resumed(
    dataset: Path, alone: dict[str, Path], tmp_path: Path, norm: str, stop_at: int
) -> None:
    """After the first step, within epochs, at their ends (13 steps each), before the very last step."""
    config = job(dataset, norm=norm)
    train(config, tmp_path, stop_at=stop_at)
    assert len(records(tmp_path)) < config.epochs
    train(config, tmp_path)
    assert differing(final(alone[norm]), final(tmp_path)) == []
    assert records(tmp_path) == records(alone[norm])


@pytest.mark.slow
def test_stopped_and_resumed_on_three_ranks(dataset: Path, tmp_path: Path) -> None:
    """Sums of three depend on their order, which must not depend on how long a process has lived."""
    config = job(dataset)
    train(config, tmp_path / "whole", 3)
    train(config, tmp_path / "parts", 3, stop_at=20)
    train(config, tmp_path / "parts", 3)
    assert differing(final(tmp_path / "whole"), final(tmp_path / "parts")) == []
    for ours, theirs in zip(records(tmp_path / "parts"), records(tmp_path / "whole"), strict=True):
        # Of the epoch's sums rank 0 keeps those of all ranks until the interruption: the last digit may differ.
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.slow
def test_world_size_may_change_in_between(dataset: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    """1, then 3, then 2 ranks, changed within epochs: losses within 0.1% of those of one."""
    config = job(dataset)
    train(config, tmp_path, 1, stop_at=20)
    train(config, tmp_path, 3, stop_at=9)
    train(config, tmp_path, 2)
    for ours, theirs in zip(records(tmp_path), records(alone["batch"]), strict=True):
        for name in ("val_loss", "train_loss", "train_kl", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3 if "loss" in name else 1e-2)


def test_scheduled_checkpoints_within_an_epoch(dataset: Path, tmp_path: Path) -> None:
    """Every 5 steps; each is enough to go on from, with the numbers of an uninterrupted run."""
    config = job(dataset, epochs=1)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_at=12, safety=Safety(checkpoint_steps=5))
    files = sorted((tmp_path / "parts/checkpoints").iterdir())
    assert [int(f.name[5:14]) for f in files] == [10, 12]
    files[-1].unlink()
    train(config, tmp_path / "parts")
    assert differing(final(tmp_path / "whole"), final(tmp_path / "parts")) == []
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


@pytest.mark.parametrize("metrics", ["a line too many", "lost"])
def test_metrics_are_those_of_the_checkpoint(
    dataset: Path, alone: dict[str, Path], tmp_path: Path, metrics: str
) -> None:
    """A kill came between an epoch's line and its checkpoint, or the file is gone."""
    train(job(dataset), tmp_path, stop_at=30)
    path = tmp_path / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 2
    path.write_text("".join((alone["batch"] / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]))
    if metrics == "lost":
        path.unlink()
    train(job(dataset), tmp_path)
    assert records(tmp_path) == records(alone["batch"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_torn_checkpoint_is_passed_over(dataset: Path, alone: dict[str, Path], tmp_path: Path, damage: str) -> None:
    config = job(dataset)
    train(config, tmp_path, stop_at=33)
    newest = max((tmp_path / "checkpoints").iterdir())
    data = bytearray(newest.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    newest.write_bytes({"truncated": bytes(data[: len(data) // 3]), "flipped": bytes(data), "empty": b""}[damage])
    train(config, tmp_path)
    assert differing(final(alone["batch"]), final(tmp_path)) == []
    assert records(tmp_path) == records(alone["batch"])


def test_checkpoint_of_another_run_is_refused(dataset: Path, tmp_path: Path) -> None:
    train(job(dataset, epochs=1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"latent_dim 4, not 8; beta 1.0, not 2.0"):
        train(job(dataset, epochs=2, latent_dim=8, beta=2.0), tmp_path / "run")
    other = make_dataset(tmp_path / "other")
    (shard,) = other.glob("train-*.npy")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"train-00000\.npy"):
        train(job(other, epochs=2), tmp_path / "run")


def test_checkpoint_with_other_random_streams_is_refused(dataset: Path, tmp_path: Path) -> None:
    """A run that goes on with other numbers would end with other weights, and nobody would know."""
    train(job(dataset, epochs=1), tmp_path)
    checkpoints = Checkpoints(Storage(tmp_path))
    saved = checkpoints.latest()
    assert saved is not None
    assert saved.meta["streams"] == rng.VERSION
    del saved.meta["streams"]  # as the checkpoints of version 0.1 have it
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    checkpoints.save(saved.tensors, saved.meta)
    checkpoints.wait()
    with pytest.raises(UsageError, match="drew other random numbers"):
        train(job(dataset, epochs=2), tmp_path)


def test_checkpoint_of_other_data_is_refused(dataset: Path, write_dataset: WriteDataset, tmp_path: Path) -> None:
    """Data that are whole, but not those of the checkpoint, or not those that the run began with."""
    config = job(dataset, epochs=1)
    train(config, tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (TRAIN, 3, SIZE, SIZE), np.uint8)
    other = job(write_dataset([noise], [noise[:VAL]]), epochs=2)
    with pytest.raises(UsageError, match=f"fingerprint {config.fingerprint}, not {other.fingerprint}"):
        train(other, tmp_path / "run")
    with pytest.raises(UsageError, match="not what this run was trained on"):
        train(other.replace(data=str(dataset)), tmp_path / "elsewhere")


def test_data_may_move_in_between(dataset: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    config = job(dataset)
    train(config, tmp_path / "run", stop_at=20)
    train(config.replace(data=str(shutil.copytree(dataset, tmp_path / "moved"))), tmp_path / "run")
    assert differing(final(alone["batch"]), final(tmp_path / "run")) == []
    assert records(tmp_path / "run") == records(alone["batch"])


def test_resumed_run_keeps_its_settings_and_data(dataset: Path, write_dataset: WriteDataset, tmp_path: Path) -> None:
    config = job(dataset, epochs=1)
    run = Storage(tmp_path) / "run"
    runs.save_config(run, config)
    moved = str(shutil.copytree(dataset, tmp_path / "moved"))
    opened = runs.open_old(str(tmp_path), "run", {"epochs": 7, "beta": 1.0}, moved)
    assert opened[1] == config.replace(epochs=7, data=moved)
    assert opened[0].uri == run.uri
    with pytest.raises(UsageError, match=r"--beta: this run has 1\.0, not 2\.0"):
        runs.open_old(str(tmp_path), "run", {"beta": 2.0}, None)
    noise = np.zeros((9, 3, SIZE, SIZE), np.uint8)
    with pytest.raises(UsageError, match=r"--data: .*its fingerprint differs"):
        runs.open_old(str(tmp_path), "run", {}, str(write_dataset([noise], [noise])))
    with pytest.raises(UsageError, match="--name run --resume"):
        runs.open_new(str(tmp_path), "run")


def test_finished_is_a_run_with_the_checkpoint_of_its_last_epoch(dataset: Path, tmp_path: Path) -> None:
    config, run = job(dataset, epochs=2), Storage(tmp_path)
    assert not runs.is_finished(run, config)
    train(config, tmp_path)
    assert runs.is_finished(run, config)
    assert not runs.is_finished(run, config.replace(epochs=3))
    max((tmp_path / "checkpoints").iterdir()).unlink()
    assert not runs.is_finished(run, config)


def test_each_epoch_has_its_own_order_and_numbers(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images come as (seed, epoch) has them; the record is the mean over that epoch's steps. Over an interruption."""
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


def test_two_ranks_interrupted_tell_what_one_does(dataset: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    """With a checkpoint after every step: each image counts once, whichever rank had seen it before."""
    config = job(dataset)
    train(config, tmp_path, 2, stop_at=18, safety=Safety(checkpoint_s=0))
    train(config, tmp_path, 2, stop_at=9)
    assert len(records(tmp_path)) == 2
    for ours, theirs in zip(records(tmp_path), records(alone["batch"]), strict=False):
        for name in ("train_loss", "train_reconstruction", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
        assert ours["train_kl"] == pytest.approx(theirs["train_kl"], rel=1e-2)


class Clock(StopAt):
    """Time that goes on by 10 seconds with each step, and not otherwise."""

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
def test_checkpoints_are_made_when_they_are_due(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safety: Safety, steps: list[int]
) -> None:
    """After so many seconds without one, or so many steps, and after each epoch: only those have a validation loss."""
    made: dict[int, float | None] = {}
    save = Checkpoints.save

    def watched(self: Checkpoints, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        made[meta["step"]] = meta.get("val_loss")
        save(self, tensors, meta)

    clock = Clock()
    monkeypatch.setattr("dogvae.training.loop.time", clock)
    monkeypatch.setattr(Checkpoints, "save", watched)
    assert loop(job(dataset, epochs=2), Storage(tmp_path), torch.device("cpu"), clock, safety)
    assert list(made) == steps
    assert {step: loss for step, loss in made.items() if loss} == {
        13 * line["epoch"] + 13: line["val_loss"] for line in records(tmp_path)
    }


class Slow(StopAt):
    """Takes a second more for its first epoch."""

    def epoch(self, record: dict[str, Any]) -> None:
        raise SystemExit

    def progress(self, epoch: int, step: int, steps: int) -> None:
        if step == 1:
            time.sleep(1)


def test_seconds_go_on_from_the_checkpoint(dataset: Path, tmp_path: Path) -> None:
    config = job(dataset, epochs=2)
    with pytest.raises(SystemExit):
        loop(config, Storage(tmp_path), torch.device("cpu"), Slow())
    time.sleep(0.3)
    train(config, tmp_path, stop_at=4)
    train(config, tmp_path)
    first, second = (line["seconds"] for line in read(Storage(tmp_path)))
    assert 1 < first < second


class SlowStorage(Storage):
    """Storage that answers late."""

    def __truediv__(self, name: str) -> Storage:
        return SlowStorage(f"{self.uri}/{name}")

    def write(self, name: str, data: bytes) -> None:
        time.sleep(0.2)
        super().write(name, data)


class Ends(StopAt):
    """Hears an epoch, and ends the training at once, as a search does with a trial."""

    wants_saved = True

    def epoch(self, record: dict[str, Any]) -> None:
        raise SystemExit


def test_epoch_can_be_on_the_storage_before_it_is_told(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        loop(job(dataset), SlowStorage(tmp_path), torch.device("cpu"), Ends())
    assert [r["epoch"] for r in records(tmp_path)] == [0]
    saved = Checkpoints(Storage(tmp_path)).latest()
    assert saved is not None
    assert saved.meta["step"] == 13


def test_resumed_from_the_end_of_an_epoch_a_later_checkpoint_has_no_loss_of_it(dataset: Path, tmp_path: Path) -> None:
    config = job(dataset, epochs=2)
    train(job(dataset, epochs=1), tmp_path)
    train(config, tmp_path, stop_at=3)
    saved = Checkpoints(Storage(tmp_path)).latest()
    assert saved is not None
    assert (saved.meta["step"], saved.meta["val_loss"]) == (16, None)
