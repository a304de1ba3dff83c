"""The fitted prior: its formulas against torch.distributions, its fit against known densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from dogvae.network import prior
from dogvae.network.prior import Mixture, fit, principal

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def constant(n: int, d: int, value: float) -> Tensor:
    return torch.full((n, d), value, dtype=F64)


def covariance_of(mixture: Mixture, k: int = 0) -> Tensor:
    return mixture.factors[k] @ mixture.factors[k].T


def mixture_of(k: int = 3, d: int = 4) -> Mixture:
    """k Gaussians whose covariances are far from round."""
    loose = normal(k, d, 2 * d)
    weights = torch.arange(1, k + 1, dtype=F64)
    return Mixture(weights / weights.sum(), 2 * normal(k, d), torch.linalg.cholesky(loose @ loose.mT / d))


def of_torch(mixture: Mixture) -> MixtureSameFamily:
    """The same density by torch's own code."""
    gaussians = MultivariateNormal(mixture.means, scale_tril=mixture.factors, validate_args=False)
    return MixtureSameFamily(Categorical(mixture.weights), gaussians)


def clusters(n: int, centres: Tensor, width: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (n, d) of equally large round clusters in random order, and the cluster of each."""
    labels = (len(centres) * uniform(n, seed)).long()
    return centres[labels] + width * normal(n, centres.shape[1], seed=seed + 1), labels


def corners(d: int, apart: float) -> Tensor:
    """Four centres at equal distances from each other."""
    return apart / math.sqrt(2) * torch.eye(4, d, dtype=F64)


# --- formulas


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 5), (3, 4), (7, 20)])
def test_log_prob_equals_that_of_torch(k: int, d: int) -> None:
    """Also at a distance where the density itself is 0 in floating point."""
    mixture, z = mixture_of(k, d), torch.cat([3 * normal(50, d, seed=1), constant(1, d, 5e3)])
    expected = of_torch(mixture).log_prob(z)
    assert expected.min() < -1e6
    assert mixture.log_prob(z).numpy() == pytest.approx(expected.numpy(), rel=1e-9)
    single = Mixture(*(t.float() for t in vars(mixture).values()))
    assert single.double().log_prob(z[:50]).numpy() == pytest.approx(expected[:50].numpy(), rel=1e-3)


def test_expected_log_density_equals_monte_carlo() -> None:
    """Within 5 standard errors of 100,000 draws."""
    mixture, mu, var = mixture_of(2, 4), 2 * normal(3, 4, seed=1), torch.exp(normal(3, 4, seed=2))
    got = mixture.expected(mu, var)
    assert got.shape == (3, 2)
    for i in range(3):
        z = mu[i] + var[i].sqrt() * normal(100_000, 4, seed=3 + i)
        for k in range(2):
            gaussian = MultivariateNormal(mixture.means[k], scale_tril=mixture.factors[k])
            logs = mixture.weights[k].log() + gaussian.log_prob(z)
            assert float(got[i, k]) == pytest.approx(float(logs.mean()), abs=5 * float(logs.std()) / math.sqrt(len(z)))


def test_draw_is_mean_plus_factor_times_noise() -> None:
    mixture, noise = mixture_of(3, 4), normal(9, 4, seed=1)
    means = mixture.means.clone()
    chosen = [0, 2, 1, 1, 2, 0, 2, 2, 1]
    middles = (mixture.weights.cumsum(0) - mixture.weights / 2)[chosen]
    for temperature in (1.0, 0.3, 0.0):
        z = mixture.draw(middles, noise, temperature)
        for i, k in enumerate(chosen):
            expected = mixture.means[k].numpy() + temperature * mixture.factors[k].numpy() @ noise[i].numpy()
            assert z[i].numpy() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(mixture.means, means)


def test_draw_chooses_components_by_their_weights() -> None:
    mixture, n = mixture_of(4, 2), 50_000
    z = mixture.draw(uniform(n), normal(n, 2), temperature=0.0)
    for weight, mean in zip(mixture.weights.tolist(), mixture.means, strict=True):
        share = float((z == mean).all(dim=1).double().mean())
        assert share == pytest.approx(weight, abs=5 * math.sqrt(weight * (1 - weight) / n))


def test_draw_above_the_rounded_sum_of_weights_takes_the_last_component() -> None:
    mixture = Mixture(torch.tensor([0.3, 0.3, 0.399]), torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3, 1, 1))
    assert mixture.draw(torch.tensor([0.0, 0.9999]), torch.zeros(2, 1)).tolist() == [[1.0], [3.0]]


# --- fitting one Gaussian


def test_one_gaussian_has_the_moments_of_the_aggregated_posterior() -> None:
    """Covariance: that of the means plus the mean of the variances. Shrinkage lowers correlations only."""
    mu, var = normal(50, 6) @ normal(6, 6, seed=1), torch.exp(normal(50, 6, seed=2))
    covariance = np.cov(mu.numpy().T, bias=True) + np.diag(var.numpy().mean(axis=0))
    for shrinkage in (0.0, 0.3, 1.0):
        got = prior._fit(mu, var, 1, shrinkage)
        assert got.weights.tolist() == [1.0]
        assert got.means[0].numpy() == pytest.approx(mu.numpy().mean(axis=0), abs=1e-12)
        shrunk = np.where(np.eye(6) > 0, covariance, (1 - shrinkage) * covariance)
        assert covariance_of(got).numpy() == pytest.approx(shrunk, abs=1e-10)
        assert torch.equal(got.factors[0], got.factors[0].tril())


def shrinkage_of(fitted: Mixture, mu: Tensor) -> float:
    """The share by which the correlations of the first component were lowered."""
    off = ~torch.eye(mu.shape[1], dtype=torch.bool)
    ratios = covariance_of(fitted)[off] / torch.cov(mu.T, correction=0)[off]
    assert float(ratios.max() - ratios.min()) < 1e-6
    return 1 - float(ratios.mean())


@pytest.mark.parametrize("seed", range(3))
def test_many_gaussian_latents_get_one_component_without_shrinkage(seed: int) -> None:
    mu = normal(5) + normal(20_000, 5, seed=seed) @ normal(5, 5, seed=9)
    single, mixture = fit(mu, constant(20_000, 5, 0.2))
    assert len(single.weights) == len(mixture.weights) == 1
    assert shrinkage_of(single, mu) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_few_images_in_many_dimensions_are_shrunk(seed: int) -> None:
    """Held-out images show that correlations are chance. Fresh images must agree."""
    d, n = 48, 100
    loadings = 0.5 * normal(3, d, seed=99)

    def posterior_means(n: int, seed: int) -> Tensor:
        return normal(n, 3, seed=seed) @ loadings + normal(n, d, seed=seed + 1)

    mu, var = posterior_means(n, 10 * seed), constant(n, d, 0.05)
    single, _ = fit(mu, var)
    assert min(abs(shrinkage_of(single, mu) - s) for s in prior.SHRINKAGE if s > 0) < 1e-6
    fresh = posterior_means(2000, 1000 + seed) + math.sqrt(0.05) * normal(2000, d, seed=5)
    score, unshrunk, independent = (
        float(fitted.log_prob(fresh).mean())
        for fitted in (single, prior._fit(mu, var, 1, 0.0), prior._fit(mu, var, 1, 1.0))
    )
    assert score > max(unshrunk + 1, independent - 0.5)


def test_fewer_than_80_images_get_one_gaussian_with_the_most_shrinkage() -> None:
    mu = normal(79, 8)
    single, mixture = fit(mu, constant(79, 8, 0.1))
    assert len(mixture.weights) == 1
    assert torch.equal(single.factors, mixture.factors)
    assert shrinkage_of(single, mu) == pytest.approx(max(prior.SHRINKAGE), abs=1e-9)


# --- fitting several


@pytest.mark.parametrize("seed", range(3))
def test_clusters_get_components_of_their_own(seed: int) -> None:
    """On fresh latents the mixture is nearly as good as the density that they were drawn from."""
    d, width, var = 8, 0.5, 0.1
    centres = corners(d, apart=6.0)
    mu, _ = clusters(800, centres, width, seed=10 * seed)
    single, mixture = fit(mu, constant(800, d, var))
    assert len(single.weights) == 1
    assert len(mixture.weights) >= 4
    assert (mixture.weights @ mixture.means).numpy() == pytest.approx(mu.mean(dim=0).numpy(), abs=1e-9)  # of all images
    spread = math.sqrt(width**2 + var)
    truth = Mixture(torch.full((4,), 0.25, dtype=F64), centres, spread * torch.eye(d, dtype=F64).repeat(4, 1, 1))
    fresh, _ = clusters(4000, centres, spread, seed=10 * seed + 5)
    best = float(of_torch(truth).log_prob(fresh).mean())
    assert best - 0.3 < float(mixture.log_prob(fresh).mean()) <= best + 0.02
    assert float(single.log_prob(fresh).mean()) < best - 1.5
    nearest = torch.cdist(mixture.means, centres).min(dim=1)
    assert nearest.values.max() < 1.5
    assert set(nearest.indices.tolist()) == {0, 1, 2, 3}


def test_separate_clusters_keep_their_moments() -> None:
    """Weights and means are those of the clusters. The average covariance is mixed in with the weight of `d` images."""
    d, n = 3, 900
    centres = corners(d + 1, apart=60.0)[:, :d]
    points, labels = clusters(n, centres, 1.0)
    var = torch.exp(normal(n, d, seed=7))
    got = prior._fit(points, var, 4, 0.0)
    order = torch.cdist(centres, got.means).argmin(dim=1).tolist()
    assert sorted(order) == [0, 1, 2, 3]
    members = [points.numpy()[labels == label] for label in range(4)]
    scatters = [
        len(own) * np.cov(own.T, bias=True) + np.diag(var.numpy()[labels == label].sum(axis=0))
        for label, own in enumerate(members)
    ]
    for own, scatter, k in zip(members, scatters, order, strict=True):
        assert float(got.weights[k]) == pytest.approx(len(own) / n, abs=1e-9)
        assert got.means[k].numpy() == pytest.approx(own.mean(axis=0), abs=1e-6)
        covariance = (scatter + d * sum(scatters) / n) / (len(own) + d)
        assert covariance_of(got, k).numpy() == pytest.approx(covariance, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_step_of_expectation_maximisation_lowers_the_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On clusters that overlap, so that it takes many steps."""
    bounds: list[float] = []
    original = Mixture.expected

    def watched(self: Mixture, mu_nd: Tensor, var_nd: Tensor) -> Tensor:
        out = original(self, mu_nd, var_nd)
        bounds.append(float(torch.logsumexp(out, dim=1).mean()))
        return out

    monkeypatch.setattr(Mixture, "expected", watched)
    mu, _ = clusters(1000, normal(6, 3, seed=seed), 0.6, seed=seed)
    prior._fit(mu, constant(1000, 3, 0.05), 6, 0.0)
    assert len(bounds) > 4
    assert min(np.diff(bounds)) > -1e-6
    assert bounds[-1] > bounds[0] + 0.005
    assert len(bounds) == prior.MOST_STEPS or bounds[-1] - bounds[-2] < 3 * prior.TOLERANCE


def test_fit_does_not_use_the_global_generator_and_reports_every_attempt() -> None:
    mu, _ = clusters(400, corners(6, apart=4.0), 0.5)
    fits, lines = [], list[str]()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fits.append([t for mixture in fit(mu, constant(400, 6, 0.1), lines.append) for t in vars(mixture).values()])
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*fits, strict=True))
    for shrinkage in prior.SHRINKAGE:
        assert f"fitting the prior: 1 component, shrinkage {shrinkage}" in lines
    for components in (2, len(fits[0][3])):
        assert any(f"{components} components" in line for line in lines)


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
    for fitted in fit(mu, var):
        assert fitted.means.shape[1:] == (d,)
        assert fitted.factors.shape == (len(fitted.weights), d, d)
        assert all(t.dtype == F64 and t.isfinite().all() for t in vars(fitted).values())
        assert (fitted.factors.diagonal(dim1=1, dim2=2) > 0).all()
        z = mu.double() + var.double().sqrt() * normal(*mu.shape, seed=9)
        assert float(fitted.log_prob(z).mean()) > float(Normal(0.0, 1.0).log_prob(z).sum(dim=1).mean()) - 0.02
        assert fitted.draw(uniform(50), normal(50, d)).isfinite().all()
        if name == "collapsed dimensions" and len(fitted.weights) == 1:
            covariance = covariance_of(fitted)
            assert fitted.means[0, 3:].abs().max() == 0
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
