"""Walks between pictures: linear and spherical paths against closed forms, and their ends bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dogvae.inference.model import METHODS, DogVAE
from tests.support.runs import SIZE


@pytest.mark.parametrize("method", METHODS)
def test_walk_passes_through_the_reconstructions(method: str, model: DogVAE, dogs: np.ndarray) -> None:
    """Bit for bit."""
    for steps in (2, 5):
        walk = model.walk(list(dogs[:3]), steps, method)
        assert walk.shape == (2 * (steps - 1) + 1, SIZE, SIZE, 3)
        assert len(np.unique(walk, axis=0)) == len(walk)
        assert np.array_equal(walk[:: steps - 1], model.reconstruct(dogs[:3]))
        assert np.array_equal(walk[:steps], model.interpolate(dogs[0], dogs[1], steps, method))
    latents = model.encode(dogs[:4])
    path = model.path(latents, 6, method)
    assert np.array_equal(path[::5], latents)
    assert np.array_equal(model.decode(path), model.walk(list(dogs[:4]), 6, method))


def test_linear_path_is_a_weighted_mean(model: DogVAE, dogs: np.ndarray) -> None:
    latents = model.encode(dogs[:2])
    a, b = latents.astype(np.float64)
    t = np.linspace(0, 1, 9)[:, None, None, None]
    path = model.path(latents, 9)
    assert path.dtype == np.float32
    assert path == pytest.approx((1 - t) * a + t * b, abs=1e-6)
    assert model.path(latents.astype(np.float64), 9) == pytest.approx(path, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_each_step_leaves_the_start_and_nears_the_end(method: str, model: DogVAE, dogs: np.ndarray) -> None:
    for pair in model.encode(dogs[:20]).reshape(10, 2, 2, 4, 4):
        path = model.path(pair, 12, method)
        distances = [np.linalg.norm((path - end).reshape(12, -1), axis=1) for end in pair]
        assert (np.diff(distances[0]) > 0).all()
        assert (np.diff(distances[1]) < 0).all()


def unit(seed: int) -> np.ndarray:
    """A random latent of length 1."""
    z = np.random.default_rng(seed).normal(size=(2, 4, 4))
    return (z / np.linalg.norm(z)).astype(np.float32)


def angles(path: np.ndarray) -> np.ndarray:
    """Between each latent and the next."""
    flat = path.reshape(len(path), -1).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return np.arccos(np.clip((flat[1:] * flat[:-1]).sum(axis=1), -1, 1))


def test_spherical_path_turns_at_constant_speed(model: DogVAE) -> None:
    a, b = 3 * unit(0), 3 * unit(1)
    path = model.path(np.stack([a, b]), 11, "spherical")
    assert np.linalg.norm(path.reshape(11, -1), axis=1) == pytest.approx(np.full(11, 3.0), rel=1e-6)
    whole = math.acos(float((a * b).sum(dtype=np.float64)) / 9)
    assert angles(path) == pytest.approx(np.full(10, whole / 10), rel=1e-4)
    linear = np.linalg.norm(model.path(np.stack([a, b]), 11).reshape(11, -1), axis=1)
    assert linear.min() < 2.5  # the linear path passes closer to the origin
    # The spherical path stays in the plane of its two ends.
    assert np.linalg.matrix_rank(path.reshape(11, -1).astype(np.float64), tol=1e-4) == 2


def test_spherical_path_between_different_lengths(model: DogVAE) -> None:
    """Shoemake's formula: in the middle, (a + b) / (2 cos(angle / 2))."""
    a, b = 2 * unit(0), 5 * unit(1)
    angle = math.acos(float((a * b).sum(dtype=np.float64)) / 10)
    middle = model.path(np.stack([a, b]), 3, "spherical")[1]
    assert middle == pytest.approx((a + b) / (2 * math.cos(angle / 2)), abs=1e-5)


@pytest.mark.parametrize(
    ("start", "end", "aside"),
    [
        (1, 1, 0), (1, 4, 0), (1, -1, 0), (1, -3, 0), (0, 1, 0), (1, 0, 0), (0, 0, 0),  # no angle, or one of pi
        (1, 1, 1e-6), (1, -1, 1e-6), (1e-30, 0, 1e-30), (1e18, 0, 1e18),  # numbers that float32 rounds
    ],
)  # fmt: skip
def test_spherical_path_is_finite_where_the_angle_is_undefined(
    start: float, end: float, aside: float, model: DogVAE
) -> None:
    """Both ends are met exactly, and no latent in between is far away."""
    first, last = start * unit(0), end * unit(0) + aside * unit(1)
    path = model.path(np.stack([first, last]), 9, "spherical")
    assert np.isfinite(path).all()
    assert np.array_equal(path[0], first)
    assert np.array_equal(path[-1], last)
    flat, (a, b) = path.reshape(9, -1).astype(np.float64), (z.astype(np.float64) for z in (first, last))
    longest = max(np.linalg.norm(a), np.linalg.norm(b))
    assert (np.linalg.norm(flat, axis=1) <= 1.001 * longest).all()
    assert np.linalg.norm(np.diff(flat, axis=0), axis=1).max() <= 1.01 * np.pi * longest / 8
