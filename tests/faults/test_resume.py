"""Interrupted and resumed is the same as never interrupted, bit for bit; on other world sizes, nearly so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dogvae.checkpoint import Checkpoints
from dogvae.config import Safety
from dogvae.console import UsageError
from dogvae.storage import Storage
from dogvae.train import loop
from tests.faults.bench import StopAt, differing, final, job, make_dataset, records, train


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


class Slow(Storage):
    """Storage that answers late."""

    def __truediv__(self, name: str) -> Storage:
        return Slow(f"{self.uri}/{name}")

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
        loop(job(dataset), Slow(tmp_path), torch.device("cpu"), Ends())
    assert [r["epoch"] for r in records(tmp_path)] == [0]
    saved = Checkpoints(Storage(tmp_path)).latest()
    assert saved is not None
    assert saved.meta["step"] == 13
