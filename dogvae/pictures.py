"""Pictures for people: uint8 arrays as grids, animations and files. Independent of training."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dogvae.errors import UsageError
from dogvae.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

STILL, MOVING, VIDEO, ARRAY = (".png", ".jpg", ".jpeg"), (".gif", ".webp"), (".mp4",), (".npy",)
SUFFIXES = STILL + MOVING + VIDEO + ARRAY
FRAMES_PER_S, ENLARGED = 20, 4  # of an animation; each frame is enlarged by this factor
MOST_IN_GRID = 10_000


def to_uint8(x: Tensor) -> np.ndarray:
    """Values in [0, 1], any shape, as a uint8 array of that shape, 0 to 255. Values outside [0, 1] are clipped."""
    return (x.float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def grid(images_nhw3: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Arrange uint8 images (n, h, w, 3) row by row in one image (H, W, 3), on white, `gap` pixels apart."""
    n, h, w, channels = images_nhw3.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images_nhw3):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet


def png(image_hw3: np.ndarray) -> bytes:
    """The bytes of a PNG file of a uint8 image (h, w, 3)."""
    return still(image_hw3, ".png")


def still(image_hw3: np.ndarray, suffix: str) -> bytes:
    """The bytes of a file of a uint8 image (h, w, 3), in one of the formats `STILL`."""
    buffer = io.BytesIO()
    Image.fromarray(image_hw3).save(buffer, "PNG" if suffix == ".png" else "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def animation(images_nhw3: np.ndarray, suffix: str) -> bytes:
    """The bytes of a .gif, .webp or .mp4 file of uint8 images (n, h, w, 3), enlarged 4 times.

    The frames run forwards, then backwards; .gif and .webp repeat for ever. Raises UsageError if .mp4 lacks its
    package.
    """
    frames = [Image.fromarray(p).resize((p.shape[1] * ENLARGED, p.shape[0] * ENLARGED)) for p in images_nhw3]
    frames += frames[-2:0:-1]  # without the first and last frame, which the loop would otherwise show twice
    if suffix in VIDEO:
        return _mp4(frames)
    buffer = io.BytesIO()
    kind, duration = suffix.lstrip(".").upper(), 1000 // FRAMES_PER_S
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return buffer.getvalue()


def _mp4(frames: list[Image.Image]) -> bytes:
    try:
        import av
    except ImportError as error:
        raise UsageError("-o: .mp4 needs another package: pip install 'dogvae[video]'; or use .gif") from error
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("h264", rate=FRAMES_PER_S)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    return buffer.getvalue()


def check_output(path: Path, n: int) -> None:
    """Raise UsageError unless `save` can write `n` images to `path`."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"-o: {path} must end in one of {', '.join(SUFFIXES)}")
    try:
        if not path.parent.is_dir():
            raise UsageError(f"-o: the folder {path.parent} does not exist")
        if path.is_dir():
            raise UsageError(f"-o: {path} is a folder")
    except OSError as error:
        raise UsageError(f"-o: {path} cannot be written: {error.strerror}") from error
    if n > MOST_IN_GRID and suffix not in ARRAY:
        raise UsageError(f"-o: {n:,} pictures are too many for {suffix}, at most {MOST_IN_GRID:,}; use .npy")
    if suffix in VIDEO:  # fails now rather than after the pictures are computed
        _mp4([Image.new("RGB", (16, 16))])


def save(path: Path, images_nhw3: np.ndarray, columns: int) -> None:
    """Write uint8 images (n, h, w, 3) in the format of the suffix: a PNG grid of `columns`, an animation, or an array.

    Raises UsageError if `path` cannot be written; then nothing is left there.
    """
    suffix = path.suffix.lower()
    check_output(path, len(images_nhw3))
    if suffix in ARRAY:
        save_array(path, iter([images_nhw3]), len(images_nhw3))
        return
    content = still(grid(images_nhw3, columns), suffix) if suffix in STILL else animation(images_nhw3, suffix)
    try:
        Storage(path.parent).write(path.name, content)
    except OSError as error:
        raise UsageError(f"-o: {path} cannot be written: {error.strerror}") from error


def save_array(path: Path, batches: Iterator[np.ndarray], n: int) -> None:
    """Write batches of uint8 images (b, h, w, 3), `n` in all, to one .npy file, which appears when it is complete."""
    first = next(batches)
    partial = path.with_name(f".{path.name}.partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape[1:])}
    try:
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in itertools.chain([first], batches):
                file.write(np.ascontiguousarray(batch).data)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"-o: {path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
