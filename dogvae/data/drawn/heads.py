"""The heads of drawn dogs, around (0, 0) and turned to the right; y points down and lengths are in head units.

Each function gives shapes in painting order, far parts first.
"""

from __future__ import annotations

import numpy as np

from dogvae.data.drawn.breeds import Coat, Dog
from dogvae.data.drawn.ink import Colour, Dice, Points, Shape, curve, darker, ellipse, fluffy, limb, mix

INK: Colour = (44, 32, 38)
PINK: Colour = (240, 130, 138)
SHINE: Colour = (255, 255, 255)
Marks = tuple[tuple[Points, Colour], ...]


def rim(colour: Colour) -> Colour:
    """The colour of the rim around a fill: dark enough to separate two limbs of the same colour."""
    return darker(colour, 0.42)


def mirrored(half: list[tuple[float, float]], x: float = 0.0) -> Points:
    """A closed curve, symmetric about the vertical line at `x`, from its right `half`, top to bottom."""
    outline = curve(half + [(-hx, y) for hx, y in reversed(half) if hx != 0.0])
    return outline + np.array([x, 0.0])


def furred(dog: Dog, outline: Points, size: float = 1.0) -> Points:
    """The outline with the tufts of the breed's coat, `size` times as wide as usual."""
    breed = dog.breed
    return fluffy(outline, breed.fluff * size, 0.22, breed.curly) if breed.fluff else outline


def head(dog: Dog, dice: Dice) -> list[Shape]:
    """The head, about 2 wide, looking at the viewer and `turn` of the way to the right."""
    breed, coat, turn = dog.breed, dog.coat, dog.turn
    w, h = breed.skull
    near, far = 0.16 * turn, 0.42 * turn  # how far the eyes and the nose move as the head turns
    upper = [(0, -h), (0.55 * w, -0.9 * h), (0.93 * w, -0.45 * h), (w, 0.08)]
    lower = [(breed.cheek, 0.55), (0.55 * breed.cheek, 0.92), (0, 1.0)]
    marks = face_marks(coat, h, near, far) + blots(coat, dice, (-w, -h, w, 1.0), 0.3)
    skull = Shape(furred(dog, mirrored(upper + lower)), coat.base, rim(coat.base), marks)
    behind, before = ears(dog)
    out = [*behind, skull]
    if breed.curly:
        topknot = fluffy(ellipse(0.05 * turn, -0.95 * h, 0.82, 0.6), 0.36, 0.28)
        out.append(Shape(topknot, coat.base, rim(coat.base)))
    if breed.wrinkled:
        for y, half in ((-0.52, 0.34), (-0.36, 0.22)):
            fold = limb([(near - half, y + 0.06), (near, y - 0.04), (near + half, y + 0.06)], 0.03, 0.05)
            out.append(Shape(fold, darker(coat.base, 0.22)))
    return out + muzzle(dog, far) + eyes(dog, near) + before


def face_marks(coat: Coat, h: float, near: float, far: float) -> Marks:
    """Mask, blaze and brows, as far as the coat has them."""
    marks: Marks = ()
    if coat.mask:
        upper = [(0, -0.18), (0.12, -0.62), (0.4, -0.66), (0.52, -0.3)]
        marks += ((mirrored([*upper, (0.74, -0.02), (1.3, 0.0), (1.3, 1.5), (0, 1.5)], 0.7 * far), coat.mask),)
    if coat.blaze:
        upper = [(0, -1.3 * h), (0.2, -1.2 * h), (0.13, -0.45), (0.34, 0.2)]
        marks += ((mirrored([*upper, (0.95, 0.75), (0.9, 1.4), (0, 1.4)], 0.9 * near), coat.blaze),)
    if coat.brows:
        marks += tuple((ellipse(near + s * 0.38, -0.44, 0.14, 0.1, s * 0.3), coat.brows) for s in (-1, 1))
        marks += tuple((ellipse(near + s * 0.66, 0.56, 0.34, 0.26), coat.brows) for s in (-1, 1))
    return marks


def blots(coat: Coat, dice: Dice, frame: tuple[float, float, float, float], size: float) -> Marks:
    """Patches, about `size` in radius, or spots, scattered over `frame` = (x0, y0, x1, y1)."""
    marks: Marks = ()
    x0, y0, x1, y1 = frame
    if coat.patches:
        around = [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 7, endpoint=False)]
        for _ in range(max(2, round((x1 - x0) * (y1 - y0) / (14 * size * size)))):
            x, y, r = dice.uniform(x0, x1), dice.uniform(y0, y1), dice.uniform(0.8, 1.7) * size
            blot = [(x + r * dice.uniform(0.7, 1.2) * c, y + r * dice.uniform(0.7, 1.2) * s) for c, s in around]
            marks += ((curve(blot), coat.patches),)
    if coat.spots:
        # On a jittered grid: spots at independent places would overlap.
        for y in np.arange(y0, y1, 0.38):
            for x in np.arange(x0, x1, 0.38):
                if dice.chance(0.8):
                    r = dice.uniform(0.06, 0.13)
                    at = x + dice.uniform(-0.12, 0.12), y + dice.uniform(-0.12, 0.12)
                    marks += ((ellipse(*at, r, r * dice.uniform(0.8, 1.2)), coat.spots),)
    return marks


def ears(dog: Dog) -> tuple[list[Shape], list[Shape]]:
    """The parts of the ears behind the skull, and those in front of it."""
    breed = dog.breed
    colour = dog.coat.ears or dog.coat.base
    (w, h), k = breed.skull, breed.ear
    behind: list[tuple[Points, Colour, Colour | None]] = []
    before: list[tuple[Points, Colour, Colour | None]] = []
    if breed.ears in ("pointed", "bat"):
        blunt, lean = (0.16, 0.3) if breed.ears == "bat" else (0.05, 0.06)
        x, y = 0.66 * w + lean, -h - 0.72 * k
        inside = [(0.14 * w, -0.82 * h), (0.3 * w, -h - 0.3 * k), (x - blunt, y)]
        ear = curve([*inside, (x + blunt, y + 0.06), (w + lean, -0.85 * h), (0.95 * w, -0.2 * h)])
        middle = ear.mean(0)
        hollow = (ear - middle) * (0.6, 0.68) + middle + (0.0, 0.06)
        behind = [(ear, colour, rim(colour)), (hollow, mix(PINK, colour, 0.35), None)]
    elif breed.ears == "droopy":
        y = 0.62 * k
        outside = [(0.46 * w, -0.84 * h), (0.86 * w, -0.84 * h), (1.2 * w, -0.3 * h), (1.3 * w, y - 0.15)]
        ear = furred(dog, curve([*outside, (1.08 * w, y + 0.1), (0.84 * w, y - 0.2), (0.74 * w, -0.2 * h)]))
        before = [(ear, darker(colour, 0.1), rim(colour))]
    elif breed.ears == "puff":
        outside = [(0.62 * w, -0.5), (1.15 * w, -0.45), (1.45 * w, 0.25), (1.2 * w, 0.85)]
        ear = fluffy(curve([*outside, (0.82 * w, 0.6), (0.74 * w, 0.1)]), 0.36, 0.28)
        before = [(ear, darker(colour, 0.08), rim(colour))]
    elif breed.ears == "folded":
        inside = [(0.25 * w, -0.85 * h), (0.42 * w, -h - 0.34 * k), (0.85 * w, -h - 0.3 * k)]
        stem = curve([*inside, (1.02 * w, -0.7 * h), (0.95 * w, -0.3 * h)])
        fold = [(0.36 * w, -h - 0.26 * k), (0.62 * w, -h - 0.44 * k), (0.96 * w, -h - 0.22 * k)]
        flap = curve([*fold, (1.12 * w, -h + 0.28 * k), (0.86 * w, -h + 0.16 * k)])
        behind, before = [(stem, colour, rim(colour))], [(flap, darker(colour, 0.1), rim(colour))]
    else:
        edge = [(0.5 * w, -0.9 * h), (0.9 * w, -0.95 * h), (1.16 * w, -0.6 * h)]
        flap = curve([*edge, (1.12 * w, -0.35 * h + 0.3 * k), (0.88 * w, -0.5 * h + 0.2 * k)])
        before = [(flap, darker(colour, 0.12), rim(colour))]

    def pair(parts: list[tuple[Points, Colour, Colour | None]]) -> list[Shape]:
        out = []
        for s in (-1.0, 1.0):
            narrow = 1.0 - 0.22 * max(0.0, s * dog.turn)  # the ear on the side that turns away looks narrower
            out += [Shape(p * (s * narrow, 1.0) + (0.12 * dog.turn, 0.0), fill, edge) for p, fill, edge in parts]
        return out

    return pair(behind), pair(before)


def muzzle(dog: Dog, x: float) -> list[Shape]:
    """Snout, mouth, tongue and nose, the nose at `x`."""
    breed = dog.breed
    mw, mh = breed.muzzle
    colour = dog.coat.muzzle or mix(dog.coat.base, SHINE, 0.12)
    edge, y = darker(colour, 0.22), 0.44
    dark = sum(colour) < 300  # dark lines would not show
    line = mix(colour, SHINE, 0.28) if dark else darker(colour, 0.62)
    chin = mix(colour, INK, 0.1)
    out: list[Shape] = []
    if breed.bearded:
        beard = [(0, 0.2), (0.62 * mw, 0.16), (1.2 * mw, 0.45), (1.15 * mw, 0.95), (0.6 * mw, 1.22), (0, 1.28)]
        out.append(Shape(fluffy(mirrored(beard, x), 0.26, 0.28, breed.curly), colour, edge))
    if dog.tongue:
        root, tip = y + 0.55 * mh, y + 0.7 * mh + dog.tongue
        out.append(Shape(ellipse(x, y + 0.72 * mh, 0.64 * mw, 0.54 * mh), chin, edge))
        out.append(Shape(ellipse(x, y + 0.62 * mh, 0.52 * mw, 0.46 * mh), (110, 40, 52)))
        middle = (x + 0.02, (root + tip) / 2)
        out.append(Shape(limb([(x, root), middle, (x + 0.05, tip)], 0.5 * mw, 0.62 * mw), PINK, (196, 84, 96)))
        out.append(Shape(limb([(x, root), (x + 0.03, tip - 0.06)], 0.03, 0.03), (214, 98, 110)))
    else:
        out.append(Shape(ellipse(x, y + 0.72 * mh, 0.5 * mw, 0.42 * mh), chin, edge))
    jowl = 0.3 * mh if breed.wrinkled else 0.0
    upper = [(0, y - mh), (0.5 * mw, y - 0.86 * mh), (0.98 * mw, y + 0.1 * mh + jowl)]
    lower = [(0.66 * mw, y + 0.72 * mh + jowl), (0.2 * mw, y + 0.62 * mh), (0, y + 0.5 * mh)]
    out.append(Shape(mirrored(upper + lower, x), colour, edge))
    nose_y, lip_y = y - 0.52 * mh, y + 0.42 * mh
    out.append(Shape(limb([(x, nose_y), (x, lip_y)], 0.045, 0.045), line))
    for s in (-1, 1):
        corner = (x + s * 0.68 * mw, lip_y - 0.26 * mh + 0.9 * jowl)
        out.append(
            Shape(limb([(x, lip_y), (x + s * 0.34 * mw, lip_y + 0.22 * mh + jowl * 0.7), corner], 0.05, 0.04), line)
        )
    n = breed.nose
    half = [(0, nose_y - 0.75 * n), (n, nose_y - 0.55 * n), (0.8 * n, nose_y + 0.25 * n), (0, nose_y + 0.72 * n)]
    out.append(Shape(mirrored(half, x), INK, line if dark else None))
    out.append(Shape(ellipse(x - 0.25 * n, nose_y - 0.35 * n, 0.32 * n, 0.16 * n), (150, 138, 150)))
    return out


def eyes(dog: Dog, x: float) -> list[Shape]:
    """Both eyes around `x`: open with highlights, or closed."""
    r, y, apart = dog.breed.eye, -0.12, 0.46 if dog.breed.wrinkled else 0.4
    skin = dog.coat.mask or dog.coat.base  # the mask surrounds the eyes, if there is one
    out: list[Shape] = []
    for s in (-1, 1):
        cx = x + s * apart * (1.0 - 0.12 * max(0.0, s * dog.turn))
        if dog.eyes != "open":
            up = 0.7 * r if dog.eyes == "happy" else -0.6 * r
            lid = [(cx - 1.1 * r, y + 0.5 * up), (cx, y - up), (cx + 1.1 * r, y + 0.5 * up)]
            out.append(Shape(limb(lid, 0.065, 0.065), INK, mix(skin, SHINE, 0.4 if sum(skin) < 300 else 0.15)))
            continue
        out.append(Shape(ellipse(cx, y, r * 1.12, r * 1.22), INK, mix(skin, INK, 0.35)))
        out.append(Shape(ellipse(cx, y + 0.1 * r, 0.84 * r, 0.9 * r), dog.iris))
        out.append(Shape(ellipse(cx, y, 0.6 * r, 0.66 * r), INK))
        out.append(Shape(ellipse(cx + 0.3 * r, y - 0.42 * r, 0.38 * r, 0.38 * r), SHINE))
        out.append(Shape(ellipse(cx - 0.36 * r, y + 0.5 * r, 0.2 * r, 0.2 * r), mix(dog.iris, SHINE, 0.6)))
    return out
