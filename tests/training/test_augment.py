"""Flips and rotations: how often, by how much, in which direction, and what happens at the border."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dogvae.training.augment import augment, draws


def photos(n: int, side: int = 16) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def rotated(x_bchw: Tensor, degrees: float, flip: bool = False) -> Tensor:
    n = len(x_bchw)
    return augment(x_bchw, torch.full((n,), flip), torch.full((n,), degrees))


# --- the draws


def test_draws_have_the_notebooks_frequencies_and_angles() -> None:
    """Over 20,000 images, within 5 standard deviations of p 0.5 and 0.3; angles are uniform within +-10 degrees."""
    parts = [draws(100, 0, epoch, step) for epoch in range(4) for step in range(50)]
    flip, degrees = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    n = len(flip)
    assert (flip.dtype, degrees.dtype) == (np.bool_, np.float32)
    is_rotated = degrees != 0
    assert abs(flip.mean() - 0.5) < 5 * math.sqrt(0.25 / n)
    assert abs(is_rotated.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    angles = degrees[is_rotated]
    assert -10 <= angles.min() < -9.9
    assert 9.9 < angles.max() <= 10
    share = np.histogram(angles, bins=10, range=(-10, 10))[0] / len(angles)
    assert np.abs(share - 0.1).max() < 5 * math.sqrt(0.1 * 0.9 / len(angles))
    # Flips and rotations are independent.
    assert abs(np.corrcoef(flip, is_rotated)[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(flip[is_rotated], angles)[0, 1]) < 5 / math.sqrt(len(angles))


def test_draws_depend_on_seed_epoch_and_step_alone() -> None:
    first = draws(64, seed=1, epoch=2, step=3)
    np.random.seed(0)
    again = draws(64, seed=1, epoch=2, step=3)
    for kind in (0, 1):
        assert np.array_equal(first[kind], again[kind])
        for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
            assert not np.array_equal(first[kind], draws(64, *other)[kind])


# --- what is done to the images


def test_flip_is_exact_and_other_images_keep_their_values() -> None:
    x = photos(4)
    before = x.clone()
    got = augment(x, torch.tensor([True, False, True, False]), torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert torch.equal(got[[0, 2]], torch.from_numpy(x.numpy()[[0, 2], :, :, ::-1].copy()))
    assert torch.equal(got[1], x[1])
    assert not torch.allclose(got[3], x[3], atol=1e-2)
    assert torch.equal(x, before)
    assert got.min() >= 0
    assert got.max() <= 1


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_rotation_by_quarter_turns_is_counter_clockwise(quarters: int) -> None:
    x = photos(2)
    assert (rotated(x, 90.0 * quarters) - torch.rot90(x, quarters, (2, 3))).abs().max() < 1e-5


def test_flip_comes_before_rotation() -> None:
    x = photos(1)
    assert (rotated(x, 90.0, flip=True) - torch.rot90(x.flip(3), 1, (2, 3))).abs().max() < 1e-5


@pytest.mark.parametrize("degrees", [10.0, -10.0, 3.3])
def test_small_rotation_equals_that_of_pil(degrees: float) -> None:
    """Away from the border, where PIL turns corners black. PIL is bilinear and counter-clockwise, too."""
    y, x = np.mgrid[0:64, 0:64] / 64
    picture = (0.5 + 0.3 * np.sin(5 * x + 2 * y) + 0.2 * np.cos(3 * y * y - x)).astype(np.float32)  # no symmetry
    expected = np.asarray(Image.fromarray(picture).rotate(degrees, Image.Resampling.BILINEAR))
    got = rotated(torch.from_numpy(picture).expand(1, 3, -1, -1), degrees)[0]
    for channel in got.numpy():
        assert np.abs(channel - expected)[10:54, 10:54].max() < 2e-3


def test_border_is_reflected() -> None:
    """The corners of a rotated picture come from its own border: a white left half stays white there."""
    x = torch.zeros(1, 3, 32, 32)
    x[..., :16] = 1
    got = rotated(x, 10.0)[0]
    assert (got[:, :, :4] - 1).abs().max() < 1e-5
    assert got[:, :, -4:].abs().max() < 1e-5


def test_empty_batch_is_returned() -> None:
    flip, degrees = draws(0, 0, 0, 0)
    assert augment(torch.empty(0, 3, 16, 16), torch.from_numpy(flip), torch.from_numpy(degrees)).shape == (0, 3, 16, 16)


def test_slice_of_a_batch_is_augmented_as_within_the_batch() -> None:
    """Bit for bit, as each rank augments its slice."""
    x = photos(6)
    flip, degrees = (torch.from_numpy(a) for a in draws(6, 3, 0, 0))
    degrees[2] = 7.0  # so that at least one image is rotated
    whole = augment(x, flip, degrees)
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        assert torch.equal(augment(x[part], flip[part], degrees[part]), whole[part])
