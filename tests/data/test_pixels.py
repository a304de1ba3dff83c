"""Pixels of every mode, depth, transparency, orientation and profile, against libvips, an independent decoder."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import pyvips
from PIL import Image, ImageCms

from dogvae.data import decode as module
from dogvae.data.decode import crops, decode
from dogvae.data.photos import Photo
from dogvae.inference.user_images import pixels
from tests.support.images import icc, png

SIZE = 64  # of the images, too: nothing is resized
LEVELS = 2.0


def scene(width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """(height, width, 4) in [0, 1]: smooth red, green, blue and opacity, with all their extremes."""
    y, x = np.mgrid[:height, :width] / np.array([height - 1, width - 1]).reshape(2, 1, 1)
    waves = [x, y, 0.5 + 0.5 * np.cos(9 * x * y), np.clip(1.5 * np.abs(x + y - 1), 0, 1)]
    return np.stack(waves, axis=-1)


def samples(depth: int, bands: int) -> np.ndarray:
    """The scene in `depth` bits: grey, grey and opacity, RGB, or RGB and opacity."""
    chosen = scene()[..., {1: [2], 2: [2, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[bands]]
    return np.rint(chosen * (2**depth - 1)).astype(int)


def image(mode: str, width: int = SIZE, height: int = SIZE) -> Image.Image:
    levels = np.rint(scene(width, height) * 255).astype(np.uint8)
    if mode in ("I;16", "I;16B"):
        return Image.fromarray(np.rint(scene()[..., 2] * 65535).astype(np.uint16))
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(levels[..., band]) for band in (2, 3)])
    if mode == "RGBA":
        return Image.fromarray(levels)
    rgb = Image.fromarray(levels[..., :3])
    return rgb.quantize(64) if mode == "P" else rgb.convert(mode)


def file(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def transparent(samples: np.ndarray) -> tuple[int, ...]:
    """The colour of a pixel, for PNG to make transparent."""
    return tuple(int(sample) for sample in samples[20, 30])


def tiff_of_16_bits(bands: int) -> bytes:
    """Written by libvips: Pillow writes no RGB of 16 bits."""
    picture = pyvips.Image.new_from_array(samples(16, bands).astype(np.uint16))
    return bytes(picture.copy(interpretation="grey16" if bands == 1 else "rgb16").tiffsave_buffer(compression="lzw"))


def on_canvas(gif: bytes) -> bytes:
    """The GIF with its frame in the corner of a canvas of SIZE x SIZE."""
    return gif[:6] + struct.pack("<HH", SIZE, SIZE) + gif[10:]


def white_is_0(tiff: bytes) -> bytes:
    """The TIFF with 0 in place of 1 as its PhotometricInterpretation."""
    one, zero = (struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0))
    assert tiff.count(one) == 1
    return tiff.replace(one, zero)


def oriented(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(image("RGB", 96, 64), format, exif=exif, quality=95)


CMYK = pyvips.Operation.call("profile_load", "cmyk")
FILES: dict[str, Callable[[], bytes]] = {}
for _depth, _bands in [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (8, 3), (16, 3), (8, 4), (16, 4)]:
    FILES[f"{_bands} bands of {_depth} bits.png"] = lambda d=_depth, b=_bands: png(samples(d, b), d)
    if _bands in (1, 3):
        FILES[f"{_bands} bands of {_depth} bits, one colour transparent.png"] = lambda d=_depth, b=_bands: png(
            samples(d, b), d, transparent(samples(d, b))
        )
for _colours in (2, 4, 16, 256):
    FILES[f"palette of {_colours}.png"] = lambda c=_colours: file(image("RGB").quantize(c), "PNG")
    FILES[f"palette of {_colours}, some transparent.png"] = lambda c=_colours: file(
        image("RGB").quantize(c), "PNG", transparency=bytes(range(0, 200, 100))
    )
MODES = {
    "JPEG": ("L", "RGB", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
}
for _format, _modes in MODES.items():
    for _mode in _modes:
        FILES[f"{_mode}.{_format}"] = lambda f=_format, m=_mode: file(image(m), f, quality=95, subsampling="4:4:4")
FILES |= {
    "progressive.JPEG": lambda: file(image("RGB"), "JPEG", quality=95, progressive=True, subsampling=0),
    "low quality.JPEG": lambda: file(image("RGB"), "JPEG", quality=20),
    "lossless.WEBP": lambda: file(image("RGBA"), "WEBP", lossless=True),
    "transparent frame smaller than its canvas.GIF": lambda: on_canvas(file(image("P", 40, 50), "GIF", transparency=3)),
    "16 bits.TIFF": lambda: tiff_of_16_bits(1),
    "RGB of 16 bits.TIFF": lambda: tiff_of_16_bits(3),
    "RGBA of 16 bits.TIFF": lambda: tiff_of_16_bits(4),
    "white is 0.TIFF": lambda: white_is_0(file(image("L"), "TIFF")),
    "16 bits, white is 0.TIFF": lambda: white_is_0(file(image("I;16"), "TIFF")),
    "transparent.GIF": lambda: file(image("P"), "GIF", transparency=3),
    "compressed.TIFF": lambda: file(image("RGB"), "TIFF", compression="tiff_lzw"),
    "jpeg.TIFF": lambda: file(image("RGB"), "TIFF", compression="jpeg", quality=95),
}
for _format in ("JPEG", "PNG", "WEBP", "TIFF"):
    FILES |= {f"orientation {o}.{_format}": lambda f=_format, o=o: oriented(f, o) for o in range(1, 9)}
PROFILES = {
    "sRGB": icc("srgb", 2.2),
    "Adobe RGB": icc("adobe", 563 / 256),
    "Display P3": icc("p3", 2.2),
    "ProPhoto": icc("prophoto", 1.8),
    "red and green swapped": icc("srgb", 2.2, "grb"),
}
PROFILED = [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("TIFF", "RGB")]
for _name, _profile in PROFILES.items():
    for _format, _mode in PROFILED:
        FILES[f"{_name} {_mode}.{_format}"] = lambda f=_format, m=_mode, p=_profile: file(
            image(m), f, icc_profile=p, quality=95
        )
for _gamma in (1.0, 1.8, 2.2):
    FILES[f"grey gamma {_gamma}.JPEG"] = lambda g=_gamma: file(image("L"), "JPEG", icc_profile=icc("grey", g))
    FILES[f"grey gamma {_gamma}.PNG"] = lambda g=_gamma: png(samples(16, 1), 16, profile=icc("grey", g))
FILES |= {f"CMYK.{f}": lambda f=f: file(image("CMYK"), f, icc_profile=CMYK, quality=95) for f in ("JPEG", "TIFF")}


def by_libvips(data: bytes) -> np.ndarray:
    """(3, SIZE, SIZE) float: the centre of the picture, upright, in sRGB, over white."""
    picture = pyvips.Image.new_from_buffer(data, "").autorot()
    if picture.get_typeof("icc-profile-data"):
        picture = picture.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True)
    picture = picture.colourspace("srgb")
    if picture.hasalpha():
        picture = picture.flatten(background=255)
    x, y = (picture.width - SIZE) // 2, (picture.height - SIZE) // 2
    return picture.crop(x, y, SIZE, SIZE).cast("uchar").numpy().reshape(SIZE, SIZE, -1)[..., :3].transpose(2, 0, 1)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_libvips(name: str, tmp_path: Path) -> None:
    data = FILES[name]()
    (tmp_path / name).write_bytes(data)
    [(_, decoded)] = crops(Photo(name, data), SIZE)
    assert not isinstance(decoded, str), decoded
    difference = np.abs(decoded.astype(float) - by_libvips(data))
    assert difference.mean() < LEVELS
    assert np.array_equal(pixels(tmp_path / name, SIZE)[0], decoded)
    assert np.array_equal(pixels(Image.open(tmp_path / name), SIZE)[0], decoded)


def decoded(data: bytes, size: int = SIZE) -> np.ndarray:
    [(_, found)] = crops(Photo("x", data), size)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("values", [(0, 4096), (1, 3), (7, 9)])
@pytest.mark.parametrize(("depth", "bands"), [(1, 1), (2, 1), (4, 1), (16, 1), (8, 3), (16, 3)])
def test_transparent_colour_of_a_png_becomes_white(depth: int, bands: int, values: tuple[int, int]) -> None:
    colour = values[0] % 2**depth, values[1] % 2**depth
    one = colour[1] if depth == 16 else colour[0]
    plain = np.full((SIZE, SIZE, bands), one)
    assert np.unique(decoded(png(plain, depth, (one,) * bands))).tolist() == [255]
    grey = one >> 8 if depth == 16 else one * 255 // (2**depth - 1)
    other = (one + 2 ** (depth - 1)) % 2**depth
    assert np.unique(decoded(png(plain, depth, (other,) * bands))).tolist() == [grey]


def test_canvas_around_the_frame_of_a_gif_is_white() -> None:
    frame = image("P", 40, 50)
    expected = np.full((3, SIZE, SIZE), 255)
    expected[:, :50, :40] = np.asarray(frame.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decoded(on_canvas(file(frame, "GIF"))), expected)


def test_fourth_byte_of_a_bmp_is_opacity_unless_all_are_0() -> None:
    assert np.array_equal(decoded(file(image("RGBA"), "BMP")), decoded(file(image("RGBA"), "PNG")))
    unset = image("RGBA")
    unset.putalpha(0)
    assert np.array_equal(decoded(file(unset, "BMP")), decoded(file(image("RGB"), "BMP")))
    assert np.array_equal(decoded(file(image("RGB"), "BMP")), np.asarray(image("RGB")).transpose(2, 0, 1))


def test_lab_becomes_rgb() -> None:
    spaces = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(image("RGB"), *spaces, outputMode="LAB")
    assert lab
    assert np.abs(decoded(file(lab, "TIFF")).astype(int) - decoded(file(image("RGB"), "PNG"))).mean() < LEVELS


@pytest.mark.parametrize("profile", [b"junk" * 50, PROFILES["Adobe RGB"][:200], CMYK, icc("grey", 1.8)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_damaged_or_wrong_profile_is_ignored_and_reported(profile: bytes, format: str) -> None:
    plain, profiled = (file(image("RGB"), format, icc_profile=p) for p in (None, profile))
    found = decode(Photo("x", profiled), SIZE)
    assert found.bad_profile
    assert np.array_equal(found.crops[0][1], decoded(plain))
    assert not decode(Photo("x", plain), SIZE).bad_profile


def test_profile_of_srgb_changes_no_pixel() -> None:
    lcms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (lcms, pyvips.Operation.call("profile_load", "srgb")):
        for mode in ("L", "RGB"):
            assert np.array_equal(
                decoded(file(image(mode), "JPEG", icc_profile=profile)), decoded(file(image(mode), "JPEG"))
            )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("missing", [1, 2])
def test_jpeg_that_lacks_only_its_end_mark_is_decoded(options: dict[str, object], missing: int) -> None:
    whole = file(image("RGB", 300, 300), "JPEG", **options)
    for size in (SIZE, 256):  # decoded at a reduced scale, and at the whole one
        assert np.array_equal(decoded(whole[:-missing], size), decoded(whole, size))
    for cut in (4, 20, 1000):
        [(_, reason)] = crops(Photo("x", whole[:-cut]), SIZE)
        assert "truncated" in str(reason)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_heic_is_decoded(mode: str) -> None:
    pillow_heif.register_heif_opener()
    heic = file(image(mode), "HEIF", quality=95, chroma=444)
    assert np.abs(decoded(heic).astype(int) - decoded(file(image(mode), "PNG"))).mean() < LEVELS


def test_heic_without_its_extra_says_how_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "reads_heic", lambda: False)
    [(_, reason)] = crops(Photo("x.jpg", b"\0\0\0\x18ftypheic" + bytes(100)), SIZE)
    assert reason == "HEIC is read after: pip install 'dogvae[heic]'"
