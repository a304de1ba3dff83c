"""Validation and the two scores that `explained` lies between, recomputed plainly, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dogvae import rng
from dogvae.data.dataset import Dataset, Split
from dogvae.inference.elbo import baselines, evaluate
from dogvae.rng import Stream
from tests.support.steps import CPU, config_of, photos, plain_terms, trainer_of

Writer = Callable[..., Path]


@pytest.fixture
def val(write_dataset: Writer) -> Split:
    """37 images in two shards. Validation takes them in chunks of 32, so the last chunk is short."""
    arrays = [photos(30, seed=1).numpy(), photos(7, seed=2).numpy()]
    return Dataset(write_dataset([photos(2).numpy()], arrays)).val


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous-bernoulli", "gaussian"])
def test_validation_is_the_mean_over_images(val: Split, likelihood: str) -> None:
    """With the same 4 samples per image, whose noise is keyed by the chunk."""
    model = trainer_of(config_of(likelihood=likelihood, norm="batch")).model
    with torch.no_grad():  # latents whose means vary more or less from image to image
        head = model.encoder.layers[-1]
        assert isinstance(head, nn.Conv2d)
        head.weight[:3] *= torch.tensor([40.0, 1.0, 1e-3])[:, None, None, None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got = evaluate(model, val, CPU)
    assert model.training
    torch.manual_seed(1)
    assert evaluate(model, val, CPU) == got
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    model.eval()
    x = val.gather(np.arange(37)).float() / 255
    noise = torch.cat([rng.normal((4, n, 3, 4, 4), Stream.VALIDATION, chunk) for chunk, n in ((0, 32), (1, 5))], dim=1)
    with torch.no_grad():
        reconstruction, kl = plain_terms(model, x, noise, likelihood)
        mu = torch.cat([model.encoder(x[b : b + 1])[0] for b in range(37)])
        pictures = model.decode_mean(mu).double()
    psnr = [10 * math.log10(1 / float((pictures[b] - x[b].double()).square().mean())) for b in range(37)]
    active = int((mu.double().numpy().reshape(37, -1).var(axis=0) > 0.01).sum())
    assert 0 < active < 48
    expected = {
        "loss": float((reconstruction + kl).double().mean()),
        "reconstruction": float(reconstruction.double().mean()),
        "kl": float(kl.double().mean()),
        "psnr": sum(psnr) / 37,
        "active_latents": active,
    }
    assert got == pytest.approx(expected, rel=2e-5, abs=2e-4)  # nats: sums of 3,072 pixels in float32


def test_baselines_are_the_best_score_of_each_pixel_and_that_of_the_mean_training_image(write_dataset: Writer) -> None:
    train, val = photos(20, seed=1).numpy(), photos(9, seed=2).numpy()
    floor, mean = baselines("bernoulli", Dataset(write_dataset([train], [val])))
    x = val.astype(np.float64) / 255
    p = (train.astype(np.float64) / 255).mean(axis=0)
    inside = np.clip(x, 1e-12, 1 - 1e-12)
    entropy = -(x * np.log(inside) + (1 - x) * np.log(1 - inside))
    assert floor == pytest.approx(entropy.sum() / 9, rel=1e-9)
    assert mean == pytest.approx(-(x * np.log(p) + (1 - x) * np.log(1 - p)).sum() / 9, rel=1e-9)
