"""Converts the kinds of pictures that users pass to the pixels that the model gets.

A picture is a path, a PIL image, a numpy array (h, w, 3) or grey (h, w), or a torch tensor (3, h, w) or (1, h, w).
An array (3, h, w) is read as three grey pictures; channels come first in tensors only. Arrays and tensors are uint8,
or floating point in [0, 1]. Pictures of any size are cropped and resized as for training. Several pictures are a
sequence of pictures, or an array or tensor with one more axis in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dogvae.data.decode import crop_square, crops
from dogvae.data.photos import Photo, reason_of
from dogvae.data.rgb import to_rgb
from dogvae.errors import UsageError
from dogvae.user_file import read_file

Picture = str | Path | Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]


def pixels(pictures: Pictures, size: int) -> np.ndarray:
    """One or several pictures as (n, 3, size, size) uint8. Raises UsageError that names a picture and what is wrong."""
    single = isinstance(pictures, str | Path | Image.Image) or (
        isinstance(pictures, np.ndarray | Tensor)
        and pictures.ndim <= (3 if isinstance(pictures, Tensor) or pictures.shape[-1:] == (3,) else 2)
    )
    try:
        several: list[Any] = [pictures] if single else list(pictures)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"{_short(pictures)} is not a picture") from error
    if isinstance(pictures, np.ndarray) and pictures.ndim == 3 and pictures.shape[2] in (1, 2, 4):
        raise UsageError(f"an array of shape {pictures.shape} is not a picture: expected (h, w, 3)")
    if not several:
        raise UsageError("there are no pictures")
    return np.stack([_pixels(p, size) for p in several])


def photo(data: bytes, name: str, size: int) -> np.ndarray:
    """Decode the bytes of an image file to (3, size, size) uint8. Raises UsageError, with `name`, if that fails."""
    ((_, decoded),) = crops(Photo(name, data), size)
    if isinstance(decoded, str):
        raise UsageError(f"{name} cannot be used: {decoded}")
    return decoded


def _pixels(picture: Any, size: int) -> np.ndarray:
    if isinstance(picture, str | Path):
        try:
            data = read_file(picture)
        except OSError as error:
            raise UsageError(f"{picture} cannot be read: {reason_of(error)}") from error
        except ValueError as error:
            raise UsageError(f"{str(picture)!r} cannot be read: {error}") from error
        return photo(data, str(picture), size)
    if isinstance(picture, np.ndarray | Tensor):
        picture = Image.fromarray(_bytes(picture))
    if not isinstance(picture, Image.Image):
        raise UsageError(f"{_short(picture)} is not a picture")
    if not (picture.width and picture.height):
        raise UsageError(f"an image of {picture.width} x {picture.height} pixels is not a picture")
    try:
        _, decoded = crop_square(to_rgb(picture).image, size, None)
    except OSError as error:  # PIL decodes an opened image only now
        raise UsageError(f"an image cannot be used: {error}") from error
    assert isinstance(decoded, np.ndarray)
    return decoded


def _short(thing: Any) -> str:
    """Type and value of an argument, for an error message of one line."""
    return f"{type(thing).__name__} {' '.join(repr(thing).split())[:60]}"


def _bytes(array: np.ndarray | Tensor) -> np.ndarray:
    """An array or a tensor of one picture as a (h, w, 3) or (h, w) uint8 array."""
    if isinstance(array, Tensor):
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise UsageError(f"a tensor of shape {tuple(array.shape)} is not a picture: expected (3, h, w)")
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).permute(1, 2, 0).squeeze(2).numpy()
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise UsageError(f"an array of shape {array.shape} is not a picture: expected (h, w, 3)")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also if one is NaN
            raise UsageError("a floating point picture must have values from 0 to 1, and no NaN")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise UsageError(f"a picture of {array.dtype} is neither uint8 nor floating point from 0 to 1")
    return np.ascontiguousarray(array)
