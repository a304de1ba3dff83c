"""Finds near-duplicates: one photo saved twice, at another quality or size. They must be on one side of the split.

Each image gets a *signature*: its 8 x 8 lowest frequencies, which recompression and resizing hardly change. Comparing
each image with each other one would take days for a million photos. So an image is compared only with those that agree
with it in one of 8 *keys*, by which earlier images are found at once. A key is the signs of 16 of the frequencies.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dogvae.data.split import is_val

if TYPE_CHECKING:
    from dogvae.data.writer import Row

SIDE = 8  # frequencies per axis
SCALE = 127  # a signature's frequencies are a vector of this length, in whole numbers
# The largest distance of two signatures of near-duplicates: 0.2 of their length. Of 11,500 photos of dogs, 15 pairs are
# nearer than 0.05, all of them the same photo; the next pair is at 0.30. Copies of JPEG quality 20 are below 0.15.
NEAR = (0.2 * SCALE) ** 2
SAME = NEAR / 9  # a third of that distance, so that what is two thirds away from a photo is near what stands for it
MIN_CONTRAST = 4.0  # levels: the signature of a picture that is flatter than this would be its noise


def signatures(images: Sequence[np.ndarray]) -> list[bytes]:
    """The signatures of (3, size, size) uint8 images, each followed by its keys; empty for one without contrast.

    The result is the same on every machine: up to the square root all numbers are whole, so that no sum is rounded.
    """
    if not images:
        return []
    green = np.stack([image[1] for image in images]).astype(np.float64)
    size = green.shape[-1]
    basis = _basis(size)
    frequencies = np.rint(basis @ green @ basis.T / 2**16).reshape(-1, SIDE * SIDE)
    mean = 2 * frequencies[:, 0] / size**2
    frequencies[:, 0] = 0
    length = np.sqrt((frequencies**2).sum(1))
    contrast = 2 * length / size**2  # the standard deviation of the pixels
    scaled = np.rint(SCALE * frequencies / np.maximum(length, 1)[:, None])
    scaled[:, 0] = np.rint(mean - 128)  # so that a dark picture differs from a bright one
    keys = np.packbits(scaled[:, BANDS] > 0, axis=2).reshape(len(images), -1)
    rows = np.concatenate([scaled.astype(np.int8).view(np.uint8), keys], axis=1)
    return [row.tobytes() if enough else b"" for row, enough in zip(rows, contrast >= MIN_CONTRAST, strict=True)]


class NearDuplicates:
    """Iterate for `rows`, in their order, with one `digest` for all near-duplicates: that of the first of them.

    A photo that resembles photos on both sides of the split is rejected: it would tell training about validation.
    Afterwards `count` is the number of photos that resemble an earlier one.
    """

    def __init__(self, rows: Iterable[Row], val_fraction: float) -> None:
        self._rows, self._val_fraction = rows, val_fraction
        self.count = 0
        self._photos: list[tuple[bytes, str]] = []  # of each stored signature: digest of the group, path of the photo
        self._stored = np.empty((1024, SIDE * SIDE), np.int8)  # signatures; the first `len(self._photos)` are filled
        self._buckets: dict[int, array[int]] = {}  # key -> numbers of the stored signatures

    def __iter__(self) -> Iterator[Row]:
        for _, photo in groupby(self._rows, key=lambda row: (row.path, row.digest)):
            yield from self._grouped(list(photo))

    def _grouped(self, rows: list[Row]) -> Iterator[Row]:
        """The rows of one photo, which may have several boxes."""
        found = {row.signature: self._near(row.signature) for row in rows if row.signature}
        similar = sorted({number for near, _ in found.values() for number in near})
        digest, first = self._photos[similar[0]] if similar else (rows[0].digest, "")
        for number in similar:
            other_digest, other = self._photos[number]
            if is_val(digest, self._val_fraction) != is_val(other_digest, self._val_fraction):
                reason = f"resembles both {first} and {other}, of which one is for validation"
                yield from (row if isinstance(row.pixels, str) else row._replace(pixels=reason) for row in rows)
                return
        self.count += bool(similar)
        for signature, (_, is_stored) in found.items():
            if not is_stored:
                self._store(signature, digest, rows[0].path)
        yield from (row._replace(digest=digest, duplicate_of=first) for row in rows) if similar else rows

    def _near(self, signature: bytes) -> tuple[list[int], bool]:
        """The stored signatures near this one, and whether one is so near that this one need not be stored, too.

        Else a million pictures of one camera would all be compared with each other.
        """
        candidates = {number for key in _keys(signature) for number in self._buckets.get(key, ())}
        if not candidates:
            return [], False
        numbers = np.fromiter(candidates, int, len(candidates))
        difference = self._stored[numbers] - np.frombuffer(signature, np.int8, SIDE * SIDE).astype(np.int32)
        distance = (difference**2).sum(1)
        return numbers[distance <= NEAR].tolist(), bool((distance <= SAME).any())

    def _store(self, signature: bytes, digest: bytes, path: str) -> None:
        number = len(self._photos)
        if number == len(self._stored):
            self._stored = np.concatenate([self._stored, np.empty_like(self._stored)])
        self._stored[number] = np.frombuffer(signature, np.int8, SIDE * SIDE)
        self._photos.append((digest, path))
        for key in _keys(signature):
            if key not in self._buckets:
                self._buckets[key] = array("i")
            self._buckets[key].append(number)


@lru_cache
def _basis(size: int) -> np.ndarray:
    """The lowest rows of the discrete cosine transform (SIDE, size), times 256 and rounded to whole numbers."""
    waves = np.cos(np.pi * np.arange(SIDE)[:, None] * (np.arange(size) + 0.5) / size)
    waves[0] /= 2**0.5
    return np.rint(256 * waves)


def _bands() -> np.ndarray:
    """(8, 16): the frequencies of each key. Each key has low and high ones, and each frequency is in about two keys."""
    order = np.array(sorted(range(1, SIDE * SIDE), key=lambda n: (n // SIDE + n % SIDE, n)))
    order = np.append(order, order[0])
    interleaved = order.reshape(16, 4).T
    return np.concatenate([interleaved, np.concatenate([order[:32].reshape(4, 8), order[32:].reshape(4, 8)], axis=1)])


BANDS = _bands()


def _keys(signature: bytes) -> list[int]:
    return [band << 16 | key for band, key in enumerate(struct.unpack("<8H", signature[SIDE * SIDE :]))]
