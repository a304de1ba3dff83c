"""KL and importance-weighted bound under each prior, against a slow computation and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    MultivariateNormal,
    Normal,
)

from dogvae import rng
from dogvae.config import ModelConfig
from dogvae.data.dataset import Dataset, Split
from dogvae.inference.evaluate import CHUNK, bounds
from dogvae.inference.model import DogVAE
from dogvae.inference.priors import DENSITIES
from dogvae.network.likelihood import kl
from dogvae.network.vae import VAE
from dogvae.rng import Stream
from tests.support.exports import DIMS, Exported

CPU = torch.device("cpu")


def ignore(text: str, done: int, total: int) -> None:
    """Progress that no test looks at."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@pytest.fixture(scope="module")
def dataset(exported: Exported) -> Dataset:
    return Dataset(exported.dataset)


def images(split: Split) -> Tensor:
    return split.gather(np.arange(len(split))).float() / 255


def random_model(likelihood: str) -> DogVAE:
    """A model of random weights, and a prior with random moments near the model's posteriors."""
    config = ModelConfig(image_size=32, width=4, latent_dim=2, latent_size=4, likelihood=likelihood)
    torch.manual_seed(1)
    vae = VAE(config).eval()
    with torch.no_grad():
        for i, p in enumerate(vae.parameters()):  # some weights are 0 at first
            p.add_(0.1 * random(*p.shape, seed=i))
    tensors = {"directions": torch.eye(DIMS)[:3], "scales": torch.ones(3), "parents": torch.zeros(2, DIMS)}
    tensors["gaussian.mean"] = 0.3 * random(DIMS, seed=11)
    tensors["gaussian.factor"] = torch.eye(DIMS) + 0.1 * random(DIMS, DIMS, seed=1).tril()
    return DogVAE(vae, CPU, {"sigma": 0.15}, tensors)


def negative_log_likelihood(model: DogVAE, z: Tensor, x: Tensor) -> float:
    """Of one image given one latent, by torch's distributions; a Gaussian's density is per grey level."""
    outputs, x = model.model.decoder(z[None])[0].double(), x.double()
    if model.model.config.likelihood == "bernoulli":
        return -float(Bernoulli(logits=outputs, validate_args=False).log_prob(x).sum())
    return -float(Normal(255 * (outputs + 0.5), 255 * model.sigma).log_prob(255 * x).sum())


def density(model: DogVAE, prior: str) -> Distribution:
    """A prior, in float64, by torch's distributions."""
    if prior == "normal":
        return MultivariateNormal(torch.zeros(DIMS).double(), torch.eye(DIMS).double())
    fitted = model.gaussian.double()
    return MultivariateNormal(fitted.mean, scale_tril=fitted.factor)


@torch.no_grad()
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_bounds_equal_a_slow_computation(likelihood: str, dataset: Dataset, write_dataset: Callable[..., Path]) -> None:
    """One image and one draw at a time, by torch's distributions; with more draws than one chunk."""
    three = dataset.val.gather(np.arange(3)).numpy()
    model, split, samples = random_model(likelihood), Dataset(write_dataset([three], [three])).val, CHUNK + 8
    kls: dict[str, list[float]] = {prior: [] for prior in DENSITIES}
    weighted: dict[str, list[float]] = {prior: [] for prior in DENSITIES}
    for i, x in enumerate(images(split)):
        mu, logvar = (each[0].flatten().double() for each in model.model.encoder(x[None]))
        posterior = Normal(mu, torch.exp(logvar / 2))
        generator = torch.Generator().manual_seed(rng.seed(Stream.IMPORTANCE, i))  # the documented draw
        z = mu + posterior.scale * torch.randn((samples, 2, 4, 4), generator=generator).flatten(1)
        nll = [negative_log_likelihood(model, each.float().view(2, 4, 4), x) for each in z]
        for prior in DENSITIES:
            p = density(model, prior)
            log_ratio = [float(posterior.log_prob(each).sum()) - float(p.log_prob(each[None])) for each in z]
            kls[prior].append(float(np.mean(log_ratio)))
            logs = -np.array(nll) - np.array(log_ratio)
            weighted[prior].append(-float(np.log(np.mean(np.exp(logs - logs.max()))) + logs.max()))
    got = bounds(model, split, samples, ignore)
    assert got["kl_by_prior"] == pytest.approx({k: np.mean(v) for k, v in kls.items()}, rel=1e-4)
    assert got["importance_weighted"] == pytest.approx({k: np.mean(v) for k, v in weighted.items()}, rel=2e-6)
    assert len({round(value, 3) for value in got["importance_weighted"].values()}) == 2  # the priors differ


@torch.no_grad()
def test_kl_to_the_normal_prior_is_near_the_closed_form(model: DogVAE, dataset: Dataset) -> None:
    mu, logvar = model.model.encoder(images(dataset.val))
    got = bounds(model, dataset.val, 100, ignore)["kl_by_prior"]["normal"]
    assert got == pytest.approx(float(kl(mu, logvar).mean()), rel=0.03)


def test_bound_falls_with_the_number_of_draws(model: DogVAE, dataset: Dataset) -> None:
    several = [bounds(model, dataset.val, n, ignore)["importance_weighted"] for n in (1, 8, 64)]
    for prior in DENSITIES:
        first, second, third = (bound[prior] for bound in several)
        assert first > second > third


def test_fitted_prior_is_nearer_than_the_normal_one(model: DogVAE, dataset: Dataset) -> None:
    """To the posteriors of the training images, which it is fitted to."""
    got = bounds(model, dataset.train, 16, ignore)["kl_by_prior"]
    assert got["gaussian"] < 0.95 * got["normal"]
