"""What may be handed over as a picture: every kind gives the same pixels, and what is none is told why."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dogvae.data.decode import crops
from dogvae.data.photos import Photo
from dogvae.errors import UsageError
from dogvae.inference.user_images import photo, pixels

SIZE = 32
Make = Callable[[np.ndarray, Path], Any]


def colours(h: int = SIZE, w: int = SIZE, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8 of 216 colours, so that a palette holds them all."""
    return np.random.default_rng(seed).integers(0, 6, (h, w, 3), np.uint8) * 51


def greys(h: int = SIZE, w: int = SIZE, seed: int = 0) -> np.ndarray:
    """(h, w) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (h, w), np.uint8)


def chw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def saved(array: np.ndarray, folder: Path, name: str = "dog.png") -> Path:
    Image.fromarray(array).save(folder / name)
    return folder / name


def palette(array: np.ndarray) -> Image.Image:
    """By hand: Pillow's own quantisation would choose other colours."""
    image = Image.new("P", array.shape[1::-1])
    image.putpalette([51 * v for r in range(6) for g in range(6) for b in range(6) for v in (r, g, b)])
    image.putdata((array // 51 @ np.array([36, 6, 1])).ravel().tolist())
    return image


KINDS: dict[str, Make] = {
    "path": lambda a, folder: saved(a, folder),
    "str": lambda a, folder: str(saved(a, folder)),
    "bmp": lambda a, folder: saved(a, folder, "dog.bmp"),
    "PIL RGB": lambda a, folder: Image.fromarray(a),
    "PIL RGBA": lambda a, folder: Image.fromarray(a).convert("RGBA"),
    "PIL P": lambda a, folder: palette(a),
    "PIL of a file": lambda a, folder: Image.open(saved(a, folder)),
    "numpy uint8": lambda a, folder: a,
    "numpy float32": lambda a, folder: (a / 255).astype(np.float32),
    "numpy float64": lambda a, folder: a / 255,
    "numpy float16": lambda a, folder: (a / 255).astype(np.float16),
    "numpy column by column": lambda a, folder: np.asfortranarray(a),
    "numpy backwards": lambda a, folder: a[::-1, ::-1].copy()[::-1, ::-1],
    "torch uint8": lambda a, folder: chw(a),
    "torch float32": lambda a, folder: chw(a).float() / 255,
    "torch float64": lambda a, folder: chw(a).double() / 255,
    "torch float16": lambda a, folder: (chw(a).float() / 255).half(),
    "torch with gradient": lambda a, folder: (chw(a).float() / 255).requires_grad_(),
    "torch transposed": lambda a, folder: torch.from_numpy(a).permute(2, 0, 1),
}
GREY_KINDS: dict[str, Make] = {
    "path": lambda a, folder: saved(a, folder),
    "PIL L": lambda a, folder: Image.fromarray(a),
    "PIL LA": lambda a, folder: Image.fromarray(a).convert("LA"),
    "numpy uint8": lambda a, folder: a,
    "numpy float32": lambda a, folder: (a / 255).astype(np.float32),
    "torch uint8": lambda a, folder: torch.from_numpy(a)[None],
    "torch float32": lambda a, folder: torch.from_numpy(a)[None].float() / 255,
}


# --- what is accepted


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_colour_picture(kind: str, tmp_path: Path) -> None:
    """Of the model's size: the pixels are its own, alone or in a list."""
    array = colours()
    picture = KINDS[kind](array, tmp_path)
    for got in (pixels(picture, SIZE), pixels([picture], SIZE), pixels((picture,), SIZE)):
        assert got.dtype == np.uint8
        assert got.shape == (1, 3, SIZE, SIZE)
        assert np.array_equal(got[0], array.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", GREY_KINDS)
def test_every_kind_of_grey_picture(kind: str, tmp_path: Path) -> None:
    array = greys()
    picture = GREY_KINDS[kind](array, tmp_path)
    for got in (pixels(picture, SIZE), pixels([picture], SIZE)):
        assert got.shape == (1, 3, SIZE, SIZE)
        assert all(np.array_equal(channel, array) for channel in got[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("h", "w"), [(90, 47), (20, 33)])
def test_other_sizes_are_cropped_as_for_training(kind: str, h: int, w: int, tmp_path: Path) -> None:
    """By the very code that `dogvae prepare` runs on files."""
    array = colours(h, w)
    ((_, expected),) = crops(Photo("x", saved(array, tmp_path, "as-prepared.png").read_bytes()), SIZE)
    assert np.array_equal(pixels(KINDS[kind](array, tmp_path), SIZE)[0], expected)


def test_the_square_in_the_middle_is_taken() -> None:
    left, middle, right = (np.full((SIZE, SIZE, 3), colour, np.uint8) for colour in ((9, 0, 0), (0, 9, 0), (0, 0, 9)))
    wide = np.concatenate([left, middle, right], axis=1)
    for picture in (wide, wide.transpose(1, 0, 2)):
        assert np.array_equal(pixels(picture, SIZE)[0], middle.transpose(2, 0, 1))


def test_transparent_is_white() -> None:
    array = np.dstack([colours(), np.full((SIZE, SIZE), 255, np.uint8)])
    array[:7, :, 3] = 0
    expected = array[..., :3].copy()
    expected[:7] = 255
    assert np.array_equal(pixels(Image.fromarray(array), SIZE)[0], expected.transpose(2, 0, 1))


def test_floating_point_is_rounded() -> None:
    for value, expected in ((0.0, 0), (0.49 / 255, 0), (0.51 / 255, 1), (127.6 / 255, 128), (1.0, 255)):
        assert np.unique(pixels(np.full((8, 8, 3), value), SIZE)).tolist() == [expected]
        assert np.unique(pixels(torch.full((3, 8, 8), value), SIZE)).tolist() == [expected]
    # numpy has no bfloat16; its 8 bits are just enough for half of the values.
    assert np.unique(pixels(torch.full((3, 8, 8), 0.25, dtype=torch.bfloat16), SIZE)).tolist() == [64]


def test_what_is_handed_over_is_not_changed() -> None:
    array = colours()
    array.setflags(write=False)
    got = pixels(array, SIZE)
    got[:] = 0
    assert array.max() == 255
    tensor = chw(colours())
    pixels([tensor, tensor], SIZE)[:] = 0
    assert torch.equal(tensor, chw(colours()))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_arrays_and_tensors_of_several(n: int) -> None:
    """Also of three, where the number of pictures looks like one of channels."""
    several = np.stack([colours(40, 36, seed=i) for i in range(n)])
    expected = np.stack([pixels(p, SIZE)[0] for p in several])
    assert len(np.unique(expected, axis=0)) == n
    tensor = torch.from_numpy(several).permute(0, 3, 1, 2)
    for pictures in (several, several / 255, tensor, tensor.float() / 255, list(several), list(tensor)):
        assert np.array_equal(pixels(pictures, SIZE), expected)
    grey = np.stack([greys(40, 36, seed=i) for i in range(n)])
    expected = np.stack([pixels(p, SIZE)[0] for p in grey])
    for pictures in (grey, grey / 255, torch.from_numpy(grey)[:, None], list(grey)):
        assert np.array_equal(pixels(pictures, SIZE), expected)


def test_several_of_different_kinds_keep_their_order(tmp_path: Path) -> None:
    arrays = [colours(seed=i) for i in range(4)]
    path = saved(arrays[0], tmp_path)
    mixed: list[Any] = [path, Image.fromarray(arrays[1]), chw(arrays[2]), arrays[3]]
    expected = np.stack(arrays).transpose(0, 3, 1, 2)
    assert np.array_equal(pixels(mixed, SIZE), expected)
    assert np.array_equal(pixels(iter(mixed), SIZE), expected)  # type: ignore[arg-type]


def test_a_jpeg_with_its_orientation(tmp_path: Path) -> None:
    """As a phone writes them: turned upright."""
    array = np.zeros((64, 64, 3), np.uint8)
    array[:32] = 255
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x112] = 6  # what is up in the file is on the right
    image.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    got = pixels(tmp_path / "phone.jpg", SIZE)[0]
    assert got[:, :, 20:].min() > 200
    assert got[:, :, :12].max() < 50


def test_an_opened_image_is_turned_upright_too(tmp_path: Path) -> None:
    image = Image.fromarray(colours(40, 60))
    exif = image.getexif()
    exif[0x112] = 6
    image.save(tmp_path / "phone.png", exif=exif)
    upright = np.rot90(colours(40, 60), -1)
    assert np.array_equal(pixels(tmp_path / "phone.png", SIZE), pixels(upright, SIZE))
    assert np.array_equal(pixels(Image.open(tmp_path / "phone.png"), SIZE), pixels(upright, SIZE))


def test_bytes_of_a_file(tmp_path: Path) -> None:
    """What is uploaded to the playground."""
    data = saved(colours(), tmp_path).read_bytes()
    assert np.array_equal(photo(data, "upload", SIZE), colours().transpose(2, 0, 1))
    with pytest.raises(UsageError, match=r"^upload cannot be used: "):
        photo(data[:100], "upload", SIZE)


# --- what is refused


def refused(pictures: Any, reason: str) -> str:
    """The one line that it ends with."""
    with pytest.raises(UsageError, match=reason) as error:
        pixels(pictures, SIZE)
    assert "\n" not in str(error.value)
    return str(error.value)


def floats(value: float) -> np.ndarray:
    array = np.full((8, 8, 3), 0.5)
    array[3, 4, 1] = value
    return array


@pytest.mark.parametrize("value", [np.nan, 1.001, -0.001, np.inf, -np.inf, 255.0])
def test_numbers_that_are_no_share_of_white(value: float) -> None:
    array = floats(value)
    for pictures in (array, array.astype(np.float32), [array], chw(array), chw(array).float(), array[None]):
        refused(pictures, "must have them from 0 to 1, and no NaN")


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16, np.int8, bool, np.complex64, object])
def test_numbers_of_another_type(kind: type) -> None:
    array: np.ndarray = np.zeros((8, 8, 3), kind)
    assert np.dtype(kind).name in refused(array, "is neither uint8 nor floating point")


@pytest.mark.parametrize("kind", [torch.int64, torch.int16, torch.bool])
def test_tensors_of_another_type(kind: torch.dtype) -> None:
    assert str(kind).removeprefix("torch.") in refused(torch.zeros(3, 8, 8, dtype=kind), "is neither uint8 nor")


@pytest.mark.parametrize(
    "shape", [(), (8,), (2, 8, 8, 4), (2, 8, 8, 1), (1, 2, 8, 8, 3), (0, 8, 3), (8, 0, 3), (8, 0), (0,)]
)
def test_arrays_of_another_shape(shape: tuple[int, ...]) -> None:
    refused(np.zeros(shape, np.uint8), "is no picture|there are no pictures")


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (8, 8, 3), (4, 8, 8), (2, 4, 8, 8), (1, 2, 3, 8, 8), (3, 0, 8)])
def test_tensors_of_another_shape(shape: tuple[int, ...]) -> None:
    refused(torch.zeros(shape, dtype=torch.uint8), "is no picture")


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_an_array_of_other_channels_is_not_taken_for_grey_pictures(channels: int) -> None:
    """Of RGBA pixels, say: it would be 64 grey pictures, 4 pixels wide."""
    refused(np.zeros((64, 64, channels), np.uint8), "is no picture")


@pytest.mark.parametrize("none", [[], (), np.zeros((0, 8, 8, 3), np.uint8), torch.zeros(0, 3, 8, 8), iter([])])
def test_no_pictures(none: Any) -> None:
    refused(none, "there are no pictures")


@pytest.mark.parametrize("thing", [None, 7, b"abc", [None], [[colours()]]])
def test_things_that_are_no_pictures(thing: Any) -> None:
    refused(thing, "no picture")


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jpg"
    assert str(missing) in refused(missing, "cannot be read: No such file or directory")
    assert str(missing) in refused([saved(colours(), tmp_path), str(missing)], "No such file")
    assert str(tmp_path) in refused(tmp_path, "cannot be read: Is a directory")
    refused(tmp_path / ("x" * 300 + ".png"), "cannot be read: File name too long")


def test_a_path_that_no_file_can_have() -> None:
    refused("a\0b.png", "cannot be read")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims to be so large, of which there is but a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"The quick brown fox", "not an image of a known format"),
        (b"", "not an image of a known format"),
        (jpeg(colours(200, 200))[:5000], "truncated"),
        (png_of_size(30_000, 30_000), "decompression bomb"),
        (png_of_size(10_000, 10_000), "decompression bomb"),  # of which Pillow by itself only warns
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image of a known format"),
    ],
    ids=["text", "empty", "truncated", "bomb", "small-bomb", "postscript"],
)
def test_files_that_are_no_pictures(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "dog.jpg"
    path.write_bytes(data)
    began = time.monotonic()
    assert str(path) in refused([path], f"dog.jpg cannot be used: .*{reason}")
    assert time.monotonic() - began < 2


def test_an_opened_image_that_is_truncated() -> None:
    """Pillow reads the pixels only now."""
    refused(Image.open(io.BytesIO(jpeg(colours(200, 200))[:5000])), "truncated")


def test_an_image_without_pixels() -> None:
    refused(Image.new("RGB", (0, 8)), "no picture")
