"""Image files as bytes, and the pictures in the playground's answers."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG") -> bytes:
    """The bytes of an image file of a PIL image or a (h, w, 3) uint8 array."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind)
    return buffer.getvalue()


def pixels(url: str) -> np.ndarray:
    """(h, w, 3) uint8 of a PNG data URL."""
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def png(samples: np.ndarray, depth: int, transparent: tuple[int, ...] = (), profile: bytes = b"") -> bytes:
    """A PNG of (h, w, bands) samples of `depth` bits: grey, grey and alpha, RGB or RGBA. Pillow writes few of these."""
    height, width, bands = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if profile:
        chunks.append((b"iCCP", b"profile\0\0" + zlib.compress(profile)))
    if transparent:
        chunks.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks.append((b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())))  # 0: the row is not filtered
    chunks.append((b"IEND", b""))
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


PRIMARIES = {  # CIE 1931 x, y of red, green, blue and white (D65; ProPhoto: D50)
    "srgb": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290)),
    "adobe": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290)),
    "p3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), (0.3127, 0.3290)),
    "prophoto": ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585)),
}
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def icc(space: str, gamma: float, order: str = "rgb") -> bytes:
    """An ICC profile of a space of `PRIMARIES`, or of "grey", with a plain gamma. `order` permutes its primaries."""

    def fixed(numbers: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79), b"wtpt": fixed(D50)}
    if space == "grey":
        tags[b"kTRC"] = curve
    else:
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[space]]).T
        white = xyz[:, 3]
        matrix = xyz[:, :3] * np.linalg.solve(xyz[:, :3], white)
        adapted = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD @ matrix
        tags |= {f"{c}XYZ".encode(): fixed(adapted[:, "rgb".index(o)]) for c, o in zip("rgb", order, strict=True)}
        tags |= {f"{c}TRC".encode(): curve for c in "rgb"}
    directory, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        directory += name + struct.pack(">II", offset + len(data), len(tag))
        data += tag
    space_name = b"GRAY" if space == "grey" else b"RGB "
    header = struct.pack(
        ">I4sI4s4s4s12s4s28s", offset + len(data), b"", 0x02400000, b"mntr", space_name, b"XYZ ", b"", b"acsp", b""
    )
    return header + fixed(D50)[8:] + bytes(48) + directory + data
