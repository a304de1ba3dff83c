"""The pictures that users pass: every kind gives the same pixels, and anything else is refused with a reason."""

from __future__ import annotations

import io
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
from tests.support.images import encoded

SIZE = 32
Make = Callable[[np.ndarray, Path], Any]


def colours(h: int = SIZE, w: int = SIZE, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8 of 216 colours, which fit into a palette."""
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
    """An image of mode P, made by hand because Pillow's quantisation would choose other colours."""
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
    "numpy column-major": lambda a, folder: np.asfortranarray(a),
    "numpy negative strides": lambda a, folder: a[::-1, ::-1].copy()[::-1, ::-1],
    "torch uint8": lambda a, folder: chw(a),
    "torch with gradient": lambda a, folder: (chw(a).float() / 255).requires_grad_(),
    "torch transposed": lambda a, folder: torch.from_numpy(a).permute(2, 0, 1),
}
KINDS |= {f"numpy {t}": lambda a, folder, t=t: (a / 255).astype(t) for t in ("float16", "float32", "float64")}
KINDS |= {f"{t}": lambda a, folder, t=t: (chw(a).double() / 255).to(t) for t in (torch.half, torch.float, torch.double)}
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
def test_colour_picture_of_the_models_size_is_unchanged(kind: str, tmp_path: Path) -> None:
    array = colours()
    picture = KINDS[kind](array, tmp_path)
    for got in (pixels(picture, SIZE), pixels([picture], SIZE), pixels((picture,), SIZE)):
        assert got.dtype == np.uint8
        assert np.array_equal(got, array.transpose(2, 0, 1)[None])


@pytest.mark.parametrize("kind", GREY_KINDS)
def test_grey_picture_gets_three_equal_channels(kind: str, tmp_path: Path) -> None:
    array = greys()
    picture = GREY_KINDS[kind](array, tmp_path)
    for got in (pixels(picture, SIZE), pixels([picture], SIZE)):
        assert np.array_equal(got, np.stack([array] * 3)[None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("h", "w"), [(90, 47), (20, 33)])
def test_other_sizes_are_cropped_as_by_prepare(kind: str, h: int, w: int, tmp_path: Path) -> None:
    array = colours(h, w)
    ((_, expected),) = crops(Photo("x", saved(array, tmp_path, "as-prepared.png").read_bytes()), SIZE)
    assert np.array_equal(pixels(KINDS[kind](array, tmp_path), SIZE)[0], expected)


def test_floating_point_values_are_rounded() -> None:
    for value, expected in ((0.0, 0), (0.49 / 255, 0), (0.51 / 255, 1), (127.6 / 255, 128), (1.0, 255)):
        assert np.unique(pixels(np.full((8, 8, 3), value), SIZE)).tolist() == [expected]
        assert np.unique(pixels(torch.full((3, 8, 8), value), SIZE)).tolist() == [expected]
    # numpy has no bfloat16.
    assert np.unique(pixels(torch.full((3, 8, 8), 0.25, dtype=torch.bfloat16), SIZE)).tolist() == [64]


def test_arguments_are_not_changed() -> None:
    array = colours()
    array.setflags(write=False)
    pixels(array, SIZE)[:] = 0
    assert array.max() == 255
    tensor = chw(colours())
    pixels([tensor, tensor], SIZE)[:] = 0
    assert torch.equal(tensor, chw(colours()))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_array_or_tensor_of_several_pictures(n: int) -> None:
    """Also of three, a number that looks like channels."""
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


def test_pictures_of_different_kinds_keep_their_order(tmp_path: Path) -> None:
    arrays = [colours(seed=i) for i in range(4)]
    path = saved(arrays[0], tmp_path)
    mixed: list[Any] = [path, Image.fromarray(arrays[1]), chw(arrays[2]), arrays[3]]
    expected = np.stack(arrays).transpose(0, 3, 1, 2)
    assert np.array_equal(pixels(mixed, SIZE), expected)
    assert np.array_equal(pixels(iter(mixed), SIZE), expected)  # type: ignore[arg-type]


def test_exif_orientation_is_applied_to_paths_and_opened_images(tmp_path: Path) -> None:
    image = Image.fromarray(colours(40, 60))
    exif = image.getexif()
    exif[0x112] = 6  # the top of the photo is on the right of the file
    image.save(tmp_path / "phone.png", exif=exif)
    upright = np.rot90(colours(40, 60), -1)
    assert np.array_equal(pixels(tmp_path / "phone.png", SIZE), pixels(upright, SIZE))
    assert np.array_equal(pixels(Image.open(tmp_path / "phone.png"), SIZE), pixels(upright, SIZE))


# --- what is refused


def refused(pictures: Any, reason: str) -> str:
    """The one-line error."""
    with pytest.raises(UsageError, match=reason) as error:
        pixels(pictures, SIZE)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("value", [np.nan, 1.001, -0.001, np.inf, -np.inf, 255.0])
def test_floating_point_values_outside_0_to_1_are_refused(value: float) -> None:
    array = np.full((8, 8, 3), 0.5)
    array[3, 4, 1] = value
    for pictures in (array, array.astype(np.float32), [array], chw(array), chw(array).float(), array[None]):
        refused(pictures, "must have values from 0 to 1, and no NaN")


DTYPES = ("int64", "int32", "uint16", "int8", "bool", "complex64", "object")
ARRAYS: list[Any] = [np.zeros((8, 8, 3), dtype) for dtype in DTYPES]
TENSORS = [torch.zeros(3, 8, 8, dtype=dtype) for dtype in (torch.int64, torch.int16, torch.bool)]


@pytest.mark.parametrize("picture", ARRAYS + TENSORS, ids=lambda picture: str(picture.dtype))
def test_array_or_tensor_of_another_dtype_is_refused(picture: Any) -> None:
    assert str(picture.dtype).removeprefix("torch.") in refused(picture, "is neither uint8 nor floating point")


SHAPES: list[Any] = [np.zeros(shape, np.uint8) for shape in (
    (), (8,), (2, 8, 8, 4), (2, 8, 8, 1), (1, 2, 8, 8, 3), (0, 8, 3), (8, 0, 3), (8, 0), (0,),
    (64, 64, 1), (64, 64, 2), (64, 64, 4),  # not 64 grey pictures that are 4 pixels wide
)]  # fmt: skip
SHAPES += [torch.zeros(shape, dtype=torch.uint8) for shape in (
    (), (8,), (8, 8), (8, 8, 3), (4, 8, 8), (2, 4, 8, 8), (1, 2, 3, 8, 8), (3, 0, 8)
)]  # fmt: skip


@pytest.mark.parametrize("picture", SHAPES, ids=lambda picture: f"{type(picture).__name__} {tuple(picture.shape)}")
def test_array_or_tensor_of_another_shape_is_refused(picture: Any) -> None:
    refused(picture, "is not a picture")


@pytest.mark.parametrize("empty", [[], (), np.zeros((0, 8, 8, 3), np.uint8), torch.zeros(0, 3, 8, 8), iter([])])
def test_empty_sequence_is_refused(empty: Any) -> None:
    refused(empty, "there are no pictures")


@pytest.mark.parametrize("thing", [None, 7, b"abc", [None], [[colours()]], Image.new("RGB", (0, 8))])
def test_other_objects_are_refused(thing: Any) -> None:
    refused(thing, "is not a picture")


def test_path_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jpg"
    assert str(missing) in refused(missing, "cannot be read: No such file or directory")
    assert str(missing) in refused([saved(colours(), tmp_path), str(missing)], "No such file")
    assert str(tmp_path) in refused(tmp_path, "cannot be read: Is a directory")
    refused(tmp_path / ("x" * 300 + ".png"), "cannot be read: File name too long")
    refused("a\0b.png", "cannot be read")


def test_damaged_image_is_refused(tmp_path: Path) -> None:
    """As a file, and as an opened image, which Pillow decodes only when its pixels are needed."""
    truncated = encoded(colours(200, 200), "JPEG")[:5000]
    (tmp_path / "dog.jpg").write_bytes(truncated)
    assert str(tmp_path) in refused(tmp_path / "dog.jpg", "dog.jpg cannot be used: .*truncated")
    refused(Image.open(io.BytesIO(truncated)), "truncated")
    with pytest.raises(UsageError, match=r"^upload cannot be used: .*truncated"):
        photo(truncated, "upload", SIZE)
