"""What the fault tests stand on: a small job, running it on gloo ranks without Ray, and comparing where it ended."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dogvae.config import Config, Safety
from dogvae.data.dataset import Dataset
from dogvae.data.drawn import draw
from dogvae.data.writer import Row, write_dataset
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from tests.conftest import start_ranks

SIZE, TRAIN, VAL = 32, 100, 20
EPOCHS = 24  # of the jobs that are killed from outside: long enough to be hit


def make_dataset(folder: Path) -> Path:
    """Write 100 drawn dogs for training and 20 for validation, with the product's writer; no Ray is needed.

    (The fixture `write_dataset` writes given arrays without the product's code, for tests of reading.)
    """
    rows = []
    for i in range(VAL + TRAIN):
        digest = (0 if i < VAL else 2**63).to_bytes(8, "big") + i.to_bytes(24, "big")
        rows.append(Row(f"{i}.png", None, digest, np.asarray(draw(i, 0, SIZE)).transpose(2, 0, 1)))
    settings = {"size": SIZE, "crop": "center", "val_fraction": 0.2}
    folder.mkdir()
    write_dataset(folder, rows, {"kind": "test", "name": "test", "signature": ""}, settings)
    return folder


def job(dataset: Path, **settings: Any) -> Config:
    """13 steps an epoch, the last one short; batch norm, EMA, augmentation and two samples: all that has a state."""
    small: dict[str, Any] = dict(width=4, latent_dim=4, epochs=4, samples=2, batch_size=8, kl_warmup=2.0, ema=0.9)
    config = Config.make(**{**small, **settings})
    return config.for_data(str(dataset), Dataset(dataset).fingerprint, SIZE, TRAIN)


class StopAt(Observer):
    """Wishes to stop after a number of steps, as Ctrl-C would; writes down what it is told."""

    def __init__(self, steps: int | None = None) -> None:
        self._left = steps
        self.notes: list[str] = []

    def stopping(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left == 0

    def note(self, line: str) -> None:
        self.notes.append(line)


def _rank(rank: int, world_size: int, init: str, run: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world_size)
    run(rank)
    dist.destroy_process_group()


class _Loop:
    def __init__(self, config: Config, uri: str, stop_at: int | None, safety: Safety | None) -> None:
        self.config, self.uri, self.stop_at, self.safety = config, uri, stop_at, safety
        # The server that the ranks are forked from may be older than the keys to an object store.
        self.keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def __call__(self, rank: int) -> None:
        os.environ.update(self.keys)
        loop(self.config, Storage(self.uri), torch.device("cpu"), StopAt(self.stop_at), self.safety)


def train(
    config: Config,
    out: Path | Storage,
    world_size: int = 1,
    stop_at: int | None = None,
    safety: Safety | None = None,
) -> None:
    """Run the loop on so many ranks, until its end or for `stop_at` steps."""
    run = _Loop(config, out.uri if isinstance(out, Storage) else str(out), stop_at, safety)
    if world_size == 1:
        run(0)
        return
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, world_size, world_size, f"{folder}/init", run)


def final(out: Path | Storage) -> dict[str, Tensor]:
    """All tensors of the latest checkpoint."""
    saved = Checkpoints(out if isinstance(out, Storage) else Storage(out)).latest()
    assert saved is not None
    return saved.tensors


def records(out: Path | Storage) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    clock = ("images_per_s", "data_wait", "seconds", "world_size")
    lines = metrics.read(out if isinstance(out, Storage) else Storage(out))
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
