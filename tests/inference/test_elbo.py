"""Validation and the error of the mean training image, recomputed plainly, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from dogvae import rng
from dogvae.data.dataset import Dataset, Split
from dogvae.inference.elbo import VAL_CHUNK, VAL_SAMPLES, ValidationNoise, evaluate, mean_error
from dogvae.rng import Stream
from tests.support.steps import CPU, config_of, photos, plain_means, plain_sigma, plain_terms, trainer_of

Writer = Callable[..., Path]


@pytest.fixture
def val(write_dataset: Writer) -> Split:
    """37 images in two shards. Validation takes them in chunks of 32, so the last chunk is short."""
    arrays = [photos(30, seed=1).numpy(), photos(7, seed=2).numpy()]
    return Dataset(write_dataset([photos(2).numpy()], arrays)).val


@pytest.mark.parametrize(
    ("likelihood", "architecture", "given"),
    [
        ("gaussian", "default", None),
        ("gaussian", "default", 0.2),
        ("bernoulli", "default", None),
        ("bernoulli", "notebook", None),
    ],
)
def test_validation_is_the_mean_over_images(
    val: Split, likelihood: str, architecture: str, given: float | None
) -> None:
    """With the same 4 samples per image, whose noise is keyed by the chunk."""
    model = trainer_of(config_of(likelihood=likelihood, architecture=architecture)).model
    with torch.no_grad():  # latents whose means vary more or less from image to image
        head = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)][-1]
        head.weight[:3] *= torch.tensor([40.0, 1.0, 1e-3])[:, None, None, None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got = evaluate(model, val, CPU, sigma=given)
    assert model.training
    torch.manual_seed(1)
    assert evaluate(model, val, CPU, sigma=given) == got
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    model.eval()
    x = val.gather(np.arange(37)).float() / 255
    noise = torch.cat([rng.normal((4, n, 3, 4, 4), Stream.VALIDATION, chunk) for chunk, n in ((0, 32), (1, 5))], dim=1)
    with torch.no_grad():
        means = plain_means(model, x, noise)
        sigma = given or plain_sigma(means, x)
        reconstruction, kl = plain_terms(model, x, noise, sigma)
        mu = torch.cat([model.encoder(x[b : b + 1])[0] for b in range(37)])
        pictures = model.decode_mean(mu).double()
    errors = [float((pictures[b] - x[b].double()).square().mean()) for b in range(37)]
    # The Gaussian's mass on the grey level of each pixel; black and white take the tails.
    pixels = x.double().expand_as(means)
    normal = Normal(pixels - (pixels - means).clamp(-1, 1), sigma)  # larger residuals count as 1
    below = torch.where(pixels == 0, 0.0, normal.cdf(pixels - 0.5 / 255))
    above = torch.where(pixels == 1, 1.0, normal.cdf(pixels + 0.5 / 255))
    active = int((mu.double().numpy().reshape(37, -1).var(axis=0) > 0.01).sum())
    assert 0 < active < 48
    expected = {
        "loss": float((reconstruction + kl).double().mean()),
        "reconstruction": float(reconstruction.double().mean()),
        "kl": float(kl.double().mean()),
        "bits_per_dim": -float((above - below).log2().mean()) + float(kl.double().mean()) / (3072 * math.log(2)),
        "sigma": sigma,
        "error": sum(errors) / 37,
        "psnr": sum(10 * math.log10(1 / error) for error in errors) / 37,
        "active_latents": active,
    }
    assert got == pytest.approx(expected, rel=2e-5, abs=2e-4)  # nats: sums of 3,072 pixels in float32


def test_mean_error_is_that_of_the_mean_training_image(write_dataset: Writer) -> None:
    train, val = photos(20, seed=1).numpy(), photos(9, seed=2).numpy()
    prediction = (train.astype(np.float64) / 255).mean(axis=0)
    expected = np.square(val.astype(np.float64) / 255 - prediction).mean()
    assert mean_error(Dataset(write_dataset([train], [val]))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("grey", [1, 128, 211])
def test_mean_error_of_images_that_do_not_differ_is_0(grey: int, write_dataset: Writer) -> None:
    train, val = (np.full((n, 3, 32, 32), grey, np.uint8) for n in (7, 3))
    assert mean_error(Dataset(write_dataset([train], [val]))) == 0


def test_validation_noise_of_several_chunks_is_that_of_each() -> None:
    """A GPU validates several chunks at a time."""
    noise = ValidationNoise((3, 2, 2), CPU)
    parts = [noise.of(np.arange(start, min(start + VAL_CHUNK, 70))) for start in range(0, 70, VAL_CHUNK)]
    assert torch.equal(noise.of(np.arange(70)), torch.cat(parts, dim=1))
    wanted = rng.normal((VAL_SAMPLES, VAL_CHUNK, 3, 2, 2), Stream.VALIDATION, 1)
    assert torch.equal(parts[1], wanted)
