"""Drawn dogs: the same on every machine, varied, anti-aliased, and complete in view."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dogvae.data.drawn import draw, extent, layer, placed_shapes
from dogvae.data.drawn.breeds import BREEDS, POSES, Breed, Pose, portrait, random_dog
from dogvae.data.drawn.ink import Dice, Shape, curve, ellipse, expanded, fluffy, limb
from dogvae.data.drawn.scenes import SCENES


def pixels(index: int, seed: int = 0, size: int = 64) -> np.ndarray:
    """A dog as floats (size, size, 3), 0 to 255."""
    return np.asarray(draw(index, seed, size), dtype=np.float64)


def test_same_image_in_another_process_and_order() -> None:
    code = (
        "import hashlib; from dogvae.data.drawn import draw\n"
        "print(*(hashlib.sha256(draw(i, 3, 96).tobytes()).hexdigest() for i in (5, 0, 70)))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = [hashlib.sha256(draw(i, 3, 96).tobytes()).hexdigest() for i in (70, 5, 0)]
    assert fresh == [here[1], here[2], here[0]]


def test_random_choices_never_change() -> None:
    """They make up everybody's default dataset. Pixels are not pinned: Pillow's rasteriser may change."""
    chosen = [(random_dog(i).breed.name, random_dog(i).pose, random_dog(i).left) for i in range(3)]
    assert chosen == [("collie", "playing", False), ("terrier", "sitting", True), ("collie", "playing", True)]


def test_portrait_shows_the_same_dog_with_its_head_in_the_middle() -> None:
    centres = []
    for i in range(60):
        dog, posed = random_dog(i), portrait(random_dog(i))
        assert (posed.breed, posed.coat, posed.scene, posed.collar) == (dog.breed, dog.coat, dog.scene, dog.collar)
        low, high = extent(placed_shapes(posed)[1])  # of the head
        assert (low >= 0.04).all()
        assert (high <= 0.96).all()
        centres.append((low + high) / 2)
    assert np.std(centres, axis=0).max() < 1e-6
    assert (np.asarray(draw(1, 0, 64, posed=True)) != np.asarray(draw(1, 0, 64))).any()


def test_images_differ_from_each_other_and_within() -> None:
    dogs_nhwc = np.stack([pixels(i) for i in range(150)])
    flat = dogs_nhwc.reshape(len(dogs_nhwc), -1)
    distance = np.stack([np.abs(flat - one).mean(1) for one in flat])
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 12
    assert np.median(distance) > 40
    assert np.abs(pixels(0, seed=0) - pixels(0, seed=1)).mean() > 8
    assert (dogs_nhwc.mean((1, 2)).std(0) > 20).all()  # the mean colour, each channel
    assert dogs_nhwc.std((1, 2)).mean() > 35  # within an image
    assert 100 < dogs_nhwc.mean() < 190
    assert ((dogs_nhwc == 0) | (dogs_nhwc == 255)).mean() < 0.12


def test_edges_are_anti_aliased() -> None:
    for i in range(20):
        fine = pixels(i, size=256)
        averaged = fine.reshape(64, 4, 64, 4, 3).mean((1, 3))
        aliased = fine[2::4, 2::4]
        assert np.abs(pixels(i, size=64) - averaged).mean() < 0.5 * np.abs(aliased - averaged).mean()
    disc = np.asarray(layer([Shape(ellipse(0.5, 0.5, 0.3, 0.3), (255, 200, 100))], 64, 6), dtype=np.float64)
    alpha = disc[..., 3] / 255
    assert alpha.sum() == pytest.approx(np.pi * (0.3 * 64) ** 2, rel=0.015)
    assert ((alpha > 0.05) & (alpha < 0.95)).sum() > 0.8 * 2 * np.pi * 0.3 * 64
    assert (np.abs(disc[alpha > 0.2, :3] - (255, 200, 100)) < 6).all()  # no dark fringe at half-transparent pixels


def test_every_breed_coat_pose_and_scene_occurs() -> None:
    dogs = [random_dog(i) for i in range(400)]
    assert {dog.breed.name for dog in dogs} == {breed.name for breed in BREEDS}
    assert {dog.pose for dog in dogs} == set(POSES)
    assert {dog.scene for dog in dogs} == set(SCENES)
    assert {dog.coat for dog in dogs} == {coat for breed in BREEDS for coat in breed.coats}
    assert {dog.left for dog in dogs} == {True, False}
    assert len({dog.eyes for dog in dogs}) == 3
    assert 0.3 < np.mean([dog.tongue > 0 for dog in dogs]) < 0.5


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("breed", BREEDS, ids=lambda breed: breed.name)
def test_head_is_in_view_and_on_the_body_and_paws_are_on_the_ground(breed: Breed, pose: Pose) -> None:
    for i in range(3):
        dog = replace(random_dog(i), breed=breed, coat=breed.coats[i % len(breed.coats)], pose=pose)
        trunk, skull = (np.vstack([shape.points for shape in part]) for part in placed_shapes(dog))
        assert skull.min() > 0
        assert skull.max() < 1
        assert ((trunk > skull.min(0)) & (trunk < skull.max(0))).all(1).any()
        if pose == "portrait":
            assert trunk[:, 1].max() > 1  # cut off by the lower edge
        else:
            assert trunk.min() > 0
            assert trunk[:, 0].max() < 1
            assert 0.83 < trunk[:, 1].max() < 0.96
            assert skull[:, 1].max() < trunk[:, 1].max()


def test_dog_that_faces_left_is_mirrored() -> None:
    dog = replace(random_dog(4), place=(0.5, 0.5), toy=None, pose="standing")
    right, left = placed_shapes(replace(dog, left=False)), placed_shapes(replace(dog, left=True))
    for a, b in zip(right[0] + right[1], left[0] + left[1], strict=True):
        np.testing.assert_allclose(a.points * (-1, 1) + (1, 0), b.points, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 10**9), seed=st.integers(0, 2**31 - 1), size=st.integers(32, 256))
def test_any_index_seed_and_size_can_be_drawn(index: int, seed: int, size: int) -> None:
    image = draw(index, seed, size)
    assert image.mode == "RGB"
    assert image.size == (size, size)
    assert image.tobytes() == draw(index, seed, size).tobytes()
    assert np.asarray(image).std() > 10


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_dice_are_uniform(key: list[int]) -> None:
    dice = Dice(*key)
    values = np.array([dice.uniform(-3, 1) for _ in range(600)])  # more than the 512 words of Dice
    assert (values >= -3).all()
    assert (values < 1).all()
    assert abs(values[:512].mean() + 1) < 0.4


def area(points: np.ndarray) -> float:
    """The area inside a closed outline (n, 2), by the shoelace formula."""
    x, y = points.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def test_outlines_enclose_the_area_of_their_shape() -> None:
    circle = ellipse(0, 0, 1, 1)
    assert area(ellipse(3, 4, 2, 1, 0.7)) == pytest.approx(2 * np.pi, rel=0.01)
    assert area(limb([(0, 0), (5, 0), (10, 0)], 2, 2)) == pytest.approx(20 + np.pi, rel=0.02)
    for direction in (circle, circle[::-1]):
        assert area(expanded(direction, 0.5)) == pytest.approx(np.pi * 1.5**2, rel=0.01)
    assert area(fluffy(circle, 0.3)) > area(circle)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=9))
def test_curves_pass_through_their_points(points: list[tuple[float, float]]) -> None:
    np.testing.assert_allclose(curve(points)[::7], points, atol=1e-9)
    through = curve(points, closed=False)
    np.testing.assert_allclose(through[::7], points, atol=1e-9)
    assert len(through) == 7 * (len(points) - 1) + 1
