"""A small training run for tests: its dataset and config, training it without Ray, and comparing results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dogvae.config import Config, Safety
from dogvae.data.dataset import Dataset
from dogvae.data.drawn import draw
from dogvae.data.writer import Row, write_dataset
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.checkpoint import Checkpoint, Checkpoints
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from tests.support.ranks import on_ranks

SIZE, TRAIN, VAL = 32, 100, 20
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "notebook": {"architecture": "notebook", "likelihood": "bernoulli", "grad_clip": 1.0},  # with batch norm
}
EPOCHS = 24  # of runs that are killed from outside: long enough to be hit


def make_dataset(folder: Path) -> Path:
    """A prepared dataset of TRAIN + VAL drawn dogs."""
    dogs = drawn_dogs(VAL + TRAIN)
    return write_images(folder, train=dogs[VAL:], val=dogs[:VAL])


def drawn_dogs(n: int) -> list[np.ndarray]:
    """Images (3, SIZE, SIZE) uint8."""
    return [np.asarray(draw(i, 0, SIZE)).transpose(2, 0, 1).copy() for i in range(n)]


def write_images(folder: Path, train: Sequence[np.ndarray], val: Sequence[np.ndarray]) -> Path:
    """A prepared dataset of these images, each (3, h, h) uint8, in this order."""
    rows = []
    for i, image in enumerate([*val, *train]):
        digest = (0 if i < len(val) else 2**63).to_bytes(8, "big") + i.to_bytes(24, "big")
        rows.append(Row(f"{i}.png", None, digest, image))
    folder.mkdir()
    settings = {"size": train[0].shape[-1], "crop": "center", "val_fraction": 0.2}
    write_dataset(folder, rows, {"kind": "test", "name": "test", "signature": ""}, settings)
    return folder


def job(dataset: Path, **settings: Any) -> Config:
    """A config of 13 steps an epoch, the last one short, with averaged weights and augmentation."""
    small: dict[str, Any] = dict(
        width=4, latent_dim=4, latent_size=4, epochs=4, samples=2, batch_size=8, kl_warmup=2.0, ema=0.9
    )
    config = Config.make(**{**small, **settings})
    return config.for_data(str(dataset), Dataset(dataset).fingerprint, SIZE, TRAIN)


class StopAt(Observer):
    """Stops after a number of steps, as Ctrl-C would, and keeps the notes."""

    def __init__(self, steps: int | None = None) -> None:
        self._left = steps
        self.notes: list[str] = []

    def stopping(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left == 0

    def note(self, line: str) -> None:
        self.notes.append(line)


def _loop(rank: int, config: Config, uri: str, stop_at: int | None, safety: Safety | None) -> None:
    loop(config, Storage(uri), torch.device("cpu"), StopAt(stop_at), safety)


def train(
    config: Config,
    out: Path | Storage,
    world_size: int = 1,
    stop_at: int | None = None,
    safety: Safety | None = None,
) -> None:
    """Run the loop on that many ranks, to its end or for `stop_at` steps."""
    args = config, storage_of(out).uri, stop_at, safety
    if world_size == 1:
        _loop(0, *args)
    else:
        on_ranks(world_size, _loop, *args)


def storage_of(out: Path | Storage) -> Storage:
    return out if isinstance(out, Storage) else Storage(out)


def latest(out: Path | Storage) -> Checkpoint:
    """The latest checkpoint of a run."""
    saved = Checkpoints(storage_of(out)).latest()
    assert saved is not None
    return saved


def final(out: Path | Storage) -> dict[str, Tensor]:
    """All tensors of the latest checkpoint."""
    return latest(out).tensors


def records(out: Path | Storage) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without fields that depend on the clock or the number of workers."""
    clock = ("images_per_s", "data_wait", "seconds", "world_size")
    lines = metrics.read(storage_of(out))
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
