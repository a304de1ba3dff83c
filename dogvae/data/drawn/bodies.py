"""The bodies of drawn dogs, one function per pose. A dog faces right; y points down, and the ground is y = 0.

Lengths are in head units. A pose returns its shapes in painting order, far parts first, and the centre of the head.
"""

from __future__ import annotations

import numpy as np

from dogvae.data.drawn.breeds import Dog
from dogvae.data.drawn.heads import Marks, blots, furred, mirrored, rim
from dogvae.data.drawn.ink import Colour, Dice, Shape, curve, darker, ellipse, fluffy, limb, mix

Place = tuple[float, float]


def body(dog: Dog, dice: Dice) -> tuple[list[Shape], Place]:
    """The body in the dog's pose, and the centre of the head."""
    poses = {"portrait": bust, "sitting": sitting, "standing": standing, "lying": lying, "playing": playing}
    return poses[dog.pose](dog, dice)


def bust(dog: Dog, dice: Dice) -> tuple[list[Shape], Place]:
    """Neck and shoulders, cut off by the lower edge of the image."""
    coat, half = dog.coat, 0.55 + 0.3 * dog.breed.girth
    neck = [(0, -0.2), (0.62 * half, -0.1), (0.8 * half, 0.7), (1.25 * half, 1.5)]
    outline = furred(dog, mirrored([*neck, (1.6 * half, 2.6), (1.6 * half, 4.0), (0, 4.0)]), 1.2)
    marks = blots(coat, dice, (-1.6, 0.4, 1.6, 2.6), 0.45)
    if coat.chest:
        marks += ((fluffy(ellipse(0.1 * dog.turn, 1.75, 0.62 * half, 1.3), 0.4, 0.2), coat.chest),)
    shoulders = Shape(outline, coat.base, rim(coat.base), marks)
    return [shoulders, *collar(dog, 0.06 * dog.turn, 1.0, 0.8 * half)], (0.0, 0.0)


def sitting(dog: Dog, dice: Dice) -> tuple[list[Shape], Place]:
    """Sitting, seen from the front."""
    breed, coat = dog.breed, dog.coat
    g, tall = breed.girth, 1.4 + 0.55 * breed.legs + 0.1 * breed.body
    colour, foot = coat.base, coat.feet or coat.base
    marks = blots(coat, dice, (-1.3, -tall, 1.3, 0.0), 0.4)
    front: Marks = marks
    if coat.saddle:
        front += tuple(
            (ellipse(s * 1.15 * g, -0.62 * tall, 0.52 * g, 0.5 * tall, s * 0.2), coat.saddle) for s in (-1, 1)
        )
    if coat.chest:
        front += ((fluffy(ellipse(0, -0.62 * tall, 0.5 * g, 0.46 * tall), 0.34, 0.2), coat.chest),)
    upper = [(0, -tall - 0.1), (0.52 * g, -tall), (0.82 * g, -0.62 * tall)]
    torso = mirrored([*upper, (1.12 * g, -0.26 * tall), (1.02 * g, -0.08), (0, -0.05)])
    out = [*tail(dog, -0.85 * g, -0.4, 0.9), Shape(furred(dog, torso, 1.1), colour, rim(colour), front)]
    for s in (-1, 1):
        out.append(Shape(ellipse(s * 0.98 * g, -0.46, 0.46 * g, 0.5, s * 0.25), colour, rim(colour), marks))
        out += paw(s * 1.06 * g, 0.04, 0.32, foot)
    for s in (-1, 1):
        shin = limb([(s * 0.4 * g, -0.5 * tall), (s * 0.36 * g, -0.3 * tall), (s * 0.38 * g, -0.16)], 0.5 * g, 0.4 * g)
        sock = ((ellipse(s * 0.38 * g, -0.1, 0.5, 0.4 * min(1.0, breed.legs)), foot),) if coat.feet else ()
        out.append(Shape(shin, colour, rim(colour), marks + sock))
        out += paw(s * 0.4 * g, 0.1, 0.3, foot)
    if not coat.spots:
        bib = ellipse(0, -0.58 * tall, 0.46 * g, 0.2 * tall)  # hides the round tops of the shins
        out.append(Shape(bib, coat.chest or colour, None, marks))
    return out + collar(dog, 0.0, -tall + 0.44, 0.6 * g), (0.05 * dog.turn, -tall - 0.5)


def standing(dog: Dog, dice: Dice) -> tuple[list[Shape], Place]:
    """Standing or walking, seen from the side."""
    breed, colour = dog.breed, dog.coat.base
    g, half, up = breed.girth, breed.body / 2, breed.legs
    mid, shade = -up - 0.72 * g, darker(colour, 0.2)
    step, wide = 0.3 * dog.stride * min(1.0, up), 0.3 + 0.16 * g
    front = half - 0.36
    marks = flank(dog, dice, (-half - 0.2, mid - g, half + 0.3, 0.0), mid)
    far = [(front - 0.2, mid), (front - 0.16 - step, -0.5 * up), (front - 0.2 - 1.4 * step, -0.12)]
    near = [(front, mid + 0.35 * g), (front + 0.04 + step, -0.5 * up), (front + 1.4 * step, -0.08)]
    far_hind, near_hind = hind_legs(dog, mid, step, wide, marks)
    out = [*far_hind, *leg(dog, far, wide, shade), *side(dog, mid, marks), *near_hind]
    out += leg(dog, near, wide, colour, marks)
    out.append(Shape(ellipse(front, mid + 0.3 * g, 0.36, 0.5 * g), colour, None, marks))
    return out + collar(dog, half + 0.16, mid - g + 0.18, 0.5, 0.16), (half + 0.4, mid - g - 0.8)


def playing(dog: Dog, dice: Dice) -> tuple[list[Shape], Place]:
    """The play bow: elbows on the ground, rump in the air, seen from the side."""
    breed, coat, colour = dog.breed, dog.coat, dog.coat.base
    g, half, up = breed.girth, breed.body / 2, breed.legs
    mid, wide, foot = -up - 0.72 * g, 0.3 + 0.16 * g, coat.feet or coat.base
    hip = np.array([-half + 0.42, mid])
    sine = min(0.55, (up + 0.72 * g - 0.15 - 0.8 * g) / (breed.body - 0.62))
    bow = np.array([[np.sqrt(1 - sine**2), -sine], [sine, np.sqrt(1 - sine**2)]])
    marks = flank(dog, dice, (-half - 0.2, mid - g, half + 0.3, 0.0), mid)
    around = hip - bow @ hip
    trunk = [shape.moved(bow, around) for shape in side(dog, mid, marks)]
    band = [shape.moved(bow, around) for shape in collar(dog, half + 0.16, mid - g + 0.18, 0.5, 0.16)]
    x, y = bow @ (half - 0.3, mid + 0.3 * g) + around
    sock = ((ellipse(x + 0.95, -0.15, 0.5, 0.5), foot),) if coat.feet else ()
    far = limb([(x + 0.1, y), (x + 0.3, -0.34), (x + 1.1, -0.26)], 0.5, 0.36)
    near = limb([(x, y), (x + 0.05, -0.3), (x + 0.9, -0.18)], 0.62, 0.38)
    far_hind, near_hind = hind_legs(dog, mid, 0.15 * dog.stride, wide, trunk[-1].marks)
    out = [*far_hind, Shape(far, darker(colour, 0.2), rim(colour)), *paw(x + 1.2, -0.08, 0.3, darker(foot, 0.15))]
    out += [*trunk, *near_hind, Shape(near, colour, rim(colour), sock), *paw(x + 0.98, 0.06, 0.32, foot)]
    out.append(Shape(ellipse(x, y, 0.34, 0.4 * g), colour, None, trunk[-1].marks))
    at = bow @ (half + 0.4, mid - g - 0.8) + around
    return out + band, (float(at[0]), float(at[1]))


def side(dog: Dog, mid: float, marks: Marks) -> list[Shape]:
    """Tail, neck and trunk seen from the side, level, around y = `mid`."""
    colour, g, half = dog.coat.base, dog.breed.girth, dog.breed.body / 2
    below = [(half + 0.22, mid - 0.1), (half - 0.2, mid + 0.9 * g), (0.1 * half, mid + 0.82 * g)]
    rump = [(-half + 0.5, mid + 0.62 * g), (-half - 0.1, mid + 0.2 * g), (-half + 0.02, mid - 0.6 * g)]
    back = [(-half + 0.55, mid - 0.86 * g), (0, mid - 0.82 * g), (half - 0.45, mid - 1.0 * g)]
    trunk = furred(dog, curve(below + rump + back))
    nape = (half + 0.32, mid - g - 0.42)
    neck = furred(dog, limb([(half - 0.5, mid - 0.1), (half + 0.02, mid - 0.7 * g), nape], 1.5 * g, 0.9))
    # The neck is painted again without its rim, so that one outline runs around neck and trunk.
    over = Shape(neck, colour, None, marks)
    return [
        *tail(dog, -half, mid - 0.45 * g),
        Shape(neck, colour, rim(colour), marks),
        Shape(trunk, colour, rim(colour), marks),
        over,
    ]


def hind_legs(dog: Dog, mid: float, step: float, wide: float, marks: Marks) -> tuple[list[Shape], list[Shape]]:
    """The far hind leg, and the near one with its thigh, for a hip at y = `mid`."""
    colour, up, hip = dog.coat.base, dog.breed.legs, -dog.breed.body / 2 + 0.42
    far = [(hip + 0.22, mid), (hip + 0.28 + step, -0.5 * up), (hip + 0.2 + step, -0.12)]
    near = [(hip, mid + 0.3), (hip - 0.06 - 0.6 * step, -0.5 * up), (hip - 0.1 - step, -0.1)]
    thigh = ellipse(hip + 0.02, mid + 0.12 * dog.breed.girth, 0.5, 0.6 * dog.breed.girth + 0.1, 0.15)
    over = Shape(thigh, colour, None, marks)
    return leg(dog, far, wide, darker(colour, 0.2)), [*leg(dog, near, wide, colour, marks), over]


def lying(dog: Dog, dice: Dice) -> tuple[list[Shape], Place]:
    """Lying like a sphinx, seen from the side."""
    coat, colour = dog.coat, dog.coat.base
    g, half = dog.breed.girth, dog.breed.body / 2
    mid, reach, foot = -0.8 * g, half + 0.75, coat.feet or coat.base
    marks = flank(dog, dice, (-half - 0.3, mid - g, half + 1.4, 0.0), mid)
    out = tail(dog, -half - 0.1, -0.3, 0.25 + 0.5 * abs(dog.stride))
    far = limb([(half - 0.2, -0.34), (reach + 0.2, -0.3)], 0.42, 0.36)
    out += [Shape(far, darker(colour, 0.2), rim(colour)), *paw(reach + 0.3, -0.08, 0.3, darker(foot, 0.15))]
    below = [(half + 0.3, mid - 0.2), (half + 0.2, -0.1), (0, -0.02), (-half, -0.02), (-half - 0.32, -0.4 * g)]
    back = [(-half - 0.1, -1.25 * g), (-half + 0.6, -1.62 * g), (0.1, -1.5 * g), (half - 0.3, -1.75 * g)]
    trunk = furred(dog, curve(below + back))
    neck = furred(dog, limb([(half - 0.35, mid - 0.2), (half + 0.1, -1.7 * g - 0.3)], 1.5 * g, 0.95))
    out += [Shape(neck, colour, rim(colour), marks), Shape(trunk, colour, rim(colour), marks)]
    out.append(Shape(neck, colour, None, marks))
    thigh = limb([(-half + 0.5, -1.24 * g), (-half + 0.95, -0.9 * g), (-half + 0.98, -0.4 * g)], 0.04, 0.06)
    out.append(Shape(thigh, rim(colour)))
    heel = limb([(-half + 0.2, -0.16), (-half + 1.05, -0.14)], 0.34, 0.3)
    out.append(Shape(heel, foot, rim(foot)))
    sock = ((ellipse(reach + 0.1, -0.15, 0.5, 0.5), foot),) if coat.feet else ()
    arm = limb([(half - 0.1, -0.55 * g), (half + 0.15, -0.26), (reach, -0.2)], 0.6, 0.4)
    out += [Shape(arm, colour, rim(colour), marks + sock), *paw(reach + 0.08, 0.06, 0.32, foot)]
    return out + collar(dog, half + 0.14, -1.7 * g + 0.16, 0.52, 0.1), (half + 0.25, -1.7 * g - 0.74)


def flank(dog: Dog, dice: Dice, frame: tuple[float, float, float, float], mid: float) -> Marks:
    """The marks of a body seen from the side: saddle, pale chest and belly, blots within `frame` = (x0, y0, x1, y1)."""
    coat, g, half = dog.coat, dog.breed.girth, dog.breed.body / 2
    marks = blots(coat, dice, frame, 0.5)
    if coat.saddle:
        marks += ((ellipse(-0.12 * half, mid - 0.62 * g, 0.92 * half, 0.8 * g), coat.saddle),)
    if coat.chest:
        marks += ((ellipse(half + 0.22, mid + 0.1 * g, 0.42, 1.2 * g, 0.25), coat.chest),)
        marks += ((ellipse(0, mid + 1.0 * g, half, 0.36 * g), coat.chest),)
    return marks


def tail(dog: Dog, x: float, y: float, lift: float = 1.0) -> list[Shape]:
    """The tail, from the rump at (x, y) to the left; `lift` 1 is up, 0 is along the ground."""
    kind, colour = dog.breed.tail, dog.coat.saddle or dog.coat.base
    if kind == "curl":
        path, root, tip = [(0.3, 0.2), (-0.25, -0.35), (-0.15, -0.95), (0.4, -1.0)], 0.42, 0.5
    elif kind == "plume":
        path, root, tip = [(0.35, 0.1), (-0.35, -0.1), (-0.95, -0.55), (-1.15, -1.15)], 0.3, 0.56
    elif kind == "stub":
        path, root, tip = [(0.3, 0.15), (-0.1, -0.12), (-0.28, -0.34)], 0.34, 0.26
    elif kind == "pompon":
        path, root, tip = [(0.4, 0.2), (-0.15, -0.3), (-0.4, -0.8)], 0.3, 0.24
    else:
        path, root, tip = (
            [(0.4, 0.12), (-0.35, -0.05), (-0.9, -0.5), (-1.15, -1.0)],
            0.34,
            0.16 if kind == "whip" else 0.24,
        )
    path = [(x + dx, y + (dy * lift if dy < 0 else dy)) for dx, dy in path]
    stroke = limb(path, root, tip)
    if kind != "pompon":
        return [Shape(furred(dog, stroke), colour, rim(colour))]
    pompon = fluffy(ellipse(*path[-1], 0.4, 0.4), 0.28, 0.28)
    return [Shape(stroke, colour, rim(colour)), Shape(pompon, colour, rim(colour))]


def leg(dog: Dog, path: list[Place], wide: float, colour: Colour, marks: Marks = ()) -> list[Shape]:
    """A leg along `path`, hip to ankle, and a paw that points right. A far leg has a darker `colour` than the coat."""
    coat = dog.coat
    foot = colour if coat.feet is None else coat.feet if colour == coat.base else mix(coat.feet, colour, 0.35)
    x, y = path[-1]
    if coat.feet:
        marks += ((ellipse(x, y - 0.05, wide * 0.9, 0.5), foot),)
    out = [Shape(limb(path, wide * 1.25, wide * 0.92), colour, rim(colour), marks)]
    if dog.breed.curly:
        out.append(Shape(fluffy(ellipse(x, y - 0.24, wide * 0.78, 0.32), 0.26, 0.28), colour, rim(colour)))
    upper = [(x - 0.5 * wide, y - 0.16), (x + 0.25 * wide, y - 0.22), (x + 0.85 * wide, y - 0.04)]
    sole = curve([*upper, (x + 0.8 * wide, y + 0.12), (x - 0.45 * wide, y + 0.12)])
    return [*out, Shape(sole, foot, rim(foot))]


def paw(x: float, y: float, r: float, colour: Colour) -> list[Shape]:
    """A paw seen from the front, its sole at `y`, with two lines between the toes."""
    outline = mirrored([(0.5 * r, y - 1.1 * r), (r, y - 0.5 * r), (0.7 * r, y)], x)
    toes = [limb([(x + s * 0.3 * r, y - 0.1 * r), (x + s * 0.28 * r, y - 0.5 * r)], 0.05, 0.04) for s in (-1, 1)]
    return [Shape(outline, colour, rim(colour))] + [Shape(toe, rim(colour)) for toe in toes]


def collar(dog: Dog, x: float, y: float, half: float, slope: float = 0.0) -> list[Shape]:
    """The dog's collar across the neck, with a tag in the middle; an empty list if it has none."""
    if dog.collar is None:
        return []
    band = limb([(x - half, y - 0.06 - slope), (x, y + 0.1), (x + half, y - 0.06 + slope)], 0.2, 0.2)
    tag = Shape(ellipse(x + 0.02, y + 0.32, 0.15, 0.16), (250, 206, 84), (176, 126, 40))
    return [Shape(band, dog.collar, darker(dog.collar)), tag]
