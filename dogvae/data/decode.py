"""Photo bytes to square uint8 pixels, with Pillow. No photo is trusted. Imports neither Ray nor torch."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, WebPImagePlugin

from dogvae.data.photos import Box, Drawing, Photo

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # and no others: for EPS, Pillow would start Ghostscript
assert WebPImagePlugin  # else Pillow imports the plugins of all formats at the first unknown file

Crop = tuple["Box | None", "np.ndarray | str"]  # pixels (3, size, size) uint8, or why there are none


def crops(photo: Photo, size: int) -> list[Crop]:
    """The centre square of each box of a photo (of the photo itself if it has no boxes), resized to `size`.

    Boxes are in pixels of the upright photo. Never raises: a photo that cannot be decoded gives one crop with the
    reason in place of the pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Raised from the header, before any pixel is decoded, for more than Image.MAX_IMAGE_PIXELS.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _open(photo.data, size, draft=not photo.boxes)
            return [crop_square(image, size, box) for box in photo.boxes or (None,)]
    except UnidentifiedImageError:
        return [(None, f"not an image of a known format ({', '.join(FORMATS)})")]
    # On damaged bytes Pillow raises anything from struct.error to MemoryError, so only Exception covers all of it.
    # Nothing is hidden: the reason goes to rejected.csv.
    except Exception as error:  # noqa: BLE001
        return [(None, " ".join(str(error).split()) or type(error).__name__)]


def _open(data: bytes | Drawing, size: int, draft: bool) -> Image.Image:
    """The first frame, upright, RGB. `draft` decodes a JPEG at 1/2, 1/4 or 1/8 of its size, but at least 2 x `size`."""
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
    """An image of any of Pillow's modes as RGB. Transparency is put on white; of 16 bits the upper 8 are kept."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_square(image: Image.Image, size: int, box: Box | None) -> Crop:
    """The centre square of `box`, or of the whole RGB image, resized to `size` with a Lanczos filter."""
    if box:
        left, top, right, bottom = max(0, box[0]), max(0, box[1]), min(image.width, box[2]), min(image.height, box[3])
        if left >= right or top >= bottom:
            return box, f"box {box} is empty or outside the image ({image.width} x {image.height} pixels)"
        image = image.crop((left, top, right, bottom))  # first: the filter must not see what is outside
    # One call cuts and resizes: resizing first would turn 1 x 5000 pixels into 64 x 320000. The square is centred to
    # half a pixel, so that a mirrored photo gives a mirrored crop.
    side = min(image.size)
    x, y = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side), reducing_gap=3.0)
    return box, np.asarray(square).transpose(2, 0, 1)
