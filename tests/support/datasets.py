"""The images of small datasets; reading, damaging and copying their files; processes that use them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dogvae.data import cache
from dogvae.storage import Storage
from tests.support.command import ROOT
from tests.support.s3 import Server

# The code of a process that fetches a URI, and prints where the copy is.
FETCH = "import sys; from dogvae.data.cache import local_copy; print(local_copy(sys.argv[1]), flush=True)\n"


def noise(n: int, seed: int = 0, side: int = 32) -> np.ndarray:
    """Random images (n, 3, side, side) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), np.uint8)


def grey_photos(root: Path, count: int, start: int = 0, side: int = 32) -> Path:
    """PNGs of `side` x `side` pixels, each of a single grey value, its number: an image says which photo it was."""
    root.mkdir(exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", (side, side), (i, i, i)).save(root / f"{i:03d}.png")
    return root


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """The files of a folder: name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def shards(folder: Path) -> dict[str, bytes]:
    """The shards of a dataset: name -> bytes."""
    return contents(folder, "*.npy")


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """For each shard what changes when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.npy")}


def flip_bit(path: Path) -> None:
    """Flip a bit of the last pixels."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def put(folder: Path, s3: Server, name: str = "dogs") -> str:
    """Copy a folder to the object store, file by file; returns its URI."""
    uri = s3.uri(name)
    for file, data in contents(folder).items():
        Storage(uri).write(file, data)
    return uri


def release_copies() -> None:
    """Let go of all copies, as the end of a process does."""
    for lock in cache._in_use.values():
        os.close(lock)
    cache._in_use.clear()


def fetched(uri: str) -> Path:
    """Copy a dataset to this node; returns the copy, which nobody uses any more."""
    folder = cache.local_copy(uri)
    release_copies()
    return folder


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """Start a process that runs Python code."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
