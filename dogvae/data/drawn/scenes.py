"""The backgrounds of drawn dogs: eight scenes, and toys. Lengths: the image is 1 wide and 1 high."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from dogvae.data.drawn.ink import Colour, Dice, Shape, curve, darker, ellipse, ink, limb, mix

Scene = Callable[[Image.Image, Dice, float], list[Shape]]

WALLS: tuple[Colour, ...] = (
    (244, 214, 190), (190, 216, 222), (226, 206, 226), (206, 222, 190),
    (250, 226, 160), (238, 186, 176), (170, 190, 214),
)  # fmt: skip
TOYS: tuple[Colour, ...] = (
    (226, 72, 66),
    (66, 132, 214),
    (250, 190, 60),
    (92, 180, 110),
    (236, 120, 170),
    (140, 96, 190),
)
WHITE: Colour = (255, 255, 255)


def fade(image: Image.Image, top: Colour, bottom: Colour, start: float, end: float) -> None:
    """Fill `image` from `start` to `end` (shares of its height) with a vertical gradient."""
    w, h = image.size
    low, high = round(start * h), round(end * h)
    if high > low:
        ramp = np.linspace(top, bottom, high - low).round().astype(np.uint8)
        image.paste(Image.fromarray(np.repeat(ramp[:, None, :], w, axis=1)), (0, low))


def box(x0: float, y0: float, x1: float, y1: float, soft: float = 0.0) -> np.ndarray:
    """A rectangle whose corners are rounded by `soft`: `(n, 2)`."""
    if soft == 0.0:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    s = soft
    corners = [
        (x0 + s, y0),
        (x1 - s, y0),
        (x1, y0 + s),
        (x1, y1 - s),
        (x1 - s, y1),
        (x0 + s, y1),
        (x0, y1 - s),
        (x0, y0 + s),
    ]
    return curve(corners)


def hill(y: float, height: float, dice: Dice) -> np.ndarray:
    """A rolling skyline from edge to edge around `y`, closed below: `(n, 2)`."""
    top = [(x, y + height * dice.uniform(-1, 1)) for x in (-0.2, 0.1, 0.4, 0.7, 1.0, 1.3)]
    return np.vstack([curve(top, closed=False), [(1.3, 1.1), (-0.2, 1.1)]])


def cloud(x: float, y: float, r: float, colour: Colour) -> list[Shape]:
    """Three puffs."""
    return [
        Shape(ellipse(x + dx * r, y + dy * r, k * r, 0.62 * k * r), colour)
        for dx, dy, k in ((-0.9, 0.12, 0.8), (0.0, -0.15, 1.1), (0.95, 0.12, 0.75))
    ]


def sun(dice: Dice, y: float) -> list[Shape]:
    """A disc with a halo, left or right of the middle."""
    x = dice.pick((dice.uniform(0.06, 0.26), dice.uniform(0.74, 0.94)))
    return [Shape(ellipse(x, y, 0.13, 0.13), (255, 240, 190)), Shape(ellipse(x, y, 0.09, 0.09), (255, 214, 96))]


def meadow(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """Blue sky, hills, grass and flowers."""
    fade(image, (112, 186, 240), (214, 238, 252), 0, horizon + 0.1)
    grass = mix((122, 194, 84), (92, 170, 96), dice.uniform())
    out = sun(dice, dice.uniform(0.1, 0.22)) if dice.chance(0.6) else []
    out += cloud(dice.uniform(0.1, 0.9), dice.uniform(0.08, 0.25), dice.uniform(0.07, 0.12), WHITE)
    out += [Shape(hill(horizon - 0.06, 0.07, dice), mix(grass, (170, 210, 220), 0.45))]
    out += [Shape(hill(horizon + 0.05, 0.025, dice), grass), Shape(hill(0.84, 0.02, dice), darker(grass, 0.12))]
    for _ in range(7):
        x, y, r = dice.uniform(), dice.uniform(horizon + 0.16, 0.98), dice.uniform(0.012, 0.02)
        petals = dice.pick((WHITE, (255, 210, 80), (240, 130, 160)))
        out += [Shape(ellipse(x, y, r, r), petals), Shape(ellipse(x, y, r * 0.4, r * 0.4), (250, 180, 50))]
    return out


def autumn(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """Warm sky, round trees, fallen leaves."""
    fade(image, (250, 208, 150), (255, 238, 206), 0, horizon + 0.1)
    out: list[Shape] = []
    for side in (dice.uniform(0.0, 0.15), dice.uniform(0.3, 0.6), dice.uniform(0.85, 1.0)):
        crown = dice.pick(((222, 120, 56), (236, 164, 62), (196, 84, 60)))
        top = horizon - dice.uniform(0.16, 0.28)
        out += [Shape(box(side - 0.018, top, side + 0.018, horizon + 0.08), (120, 84, 66))]
        out += [
            Shape(ellipse(side, top, 0.13, 0.15), crown),
            Shape(ellipse(side - 0.03, top - 0.04, 0.08, 0.08), mix(crown, WHITE, 0.15)),
        ]
    out += [Shape(hill(horizon + 0.05, 0.02, dice), (204, 172, 96)), Shape(hill(0.84, 0.02, dice), (186, 150, 84))]
    for _ in range(8):
        leaf = ellipse(dice.uniform(), dice.uniform(horizon + 0.14, 0.98), 0.022, 0.012, dice.uniform(0, 3))
        out.append(Shape(leaf, dice.pick(((214, 96, 50), (230, 150, 50), (170, 70, 50)))))
    return out


def beach(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """Sky, sea, sand and a parasol."""
    fade(image, (120, 200, 236), (236, 244, 236), 0, horizon)
    fade(image, (40, 140, 190), (110, 206, 214), horizon, horizon + 0.2)
    out = sun(dice, dice.uniform(0.1, 0.22))
    out += [
        Shape(hill(horizon + 0.125, 0.012, dice), WHITE),
        Shape(hill(horizon + 0.145, 0.012, dice), (246, 222, 170)),
    ]
    out += [Shape(hill(0.86, 0.02, dice), (236, 206, 150))]
    if dice.chance(0.6):
        x, y, colour = dice.pick((0.12, 0.88)), horizon - 0.22, dice.pick(TOYS)
        out.append(Shape(limb([(x, y), (x + 0.02, horizon + 0.3)], 0.014, 0.014), (250, 244, 236)))
        for half, tint in ((0.2, colour), (0.12, WHITE), (0.05, colour)):
            out.append(Shape(curve([(x - half, y + 0.06), (x, y - 0.1), (x + half, y + 0.06), (x, y + 0.045)]), tint))
    return out


def snow(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """Pale sky, fir trees, flakes."""
    fade(image, (150, 178, 214), (226, 234, 244), 0, horizon + 0.1)
    out = [Shape(hill(horizon - 0.04, 0.06, dice), (206, 220, 238))]
    for x in (dice.uniform(0.02, 0.2), dice.uniform(0.25, 0.75), dice.uniform(0.8, 0.98)):
        base, h = horizon + 0.08, dice.uniform(0.22, 0.36)
        for k in (0.0, 0.3, 0.58):
            w = (0.11 - 0.1 * k) * h / 0.3
            tree = np.array([(x - w, base - k * h), (x, base - (k + 0.44) * h), (x + w, base - k * h)])
            out.append(Shape(tree, mix((70, 122, 112), (120, 164, 156), k)))
    out += [Shape(hill(horizon + 0.07, 0.02, dice), (240, 245, 252)), Shape(hill(0.86, 0.02, dice), (222, 232, 246))]
    for _ in range(16):
        r = dice.uniform(0.006, 0.012)
        out.append(Shape(ellipse(dice.uniform(), dice.uniform(0, 0.9), r, r), WHITE))
    return out


def room(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """A wall with a window or a picture, a wooden floor, a rug."""
    wall, floor = dice.pick(WALLS), dice.pick(((206, 158, 112), (178, 128, 92), (224, 196, 160), (150, 118, 104)))
    floor_y = horizon + 0.1
    fade(image, mix(wall, WHITE, 0.25), wall, 0, floor_y)
    fade(image, floor, darker(floor, 0.2), floor_y, 1)
    out = [Shape(box(-0.1, floor_y - 0.035, 1.1, floor_y), mix(wall, WHITE, 0.65))]
    x = dice.pick((dice.uniform(0.1, 0.25), dice.uniform(0.75, 0.9)))
    if dice.chance(0.5):
        out += [
            Shape(box(x - 0.15, 0.07, x + 0.15, 0.43), (252, 248, 240)),
            Shape(box(x - 0.13, 0.09, x + 0.13, 0.41), (158, 210, 240)),
        ]
        out += [
            Shape(ellipse(x - 0.03, 0.41, 0.1, 0.07), (140, 196, 120)),
            Shape(box(-0.13 + x, 0.41, x + 0.13, 0.48), mix(wall, WHITE, 0.1)),
        ]
        out += [
            Shape(box(x - 0.16, 0.41, x + 0.16, 0.44), (252, 248, 240)),
            Shape(box(x - 0.008, 0.09, x + 0.008, 0.41), (252, 248, 240)),
        ]
    else:
        tint = dice.pick(TOYS)
        out += [
            Shape(box(x - 0.11, 0.12, x + 0.11, 0.36), (120, 84, 66)),
            Shape(box(x - 0.09, 0.14, x + 0.09, 0.34), mix(tint, WHITE, 0.7)),
        ]
        out += [Shape(ellipse(x, 0.255, 0.045, 0.05), tint)]
    rug = mix(dice.pick(TOYS), WHITE, 0.35)
    out += [Shape(ellipse(0.5, 0.9, 0.52, 0.13), mix(rug, WHITE, 0.4)), Shape(ellipse(0.5, 0.9, 0.46, 0.105), rug)]
    return out


def sofa(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """A sofa that fills the image, seen from the front; the dog is on the seat."""
    wall = dice.pick(WALLS)
    cloth = dice.pick(
        ((92, 142, 150), (190, 104, 92), (112, 118, 168), (214, 166, 84), (126, 156, 110), (160, 120, 150))
    )
    fade(image, mix(wall, WHITE, 0.3), wall, 0, 1)
    seat, light = 0.76, mix(cloth, WHITE, 0.14)
    out = [
        Shape(box(0.02, horizon - 0.24, 0.5, 0.95, 0.05), light, darker(cloth)),
        Shape(box(0.5, horizon - 0.24, 0.98, 0.95, 0.05), light, darker(cloth)),
    ]
    pillow, x = dice.pick(TOYS), dice.pick((0.2, 0.8))
    out += [
        Shape(
            curve([(x - 0.12, seat - 0.24), (x + 0.12, seat - 0.25), (x + 0.13, seat), (x - 0.13, seat)]),
            mix(pillow, WHITE, 0.3),
            darker(cloth),
        )
    ]
    out += [Shape(box(-0.02, seat, 1.02, 1.2, 0.04), cloth, darker(cloth))]
    out += [
        Shape(box(-0.12, seat - 0.16, 0.09, 1.2, 0.05), light, darker(cloth)),
        Shape(box(0.91, seat - 0.16, 1.12, 1.2, 0.05), light, darker(cloth)),
    ]
    return out


def studio(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """A plain backdrop with a large disc of light."""
    wall = dice.pick(WALLS + tuple(mix(t, WHITE, 0.25) for t in TOYS))
    fade(image, mix(wall, WHITE, 0.2), darker(wall, 0.15), 0, 1)
    x, y, r = dice.uniform(0.35, 0.65), dice.uniform(0.4, 0.55), dice.uniform(0.34, 0.44)
    disc = [Shape(ellipse(x, y, r * k, r * k), mix(wall, WHITE, share)) for k, share in ((1.0, 0.32), (0.82, 0.42))]
    return [*disc, Shape(hill(0.84, 0.004, dice), darker(wall, 0.2))]


def dusk(image: Image.Image, dice: Dice, horizon: float) -> list[Shape]:
    """Moon, stars, dark hills."""
    fade(image, (44, 48, 104), (222, 140, 150), 0, horizon + 0.1)
    x = dice.pick((dice.uniform(0.08, 0.24), dice.uniform(0.76, 0.92)))
    out = [Shape(ellipse(dice.uniform(), dice.uniform(0.02, 0.35), 0.007, 0.007), (255, 244, 210)) for _ in range(12)]
    out += [
        Shape(ellipse(x, 0.16, 0.08, 0.08), (255, 240, 204)),
        Shape(ellipse(x + 0.02, 0.145, 0.02, 0.02), (240, 220, 180)),
    ]
    out += [
        Shape(hill(horizon - 0.04, 0.06, dice), (110, 88, 140)),
        Shape(hill(horizon + 0.06, 0.02, dice), (92, 116, 110)),
    ]
    return [*out, Shape(hill(0.84, 0.02, dice), (76, 102, 98))]


SCENES: tuple[Scene, ...] = (meadow, autumn, beach, snow, room, sofa, studio, dusk)


def ball(x: float, y: float, r: float, dice: Dice) -> list[Shape]:
    """A striped ball that rests on the ground at (x, y)."""
    colour = dice.pick(TOYS)
    stripe = curve(
        [
            (x - r, y - r),
            (x, y - 1.35 * r),
            (x + r, y - r),
            (x + r, y - 0.6 * r),
            (x, y - 0.95 * r),
            (x - r, y - 0.6 * r),
        ]
    )
    disc = Shape(ellipse(x, y - r, r, r), colour, darker(colour), ((stripe, (255, 248, 232)),))
    return [disc, Shape(ellipse(x - 0.35 * r, y - 1.5 * r, 0.2 * r, 0.13 * r, -0.6), mix(colour, WHITE, 0.7))]


def bone(x: float, y: float, r: float, dice: Dice) -> list[Shape]:
    """A bone that lies on the ground at (x, y)."""
    rim, white = (190, 170, 150), (250, 242, 226)
    tilt = dice.uniform(-0.25, 0.25)
    knobs = [(sx * 1.4 * r, sx * 1.4 * r * tilt + sy * 0.38 * r - 0.6 * r) for sx in (-1, 1) for sy in (-1, 1)]
    out = [Shape(ellipse(x + dx, y + dy, 0.5 * r, 0.45 * r), white, rim) for dx, dy in knobs]
    shaft = [(x + s * 1.5 * r, y + s * 1.5 * r * tilt - 0.6 * r) for s in (-1, 1)]
    return [*out, Shape(limb(shaft, 0.6 * r, 0.6 * r), white)]


def bowl(x: float, y: float, r: float, dice: Dice) -> list[Shape]:
    """A full bowl that stands on the ground at (x, y)."""
    colour = dice.pick(TOYS)
    side = curve([(x - 1.4 * r, y), (x - 1.1 * r, y - 1.1 * r), (x + 1.1 * r, y - 1.1 * r), (x + 1.4 * r, y)])
    food = Shape(ellipse(x, y - 1.1 * r, 0.95 * r, 0.4 * r), (150, 96, 62))
    return [
        food,
        Shape(side, colour, darker(colour)),
        Shape(ellipse(x, y - 0.5 * r, 0.3 * r, 0.22 * r), (255, 244, 226)),
    ]


TOY_SHAPES: tuple[Callable[[float, float, float, Dice], list[Shape]], ...] = (ball, bone, bowl)


def backdrop(scene: Scene, toy: list[Shape], dice: Dice, pixels: int, reduce: int) -> Image.Image:
    """The scene with the toy, RGB, `pixels` x `pixels`, averaged down from a canvas `reduce` times as large."""
    canvas = Image.new("RGB", (pixels * reduce, pixels * reduce))
    shapes = scene(canvas, dice, dice.uniform(0.42, 0.6))
    ink(canvas, shapes + toy, canvas.width, 0.006 * canvas.width)
    return canvas.reduce(reduce)
