"""The one place where a picture becomes RGB: transparency, 16 bits, colour profiles, orientation. Uses Pillow only."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFile, ImageOps

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode that it describes
SCALES = {"L;2": 85, "L;4": 17}  # Pillow's name for grey of 2 or 4 bits -> what Pillow multiplies them by
SAME = 2  # levels: a profile that changes no colour by more than this is sRGB, rounded


class Rgb(NamedTuple):
    """A picture as it is meant to be seen."""

    image: Image.Image
    """Upright, mode RGB, in the colours of sRGB."""
    bad_profile: bool = False
    """Whether an embedded colour profile was ignored because it cannot be used."""


def to_rgb(image: Image.Image) -> Rgb:
    """The first frame of an image of any of Pillow's modes.

    EXIF orientation is applied, an embedded ICC profile is converted to sRGB, transparency is put on white, of 16 bits
    the upper 8 are kept. Raises whatever Pillow raises for damaged pixels.
    """
    stored = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None  # `load` clears it
    alpha_of_bmp = _alpha_of_bmp(image, stored)  # reads the file, which `load` closes
    image.load()
    profile = image.info.get("icc_profile")
    rgb, bad_profile = image, False
    if image.mode != "RGB" or profile or alpha_of_bmp or image.has_transparency_data:  # unlike most photos
        colours, alpha = _split(image, stored)
        alpha = alpha_of_bmp or alpha
        if profile:
            try:
                colours = _to_srgb(colours, profile)
            except (OSError, ValueError, ImageCms.PyCMSError):
                bad_profile = True
        rgb = colours if colours.mode == "RGB" else colours.convert("RGB")
        if alpha:
            rgb = rgb.copy() if rgb is image else rgb
            rgb.paste("white", mask=ImageChops.invert(alpha))
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        rgb = ImageOps.exif_transpose(rgb)
    return Rgb(rgb, bad_profile)


def _split(image: Image.Image, stored: Any) -> tuple[Image.Image, Image.Image | None]:
    """The colours in a mode that a profile can describe, and the alpha channel, if there is any transparency."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        alpha = None if transparent is None else _mask(grey != transparent)
        if getattr(image, "tag_v2", {}).get(262) == 0:  # in this TIFF 0 is white, which Pillow undoes for 8 bits only
            grey = 65535 - grey
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)), alpha
    alpha, colours = None, image
    # PNG names the transparent colour in the file's bits, and Pillow scales the pixels only.
    rawmode = stored.args if stored and image.format == "PNG" else None
    if transparent is not None and rawmode in ("RGB;16B", *SCALES):
        scaled = np.asarray(transparent) // 256 if rawmode == "RGB;16B" else transparent * SCALES[rawmode]
        alpha = _mask((np.asarray(image) != scaled).reshape(image.height, image.width, -1).any(-1))
    elif image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        colours = image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB")
    if image.format == "GIF" and stored and stored.extents != (0, 0, *image.size):
        # The frame is smaller than the canvas, and Pillow fills what is outside with any colour.
        inside = Image.new("L", image.size)
        inside.paste(alpha.crop(stored.extents) if alpha else 255, stored.extents)
        alpha = inside
    if colours.mode == "1":
        colours = colours.convert("L")
    return (colours if colours.mode in PROFILE_MODES.values() else colours.convert("RGB")), alpha


def _alpha_of_bmp(image: Image.Image, stored: Any) -> Image.Image | None:
    """The fourth byte of each pixel of a 32-bit BMP, which Pillow skips. None for any other image.

    If all these bytes are 0, the program that wrote them did not mean transparency.
    """
    if image.format != "BMP" or not stored or stored.codec_name != "raw" or stored.args[0] not in ("BGRX", "BGRA"):
        return None
    assert isinstance(image, ImageFile.ImageFile) and image.fp  # noqa: PT018
    image.fp.seek(stored.offset)
    _, stride, direction = stored.args
    data = image.fp.read(stride * image.height)
    alpha = Image.frombytes("RGBA", image.size, data, "raw", "BGRA", stride, direction).getchannel("A")
    return alpha if alpha.getbbox() else Image.new("L", image.size, 255)


def _mask(opaque: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert the colours. Raises OSError, ValueError or PyCMSError if the profile is damaged or for another mode."""
    mode, transform = _transform(profile)
    if image.mode == "L" and mode == "RGB":
        image = image.convert("RGB")
    if image.mode != mode:
        raise ValueError(f"a profile of {mode} in an image of {image.mode}")
    return transform.apply(image) if transform else image


@lru_cache(maxsize=16)  # photos of one camera have one profile
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile describes, and its transform to sRGB; None if that changes nothing."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space not in PROFILE_MODES:
        raise ValueError(f"a profile of {space}")
    mode = PROFILE_MODES[space]
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode != "CMYK":
        ramp = np.arange(256, dtype=np.uint8)
        levels = ramp[::15]  # 18 of each channel, 0 and 255 included
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        before = Image.fromarray(ramp[None] if mode == "L" else cube)
        change = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB"))
        if np.abs(change).max() <= SAME:
            return mode, None
    return mode, transform
