"""Litters: each child lies between its parents by a smooth mask, and depends on the seed and its number only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.inference.litter import children
from dogvae.inference.model import DogVAE
from tests.support.exports import Exported
from tests.support.runs import VAL

SHAPES = [(3, 4, 4), (2, 8, 8), (1, 16, 16)]
N = 400


def shares(shape: tuple[int, ...], n: int = N) -> np.ndarray:
    """The share of the first parent in n children, (n, c, s, s): the first parent's latent is 1, the other's is 0."""
    means = np.stack([np.ones(shape, np.float32), np.zeros(shape, np.float32)])
    return children(means, np.ones_like(means), n, 0, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_child_lies_between_its_parents_everywhere(shape: tuple[int, ...]) -> None:
    got = shares(shape)
    assert got.shape == (N, *shape)
    assert got.dtype == np.float32
    assert got.min() >= 0
    assert got.max() <= 1
    assert got.mean() == pytest.approx(0.5, abs=0.04)  # neither parent is preferred: overall,
    assert got.mean(axis=0) == pytest.approx(0.5, abs=0.1)  # and at each place
    middle = got[:, 0, shape[1] // 2, shape[2] // 2]
    assert (middle < 0.25).mean() > 0.1  # there some children are mostly like one parent
    assert (middle > 0.75).mean() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_is_smooth_and_the_same_in_all_channels(shape: tuple[int, ...]) -> None:
    got = shares(shape)
    assert (got == got[:, :1]).all()
    side = shape[1]
    for axis in (2, 3):
        near, far = np.take(got, range(1, side), axis), np.take(got, range(side - 1), axis)
        assert np.corrcoef(near.ravel(), far.ravel())[0, 1] > 0.45
        opposite = np.take(got, 0, axis), np.take(got, side - 1, axis)
        assert abs(np.corrcoef(opposite[0].ravel(), opposite[1].ravel())[0, 1]) < 0.2  # no single share for all places


def test_noise_has_the_deviations_of_the_posteriors() -> None:
    """Of two equal parents, whose noise is independent: the mask m leaves m^2 + (1 - m)^2 of the variance."""
    shape = (2, 8, 8)
    deviations = np.array([0.5, 2.0], np.float32)[:, None, None] * np.ones((2, *shape), np.float32)
    m = shares(shape)
    for temperature in (0.7, 2.0):
        noise = children(np.full((2, *shape), 5, np.float32), deviations, N, 0, temperature) - 5
        scaled = noise / (temperature * deviations[0] * np.sqrt(m**2 + (1 - m) ** 2))
        assert abs(scaled.mean()) < 5 / math.sqrt(scaled.size)
        assert scaled.var(axis=(0, 2, 3)) == pytest.approx(1, abs=0.05)
        assert np.abs(np.corrcoef(scaled.reshape(N, -1).T) - np.eye(128)).max() < 6 / math.sqrt(N)


def test_equal_parents_without_noise_give_their_reconstruction(model: DogVAE, dogs: np.ndarray) -> None:
    got = model.litter(dogs[3], dogs[3], n=4, temperature=0)
    assert np.array_equal(got, np.repeat(model.reconstruct(dogs[3]), 4, axis=0))


def test_litter_decodes_children_of_the_pictures_posteriors(model: DogVAE, dogs: np.ndarray) -> None:
    x = torch.from_numpy(dogs[:2].transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        mu, logvar = model.model.encoder(x)
    latents = model.litter_latents(dogs[0], dogs[1], 5, seed=2)
    assert latents == pytest.approx(children(mu.numpy(), np.exp(logvar.numpy() / 2), 5, 2, 0.7), abs=1e-5)
    assert np.array_equal(model.litter(dogs[0], dogs[1], 5, seed=2), model.decode(latents))
    assert np.abs(latents - model.litter_latents(dogs[0], dogs[1], 5, seed=2, temperature=0)).mean() > 0.05


def test_fewer_children_are_the_first_of_more(model: DogVAE, dogs: np.ndarray) -> None:
    state = torch.get_rng_state()
    many = model.litter(dogs[0], dogs[1], seed=5)
    assert len(many) == len(np.unique(many, axis=0)) == 12
    assert torch.equal(torch.get_rng_state(), state)
    for n in (1, 7):
        assert np.array_equal(model.litter(dogs[0], dogs[1], n, seed=5), many[:n])
    for seed in (0, 2**70):
        assert not (model.litter(dogs[0], dogs[1], seed=seed) == many).all(axis=(1, 2, 3)).any()


REFUSALS: dict[str, tuple[Callable[[DogVAE, Any], Any], str]] = {
    "no children": (lambda m, dog: m.litter(dog, dog, 0), "n: 0 is too small"),
    "too many children": (lambda m, dog: m.litter(dog, dog, 2**40), "n: .* pictures take .* GB"),
    "negative seed": (lambda m, dog: m.litter(dog, dog, seed=-1), "seed: -1 is too small"),
    "negative temperature": (lambda m, dog: m.litter(dog, dog, temperature=-1), "temperature: -1 must be"),
    "NaN temperature": (lambda m, dog: m.litter(dog, dog, temperature=math.nan), "temperature: nan must be"),
    "missing photo": (lambda m, dog: m.litter(dog, "nowhere.jpg"), "nowhere.jpg cannot be read"),
    "two pictures for one": (lambda m, dog: m.litter(dog, [dog, dog]), "is not a picture"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_mistake_is_refused_with_one_line(name: str, model: DogVAE, dogs: np.ndarray) -> None:
    call, reason = REFUSALS[name]
    with pytest.raises(UsageError, match=reason) as error:
        call(model, dogs[0])
    assert "\n" not in str(error.value)


def test_first_parents_are_two_validation_photos_that_are_alike(exported: Exported, model: DogVAE) -> None:
    """Of pairs that are more than 55 degrees apart, the one with the greatest inner product."""
    photos = list(Dataset(exported.dataset).val.gather(np.arange(VAL)).permute(0, 2, 3, 1).numpy())
    centred = (model.encode(photos) - model.mean).reshape(VAL, -1).astype(float)
    products = {}
    for i, j in itertools.combinations(range(VAL), 2):
        product = centred[i] @ centred[j]
        if np.degrees(np.arccos(product / np.linalg.norm(centred[i]) / np.linalg.norm(centred[j]))) > 55:
            products[i, j] = product
    i, j = max(products, key=lambda pair: products[pair])
    expected = model.encode([photos[i], photos[j]])
    assert np.allclose(model.parents, expected, atol=1e-5) or np.allclose(model.parents[::-1], expected, atol=1e-5)
