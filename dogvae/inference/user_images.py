"""What a person may hand over as a picture, to the pixels that the model sees.

A picture is one of: a path; a PIL image; a numpy array (h, w, 3) or grey (h, w); a torch tensor (3, h, w) or (1, h, w).
An array (3, h, w) would be three grey pictures: torch's order of axes is for tensors.
Arrays and tensors are uint8, or floating point in [0, 1]. Any size: it is cropped and resized as for training. Pictures
are a sequence of those, an array or tensor with one more axis in front, or a single picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from dogvae.data.decode import crop_square, crops, to_rgb
from dogvae.data.photos import Photo
from dogvae.errors import UsageError

Picture = str | Path | Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]


def pixels(pictures: Pictures, size: int) -> np.ndarray:
    """Pictures as (n, 3, size, size) uint8; UsageError says which cannot be used, and why."""
    single = isinstance(pictures, str | Path | Image.Image) or (
        isinstance(pictures, np.ndarray | Tensor)
        and pictures.ndim <= (3 if isinstance(pictures, Tensor) or pictures.shape[-1:] == (3,) else 2)
    )
    try:
        several: list[Any] = [pictures] if single else list(pictures)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"{_short(pictures)} is no picture") from error
    if isinstance(pictures, np.ndarray) and pictures.ndim == 3 and pictures.shape[2] in (1, 2, 4):
        raise UsageError(f"an array of shape {pictures.shape} is no picture: (h, w, 3) is")
    if not several:
        raise UsageError("there are no pictures")
    return np.stack([_pixels(p, size) for p in several])


def photo(data: bytes, name: str, size: int) -> np.ndarray:
    """The pixels (3, size, size) uint8 of an image file's bytes; UsageError if it cannot be decoded."""
    ((_, decoded),) = crops(Photo(name, data), size)
    if isinstance(decoded, str):
        raise UsageError(f"{name} cannot be used: {decoded}")
    return decoded


def _pixels(picture: Any, size: int) -> np.ndarray:
    if isinstance(picture, str | Path):
        try:
            return photo(Path(picture).read_bytes(), str(picture), size)
        except OSError as error:
            raise UsageError(f"{picture} cannot be read: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{picture!r} cannot be read: {error}") from error
    if isinstance(picture, np.ndarray | Tensor):
        picture = Image.fromarray(_bytes(picture))
    if not isinstance(picture, Image.Image):
        raise UsageError(f"{_short(picture)} is no picture")
    if not (picture.width and picture.height):
        raise UsageError(f"an image of {picture.width} x {picture.height} pixels is no picture")
    try:
        upright = ImageOps.exif_transpose(picture)  # as for a path: a telephone's photo may lie on its side
        _, decoded = crop_square(to_rgb(upright), size, None)
    except OSError as error:  # it was opened, and is decoded only now
        raise UsageError(f"an image cannot be used: {error}") from error
    assert isinstance(decoded, np.ndarray)
    return decoded


def _short(thing: Any) -> str:
    return f"{type(thing).__name__} {' '.join(repr(thing).split())[:60]}"


def _bytes(array: np.ndarray | Tensor) -> np.ndarray:
    """(h, w, 3) or (h, w) uint8."""
    if isinstance(array, Tensor):
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise UsageError(f"a tensor of shape {tuple(array.shape)} is no picture: (3, h, w) is")
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).permute(1, 2, 0).squeeze(2).numpy()
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise UsageError(f"an array of shape {array.shape} is no picture: (h, w, 3) is")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise UsageError("a picture of floating point numbers must have them from 0 to 1, and no NaN")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise UsageError(f"a picture of {array.dtype} is neither uint8 nor floating point from 0 to 1")
    return np.ascontiguousarray(array)
