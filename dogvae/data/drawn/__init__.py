"""Cartoon dogs that the program draws itself, as many as needed: training data without a download.

    from dogvae.data.drawn import draw
    draw(7).save("dog.png")

The same index and seed give the same dog on every machine.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from dogvae.data.drawn.bodies import body
from dogvae.data.drawn.breeds import Dog, portrait, random_dog
from dogvae.data.drawn.heads import head
from dogvae.data.drawn.ink import Dice, Points, Shape, ink
from dogvae.data.drawn.scenes import TOY_SHAPES, backdrop

GRID = 48  # side of the grid for light and shadow: both are soft, so a small grid is scaled up
RIM = 0.0055  # width of outlines as a share of the image's side


def draw(index: int, seed: int = 0, size: int = 256, posed: bool = False) -> Image.Image:
    """Dog number `index` (>= 0) of the series `seed` (>= 0), RGB, `size` x `size` pixels (size >= 16).

    The pose and the side it is seen from are random; `posed` draws the same dog as a portrait, always from the front.
    """
    dog = random_dog(index, seed)
    return paint(portrait(dog) if posed else dog, size)


def paint(dog: Dog, size: int) -> Image.Image:
    """The image of `dog`, RGB, `size` x `size` pixels."""
    reduce = max(2, -(-384 // size))
    body_shapes, head_shapes = placed_shapes(dog)
    picture = backdrop(dog.scene, toy(dog, body_shapes), Dice(*dog.detail_key, 2), size, reduce)
    if dog.pose != "portrait":
        picture = relit(picture, ground_shadow(body_shapes))
    behind, front = layer(body_shapes, size, reduce), layer(head_shapes, size, reduce)
    body_mask, head_mask = blurred_mask(behind), blurred_mask(front)
    # Brighter in the middle of the dog than at its edges, which looks round. The head also shades the body below it.
    body_light = 92 + 62 * shifted(body_mask, 1) - 46 * shifted(head_mask, -3)
    head_light = 98 + 54 * shifted(head_mask, 1)
    for part, light in ((behind, body_light), (front, head_light)):
        picture.paste(relit(part.convert("RGB"), light), mask=part.getchannel("A"))
    return picture.point([min(255, round(v * dog.light)) for v in range(256)] * 3)


def placed_shapes(dog: Dog) -> tuple[list[Shape], list[Shape]]:
    """The shapes of body and head, scaled and placed to be in view; the image is 1 wide and 1 high."""
    dice = Dice(*dog.detail_key, 1)
    head_shapes = head(dog, dice)
    body_shapes, neck = body(dog, dice)
    c, s = np.cos(dog.tilt), np.sin(dog.tilt)
    mirror = np.diag([-1.0 if dog.left else 1.0, 1.0])
    tilted, at = mirror @ np.array([[c, -s], [s, c]]), mirror @ np.array(neck)
    seen = np.vstack([shape.points for shape in head_shapes]) @ tilted.T + at
    frame_low, frame_high = np.array([0.04, 0.04]), np.array([0.96, 0.86])
    if dog.pose != "portrait":
        seen = np.vstack([seen, np.vstack([shape.points for shape in body_shapes]) @ mirror])
        frame_low, frame_high = np.array([0.02, 0.05]), np.array([0.98, 0.95])
    low, high = seen.min(0), seen.max(0)
    scale = dog.fill * float(((frame_high - frame_low) / (high - low)).min())
    room = frame_high - frame_low - scale * (high - low)
    if dog.pose != "portrait":  # paws stand on the ground, which starts at 0.84 in every scene
        room[1], frame_low[1] = min(room[1], 0.11), frame_low[1] + max(0.0, room[1] - 0.11)
    shift = frame_low + room * dog.place - scale * low
    return (
        [shape.moved(scale * mirror, shift) for shape in body_shapes],
        [shape.moved(scale * tilted, scale * at + shift) for shape in head_shapes],
    )


def extent(shapes: list[Shape]) -> tuple[Points, Points]:
    """The upper left and lower right corner `(2,)` of what the shapes cover."""
    points = np.vstack([shape.points for shape in shapes])
    return points.min(0), points.max(0)


def layer(shapes: list[Shape], size: int, reduce: int) -> Image.Image:
    """The shapes on a transparent background: RGBA, `size` x `size`, averaged down from `reduce` times that size."""
    pixels = size * reduce
    # Shapes drawn on zeros are already premultiplied by alpha. Reading the average as premultiplied (RGBa) saves two
    # conversions of the large canvas.
    canvas = Image.new("RGBX", (pixels, pixels))
    ink(canvas, shapes, pixels, RIM * pixels)
    return Image.frombytes("RGBa", (size, size), canvas.reduce(reduce).tobytes()).convert("RGBA")


def blurred_mask(part: Image.Image) -> Points:
    """The blurred opacity of `part`, 0..1: `(GRID, GRID)`."""
    small = part.getchannel("A").resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(small.filter(ImageFilter.GaussianBlur(3)), dtype=np.float64) / 255


def shifted(grid: Points, cells: int) -> Points:
    """`grid` shifted up and left by `cells`, or only down if negative; the edge is repeated."""
    padded = np.pad(grid, abs(cells), mode="edge")
    down, across = abs(cells) + cells, abs(cells) + max(0, cells)
    return padded[down : down + GRID, across : across + GRID]


def ground_shadow(shapes: list[Shape]) -> Points:
    """The dog's shadow on the ground, as a light for `relit`: `(GRID, GRID)`."""
    points = np.vstack([shape.points for shape in shapes])
    ground = points[:, 1].max()
    soles = points[points[:, 1] > ground - 0.05, 0]
    left, right = soles.min(), soles.max()
    canvas = Image.new("L", (GRID, GRID), 128)
    box = [GRID * (left - 0.02), GRID * (ground - 0.06), GRID * (right + 0.02), GRID * (ground + 0.025)]
    ImageDraw.Draw(canvas).ellipse(box, fill=62)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(1.6)), dtype=np.float64)


def relit(image: Image.Image, light: Points) -> Image.Image:
    """RGB `image` under `light` `(GRID, GRID)`: 128 changes nothing, lower values darken, higher ones brighten."""
    grey = Image.fromarray(light.clip(0, 255).round().astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    return ImageChops.hard_light(image, Image.merge("RGB", (grey, grey, grey)))


def toy(dog: Dog, shapes: list[Shape]) -> list[Shape]:
    """The dog's toy, on the ground at the side with more room; an empty list if it has none."""
    if dog.toy is None or dog.pose == "portrait":
        return []
    dice = Dice(*dog.detail_key, 3)
    (left, _), (right, ground) = extent(shapes)
    x = max(0.1, left * 0.6) if left > 1 - right else min(0.9, right + 0.4 * (1 - right))
    return TOY_SHAPES[dog.toy](x, min(0.97, ground + 0.03), dice.uniform(0.05, 0.07), dice)
