"""The dogs that can be drawn: coats and breeds as data, and the random choice of a dog from (seed, index).

Lengths are in head units: half the width of an average skull is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dogvae.data.drawn.ink import Colour, Dice
from dogvae.data.drawn.scenes import SCENES, TOYS, Scene

Pose = Literal["portrait", "sitting", "standing", "lying", "playing"]
Ears = Literal["droopy", "pointed", "folded", "bat", "button", "puff"]
Eyes = Literal["open", "happy", "asleep"]
Tail = Literal["otter", "curl", "plume", "stub", "whip", "pompon"]
POSES: tuple[Pose, ...] = ("portrait", "sitting", "standing", "lying", "playing")

BLACK, CHARCOAL, CHOCOLATE, RED = (66, 62, 72), (96, 96, 108), (122, 80, 58), (196, 110, 62)
GOLDEN, CREAM, WHITE, GREY = (226, 170, 94), (242, 218, 178), (250, 245, 236), (150, 154, 166)
TAN, FAWN, SILVER, APRICOT = (206, 140, 82), (222, 184, 138), (190, 196, 206), (232, 180, 130)
LIVER, RUST = (110, 70, 58), (218, 138, 72)


@dataclass(frozen=True)
class Coat:
    """The colour of each part; None means the base colour."""

    base: Colour
    muzzle: Colour | None = None
    chest: Colour | None = None
    feet: Colour | None = None
    ears: Colour | None = None
    blaze: Colour | None = None  # a stripe between the eyes
    mask: Colour | None = None  # the lower half of the face, in a husky's shape
    brows: Colour | None = None  # two dots above the eyes
    saddle: Colour | None = None  # over the back
    patches: Colour | None = None  # a few large blots
    spots: Colour | None = None  # many small ones


@dataclass(frozen=True)
class Breed:
    """The proportions and coats of a breed."""

    name: str
    coats: tuple[Coat, ...]
    ears: Ears
    tail: Tail
    ear: float = 1.0  # length of the ear, 1 = usual
    skull: tuple[float, float] = (1.0, 0.95)  # half width, height above the eyes' line
    cheek: float = 0.86  # half width at the mouth
    muzzle: tuple[float, float] = (0.52, 0.42)  # half width, half height
    nose: float = 0.2
    eye: float = 0.15
    body: float = 2.7  # chest to rump
    girth: float = 0.8  # half the depth of the chest
    legs: float = 1.1
    fluff: float = 0.0  # width of the tufts of a long coat, 0 = short hair
    curly: bool = False  # tufts are round, and there are puffs on head, legs and tail
    wrinkled: bool = False
    bearded: bool = False


# One row per breed, formatted by hand: one line per number would hide how the breeds differ.
# fmt: off
BREEDS: tuple[Breed, ...] = (
    Breed("labrador", (Coat(GOLDEN, CREAM), Coat(BLACK, CHARCOAL), Coat(CHOCOLATE), Coat(CREAM, WHITE)),
          "droopy", "otter", ear=0.8),
    Breed("golden", (Coat(GOLDEN, CREAM, CREAM), Coat(RUST, GOLDEN, GOLDEN), Coat(CREAM, WHITE, WHITE)),
          "droopy", "plume", ear=0.9, girth=0.88, fluff=0.3),
    Breed("dachshund", (Coat(RED, TAN), Coat(BLACK, TAN, TAN, TAN, brows=TAN), Coat(CREAM),
                        Coat(CHOCOLATE, TAN, TAN, TAN, brows=TAN)),
          "droopy", "whip", 1.15, (0.88, 0.88), 0.7, (0.44, 0.46), body=3.4, girth=0.66, legs=0.5),
    Breed("poodle", (Coat(WHITE), Coat(APRICOT), Coat(BLACK), Coat(GREY), Coat(LIVER)),
          "puff", "pompon", 1.0, (0.8, 0.86), 0.66, (0.36, 0.4), body=2.3, girth=0.72, legs=1.3, fluff=0.3, curly=True),
    Breed("shepherd", (Coat(TAN, BLACK, TAN, TAN, BLACK, saddle=BLACK), Coat(WHITE),
                       Coat(FAWN, CHARCOAL, CREAM, CREAM, CHARCOAL, saddle=CHARCOAL)),
          "pointed", "plume", 1.1, (0.92, 0.9), 0.76, (0.42, 0.46), body=2.8, girth=0.78, legs=1.2),
    Breed("pug", (Coat(FAWN, BLACK, ears=BLACK), Coat(APRICOT, BLACK, ears=BLACK), Coat(BLACK, (48, 44, 52))),
          "button", "curl", 0.8, (1.06, 0.92), 1.0, (0.56, 0.4), 0.18, 0.2, 2.0, 0.82, 0.75, wrinkled=True),
    Breed("bulldog", (Coat(WHITE, WHITE, WHITE, patches=TAN), Coat(FAWN, WHITE, WHITE, WHITE, blaze=WHITE),
                      Coat(RED, WHITE, WHITE, WHITE, blaze=WHITE)),
          "button", "stub", 0.75, (1.08, 0.86), 1.12, (0.74, 0.5), 0.22, 0.14, 2.2, 0.98, 0.65, wrinkled=True),
    Breed("husky", (Coat(GREY, WHITE, WHITE, WHITE, mask=WHITE), Coat(BLACK, WHITE, WHITE, WHITE, mask=WHITE),
                    Coat(RED, WHITE, WHITE, WHITE, mask=WHITE)),
          "pointed", "curl", 0.95, (0.98, 0.9), 0.94, (0.44, 0.42), body=2.6, girth=0.84, fluff=0.26),
    Breed("beagle", (Coat(TAN, WHITE, WHITE, WHITE, blaze=WHITE, saddle=BLACK),
                     Coat(GOLDEN, WHITE, WHITE, WHITE, blaze=WHITE, saddle=CHOCOLATE)),
          "droopy", "whip", 1.2, (0.94, 0.92), 0.8, (0.48, 0.44), body=2.5, girth=0.74, legs=0.95),
    Breed("dalmatian", (Coat(WHITE, ears=BLACK, spots=BLACK), Coat(WHITE, ears=LIVER, spots=LIVER)),
          "droopy", "whip", 0.85, (0.92, 0.94), 0.78, (0.46, 0.46), body=2.7, girth=0.74, legs=1.35),
    Breed("corgi", (Coat(APRICOT, WHITE, WHITE, WHITE, blaze=WHITE), Coat(RED, WHITE, WHITE, WHITE, blaze=WHITE),
                    Coat(BLACK, WHITE, WHITE, TAN, blaze=WHITE, brows=TAN)),
          "bat", "stub", 1.1, (0.98, 0.84), 0.9, (0.46, 0.4), body=3.0, girth=0.78, legs=0.5),
    Breed("collie", (Coat(BLACK, WHITE, WHITE, WHITE, blaze=WHITE), Coat(RED, WHITE, WHITE, WHITE, blaze=WHITE),
                     Coat(SILVER, WHITE, WHITE, TAN, blaze=WHITE, patches=CHARCOAL)),
          "folded", "plume", 1.0, (0.92, 0.92), 0.8, (0.42, 0.46), body=2.7, girth=0.82, fluff=0.3),
    Breed("shiba", (Coat(RUST, WHITE, WHITE, WHITE, mask=WHITE), Coat(CREAM, WHITE, WHITE, WHITE, mask=WHITE),
                    Coat(BLACK, WHITE, WHITE, TAN, mask=TAN, brows=CREAM)),
          "pointed", "curl", 0.72, (1.02, 0.86), 0.98, (0.42, 0.36), 0.17, body=2.4, girth=0.78, legs=1.0),
    Breed("doberman", (Coat(BLACK, TAN, TAN, TAN, brows=TAN), Coat(CHOCOLATE, TAN, TAN, TAN, brows=TAN),
                       Coat(GREY, TAN, TAN, TAN, brows=TAN)),
          "pointed", "stub", 1.2, (0.86, 0.92), 0.7, (0.42, 0.48), body=2.6, girth=0.78, legs=1.4),
    Breed("terrier", (Coat(WHITE), Coat(GREY, SILVER, SILVER, SILVER), Coat(FAWN, CREAM), Coat(WHITE, patches=TAN)),
          "folded", "stub", 0.85, (0.94, 0.88), 0.84, (0.52, 0.44), girth=0.78, body=2.3, legs=0.8, fluff=0.2,
          bearded=True),
    Breed("chihuahua", (Coat(FAWN, CREAM, CREAM), Coat(APRICOT, WHITE, WHITE, WHITE), Coat(WHITE, patches=FAWN),
                        Coat(BLACK, TAN, TAN, TAN, brows=TAN)),
          "bat", "whip", 1.3, (1.04, 0.96), 0.78, (0.34, 0.32), 0.14, 0.21, 2.1, 0.62, 0.95),
)
# fmt: on


@dataclass(frozen=True)
class Dog:
    """Everything that is chosen for one image of a dog; `detail_key` seeds the details (blots, flowers)."""

    breed: Breed
    coat: Coat
    pose: Pose
    left: bool  # faces left
    turn: float  # of the head to the dog's front, -1..1
    tilt: float  # of the head, radians
    eyes: Eyes
    iris: Colour
    tongue: float  # length, 0 = mouth closed
    collar: Colour | None
    stride: float  # how far the legs are apart, -1..1
    fill: float  # share of the image that the dog takes
    place: tuple[float, float]  # position in the free space, 0..1 in x and y
    scene: Scene
    toy: int | None  # index into `TOY_SHAPES`
    light: float  # brightness of the image, 1 = as painted
    detail_key: tuple[int, int]


def random_dog(index: int, seed: int = 0) -> Dog:
    """Dog number `index` (>= 0) of the series `seed` (>= 0): the same on every machine."""
    dice = Dice(seed, index)
    breed = dice.pick(BREEDS)
    pose = dice.pick(POSES)
    closed: Eyes = "asleep" if pose == "lying" else "happy"
    icy = breed.name in ("husky", "collie") and dice.chance(0.5)
    return Dog(
        breed=breed,
        coat=dice.pick(breed.coats),
        pose=pose,
        left=dice.chance(0.5),
        turn=dice.uniform(-0.25, 0.9),
        tilt=dice.uniform(-0.2, 0.2),
        eyes=dice.pick(("open", "open", "open", "open", closed)),
        iris=(110, 176, 226) if icy else dice.pick(((104, 62, 40), (134, 84, 44), (80, 52, 44))),
        tongue=dice.pick((0.0, 0.0, 0.0, dice.uniform(0.25, 0.4), dice.uniform(0.4, 0.65))),
        collar=dice.pick((*TOYS, None, None)),
        stride=dice.uniform(-1, 1),
        fill=dice.uniform(0.8, 0.96),
        place=(dice.uniform(), dice.uniform()),
        scene=dice.pick(SCENES),
        toy=dice.pick((None, None, None, 0, 1, 2)),
        light=dice.uniform(0.93, 1.07),
        detail_key=(seed, index),
    )


def portrait(dog: Dog) -> Dog:
    """The same dog from the front, centred, its head upright: a small network learns such images within minutes."""
    return replace(dog, pose="portrait", left=False, turn=0.2, tilt=0.0, fill=0.9, place=(0.5, 0.5))
