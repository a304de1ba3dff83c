"""Decoding photos: pixels equal values computed by hand; damaged bytes give a reason and never raise."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dogvae.data.decode import crops
from dogvae.data.drawn import draw
from dogvae.data.photos import Box, Drawing, Photo
from dogvae.data.rgb import to_rgb


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decode(data: bytes, size: int = 32, boxes: tuple[Box, ...] = ()) -> np.ndarray:
    """The one crop, (3, size, size)."""
    [(_, pixels)] = crops(Photo("x", data, boxes), size)
    assert not isinstance(pixels, str), pixels
    return pixels


def reason(data: bytes, boxes: tuple[Box, ...] = ()) -> str:
    [(_, text)] = crops(Photo("x", data, boxes), 32)
    assert isinstance(text, str)
    assert "\n" not in text
    assert text
    return text


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_image_of_the_wanted_size_is_not_changed() -> None:
    image = noise(32, 32)
    np.testing.assert_array_equal(decode(encode(image)), np.asarray(image).transpose(2, 0, 1))


def colours(pixels: np.ndarray | str) -> list[list[int]]:
    """The different colours of a crop (3, h, h)."""
    assert not isinstance(pixels, str), pixels
    return np.unique(pixels.reshape(3, -1), axis=1).T.tolist()


def test_centre_square_is_cut_from_wide_and_tall_images() -> None:
    wide = Image.fromarray(np.hstack([Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert colours(decode(encode(image))) == [[0, 255, 0]]


def test_resizing_is_anti_aliased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # nearest-neighbour would give all black or all white
    assert np.abs(decode(encode(Image.fromarray(stripes)))[:, :, 2:-2].astype(float) - 127.5).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = noise(45, 33)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that a viewer undoes
    stored = image.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode(stored, exif=exif)), decode(encode(image)))


def test_transparency_is_put_on_white() -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:16, :, 3] = 255  # black above, transparent black below
    expected = np.zeros((3, 32, 32), np.uint8)
    expected[:, 16:] = 255
    np.testing.assert_array_equal(decode(encode(Image.fromarray(rgba))), expected)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(rgba[:, :, 2:]))), expected)  # grey and alpha
    half = np.full((32, 32, 4), (200, 100, 0, 51), np.uint8)  # 51 / 255 is a fifth
    assert decode(encode(Image.fromarray(half)))[:, 0, 0].tolist() == [244, 224, 204]


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP"])
def test_transparent_colour_of_a_palette_is_put_on_white(format: str) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 32, 16))
    image.info["transparency"] = 0
    pixels = decode(encode(image.convert("RGBA") if format == "WEBP" else image, format, lossless=True))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 31, 0].tolist() == [0, 0, 255]


def test_upper_8_of_16_bits_are_kept() -> None:
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    expected = (ramp // 256).astype(np.uint8)
    pixels = decode(encode(Image.fromarray(ramp)))
    assert all((channel == expected).all() for channel in pixels)
    for mode in ("I;16", "I;16B"):
        stored = ramp.astype(">u2" if mode == "I;16B" else "<u2")
        image = Image.frombytes(mode, (32, 32), stored.tobytes())
        np.testing.assert_array_equal(np.asarray(to_rgb(image).image)[..., 0], expected)
    wide = Image.fromarray(np.array([[-5, 0, 256, 65535, 70000]], np.int32))
    assert np.asarray(to_rgb(wide).image)[0, :, 0].tolist() == [0, 0, 1, 255, 255]
    floats = Image.fromarray(np.array([[-5.0, 0, 1, 254, 300]], np.float32))
    assert np.asarray(to_rgb(floats).image)[0, :, 0].tolist() == [0, 0, 1, 254, 255]


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.new("CMYK", (32, 32), (255, 0, 0, 0))  # pure cyan, which Pillow writes inverted, as Adobe does
    assert np.abs(decode(encode(image, "JPEG", quality=100))[:, 5, 5].astype(int) - (0, 255, 255)).max() <= 2


def test_grey_and_1_bit_images_and_first_frames_are_decoded() -> None:
    bits = Image.new("1", (32, 32), 0)
    bits.paste(1, (0, 0, 32, 16))
    assert decode(encode(bits))[:, [0, 31], 0].tolist() == [[255, 0]] * 3
    assert decode(encode(Image.new("L", (40, 40), 77), "JPEG"))[:, 3, 3].tolist() == [77] * 3
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert decode(data)[:, 5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(16, 5000), (5000, 16), (16, 16)])
def test_thin_images_are_resized_and_icons_rejected(shape: tuple[int, int]) -> None:
    assert colours(decode(encode(Image.new("RGB", shape, (1, 2, 3))), 128)) == [[1, 2, 3]]
    icon = (shape[0] - 1, shape[1] - 1)
    assert reason(encode(Image.new("RGB", icon))) == f"{icon[0]} x {icon[1]} pixels: a side is under 16"


def test_jpeg_decoded_at_a_reduced_scale_is_close_to_full_scale() -> None:
    y, x = np.mgrid[:600, :600]
    smooth = np.stack([127 + 100 * np.sin(x / 40), 127 + 100 * np.cos(y / 50), (x + y) / 5], axis=-1).astype(np.uint8)
    data = encode(Image.fromarray(smooth), "JPEG", quality=95)
    exact = np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.abs(decode(data, 64).astype(int) - exact).mean() < 1


def test_unusable_boxes_are_rejected_with_the_reason() -> None:
    boxes = ((50, 50, 50, 60), (200, 0, 210, 10), (0, 0, 31, 80), (-99, 20, 31, 70), (0, 0, 160, 40), (0, 0, 161, 40))
    found = crops(Photo("x", encode(noise(180, 80)), boxes), 32)
    assert [box for box, _ in found] == list(boxes)
    assert [pixels if isinstance(pixels, str) else "" for _, pixels in found] == [
        "box (50, 50, 50, 60) is empty or outside the image (180 x 80 pixels)",
        "box (200, 0, 210, 10) is empty or outside the image (180 x 80 pixels)",
        "box (0, 0, 31, 80) has a side under 32 pixels",
        "box (-99, 20, 31, 70) has a side under 32 pixels",
        "",
        "box (0, 0, 161, 40) is over 4 times as long as it is wide",
    ]


@pytest.mark.parametrize(
    ("box", "columns", "rows"),
    [
        ((40, 30, 72, 62), (40, 72), (30, 62)),  # square, not at a border: as it is
        ((0, 30, 64, 62), (0, 64), (14, 78)),  # long: the whole box, and as much above as below
        ((90, 4, 122, 68), (66, 130), (4, 68)),  # tall, near the right border: moved into the image
        ((20, -50, 84, 40), (20, 84), (0, 64)),  # beyond the top: clipped, and moved down
        ((4, 0, 124, 100), (4, 124), (-10, 110)),  # longer than the image is high: continued by reflection
    ],
)
def test_square_of_a_box_keeps_the_whole_box(box: Box, columns: tuple[int, int], rows: tuple[int, int]) -> None:
    image = noise(130, 100)
    reflected = np.pad(np.asarray(image), ((50, 50), (50, 50), (0, 0)), mode="reflect")
    square = reflected[rows[0] + 50 : rows[1] + 50, columns[0] + 50 : columns[1] + 50]
    for flip in (False, True):
        photo, wanted, sides = image, square, box
        if flip:
            photo, wanted = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), square[:, ::-1]
            sides = (130 - box[2], box[1], 130 - box[0], box[3])
        exact = Image.fromarray(wanted).resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
        np.testing.assert_array_equal(decode(encode(photo), boxes=(sides,)), np.asarray(exact).transpose(2, 0, 1))


def test_drawn_dog_is_drawn_at_twice_the_size() -> None:
    [(_, pixels)] = crops(Photo("x", Drawing(0, 0)), 64)
    expected = draw(0, 0, 128).resize((64, 64), Image.Resampling.LANCZOS, reducing_gap=3.0)
    np.testing.assert_array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))


def png(width: int, height: int, idat: bytes) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", idat), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_damaged_and_oversized_files_give_a_reason() -> None:
    jpeg, bmp = encode(noise(200, 200), "JPEG"), encode(noise(50, 50), "BMP")
    assert "truncated" in reason(jpeg[: len(jpeg) // 2])
    assert "truncated" in reason(bmp[: len(bmp) // 2])
    assert "exceeds limit of 89478485 pixels" in reason(png(10_000, 10_000, b""))
    assert "exceeds limit" in reason(png(65_535, 65_535, zlib.compress(b"")))
    assert reason(b"junk") == "not an image of a known format (JPEG, PNG, WEBP, GIF, BMP, AVIF, TIFF)"
    assert reason(encode(noise(20, 20), "EPS")).startswith("not an image of a known format")
    assert reason(png(0, 5, b""))
    assert reason(png(5, 5, b"no zlib"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise(format: str, data: st.DataObject) -> None:
    image = bytearray(encode(noise(24, 17), format))
    for _ in range(data.draw(st.integers(1, 8))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(image[: data.draw(st.integers(0, len(image)))]) + data.draw(st.binary(max_size=100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be raised here
        for _, pixels in crops(Photo("x", damaged), 32):
            assert isinstance(pixels, str) or (pixels.shape, pixels.dtype) == ((3, 32, 32), np.uint8)
            assert len(pixels) > 0


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "LAB", "YCbCr"),
}


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([(format, mode) for format, modes in MODES.items() for mode in modes]),
    st.integers(16, 300),
    st.integers(16, 300),
    st.sampled_from([32, 64, 128]),
)
def test_any_mode_and_size_can_be_decoded(kind: tuple[str, str], width: int, height: int, size: int) -> None:
    format, mode = kind
    pixels = decode(encode(Image.new(mode, (width, height)), format), size)
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("mode", sorted(set(Image.MODES) - {"La"}))  # no file has mode La
def test_every_mode_of_pillow_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).image.mode == "RGB"
