"""Photo bytes to square uint8 pixels, with Pillow. Every photo is taken to be hostile; knows neither Ray nor torch."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, WebPImagePlugin

from dogvae.data.photos import Box, Drawing, Photo

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no others: Pillow's EPS would start Ghostscript
assert WebPImagePlugin  # imported here, or Pillow looks for it by importing all of its formats at the first bad file

Crop = tuple["Box | None", "np.ndarray | str"]  # pixels (3, size, size) uint8, or the reason why there are none


def crops(photo: Photo, size: int) -> list[Crop]:
    """The centre square of a photo without boxes, or of each of its boxes, resized to `size`; never raises.

    Boxes are pixels of the upright photo. A photo that cannot be decoded gives one reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Over Image.MAX_IMAGE_PIXELS, by the header: refused before a pixel is decoded.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _open(photo.data, size, draft=not photo.boxes)
            return [_crop(image, size, box) for box in photo.boxes or (None,)]
    except UnidentifiedImageError:
        return [(None, f"not an image of a known format ({', '.join(FORMATS)})")]
    # On hostile bytes Pillow raises whatever its parsers and decoders trip over, from struct.error to MemoryError:
    # the only list that is complete is Exception. The reason is recorded, so that nothing is hidden.
    except Exception as error:  # noqa: BLE001
        return [(None, " ".join(str(error).split()) or type(error).__name__)]


def _open(data: bytes | Drawing, size: int, draft: bool) -> Image.Image:
    """The upright RGB image, of its first frame. `draft` lets a JPEG decode at 1/2, 1/4 or 1/8, but to 2 x `size`."""
    if isinstance(data, Drawing):
        return data.draw(2 * size)
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if draft:
        image.draft(None, (2 * size, 2 * size))
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB: transparent over white, 16 bits by their upper 8."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _crop(image: Image.Image, size: int, box: Box | None) -> Crop:
    if box:
        left, top, right, bottom = max(0, box[0]), max(0, box[1]), min(image.width, box[2]), min(image.height, box[3])
        if left >= right or top >= bottom:
            return box, f"box {box} is empty or outside the image ({image.width} x {image.height} pixels)"
        image = image.crop((left, top, right, bottom))  # first, or the filter would see what is around the box
    # Cutting the square and resizing are one step, so that a 1 x 5000 image never becomes a 64 x 320000 one. The
    # square is exactly in the centre, half pixels included: a photo and its mirror image get mirrored crops.
    side = min(image.size)
    x, y = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side), reducing_gap=3.0)
    return box, np.asarray(square).transpose(2, 0, 1)
