"""Near-duplicates: copies at another quality, size or format are found, and are on one side of the split."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from dogvae.data.decode import crops
from dogvae.data.duplicates import NearDuplicates, signatures
from dogvae.data.photos import Photo
from dogvae.data.split import assign_splits
from dogvae.data.writer import Row

PHOTOS, COPIES = 200, 50


def scene(seed: int, side: int = 128) -> Image.Image:
    """A picture like a photo: random, with most of its power in the low frequencies, as 1 / f; a little noise."""
    rng = np.random.default_rng(seed)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    f[0, 0] = np.inf
    waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, side, side))) / f).real
    waves = waves / waves.std() * rng.uniform(25, 60) + rng.uniform(90, 160)
    return Image.fromarray((waves + rng.normal(0, 3, waves.shape)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def saved(image: Image.Image, format: str = "JPEG", scale: float = 1, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    resized.save(buffer, format, quality=quality)
    return buffer.getvalue()


WAYS = [
    {"quality": 30},
    {"quality": 60},
    {"scale": 0.5},
    {"scale": 0.71, "quality": 70},
    {"scale": 1.9},
    {"format": "PNG"},
    {"format": "WEBP", "quality": 50},
]


def row(path: str, data: bytes, size: int = 64) -> Row:
    [(_, pixels)] = crops(Photo(path, data), size)
    assert not isinstance(pixels, str)
    return Row(path, None, hashlib.sha256(data).digest(), pixels, *signatures([pixels]))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """200 photos, of which 50 are saved twice; shuffled."""
    photos = [row(f"photo {i}", saved(scene(i))) for i in range(PHOTOS)]
    photos += [row(f"copy of photo {i}", saved(scene(i), **WAYS[i % len(WAYS)])) for i in range(COPIES)]  # type: ignore[arg-type]
    return [photos[i] for i in np.random.default_rng(0).permutation(len(photos))]


def test_the_50_copies_among_200_photos_are_found_and_nothing_else(rows: list[Row]) -> None:
    near = NearDuplicates(rows, 0.2)
    found = list(near)
    assert near.count == COPIES
    pairs = {frozenset((row.path, row.duplicate_of)) for row in found if row.duplicate_of}
    assert pairs == {frozenset((f"photo {i}", f"copy of photo {i}")) for i in range(COPIES)}
    assert [row.path for row in found] == [row.path for row in rows]


def test_photo_and_its_copy_are_on_one_side(rows: list[Row]) -> None:
    splits = {row.path: split for split, row in assign_splits(NearDuplicates(rows, 0.2), 0.2)}
    assert len(splits) == PHOTOS + COPIES
    assert [splits[f"photo {i}"] for i in range(COPIES)] == [splits[f"copy of photo {i}"] for i in range(COPIES)]
    without = {row.path: split for split, row in assign_splits(rows, 0.2)}
    assert sum(without[f"photo {i}"] != without[f"copy of photo {i}"] for i in range(COPIES)) > 5  # it would leak
    alone = {row.path: split for split, row in assign_splits([row for row in rows if "copy" not in row.path], 0.2)}
    assert all(splits[f"photo {i}"] == alone[f"photo {i}"] for i in range(COPIES, PHOTOS))  # others are not moved


def vector(*numbers: int) -> bytes:
    """A signature with these first frequencies, all with one key."""
    return np.array([0, *numbers] + [0] * (63 - len(numbers)), np.int8).tobytes() + bytes(16)


def test_photo_that_resembles_both_sides_is_rejected() -> None:
    middle, left, right = (vector(x, y) for x, y in ((120, 0), (120, 20), (120, -20)))
    train, val = b"\xff" * 32, bytes(32)
    rows = [Row(name, None, digest, np.zeros(1), s) for name, digest, s in (
        ("a", train, left), ("b", val, right), ("c", train, middle), ("d", b"\x80" * 32, left), ("e", train, b""),
    )]  # fmt: skip
    near = NearDuplicates(rows, 0.1)
    a, b, c, d, e = near
    assert c.pixels == "resembles both a and b, of which one is for validation"
    assert [other.digest for other in (a, b, d, e)] == [train, val, train, train]
    assert (d.duplicate_of, near.count) == ("a", 1)


def test_signature_is_exact_and_does_not_depend_on_its_neighbours() -> None:
    """Against the discrete cosine transform in numbers of 80 bits."""
    for size in (32, 96, 256):
        images = [np.asarray(scene(i, size)).transpose(2, 0, 1) for i in range(5)]
        together = signatures(images)
        assert together == [signatures([image])[0] for image in images]
        waves = np.cos(np.pi * np.arange(8)[:, None] * (np.arange(size, dtype=np.longdouble) + 0.5) / size)
        waves[0] /= np.sqrt(np.longdouble(2))
        for image, signature in zip(images, together, strict=True):
            exact = (waves @ image[1].astype(np.longdouble) @ waves.T).ravel()
            expected = 127 * exact / np.sqrt((exact[1:] ** 2).sum())
            expected[0] = image[1].mean() - 128
            assert np.abs(np.frombuffer(signature, np.int8, 64) - expected).max() < 1


def test_flat_pictures_have_no_signature() -> None:
    assert signatures([]) == []
    flat = [np.full((3, 64, 64), value, np.uint8) for value in (0, 50, 51, 255)]
    assert signatures(flat) == [b""] * 4


def test_series_of_similar_pictures_does_not_fill_the_memory() -> None:
    still = np.asarray(scene(0, 64)).transpose(2, 0, 1)
    frames = [np.roll(still, i % 2, axis=2) for i in range(2000)]
    known = signatures(frames)
    near = NearDuplicates([Row(str(i), None, bytes(32), frames[i], known[i]) for i in range(2000)], 0.1)
    assert len(list(near)) == 2000
    assert near.count == 1999
    assert len(near._photos) <= 2
