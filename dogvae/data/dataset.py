"""A prepared dataset: opening it, the order of its images, and uint8 batches on the device.

torch is imported where it is used: the command opens a dataset too, and would take seconds to import it.
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

RESIDENT_SHARE = 0.25  # of the device's free memory: what a dataset may fill before it is streamed instead


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `n` images in which an epoch sees them, int64."""
    return np.argsort(rng.words(n, Stream.ORDER, seed, epoch), kind="stable")


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """The part of a global batch of `n` images that falls to `rank`: contiguous, sizes differ by one at most."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


class Split:
    """The images of one split, memory-mapped until they are gathered."""

    def __init__(self, root: Path, shards: Sequence[dict[str, Any]], size: int) -> None:
        self._shards: list[np.ndarray] = []
        for shard in shards:
            path = root / shard["file"]
            try:
                if path.stat().st_size != shard["bytes"]:
                    has = path.stat().st_size
                    raise UsageError(f"{path} has {has} bytes, not {shard['bytes']} as prepared: prepare it again")
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                if isinstance(error, UsageError):
                    raise
                raise UsageError(f"{path} cannot be read ({error}): prepare the dataset again") from error
            if array.dtype != np.uint8 or array.shape != (shard["count"], 3, size, size):
                raise UsageError(
                    f"{path} holds {array.dtype} {array.shape}: not what its manifest says; prepare it again"
                )
            self._shards.append(array)
        self._starts = np.cumsum([0] + [len(s) for s in self._shards])
        self.image_shape = (3, size, size)
        self.nbytes = sum(s.nbytes for s in self._shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, indices: np.ndarray) -> Tensor:
        """Images (b, 3, h, h) uint8 on the CPU, in the order of `indices` (b,)."""
        import torch

        if len(self._shards) == 1:
            return torch.from_numpy(self._shards[0][indices])
        which = np.searchsorted(self._starts, indices, side="right") - 1
        out = np.empty((len(indices), *self._shards[0].shape[1:]), np.uint8)
        for shard in np.unique(which):
            rows = which == shard
            out[rows] = self._shards[shard][indices[rows] - self._starts[shard]]
        return torch.from_numpy(out)

    def chunks(self, size: int, most: int | None = None) -> Iterator[Tensor]:
        """The first `most` images (default: all) in their order, `size` at once, as `gather` gives them."""
        n = min(len(self), most or len(self))
        for start in range(0, n, size):
            yield self.gather(np.arange(start, min(start + size, n)))


class Dataset:
    """An opened dataset: `train` and `val` splits, `size` of the images and the `fingerprint` of it all.

    `path` is what was opened, a path or a URI, and `folder` where that lies on this node. With the `fingerprint` of
    what is wanted, any other dataset is refused. Raises UsageError.
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
    def copy(self) -> tuple[Any, ...]:
        """The same on two ranks if they read the same files, or files that only the user can mend."""
        status = self.folder.stat()
        return (socket.gethostname(), status.st_dev, status.st_ino) if is_uri(self.path) else ()

    def verify(self, rank: int = 0, world_size: int = 1) -> list[Path]:
        """Compare this rank's share of the shards with their checksums.

        `rank` counts among the `world_size` ranks that have this `copy`. Files of a node's own copy that differ are
        fetched again and returned: whoever has opened them should open them again. UsageError names the first that
        cannot be mended.
        """
        shards = shards_of(self.manifest)[rank::world_size]
        damaged = [s["file"] for s in shards if sha256_of(self.folder / s["file"]) != s["sha256"]]
        paths = [self.folder / name for name in damaged]
        if damaged and not is_uri(self.path):
            raise UsageError(f"{paths[0]} is not what was prepared (its checksum differs): prepare it again")
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
    """Batches of a split as uint8 (b, 3, h, h) on the device, for lists of indices known beforehand.

    The whole split is put on the device when it fits a quarter of its free memory; on the CPU the memory map is that
    already, and all workers of a node share its pages. Otherwise each batch is gathered, pinned and copied one ahead.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        import torch

        self._split = split
        self._device = device
        self._resident: Tensor | None = None
        if device.type == "cuda" and split.nbytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.cat([torch.from_numpy(np.array(s)) for s in split._shards]).to(device)

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """One batch for each array of indices."""
        import torch

        if self._resident is not None:
            for indices in batches:
                yield self._resident[torch.from_numpy(indices).to(self._device, non_blocking=True)]
            return
        with ThreadPoolExecutor(1) as ahead:
            pending = None
            for indices in batches:
                upcoming = ahead.submit(self._load, indices)
                if pending is not None:
                    yield pending.result()
                pending = upcoming
            if pending is not None:
                yield pending.result()

    def _load(self, indices: np.ndarray) -> Tensor:
        batch = self._split.gather(indices)
        return batch if self._device.type == "cpu" else batch.pin_memory().to(self._device, non_blocking=True)


def moments(split: Split, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Mean image and mean squared image (3, h, h), float64 of values in [0, 1]; sums of integers, so exact."""
    import torch

    sums = torch.zeros(2, 3, *split.image_shape[1:], dtype=torch.int64)
    for images in split.chunks(chunk):
        x = images.int()
        sums += torch.stack([x.sum(dim=0), x.square().sum(dim=0)])
    return sums[0].double() / (255 * len(split)), sums[1].double() / (255**2 * len(split))


def grey_levels(split: Split, chunk: int = 1024) -> np.ndarray:
    """How often each of the 256 values occurs in all images, (256,) int64."""
    counts = np.zeros(256, np.int64)
    for x in split.chunks(chunk):
        counts += np.bincount(x.numpy().ravel(), minlength=256)
    return counts
