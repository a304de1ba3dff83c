"""Curves, random choices and filling for drawn images: outlines are points, filled on a canvas that is averaged down.

Outlines are float arrays `(n, 2)` of x (right) and y (down) in any unit; a `Shape` is an outline with its colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]
Colour = tuple[int, int, int]
T = TypeVar("T")

_TURN = np.linspace(0, 2 * np.pi, 32, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)
_HALF_TURN = _CIRCLE[2:16:2]
_T = np.linspace(0, 1, 7, endpoint=False)[:, None]
_CATMULL_ROM = 0.5 * np.hstack(
    [-_T + 2 * _T**2 - _T**3, 2 - 5 * _T**2 + 3 * _T**3, _T + 4 * _T**2 - 3 * _T**3, _T**3 - _T**2]
)


class Dice:
    """Random choices that depend only on `key`: the same on every machine and with every version of NumPy."""

    def __init__(self, *key: int) -> None:
        # NumPy guarantees that SeedSequence's words never change, but not the numbers of Generator's methods.
        self._words = np.random.SeedSequence(key).generate_state(512).tolist()
        self._next = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        word = self._words[self._next % len(self._words)]
        self._next += 1
        return low + (high - low) * word / 2**32

    def chance(self, p: float) -> bool:
        """True with probability `p`."""
        return self.uniform() < p

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, all equally likely."""
        return options[int(self.uniform() * len(options))]


@dataclass(frozen=True)
class Shape:
    """An outline `(n, 2)`, its fill, an optional rim around it, and marks, which are cut off at the outline."""

    points: Points
    fill: Colour
    rim: Colour | None = None
    marks: tuple[tuple[Points, Colour], ...] = ()

    def moved(self, matrix: Points, shift: Points) -> Shape:
        """The shape with every point p at `matrix @ p + shift`; matrix `(2, 2)`, shift `(2,)`."""
        marks = tuple((mark @ matrix.T + shift, colour) for mark, colour in self.marks)
        return Shape(self.points @ matrix.T + shift, self.fill, self.rim, marks)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` at share 0, `b` at share 1."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def darker(colour: Colour, share: float = 0.3) -> Colour:
    """`colour` mixed with a warm black: shadows of a neutral black look dirty."""
    return mix(colour, (24, 14, 22), share)


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    """An ellipse `(32, 2)` around (x, y), turned clockwise by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return _CIRCLE * (rx, ry) @ np.array([[c, s], [-s, c]]) + (x, y)


@cache
def _basis(k: int, closed: bool) -> Points:
    """The matrix `(m, k)` that turns `k` points into the `m` points of the Catmull-Rom curve through them."""
    here = np.eye(k)
    if closed:
        around = [np.roll(here, shift, 0) for shift in (1, 0, -1, -2)]
    else:
        ends = here[[0, *range(k), k - 1]]
        around = [ends[i : i + k - 1] for i in range(4)]
    out = np.einsum("tj,jpk->ptk", _CATMULL_ROM, np.stack(around)).reshape(-1, k)
    return out if closed else np.vstack([out, here[-1:]])


@cache
def _slope(k: int) -> Points:
    """The matrix `(m, k)` that turns `k` points into the tangents of the open curve through them."""
    slope: Points = np.gradient(_basis(k, False), axis=0)
    return slope


def curve(points: ArrayLike, closed: bool = True) -> Points:
    """A Catmull-Rom curve through `points` `(k, 2)`: `(7k, 2)` if closed, else from the first point to the last."""
    p = np.asarray(points, dtype=np.float64)
    return _basis(len(p), closed) @ p


def limb(path: ArrayLike, start: float, end: float) -> Points:
    """A round-ended stroke along the curve through `path` `(k, 2)`, its width going from `start` to `end`."""
    knots = np.asarray(path, dtype=np.float64)
    middle, along = _basis(len(knots), False) @ knots, _slope(len(knots)) @ knots
    along /= np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)[:, None]
    side = along[:, ::-1] * (-1.0, 1.0)
    offset = side * np.linspace(start / 2, end / 2, len(middle))[:, None]
    cap = middle[-1] + end / 2 * _HALF_TURN @ np.stack([side[-1], along[-1]])
    heel = middle[0] - start / 2 * _HALF_TURN @ np.stack([side[0], along[0]])
    return np.concatenate([middle + offset, cap, (middle - offset)[::-1], heel])


def expanded(points: Points, by: float) -> Points:
    """The outline `(n, 2)` moved outwards by `by` along its normals."""
    ring = np.concatenate([points[-1:], points, points[:1]])
    along = ring[2:] - ring[:-2]
    area = np.dot(points[:, 0], along[:, 1]) - np.dot(points[:, 1], along[:, 0])
    outward = along[:, ::-1] * ((by, -by) if area > 0 else (-by, by))
    return points + outward / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)[:, None]


def fluffy(points: Points, size: float, depth: float = 0.3, curly: bool = True) -> Points:
    """The outline `(n, 2)` with tufts about `size` wide, round if `curly`, else pointed and uneven: `(m, 2)`."""
    ring = np.vstack([points, points[:1]])
    walked = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(ring, axis=0).T))])
    tufts = max(5, round(walked[-1] / size))
    at = np.linspace(0, walked[-1], tufts * 6, endpoint=False)
    even = np.stack([np.interp(at, walked, ring[:, 0]), np.interp(at, walked, ring[:, 1])], 1)
    if curly:
        bump = np.tile(np.sin(np.linspace(0, np.pi, 6, endpoint=False)), tufts)
    else:
        bump = np.outer(0.6 + 0.4 * np.sin(2.4 * np.arange(tufts)), (0, 0.25, 0.55, 1.0, 0.55, 0.25)).ravel()
    wide = expanded(even, size * depth)
    return even + (wide - even) * bump[:, None]


def ink(image: Image.Image, shapes: Iterable[Shape], scale: float, rim: float) -> None:
    """Fill `shapes` in order on `image` (RGB or RGBX); one unit is `scale` pixels, and rims are `rim` pixels wide.

    In RGBX the fourth band becomes 255 wherever something is drawn.
    """
    draw = ImageDraw.Draw(image)
    opaque = (255,) if image.mode == "RGBX" else ()
    for shape in shapes:
        points = shape.points * scale
        if shape.rim is not None:
            draw.polygon(_flat(expanded(points, rim)), fill=shape.rim + opaque)
        draw.polygon(_flat(points), fill=shape.fill + opaque)
        if shape.marks:
            _ink_marks(image, shape, points, scale)


def _ink_marks(image: Image.Image, shape: Shape, points: Points, scale: float) -> None:
    low = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(points.max(0)).astype(int) + 2, image.size)
    if (high <= low).any():
        return
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    mask, paint = Image.new("L", size), Image.new("RGB", size, shape.fill)
    ImageDraw.Draw(mask).polygon(_flat(points - low), fill=255)
    brush = ImageDraw.Draw(paint)
    for mark, colour in shape.marks:
        brush.polygon(_flat(mark * scale - low), fill=colour)
    image.paste(paint, (int(low[0]), int(low[1])), mask)


def _flat(points: Points) -> list[int]:
    # Pillow truncates to whole pixels; rounding first keeps shapes centred and hides last-bit differences of libm.
    flat: list[int] = np.rint(points).astype(np.int64).ravel().tolist()
    return flat
