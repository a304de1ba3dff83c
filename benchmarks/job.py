"""What the benchmarks train on: a dataset of drawn dogs, and a Config from the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.data.drawn import draw
from dogvae.data.writer import Row, write_dataset


def write_photos(folder: Path, train: int, val: int = 32, size: int = 64) -> Path:
    """Write a prepared dataset of drawn dogs, as `dogvae prepare` does: at most 100 different dogs, repeated."""
    dogs = [np.asarray(draw(i, 0, size)).transpose(2, 0, 1) for i in range(min(100, train))]
    digests = ((0 if i < val else 2**64 - 1).to_bytes(8, "big") + i.to_bytes(24, "big") for i in range(val + train))
    rows = (Row(f"{i}.png", None, digest, dogs[i % len(dogs)]) for i, digest in enumerate(digests))
    folder.mkdir(parents=True)
    source = {"kind": "drawn", "name": "drawn", "signature": ""}
    write_dataset(folder, rows, source, {"size": size, "crop": "center", "val_fraction": val / (val + train)})
    return folder


def photos_of(dataset: str | Path) -> np.ndarray:
    """The training images of a prepared dataset as an array in memory: uint8 (n, 3, h, h)."""
    train = Dataset(dataset).train
    return train.gather(np.arange(len(train))).numpy()


def config_for(dataset: str | Path, preset: str, args: argparse.Namespace, **settings: Any) -> Config:
    """The Config of a preset for this dataset, with --samples, --batch-size and, if given, --width."""
    data = Dataset(dataset)
    given = {"samples": args.samples, "batch_size": args.batch_size, **settings}
    if args.width:
        given["width"] = args.width
    return Config.make(preset=preset, **given).for_data(str(dataset), data.fingerprint, data.size, len(data.train))
