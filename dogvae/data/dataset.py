"""A prepared dataset: opening it, the order of its images in an epoch, and uint8 batches on the device.

torch is imported only where it is used: commands open datasets too, and importing torch takes seconds.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dogvae import rng
from dogvae.data.cache import local_copy
from dogvae.data.manifest import read_manifest, shards_of
from dogvae.errors import UsageError
from dogvae.rng import Stream
from dogvae.storage import is_uri

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RESIDENT_SHARE = 0.25  # of a GPU's free memory: a larger split is streamed instead of kept on the GPU
gpu_share = 1.0
"""The part of its GPU that this process has. `tune` puts that of a trial here."""


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the `n` training images in an epoch: a random permutation (n,) int64."""
    return np.argsort(rng.words(n, Stream.ORDER, seed, epoch), kind="stable")


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch of `n` images that `rank` gets; sizes of parts differ by at most 1."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


class Split:
    """The images of one split, memory-mapped from the shards in `root`. Raises UsageError for damaged shards."""

    def __init__(self, root: Path, shards: Sequence[dict[str, Any]], size: int) -> None:
        self._shards: list[np.ndarray] = []
        for shard in shards:
            path = root / shard["file"]
            try:
                length = path.stat().st_size
                array = np.load(path, mmap_mode="r", allow_pickle=False) if length == shard["bytes"] else None
            except (OSError, ValueError) as error:
                raise UsageError(f"{path} cannot be read ({error}): prepare the dataset again") from error
            if array is None:
                raise UsageError(f"{path} has {length} bytes, not {shard['bytes']}: prepare the dataset again")
            if array.dtype != np.uint8 or array.shape != (shard["count"], 3, size, size):
                raise UsageError(
                    f"{path} holds {array.dtype} {array.shape}, not what its manifest says: prepare the dataset again"
                )
            self._shards.append(array)
        self._starts = np.cumsum([0] + [len(s) for s in self._shards])
        self.image_shape = (3, size, size)
        self.nbytes = sum(s.nbytes for s in self._shards)
        self._resident: dict[torch.device, Tensor | None] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, indices: np.ndarray) -> Tensor:
        """Images (b, 3, h, h) uint8 on the CPU, copied in the order of `indices` (b,)."""
        import torch

        if len(self._shards) == 1:
            return torch.from_numpy(self._shards[0][indices])
        which = np.searchsorted(self._starts, indices, side="right") - 1
        out = np.empty((len(indices), *self._shards[0].shape[1:]), np.uint8)
        for shard in np.unique(which):
            rows = which == shard
            out[rows] = self._shards[shard][indices[rows] - self._starts[shard]]
        return torch.from_numpy(out)

    def pictures(self, n: int) -> np.ndarray:
        """The first `n` images for people, and for a `DogVAE`: uint8 (n, h, h, 3)."""
        return self.gather(np.arange(min(n, len(self)))).permute(0, 2, 3, 1).numpy()

    def resident(self, device: torch.device) -> Tensor | None:
        """All images (n, 3, h, h) uint8 on a GPU; None if they are too many for it. Copied at the first call only."""
        import torch

        if device not in self._resident:
            images = None
            if self.nbytes < RESIDENT_SHARE * gpu_share * torch.cuda.mem_get_info(device)[0]:
                images = torch.empty((len(self), *self.image_shape), dtype=torch.uint8, device=device)
                for shard, start in zip(self._shards, self._starts, strict=False):
                    images[start : start + len(shard)] = torch.from_numpy(np.array(shard))
            self._resident[device] = images
        return self._resident[device]

    def chunks(self, size: int, most: int | None = None) -> Iterator[Tensor]:
        """The first `most` images (default: all) in stored order, as uint8 (size, 3, h, h); the last may be shorter."""
        n = min(len(self), most or len(self))
        for start in range(0, n, size):
            yield self.gather(np.arange(start, min(start + size, n)))


class Dataset:
    """An opened dataset: splits `train` and `val`, `size` of the images in pixels, `fingerprint`, `manifest`.

    `path` is what was opened, a path or a URI, and `folder` is where it is on this node: a URI is copied there first.
    Raises UsageError if the dataset is missing or damaged, or has another fingerprint than `fingerprint`.
    """

    def __init__(self, path: str | Path, fingerprint: str = "") -> None:
        self.path = path if is_uri(path) else Path(path)
        self.folder = local_copy(path, fingerprint)
        manifest = read_manifest(self.folder, fingerprint)
        self.size: int = manifest["size"]
        self.fingerprint: str = manifest["fingerprint"]
        self.manifest = manifest
        self.train, self.val = (
            Split(self.folder, manifest["splits"][split]["shards"], self.size) for split in ("train", "val")
        )

    @property
    def copy_key(self) -> tuple[Any, ...]:
        """Key of the physical copy: equal for ranks that share it. Empty for plain paths, which are never repaired."""
        status = self.folder.stat()
        return (socket.gethostname(), status.st_dev, status.st_ino) if is_uri(self.path) else ()

    def verify(self, rank: int = 0, world_size: int = 1) -> list[Path]:
        """Compare this rank's share of the shards with their checksums; returns the files that were repaired.

        `rank` and `world_size` count the ranks with the same `copy_key`. Damaged files of a node's copy are fetched
        again: ranks that have them open must open them again. Raises UsageError for a file that cannot be repaired.
        """
        shards = shards_of(self.manifest)[rank::world_size]
        damaged = [s["file"] for s in shards if sha256_of(self.folder / s["file"]) != s["sha256"]]
        paths = [self.folder / name for name in damaged]
        if damaged and not is_uri(self.path):
            raise UsageError(f"{paths[0]} is not what was prepared (its checksum differs): prepare the dataset again")
        if damaged:
            try:
                local_copy(self.path, self.fingerprint, damaged)
            except UsageError as error:
                raise UsageError(f"{paths[0]} is damaged and cannot be fetched again: {error}") from error
        return paths


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Batches:
    """Batches of a split as uint8 (b, 3, h, h) on the device.

    On a GPU, a split that takes less than a quarter of the free memory is copied there whole, once. Otherwise each
    batch is gathered, and on a GPU pinned and copied on a stream of its own, while the one before it is used. On the
    CPU the memory map serves all workers of a node, which share its pages.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        import torch

        self._split = split
        self._device = device
        self._resident = split.resident(device) if device.type == "cuda" else None
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Yield one batch for each array of indices (b,)."""
        import torch

        if self._resident is not None:
            for indices in batches:
                yield self._resident[torch.from_numpy(indices).pin_memory().to(self._device, non_blocking=True)]
            return
        with ThreadPoolExecutor(1) as ahead:
            pending = None
            for indices in batches:
                upcoming = ahead.submit(self._load, indices)
                if pending is not None:
                    yield self._arrived(pending.result())
                pending = upcoming
            if pending is not None:
                yield self._arrived(pending.result())

    def _load(self, indices: np.ndarray) -> Tensor:
        import torch

        batch = self._split.gather(indices)
        if self._copying is None:
            return batch
        with torch.cuda.stream(self._copying):
            return batch.pin_memory().to(self._device, non_blocking=True)

    def _arrived(self, batch: Tensor) -> Tensor:
        """The batch, for which the current stream, but not the host, waits."""
        import torch

        if self._copying is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._copying)
            batch.record_stream(current)
        return batch


def pixel_sums(split: Split, chunk: int = 1024) -> Tensor:
    """The sum of all images and that of their squares, (2, 3, h, h) int64, of values from 0 to 255."""
    import torch

    both = torch.zeros(2, 3, *split.image_shape[1:], dtype=torch.int64)
    for images in split.chunks(chunk):
        x = images.int()
        both += torch.stack([x.sum(dim=0), x.square().sum(dim=0)])
    return both
