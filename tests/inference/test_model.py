"""`DogVAE` against plain numpy and torch's distributions; mistakes are refused with one line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.distributions import MultivariateNormal

from dogvae.config import ModelConfig
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.inference.load import load
from dogvae.inference.model import DogVAE
from dogvae.inference.priors import DENSITIES
from dogvae.network.prior import Gaussian
from dogvae.network.vae import VAE
from tests.support.exports import DIMS, LATENT, Exported
from tests.support.runs import SIZE


@pytest.fixture(scope="module")
def latents(model: DogVAE, dogs: np.ndarray) -> np.ndarray:
    """Posterior means of all training images, (100, 32) float64."""
    return model.encode(dogs).reshape(100, DIMS).astype(np.float64)


def by_hand() -> DogVAE:
    """A model of 16-dimensional latents with a known prior."""
    torch.manual_seed(0)
    small = VAE(ModelConfig(width=4, latent_dim=1, latent_size=4, image_size=32))
    d = 16
    loose = torch.randn(d, 3 * d)
    prior = {
        "gaussian.mean": torch.randn(d),
        "gaussian.factor": torch.linalg.cholesky(loose @ loose.mT / (3 * d)),
        "directions": torch.eye(2, d),
        "scales": torch.ones(2),
        "parents": torch.zeros(2, 16),
    }
    return DogVAE(small, torch.device("cpu"), {"sigma": 0.1}, prior)


# --- what is known of the training images


def test_mean_directions_and_scales_are_those_of_the_posterior_means(model: DogVAE, latents: np.ndarray) -> None:
    assert model.mean.ravel() == pytest.approx(latents.mean(axis=0), abs=1e-4)
    directions = model.directions.reshape(-1, DIMS)
    assert len(directions) == len(model.scales) == 32
    assert directions @ directions.T == pytest.approx(np.eye(32), abs=1e-5)
    assert (latents @ directions.T).std(axis=0) == pytest.approx(model.scales, abs=1e-4)
    assert (np.diff(model.scales) <= 0).all()
    assert model.scales[0] > 2 * model.scales[15] > 0


# --- sampling


@pytest.mark.parametrize("prior", DENSITIES)
def test_fewer_samples_are_the_first_of_more(prior: str) -> None:
    """Also across the batches of 256."""
    model = by_hand()
    many = model.sample_latents(300, seed=3, prior=prior)
    assert many.shape == (300, 1, 4, 4)
    assert many.dtype == np.float32
    for n in (1, 5, 255, 256, 257):
        assert np.array_equal(model.sample_latents(n, seed=3, prior=prior), many[:n])
    assert len(np.unique(many, axis=0)) == 300
    other = model.sample_latents(300, seed=4, prior=prior)
    assert not (other == many).all(axis=(1, 2, 3)).any()


def test_a_seed_always_gives_the_same_dogs(model: DogVAE, exported: Exported) -> None:
    state = torch.get_rng_state()
    many = model.sample(64, seed=5)
    assert many.shape == (64, SIZE, SIZE, 3)
    assert many.dtype == np.uint8
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(load(exported.folder).sample(5, seed=5), many[:5])
    assert np.array_equal(model.sample(5), model.sample(5, seed=0))
    for seed in (0, 6, 2**70):
        different = np.abs(model.sample(5, seed=seed).astype(int) - many[:5])
        assert different.mean(axis=(1, 2, 3)).min() > 1
    assert many.std(axis=0).mean() > 5  # neither all grey nor all the same


def test_samples_are_decoded_latents_in_batches(model: DogVAE) -> None:
    batches = list(model.samples(260, seed=1, temperature=0.7, prior="normal"))
    assert [len(b) for b in batches] == [256, 4]
    whole = model.sample(260, 1, 0.7, "normal")
    assert np.array_equal(np.concatenate(batches), whole)
    assert np.array_equal(model.decode(model.sample_latents(260, 1, 0.7, "normal")[250:]), whole[250:])


def test_latents_of_the_normal_prior_are_standard_normal_and_independent() -> None:
    n = 256 * 20
    z = by_hand().sample_latents(n, prior="normal").reshape(n, 16)
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(n)
    assert np.abs(np.cov(z.T) - np.eye(16)).max() < 5 * math.sqrt(2 / n)
    for lag in (1, 256):  # neighbours, and the same position of two batches
        assert abs(np.mean(z[lag:] * z[:-lag])) < 5 / math.sqrt(z.size)


def gaussian_of(model: DogVAE, prior: str) -> Gaussian:
    """A prior in float64."""
    return (Gaussian(torch.zeros(16), torch.eye(16)) if prior == "normal" else model.gaussian).double()


@pytest.mark.parametrize("prior", DENSITIES)
def test_temperature_scales_the_distance_from_the_mean(prior: str) -> None:
    model = by_hand()
    means = model.sample_latents(300, temperature=0, prior=prior)
    assert means.reshape(300, 16) == pytest.approx(np.tile(gaussian_of(model, prior).mean.numpy(), (300, 1)))
    plain = model.sample_latents(300, prior=prior)
    for temperature in (0.5, 2.0):
        scaled = model.sample_latents(300, temperature=temperature, prior=prior)
        assert scaled - means == pytest.approx(temperature * (plain - means), abs=1e-5)
    assert np.abs(plain - means).mean() > 0.2


@pytest.mark.parametrize("prior", DENSITIES)
def test_log_prior_equals_torchs_log_prob(prior: str) -> None:
    model = by_hand()
    latents = model.sample_latents(20)
    gaussian = gaussian_of(model, prior)
    truth = MultivariateNormal(gaussian.mean, scale_tril=gaussian.factor, validate_args=False)
    got = model.log_prior(latents, prior)
    assert got.dtype == np.float64
    assert got == pytest.approx(truth.log_prob(torch.from_numpy(latents).flatten(1).double()).numpy(), rel=1e-9)


# --- encoding and decoding


def test_an_image_does_not_depend_on_its_batch(model: DogVAE, dogs: np.ndarray) -> None:
    """Bit for bit; latents too, which would show less than one grey level."""
    latents = model.sample_latents(40)
    together = model.decode(latents)
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(model.decode(latents[order]), together[order])
    encoded = model.encode(dogs[:40])
    assert np.array_equal(model.encode(dogs[order]), encoded[order])
    for i in (0, 7, 39):
        assert np.array_equal(model.decode(latents[i : i + 1])[0], together[i])
        assert np.array_equal(model.encode(dogs[i])[0], encoded[i])


def test_encode_and_decode_are_the_networks(model: DogVAE, dogs: np.ndarray) -> None:
    x = torch.from_numpy(dogs[:6].transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        mu, _ = model.model.encoder(x)
        decoded = (model.model.decoder(mu) + 0.5).clip(0, 1)  # the mean of a Gaussian
    got = model.encode(dogs[:6])
    assert got.shape == (6, *LATENT)
    assert got.dtype == np.float32
    assert got == pytest.approx(mu.numpy(), abs=1e-5)
    pictures = np.rint(255 * decoded.numpy().transpose(0, 2, 3, 1))
    assert np.abs(model.reconstruct(dogs[:6]) - pictures).max() <= 1
    assert np.array_equal(model.decode(torch.from_numpy(got)), model.reconstruct(dogs[:6]))


def test_prepared_is_what_the_encoder_gets(model: DogVAE, dogs: np.ndarray) -> None:
    large = dogs[0].repeat(3, axis=0).repeat(3, axis=1)
    seen = model.prepared([dogs[0], large])
    assert seen.shape == (2, SIZE, SIZE, 3)
    assert np.array_equal(seen[0], dogs[0])
    assert not np.array_equal(seen[1], dogs[0])
    assert np.array_equal(model.encode(large), model.encode(seen[1]))


PIL_CALLS: dict[str, Callable[[DogVAE, np.ndarray, bool], Any]] = {
    "sample": lambda m, dogs, pil: m.sample(3, seed=2, pil=pil),
    "decode": lambda m, dogs, pil: m.decode(m.sample_latents(3), pil=pil),
    "litter": lambda m, dogs, pil: m.litter(dogs[0], dogs[1], 3, pil=pil),
    "reconstruct": lambda m, dogs, pil: m.reconstruct(dogs[:2], pil=pil),
    "interpolate": lambda m, dogs, pil: m.interpolate(dogs[0], dogs[1], steps=4, pil=pil),
    "walk": lambda m, dogs, pil: m.walk(list(dogs[:3]), steps=3, pil=pil),
}


@pytest.mark.parametrize("name", PIL_CALLS)
def test_pil_images_equal_the_arrays(name: str, model: DogVAE, dogs: np.ndarray) -> None:
    images, arrays = (PIL_CALLS[name](model, dogs, pil) for pil in (True, False))
    assert len(images) > 1
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), arrays)


def test_latents_with_negative_strides(model: DogVAE) -> None:
    """numpy reverses an array by negative strides, which torch refuses."""
    latents = model.sample_latents(3)
    assert np.array_equal(model.decode(latents[::-1]), model.decode(latents)[::-1])
    assert model.log_prior(latents[::-1]) == pytest.approx(model.log_prior(latents)[::-1], rel=1e-12)
    assert np.array_equal(model.path(latents[::-1], 4), model.path(latents[::-1].copy(), 4))


# --- directions and neighbours


def test_direction_points_from_the_photos_without_to_those_with(
    model: DogVAE, dogs: np.ndarray, latents: np.ndarray
) -> None:
    photos_with, photos_without = dogs[:5], list(dogs[5:12])
    got = model.direction(photos_with, photos_without)
    assert got.shape == LATENT
    mean_with, mean_without = latents[:5].mean(axis=0), latents[5:12].mean(axis=0)
    assert mean_without + got.ravel() == pytest.approx(mean_with, abs=1e-6)
    assert np.linalg.norm(got) > 0.1
    assert model.direction(dogs[3], dogs[4]).ravel() == pytest.approx(latents[3] - latents[4], abs=1e-6)


def test_neighbours_equal_brute_force(model: DogVAE, exported: Exported, dogs: np.ndarray, latents: np.ndarray) -> None:
    pictures = model.sample(30, seed=1)
    queries = model.encode(pictures).reshape(30, DIMS).astype(np.float64)
    brute = np.linalg.norm(queries[:, None] - latents, axis=2)
    progress: list[tuple[int, int]] = []
    indices, distances, images = model.neighbours(
        pictures, exported.dataset, k=6, progress=lambda done, total: progress.append((done, total))
    )
    assert indices.shape == distances.shape == (30, 6)
    assert distances == pytest.approx(np.sort(brute, axis=1)[:, :6], abs=1e-3)
    assert np.take_along_axis(brute, indices, axis=1) == pytest.approx(distances, abs=1e-3)
    assert all(len(set(row)) == 6 for row in indices.tolist())
    assert np.array_equal(images, dogs[indices])
    assert progress[-1] == (100, 100)


def test_neighbours_are_at_most_all_training_images(model: DogVAE, exported: Exported, dogs: np.ndarray) -> None:
    indices, _, images = model.neighbours(dogs[0], Dataset(exported.dataset), k=1000)
    assert indices[0, 0] == 0  # itself
    assert sorted(indices[0].tolist()) == list(range(100))
    assert images.shape == (1, 100, SIZE, SIZE, 3)


def test_neighbours_in_an_unsuitable_dataset_are_refused(
    model: DogVAE, write_dataset: Callable[..., Path], dogs: np.ndarray
) -> None:
    wrong = write_dataset([np.zeros((3, 3, 64, 64), np.uint8)], [np.zeros((1, 3, 64, 64), np.uint8)])
    with pytest.raises(UsageError, match="has images of 64 pixels, this model needs 32"):
        model.neighbours(dogs[0], wrong)
    with pytest.raises(UsageError, match="prepared dataset"):
        model.neighbours(dogs[0], wrong / "nowhere")


# --- what is refused


REFUSALS: dict[str, tuple[Callable[[DogVAE, np.ndarray], Any], str]] = {
    "no samples": (lambda m, z: m.sample(0), "n: 0 is too small"),
    "negative samples": (lambda m, z: m.sample(-3), "n: -3 is too small"),
    "no latents": (lambda m, z: m.sample_latents(0), "n: 0 is too small"),
    "no batches": (lambda m, z: list(m.samples(0)), "n: 0 is too small"),
    "negative seed": (lambda m, z: m.sample(1, seed=-1), "seed: -1 is too small"),
    "negative temperature": (lambda m, z: m.sample(1, temperature=-1), "temperature: -1 must be"),
    "NaN temperature": (lambda m, z: m.sample(1, temperature=math.nan), "temperature: nan must be"),
    "infinite temperature": (lambda m, z: m.sample(1, temperature=math.inf), "temperature: inf must be"),
    "unknown prior": (lambda m, z: m.sample(1, prior="banana"), "--prior: 'banana' is none of gaussian, normal"),
    "density of an unknown prior": (lambda m, z: m.log_prior(z, "banana"), "--prior: 'banana' is none of"),
    "density of other latents": (lambda m, z: m.log_prior(z[:, :1]), "latents have shape"),
    "unknown method": (lambda m, z: m.path(z, 4, "curved"), "method: 'curved' is none of linear, spherical"),
    "path of one step": (lambda m, z: m.path(z, 1), "steps: 1 is too small"),
    "path of one latent": (lambda m, z: m.path(z[:1]), "a walk needs at least two pictures"),
    "path of flat latents": (lambda m, z: m.path(z.reshape(3, DIMS)), "latents have shape"),
    "walk of one step": (lambda m, z: m.walk(m.decode(z), steps=1), "steps: 1 is too small"),
    "walk of one picture": (lambda m, z: m.walk(list(m.decode(z[:1]))), "a walk needs at least two pictures"),
    "walk of one array": (lambda m, z: m.walk(m.decode(z)[0]), "a walk needs at least two pictures"),
    "walk of one path": (lambda m, z: m.walk("a.jpg"), "a.jpg cannot be read"),
    "walk of no pictures": (lambda m, z: m.walk([]), "there are no pictures"),
    "nothing to encode": (lambda m, z: m.encode([]), "there are no pictures"),
    "nothing to decode": (lambda m, z: m.decode(z[:0]), "there are no pictures"),
    "latent without a batch": (lambda m, z: m.decode(z[0]), r"shape \(2, 4, 4\), this model's are \(n, 2, 4, 4\)"),
    "flat latents": (lambda m, z: m.decode(z.reshape(-1, DIMS)), r"latents have shape \(3, 32\)"),
    "NaN latents": (lambda m, z: m.decode(np.where(z > 1, np.nan, z)), "not finite"),
    "infinite latents": (lambda m, z: m.decode(z / np.float32(0)), "not finite"),
    "no neighbours": (lambda m, z: m.neighbours(m.decode(z), "nowhere", k=0), "k: 0 is too small"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", REFUSALS)
def test_mistake_is_refused_with_one_line(name: str, model: DogVAE) -> None:
    call, reason = REFUSALS[name]
    with pytest.raises(UsageError, match=reason) as error:
        call(model, model.sample_latents(3))
    assert "\n" not in str(error.value)


def test_more_pictures_than_memory_are_refused_at_once(model: DogVAE) -> None:
    n = psutil.virtual_memory().available // (3 * SIZE**2)
    began = time.monotonic()
    with pytest.raises(UsageError, match=f"n: {n:,} pictures take .*`samples`"):
        model.sample(n)
    assert time.monotonic() - began < 1
    assert next(iter(model.samples(n))).shape == (256, SIZE, SIZE, 3)
