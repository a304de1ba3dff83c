"""Flips and rotations: how often, by how much, which way, and what happens at the border."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dogvae.training.augment import augment, draws


def photos(n: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def smooth(side: int) -> np.ndarray:
    """A float32 picture in [0, 1] without a symmetry, smooth enough for interpolations to agree."""
    y, x = np.mgrid[0:side, 0:side] / side
    return (0.5 + 0.3 * np.sin(5 * x + 2 * y) + 0.2 * np.cos(3 * y * y - x)).astype(np.float32)


def turned(x_bchw: Tensor, degrees: float, flip: bool = False) -> Tensor:
    n = len(x_bchw)
    return augment(x_bchw, torch.full((n,), flip), torch.full((n,), degrees))


# --- the draws


def test_shares_and_angles() -> None:
    """Over 20 000 images, within 5 standard deviations of the notebook's p 0.5 and p 0.3; angles even over +-10."""
    every = [draws(100, 0, epoch, step) for epoch in range(4) for step in range(50)]
    flip, degrees = (np.concatenate([d[i] for d in every]) for i in (0, 1))
    n = len(flip)
    assert n == 20_000
    assert (flip.dtype, degrees.dtype) == (np.bool_, np.float32)
    rotated = degrees != 0
    assert abs(flip.mean() - 0.5) < 5 * math.sqrt(0.25 / n)
    assert abs(rotated.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    angles = degrees[rotated]
    assert -10 <= angles.min() < -9.9
    assert 9.9 < angles.max() <= 10
    share = np.histogram(angles, bins=10, range=(-10, 10))[0] / len(angles)
    assert np.abs(share - 0.1).max() < 5 * math.sqrt(0.1 * 0.9 / len(angles))
    # Whether an image is flipped says nothing of its rotation.
    assert abs(np.corrcoef(flip, rotated)[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(flip[rotated], angles)[0, 1]) < 5 / math.sqrt(len(angles))


def test_draws_depend_on_the_key_alone() -> None:
    flip, degrees = draws(64, seed=1, epoch=2, step=3)
    np.random.seed(0)  # the global state must not matter
    again = draws(64, seed=1, epoch=2, step=3)
    assert np.array_equal(flip, again[0])
    assert np.array_equal(degrees, again[1])
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert not np.array_equal(flip, draws(64, *other)[0])
        assert not np.array_equal(degrees, draws(64, *other)[1])


def test_draws_for_nothing() -> None:
    flip, degrees = draws(0, 0, 0, 0)
    assert flip.shape == degrees.shape == (0,)


# --- what is done to the images


def test_flip_is_exact() -> None:
    x = photos(4)
    flip = torch.tensor([True, False, True, False])
    got = augment(x, flip, torch.zeros(4))
    assert torch.equal(got[[0, 2]], torch.from_numpy(x.numpy()[[0, 2], :, :, ::-1].copy()))
    assert torch.equal(got[[1, 3]], x[[1, 3]])


def test_images_beside_a_rotated_one_keep_their_values() -> None:
    x = photos(3)
    got = augment(x, torch.tensor([False, False, True]), torch.tensor([0.0, 5.0, 0.0]))
    assert torch.equal(got[0], x[0])
    assert torch.equal(got[2], x[2].flip(2))
    assert not torch.allclose(got[1], x[1], atol=1e-2)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns_counter_clockwise(quarters: int) -> None:
    x = photos(2)
    assert (turned(x, 90.0 * quarters) - torch.rot90(x, quarters, (2, 3))).abs().max() < 1e-5


def test_flips_before_it_turns() -> None:
    x = photos(1)
    got = turned(x, 90.0, flip=True)
    assert (got - torch.rot90(x.flip(3), 1, (2, 3))).abs().max() < 1e-5
    assert (got - torch.rot90(x, 1, (2, 3)).flip(3)).abs().max() > 0.1  # the other order is another picture


@pytest.mark.parametrize("degrees", [10.0, -10.0, 3.3])
def test_small_rotation_is_pils(degrees: float) -> None:
    """Away from the border, where PIL turns corners black: its rotation is counter-clockwise and bilinear, too."""
    picture = smooth(64)
    expected = np.asarray(Image.fromarray(picture).rotate(degrees, Image.Resampling.BILINEAR))
    got = turned(torch.from_numpy(picture).expand(1, 3, -1, -1), degrees)[0]
    inside = slice(10, 54)
    for channel in got.numpy():
        assert np.abs(channel - expected)[inside, inside].max() < 2e-3
    opposite = np.asarray(Image.fromarray(picture).rotate(-degrees, Image.Resampling.BILINEAR))
    assert np.abs(got[0].numpy() - opposite)[inside, inside].max() > 0.02


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_border_is_reflected(value: float) -> None:
    """A constant image stays constant, its corners too; with zeros around it they would turn dark."""
    x = torch.full((4, 3, 32, 32), value)
    got = augment(x, torch.tensor([True, False, True, False]), torch.tensor([10.0, -10.0, 4.0, -0.5]))
    assert (got - value).abs().max() < 1e-5


def test_border_shows_what_is_beside_it() -> None:
    """The corners of a turned picture come from its own border: a left half of white stays white there."""
    x = torch.zeros(1, 3, 32, 32)
    x[..., :16] = 1
    got = turned(x, 10.0)[0]
    assert (got[:, :, :4] - 1).abs().max() < 1e-5
    assert got[:, :, -4:].abs().max() < 1e-5


def test_stays_in_range_and_keeps_its_input() -> None:
    x = photos(8)
    before = x.clone()
    got = augment(x, torch.tensor([True, False] * 4), torch.linspace(-10, 10, 8))
    assert torch.equal(x, before)
    assert got.shape == x.shape
    assert got.min() >= 0
    assert got.max() <= 1


def test_empty_batch() -> None:
    got = augment(torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.bool), torch.empty(0))
    assert got.shape == (0, 3, 16, 16)


def test_slices_are_the_whole() -> None:
    """A rank that augments its slice of the draws gets its slice of the augmented batch, bit for bit."""
    x = photos(6)
    flip, degrees = (torch.from_numpy(a) for a in draws(6, 3, 0, 0))
    degrees[2] = 7.0  # whatever the draws were, one is turned
    whole = augment(x, flip, degrees)
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        assert torch.equal(augment(x[part], flip[part], degrees[part]), whole[part])
