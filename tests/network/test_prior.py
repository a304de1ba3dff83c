"""The fitted prior: its formulas against torch.distributions, its fit against known densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from dogvae.network import prior
from dogvae.network.prior import Gaussian, fit, principal

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def constant(n: int, d: int, value: float) -> Tensor:
    return torch.full((n, d), value, dtype=F64)


def covariance_of(gaussian: Gaussian) -> Tensor:
    return gaussian.factor @ gaussian.factor.T


def gaussian_of(d: int) -> Gaussian:
    """A Gaussian whose covariance is far from round."""
    loose = normal(d, 2 * d)
    return Gaussian(2 * normal(d), torch.linalg.cholesky(loose @ loose.T / d))


# --- formulas


@pytest.mark.parametrize("d", [1, 5, 20])
def test_log_prob_equals_that_of_torch(d: int) -> None:
    """Also at a distance where the density itself is 0 in floating point."""
    gaussian, z = gaussian_of(d), torch.cat([3 * normal(50, d, seed=1), constant(1, d, 5e3)])
    expected = MultivariateNormal(gaussian.mean, scale_tril=gaussian.factor).log_prob(z)
    assert expected.min() < -1e6
    assert gaussian.log_prob(z).numpy() == pytest.approx(expected.numpy(), rel=1e-9)
    single = Gaussian(*(t.float() for t in vars(gaussian).values()))
    assert single.double().log_prob(z[:50]).numpy() == pytest.approx(expected[:50].numpy(), rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
def test_draw_is_mean_plus_factor_times_noise(temperature: float) -> None:
    gaussian, noise = gaussian_of(4), normal(9, 4, seed=1)
    for z, eps in zip(gaussian.draw(noise, temperature), noise, strict=True):
        expected = gaussian.mean.numpy() + temperature * gaussian.factor.numpy() @ eps.numpy()
        assert z.numpy() == pytest.approx(expected, abs=1e-12)


# --- fitting


def test_fit_has_the_moments_of_the_aggregated_posterior() -> None:
    """Covariance: that of the means plus the mean of the variances. Shrinkage lowers correlations only."""
    mu, var = normal(50, 6) @ normal(6, 6, seed=1), torch.exp(normal(50, 6, seed=2))
    covariance = np.cov(mu.numpy().T, bias=True) + np.diag(var.numpy().mean(axis=0))
    for shrinkage in (0.0, 0.3, 1.0):
        got = prior._fit(mu, var, shrinkage)
        assert got.mean.numpy() == pytest.approx(mu.numpy().mean(axis=0), abs=1e-12)
        shrunk = np.where(np.eye(6) > 0, covariance, (1 - shrinkage) * covariance)
        assert covariance_of(got).numpy() == pytest.approx(shrunk, abs=1e-10)
        assert torch.equal(got.factor, got.factor.tril())


def shrinkage_of(fitted: Gaussian, mu: Tensor) -> float:
    """The share by which the correlations were lowered."""
    off = ~torch.eye(mu.shape[1], dtype=torch.bool)
    ratios = covariance_of(fitted)[off] / torch.cov(mu.T, correction=0)[off]
    assert float(ratios.max() - ratios.min()) < 1e-6
    return 1 - float(ratios.mean())


@pytest.mark.parametrize("seed", range(3))
def test_many_images_in_few_dimensions_are_not_shrunk(seed: int) -> None:
    mu = normal(5) + normal(20_000, 5, seed=seed) @ normal(5, 5, seed=9)
    assert shrinkage_of(fit(mu, constant(20_000, 5, 0.2)), mu) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_few_images_in_many_dimensions_are_shrunk(seed: int) -> None:
    """Held-out images show that correlations are chance. Fresh images must agree."""
    d, n = 48, 100
    loadings = 0.5 * normal(3, d, seed=99)

    def posterior_means(n: int, seed: int) -> Tensor:
        return normal(n, 3, seed=seed) @ loadings + normal(n, d, seed=seed + 1)

    mu, var = posterior_means(n, 10 * seed), constant(n, d, 0.05)
    fitted = fit(mu, var)
    assert min(abs(shrinkage_of(fitted, mu) - s) for s in prior.SHRINKAGE if s > 0) < 1e-6
    fresh = posterior_means(2000, 1000 + seed) + math.sqrt(0.05) * normal(2000, d, seed=5)
    score, unshrunk, independent = (
        float(density.log_prob(fresh).mean())
        for density in (fitted, prior._fit(mu, var, 0.0), prior._fit(mu, var, 1.0))
    )
    assert score > max(unshrunk + 1, independent - 0.5)


def test_fewer_than_80_images_get_the_most_shrinkage() -> None:
    mu = normal(79, 8)
    assert shrinkage_of(fit(mu, constant(79, 8, 0.1)), mu) == pytest.approx(max(prior.SHRINKAGE), abs=1e-9)


def test_fit_does_not_use_the_global_generator_and_reports_every_attempt() -> None:
    fits, told = [], list[tuple[int, int]]()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fits.append(fit(normal(400, 6), constant(400, 6, 0.1), lambda *counts: told.append(counts)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(fits[0].factor, fits[1].factor)
    assert told == 2 * [(done, len(prior.SHRINKAGE) + 1) for done in range(len(prior.SHRINKAGE) + 1)]


def odd_latents() -> dict[str, tuple[Tensor, Tensor]]:
    """Posteriors that real models can have, as means and variances."""
    d = 32
    mu, var = normal(200, d), constant(200, d, 0.1)
    collapsed = torch.arange(d) >= 3
    return {
        "one image": (mu[:1], var[:1]),
        "three images": (mu[:3], var[:3]),
        "too few images to hold any out": (mu[:79], var[:79]),
        "just enough images to hold some out": (mu[:80], var[:80]),
        "fewer images than dimensions": (normal(90, 200), constant(90, 200, 0.1)),
        "collapsed dimensions": (mu.masked_fill(collapsed, 0.0), var.masked_fill(collapsed, 1.0)),
        "all dimensions collapsed": (torch.zeros_like(mu), torch.ones_like(var)),
        "the same image 200 times": (mu[:1].expand(200, d), var),
        "two images 100 times each": (mu[:2].repeat(100, 1), torch.full_like(var, math.exp(-10))),
        "sharp posteriors": (100 * mu, torch.full_like(var, math.exp(-10))),
        "float32": (mu.float(), var.float()),
    }


@pytest.mark.parametrize("name", odd_latents())
def test_odd_latents_get_a_density_no_worse_than_standard_normal(name: str) -> None:
    mu, var = odd_latents()[name]
    d = mu.shape[1]
    fitted = fit(mu, var)
    assert (fitted.mean.shape, fitted.factor.shape) == ((d,), (d, d))
    assert all(t.dtype == F64 and t.isfinite().all() for t in vars(fitted).values())
    assert (fitted.factor.diagonal() > 0).all()
    z = mu.double() + var.double().sqrt() * normal(*mu.shape, seed=9)
    assert float(fitted.log_prob(z).mean()) > float(Normal(0.0, 1.0).log_prob(z).sum(dim=1).mean()) - 0.02
    assert fitted.draw(normal(50, d)).isfinite().all()
    if name == "collapsed dimensions":
        covariance = covariance_of(fitted)
        assert fitted.mean[3:].abs().max() == 0
        assert covariance[3:, 3:].numpy() == pytest.approx(np.eye(29), abs=1e-12)
        assert covariance[:3, 3:].abs().max() == 0


# --- principal directions


def test_principal_directions_equal_those_of_the_svd() -> None:
    mu = normal(60, 9) @ normal(9, 9, seed=1) + 5
    offset = mu.numpy() - mu.numpy().mean(axis=0)
    _, values, vectors = np.linalg.svd(offset, full_matrices=False)
    directions, scales = principal(mu, 4)
    assert scales.numpy() == pytest.approx(values[:4] / math.sqrt(60), rel=1e-9)
    for direction, vector in zip(directions.numpy(), vectors[:4], strict=True):
        largest = direction[np.abs(direction).argmax()]
        assert largest > 0
        assert direction == pytest.approx(vector * np.sign(vector[np.abs(vector).argmax()]), abs=1e-9)


def test_more_principal_directions_than_the_means_have() -> None:
    directions, scales = principal(normal(3, 5), 32)
    assert directions.shape == (5, 5)
    assert (scales[2:] < 1e-7).all()  # three points lie in a plane
    assert (scales[:2] > 0.1).all()
    for mu in (normal(1, 5), torch.ones(10, 5)):
        directions, scales = principal(mu, 2)
        assert scales.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
        assert directions.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
