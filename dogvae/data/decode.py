"""Photo bytes to square uint8 pixels, with Pillow. No photo is trusted. Imports neither Ray nor torch."""

from __future__ import annotations

import io
import logging
import math
import warnings
from typing import NamedTuple

import numpy as np
from PIL import AvifImagePlugin, Image, MpoImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from dogvae.data.photos import HEIC_EXTRA, Box, Drawing, Photo, reads_heic
from dogvae.data.rgb import Rgb, to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")  # and no others: for EPS, Pillow starts Ghostscript
# Imported here, else Pillow imports the plugins of all formats at the first unknown file.
PLUGINS = (AvifImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it prints its errors beside our reasons
MIN_SIDE = 16  # pixels of a photo: below, it is an icon
MIN_BOX, MAX_ASPECT = 32, 4.0  # pixels of a box's shorter side; its longer side relative to the shorter one
JPEG_END = b"\xff\xd9"

Crop = tuple["Box | None", "np.ndarray | str"]  # pixels (3, size, size) uint8, or why there are none


class Decoded(NamedTuple):
    """What `decode` makes of a photo."""

    crops: list[Crop]
    bad_profile: bool = False
    """Whether an embedded colour profile was ignored because it cannot be used."""


def crops(photo: Photo, size: int) -> list[Crop]:
    """The crops alone of `decode`."""
    return decode(photo, size).crops


def decode(photo: Photo, size: int) -> Decoded:
    """The square around each box of a photo (the centre square of a photo without boxes), resized to `size`.

    Boxes are in pixels of the upright photo. Never raises: a photo that cannot be decoded gives one crop with the
    reason in place of the pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Raised from the header, before any pixel is decoded, for more than Image.MAX_IMAGE_PIXELS.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image, bad_profile = _open(photo.data, size, draft=not photo.boxes)
            return Decoded([crop_square(image, size, box) for box in photo.boxes or (None,)], bad_profile)
    except UnidentifiedImageError:
        if _is_heif(photo.data) and not reads_heic():
            return Decoded([(None, HEIC_EXTRA)])
        return Decoded([(None, f"not an image of a known format ({', '.join(FORMATS)})")])
    # On damaged bytes Pillow raises anything from struct.error to MemoryError, so only Exception covers all of it.
    # Nothing is hidden: the reason goes to rejected.csv.
    except Exception as error:  # noqa: BLE001
        return Decoded([(None, " ".join(str(error).split()) or type(error).__name__)])


def _open(data: bytes | Drawing, size: int, draft: bool) -> Rgb:
    """The first frame. `draft` decodes a JPEG at 1/2, 1/4 or 1/8 of its size, but at least at 2 x `size`."""
    if isinstance(data, Drawing):
        return Rgb(data.draw(2 * size))
    image = _read_header(data)
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels: a side is under {MIN_SIDE}")
    least = (2 * size, 2 * size)
    if draft:
        image.draft(None, least)
    try:
        return to_rgb(image)
    except OSError:
        if image.format != "JPEG" or data.endswith(JPEG_END):
            raise
        # If only the mark of the end is missing, then what stands in its place changes no pixel.
        body = data[:-1] if data.endswith(b"\xff") else data
        first, second = (_read_header(body + filler + JPEG_END) for filler in (b"", b"\x55\xaa" * 32))
        if draft:
            first.draft(None, least)
            second.draft(None, least)
        if first.tobytes() != second.tobytes():
            raise
        return to_rgb(first)


def _read_header(data: bytes) -> Image.Image:
    """Open an image; its pixels are decoded when they are needed."""
    if _is_heif(data) and reads_heic():
        import pillow_heif

        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data), formats=(*FORMATS, "HEIF"))
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _is_heif(data: bytes | Drawing) -> bool:
    return isinstance(data, bytes) and data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS


def crop_square(image: Image.Image, size: int, box: Box | None) -> Crop:
    """The square around `box`, or the centre square of the whole RGB image, resized to `size` with a Lanczos filter.

    The whole box is kept. The square lies within the image as far as it fits, and is continued by reflection beyond.
    """
    if box:
        left, top, right, bottom = max(0, box[0]), max(0, box[1]), min(image.width, box[2]), min(image.height, box[3])
        width, height = right - left, bottom - top
        if width <= 0 or height <= 0:
            return box, f"box {box} is empty or outside the image ({image.width} x {image.height} pixels)"
        if min(width, height) < MIN_BOX:
            return box, f"box {box} has a side under {MIN_BOX} pixels"
        if max(width, height) > MAX_ASPECT * min(width, height):
            return box, f"box {box} is over {MAX_ASPECT:.0f} times as long as it is wide"
        side = max(width, height)
        x, y = _within(left, width, side, image.width), _within(top, height, side, image.height)
        image, x, y = _cut(image, x, y, side)
    else:
        # The square is centred to half a pixel, so that a mirrored photo gives a mirrored crop.
        side = min(image.size)
        x, y = (image.width - side) / 2, (image.height - side) / 2
    # One call cuts and resizes: resizing first would turn 16 x 5000 pixels into 64 x 20000.
    square = image.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side), reducing_gap=3.0)
    return box, np.asarray(square).transpose(2, 0, 1)


def _within(start: int, length: int, side: int, limit: int) -> float:
    """Where `side` pixels start that are centred on `length` ones from `start`, but as far as possible in 0..limit."""
    low, high = sorted((0, limit - side))
    return min(max(start + (length - side) / 2, low), high)


def _cut(image: Image.Image, x: float, y: float, side: int) -> tuple[Image.Image, float, float]:
    """The pixels around a square, with reflections where it leaves the image, and where the square lies in them."""
    left, top, right, bottom = math.floor(x), math.floor(y), math.ceil(x + side), math.ceil(y + side)
    part = image.crop((max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)))
    beyond = ((max(0, -top), max(0, bottom - image.height)), (max(0, -left), max(0, right - image.width)))
    if any(map(any, beyond)):
        part = Image.fromarray(np.pad(np.asarray(part), (*beyond, (0, 0)), mode="reflect"))
    return part, x - left, y - top
