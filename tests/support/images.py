"""Image files as bytes, and the pictures in the playground's answers."""

from __future__ import annotations

import base64
import io

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
