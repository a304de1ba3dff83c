"""Pictures for people: grids, animations, files, and what the decoder makes of latents. Knows nothing of training."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dogvae.errors import UsageError
from dogvae.storage import Storage

STILL, MOVING, VIDEO, ARRAY = (".png",), (".gif", ".webp"), (".mp4",), (".npy",)
SUFFIXES = STILL + MOVING + VIDEO + ARRAY
FRAMES_PER_S, ENLARGED = 20, 4  # of an animation; it is shown so many times as large
MOST_IN_GRID = 10_000


def to_uint8(x: Tensor) -> np.ndarray:
    """Images of values in [0, 1], any shape, as uint8 on the CPU."""
    return (x.float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def grid(images_nhw3: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 images (n, h, w, 3) as one (H, W, 3), row by row, on white."""
    n, h, w, channels = images_nhw3.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images_nhw3):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet


def png(image_hw3: np.ndarray) -> bytes:
    """A uint8 image (h, w, 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image_hw3).save(buffer, "PNG")
    return buffer.getvalue()


def animation(images_nhw3: np.ndarray, suffix: str) -> bytes:
    """uint8 images (n, h, w, 3) as a .gif, .webp or .mp4 file, 4 times as large, there and back without end."""
    frames = [Image.fromarray(p).resize((p.shape[1] * ENLARGED, p.shape[0] * ENLARGED)) for p in images_nhw3]
    frames += frames[-2:0:-1]  # the loop has no jump
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
        raise UsageError("-o: .mp4 needs one more package: pip install 'dogvae[video]'; or take .gif") from error
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
    """UsageError unless `save` can write `n` images there."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"-o: {path} must end in one of {', '.join(SUFFIXES)}")
    try:
        if not path.parent.is_dir():
            raise UsageError(f"-o: there is no folder {path.parent}")
        if path.is_dir():
            raise UsageError(f"-o: {path} is a folder")
    except OSError as error:
        raise UsageError(f"-o: {path} cannot be written: {error.strerror}") from error
    if n > MOST_IN_GRID and suffix not in ARRAY:
        raise UsageError(f"-o: {n:,} pictures are too many for {suffix}, at most {MOST_IN_GRID:,}; take .npy")
    if suffix in VIDEO:
        _mp4([Image.new("RGB", (16, 16))])


def save(path: Path, images_nhw3: np.ndarray, columns: int) -> None:
    """Write uint8 images (n, h, w, 3) as the suffix says: a PNG grid of `columns`, an animation, or the array.

    Raises UsageError if that cannot be done; then nothing is written.
    """
    suffix = path.suffix.lower()
    check_output(path, len(images_nhw3))
    if suffix in ARRAY:
        save_array(path, iter([images_nhw3]), len(images_nhw3))
        return
    content = png(grid(images_nhw3, columns)) if suffix in STILL else animation(images_nhw3, suffix)
    try:
        Storage(path.parent).write(path.name, content)
    except OSError as error:
        raise UsageError(f"-o: {path} cannot be written: {error.strerror}") from error


def save_array(path: Path, batches: Iterator[np.ndarray], n: int) -> None:
    """Write `n` uint8 images (n, h, w, 3), which come in batches, as one .npy file, when all have come."""
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
