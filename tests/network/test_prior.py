"""The density that new dogs are drawn from: its formulas against torch.distributions, its fit against known truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dogvae.network import prior
from dogvae.network.prior import Mixture, fit, principal

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def factors_of(k: int, d: int, seed: int = 0) -> Tensor:
    """Lower Cholesky factors of covariances that are far from round."""
    loose = normal(k, d, 2 * d, seed=seed)
    return torch.linalg.cholesky(loose @ loose.mT / d)


def mixture_of(k: int = 3, d: int = 4, spread: float = 2.0, seed: int = 0) -> Mixture:
    weights = torch.arange(1, k + 1, dtype=F64)
    return Mixture(weights / weights.sum(), spread * normal(k, d, seed=seed), factors_of(k, d, seed))


def torchs(mixture: Mixture) -> MixtureSameFamily:
    """The same density, by torch's own code."""
    gaussians = MultivariateNormal(mixture.means, scale_tril=mixture.factors, validate_args=False)
    return MixtureSameFamily(Categorical(mixture.weights), gaussians)


def clusters(n: int, centres: Tensor, width: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Round clusters, all as large, in random order: points (n, d), and which cluster each is of."""
    labels = (len(centres) * uniform(n, seed)).long()
    return centres[labels] + width * normal(n, centres.shape[1], seed=seed + 1), labels


def corners(d: int, apart: float) -> Tensor:
    """Four centres that all are as far from each other."""
    return apart / math.sqrt(2) * torch.eye(4, d, dtype=F64)


# --- the formulas


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 5), (3, 4), (7, 20)])
def test_log_prob_is_torchs(k: int, d: int) -> None:
    mixture, z = mixture_of(k, d), 3 * normal(50, d, seed=1)
    expected = torchs(mixture).log_prob(z)
    assert expected.min() < -10  # also far outside
    assert mixture.log_prob(z).numpy() == pytest.approx(expected.numpy(), rel=1e-10)


def test_log_prob_does_not_underflow() -> None:
    """A latent that is far from all components has a density of exp(-millions), which is 0 in any precision."""
    mixture = mixture_of(3, 4)
    z = torch.full((1, 4), 5e3, dtype=F64)
    assert mixture.log_prob(z).item() == pytest.approx(torchs(mixture).log_prob(z).item(), rel=1e-9)
    assert mixture.log_prob(z) < -1e6


def test_double_is_the_same_in_float64() -> None:
    single = Mixture(*(t.float() for t in vars(mixture_of()).values()))
    double = single.double()
    for name, tensor in vars(single).items():
        assert getattr(double, name).dtype == F64
        assert torch.equal(getattr(double, name).float(), tensor)


def test_expected_by_monte_carlo() -> None:
    """E[log weight + log N(z)] over z ~ N(mu, var), within 5 standard errors of 100,000 draws."""
    mixture, mu, var = mixture_of(2, 4), 2 * normal(3, 4, seed=1), torch.exp(normal(3, 4, seed=2))
    got = mixture.expected(mu, var)
    assert got.shape == (3, 2)
    for i in range(3):
        z = mu[i] + var[i].sqrt() * normal(100_000, 4, seed=3 + i)
        for k in range(2):
            gaussian = MultivariateNormal(mixture.means[k], scale_tril=mixture.factors[k])
            logs = mixture.weights[k].log() + gaussian.log_prob(z)
            assert float(got[i, k]) == pytest.approx(float(logs.mean()), abs=5 * float(logs.std()) / math.sqrt(len(z)))


def test_expected_bounds_the_mean_log_density() -> None:
    """What is maximised is below E_q[log p(z)] (Jensen), and equal to it where there is but one component."""
    mu, var = normal(20, 4, seed=1), torch.full((20, 4), 0.5, dtype=F64)
    z = (mu + var.sqrt() * normal(20_000, 20, 4, seed=2)).flatten(0, 1)
    for k in (1, 3):
        mixture = mixture_of(k)
        logs = torchs(mixture).log_prob(z)
        bound = float(torch.logsumexp(mixture.expected(mu, var), dim=1).mean())
        error = 5 * float(logs.std()) / math.sqrt(len(z))
        assert (abs(bound - logs.mean()) < error) if k == 1 else (bound < logs.mean() - 2 * error)


# --- drawing


def test_draws_have_the_mixtures_mean_and_covariance() -> None:
    mixture, n = mixture_of(3, 3), 200_000
    z = mixture.draw(uniform(n, 1), normal(n, 3, seed=2))
    truth = torchs(mixture)
    assert torch.abs(z.mean(dim=0) - truth.mean).max() < 5 * math.sqrt(float(truth.variance.max()) / n)
    w, m = mixture.weights.numpy(), mixture.means.numpy()
    within = np.einsum("k,kij->ij", w, (mixture.factors @ mixture.factors.mT).numpy())
    between = np.einsum("k,ki,kj->ij", w, m - w @ m, m - w @ m)
    covariance = within + between
    assert np.abs(np.cov(z.numpy().T) - covariance).max() < 0.02 * covariance.max()


def test_each_draw_is_its_mean_plus_its_factor_times_the_noise() -> None:
    mixture, noise = mixture_of(3, 4), normal(9, 4, seed=1)
    chosen = [0, 2, 1, 1, 2, 0, 2, 2, 1]
    middles = (mixture.weights.cumsum(0) - mixture.weights / 2)[chosen]
    for temperature in (1.0, 0.3, 0.0):
        z = mixture.draw(middles, noise, temperature)
        for i, k in enumerate(chosen):
            expected = mixture.means[k].numpy() + temperature * mixture.factors[k].numpy() @ noise[i].numpy()
            assert z[i].numpy() == pytest.approx(expected, abs=1e-12)


def test_temperature_0_gives_the_means_as_often_as_their_weights() -> None:
    mixture, n = mixture_of(4, 2), 50_000
    z = mixture.draw(uniform(n), normal(n, 2), 0.0)
    for weight, mean in zip(mixture.weights.tolist(), mixture.means, strict=True):
        share = float((z == mean).all(dim=1).double().mean())
        assert share == pytest.approx(weight, abs=5 * math.sqrt(weight * (1 - weight) / n))


def test_weights_that_add_up_to_less_than_1_by_rounding() -> None:
    """The largest uniform number is above their sum: it belongs to the last component, not behind it."""
    weights = torch.tensor([0.3, 0.3, 0.399])
    mixture = Mixture(weights, torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3, 1, 1))
    assert mixture.draw(torch.tensor([0.0, 0.9999]), torch.zeros(2, 1)).tolist() == [[1.0], [3.0]]


def test_drawing_leaves_the_mixture_as_it_is() -> None:
    mixture = mixture_of()
    means = mixture.means.clone()
    mixture.draw(uniform(100), normal(100, 4))
    assert torch.equal(mixture.means, means)


# --- fitting one Gaussian


def test_one_gaussian_has_the_moments_of_the_aggregated_posterior() -> None:
    """Mean of the means; covariance of the means plus the mean of the variances. Shrinkage lowers correlations only."""
    mu, var = normal(50, 6) @ normal(6, 6, seed=1), torch.exp(normal(50, 6, seed=2))
    covariance = np.cov(mu.numpy().T, bias=True) + np.diag(var.numpy().mean(axis=0))
    for shrinkage in (0.0, 0.3, 1.0):
        got = prior._fit(mu, var, 1, shrinkage)
        assert got.weights.tolist() == [1.0]
        assert got.means[0].numpy() == pytest.approx(mu.numpy().mean(axis=0), abs=1e-12)
        shrunk = np.where(np.eye(6) > 0, covariance, (1 - shrinkage) * covariance)
        assert (got.factors[0] @ got.factors[0].T).numpy() == pytest.approx(shrunk, abs=1e-10)
        assert torch.equal(got.factors[0], got.factors[0].tril())


def test_a_known_gaussian_is_recovered() -> None:
    """Posteriors whose average is N(mean, S): their own means vary by S less than the variance that each has."""
    d, n = 5, 20_000
    mean, var = normal(d), torch.full((n, d), 0.2, dtype=F64)
    factor = factors_of(1, d)[0] + torch.eye(d, dtype=F64)
    whole = factor @ factor.T
    mu = mean + normal(n, d, seed=1) @ torch.linalg.cholesky(whole - 0.2 * torch.eye(d, dtype=F64)).T
    single, mixture = fit(mu, var)
    assert len(mixture.weights) == 1
    assert single.means[0].numpy() == pytest.approx(mean.numpy(), abs=0.06)
    # Of so many images no correlation is by chance: none is shrunk.
    assert (single.factors[0] @ single.factors[0].T).numpy() == pytest.approx(whole.numpy(), abs=0.15)
    off = ~torch.eye(d, dtype=torch.bool)
    ratio = (single.factors[0] @ single.factors[0].T)[off] / torch.cov(mu.T, correction=0)[off]
    assert ratio.numpy() == pytest.approx(np.ones(d * d - d), abs=1e-9)


def shrinkage_of(fitted: Mixture, mu: Tensor) -> float:
    """What the correlations of the only component were lowered by."""
    off = ~torch.eye(mu.shape[1], dtype=torch.bool)
    ratios = (fitted.factors[0] @ fitted.factors[0].T)[off] / torch.cov(mu.T, correction=0)[off]
    assert float(ratios.max() - ratios.min()) < 1e-6
    return 1 - float(ratios.mean())


@pytest.mark.parametrize("seed", range(3))
def test_few_images_in_many_dimensions_are_shrunk(seed: int) -> None:
    """Held-out images see that chance correlations are none; fresh ones, which nothing has seen, must agree."""
    d, n = 48, 100
    loadings = 0.5 * normal(3, d, seed=99)

    def posterior_means(n: int, seed: int) -> Tensor:
        return normal(n, 3, seed=seed) @ loadings + normal(n, d, seed=seed + 1)

    mu, var = posterior_means(n, 10 * seed), torch.full((n, d), 0.05, dtype=F64)
    single, _ = fit(mu, var)
    assert min(abs(shrinkage_of(single, mu) - s) for s in prior.SHRINKAGE if s > 0) < 1e-6
    fresh = posterior_means(2000, 1000 + seed) + math.sqrt(0.05) * normal(2000, d, seed=5)
    unshrunk = prior._fit(mu, var, 1, 0.0)
    assert float(single.log_prob(fresh).mean()) > float(unshrunk.log_prob(fresh).mean()) + 1
    independent = prior._fit(mu, var, 1, 1.0)
    assert float(single.log_prob(fresh).mean()) > float(independent.log_prob(fresh).mean()) - 0.5


def test_all_images_are_fitted_to_in_the_end() -> None:
    """Those that were held out to decide too."""
    mu = normal(100, 4)
    for fitted in fit(mu, torch.ones(100, 4, dtype=F64)):
        mean = fitted.weights @ fitted.means
        assert mean.numpy() == pytest.approx(mu.numpy().mean(axis=0), abs=1e-12)


# --- fitting several


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_latents_get_one_component(seed: int) -> None:
    single, mixture = fit(normal(600, 8, seed=seed), torch.full((600, 8), 0.2, dtype=F64))
    assert len(single.weights) == len(mixture.weights) == 1


@pytest.mark.parametrize("seed", range(3))
def test_clusters_get_components_of_their_own(seed: int) -> None:
    """On fresh latents the mixture is nearly as good as the density that they were drawn from."""
    d, width, var = 8, 0.5, 0.1
    centres = corners(d, apart=6.0)
    mu, _ = clusters(800, centres, width, seed=10 * seed)
    single, mixture = fit(mu, torch.full((800, d), var, dtype=F64))
    assert len(single.weights) == 1
    assert len(mixture.weights) >= 4
    assert float(mixture.weights.sum()) == pytest.approx(1)
    spread = math.sqrt(width**2 + var)
    truth = Mixture(torch.full((4,), 0.25, dtype=F64), centres, spread * torch.eye(d, dtype=F64).repeat(4, 1, 1))
    fresh, _ = clusters(4000, centres, spread, seed=10 * seed + 5)
    best = float(torchs(truth).log_prob(fresh).mean())
    assert best - 0.3 < float(mixture.log_prob(fresh).mean()) <= best + 0.02
    assert float(single.log_prob(fresh).mean()) < best - 1.5
    # Every component is at a cluster, and every cluster has some.
    nearest = torch.cdist(mixture.means, centres).min(dim=1)
    assert nearest.values.max() < 1.5
    assert set(nearest.indices.tolist()) == {0, 1, 2, 3}


def test_well_separated_clusters_have_their_own_moments() -> None:
    """Nothing is left to share out: weights and means are the clusters', covariances theirs and `d` of the average."""
    d, n = 3, 900
    mu, labels = clusters(n, corners(d + 1, apart=60.0)[:, :d], 1.0)
    var = torch.exp(normal(n, d, seed=7))
    got = prior._fit(mu, var, 4, 0.0)
    order = torch.cdist(corners(d + 1, apart=60.0)[:, :d], got.means).argmin(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    scatters, counts = [], []
    for label in range(4):
        own = (labels == label).numpy()
        counts.append(own.sum())
        offset = mu.numpy()[own] - mu.numpy()[own].mean(axis=0)
        scatters.append(offset.T @ offset + np.diag(var.numpy()[own].sum(axis=0)))
    for label, k in enumerate(order.tolist()):
        assert float(got.weights[k]) == pytest.approx(counts[label] / n, abs=1e-9)
        assert got.means[k].numpy() == pytest.approx(mu.numpy()[labels.numpy() == label].mean(axis=0), abs=1e-6)
        covariance = (scatters[label] + d * sum(scatters) / n) / (counts[label] + d)
        assert (got.factors[k] @ got.factors[k].T).numpy() == pytest.approx(covariance, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_step_lowers_the_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of expectation maximisation, on clusters that overlap, so that it takes many steps."""
    bounds: list[float] = []
    plain = Mixture.expected

    def expected(self: Mixture, mu_nd: Tensor, var_nd: Tensor) -> Tensor:
        out = plain(self, mu_nd, var_nd)
        bounds.append(float(torch.logsumexp(out, dim=1).mean()))
        return out

    monkeypatch.setattr(Mixture, "expected", expected)
    mu, _ = clusters(1000, normal(6, 3, seed=seed), 0.6, seed=seed)
    prior._fit(mu, torch.full((1000, 3), 0.05, dtype=F64), 6, 0.0)
    assert len(bounds) > 4
    assert min(np.diff(bounds)) > -1e-6
    assert bounds[-1] > bounds[0] + 0.005
    assert len(bounds) == prior.MOST_STEPS or bounds[-1] - bounds[-2] < 3 * prior.TOLERANCE


# --- what must not break it


def shapes() -> dict[str, tuple[Tensor, Tensor]]:
    """Latents that models have and textbooks do not."""
    d = 32
    mu, var = normal(200, d), torch.full((200, d), 0.1, dtype=F64)
    collapsed_mu, collapsed_var = mu.clone(), var.clone()
    collapsed_mu[:, 3:], collapsed_var[:, 3:] = 0.0, 1.0
    return {
        "one image": (mu[:1], var[:1]),
        "three images": (mu[:3], var[:3]),
        "fewer images than decide": (mu[:79], var[:79]),
        "just enough to decide": (mu[:80], var[:80]),
        "fewer images than dimensions": (normal(90, 200), torch.full((90, 200), 0.1, dtype=F64)),
        "collapsed dimensions": (collapsed_mu, collapsed_var),
        "wholly collapsed": (torch.zeros_like(mu), torch.ones_like(var)),
        "the same image again and again": (mu[:1].expand(200, d), var),
        "two images again and again": (mu[:2].repeat(100, 1), torch.full_like(var, math.exp(-10))),
        "sharp posteriors": (100 * mu, torch.full_like(var, math.exp(-10))),
        "float32": (mu.float(), var.float()),
    }


@pytest.mark.parametrize("name", shapes())
def test_odd_latents_have_a_density(name: str) -> None:
    """And it is a better one than N(0, I), or as good as that where the latents are collapsed."""
    mu, var = shapes()[name]
    for fitted in fit(mu, var):
        d = mu.shape[1]
        assert fitted.means.shape[1:] == (d,)
        assert fitted.factors.shape == (len(fitted.weights), d, d)
        assert all(t.dtype == F64 and t.isfinite().all() for t in vars(fitted).values())
        assert (fitted.factors.diagonal(dim1=1, dim2=2) > 0).all()
        z = mu.double() + var.double().sqrt() * normal(*mu.shape, seed=9)
        ours = float(fitted.log_prob(z).mean())
        theirs = float(torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1).mean())
        assert ours > theirs - 0.02
        drawn = fitted.draw(uniform(50), normal(50, d))
        assert drawn.isfinite().all()


def test_collapsed_dimensions_stay_standard_normal() -> None:
    mu, var = shapes()["collapsed dimensions"]
    single, _ = fit(mu, var)
    covariance = single.factors[0] @ single.factors[0].T
    assert single.means[0, 3:].abs().max() == 0
    assert covariance[3:, 3:].numpy() == pytest.approx(np.eye(29), abs=1e-12)
    assert covariance[:3, 3:].abs().max() == 0


def test_few_images_get_one_gaussian_with_the_most_shrinkage() -> None:
    """Below 80 there are too few to hold any out."""
    mu, var = normal(79, 8), torch.full((79, 8), 0.1, dtype=F64)
    single, mixture = fit(mu, var)
    assert len(mixture.weights) == 1
    assert torch.equal(single.factors, mixture.factors)
    assert shrinkage_of(single, mu) == pytest.approx(max(prior.SHRINKAGE), abs=1e-9)


def test_fitting_depends_on_nothing_else() -> None:
    mu, _ = clusters(400, corners(6, apart=4.0), 0.5)
    var = torch.full((400, 6), 0.1, dtype=F64)
    torch.manual_seed(1)
    first = fit(mu, var)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = fit(mu, var)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first[1].weights) > 1
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_progress_tells_of_every_trial() -> None:
    told: list[str] = []
    mu, _ = clusters(400, corners(6, apart=6.0), 0.3)
    _, mixture = fit(mu, torch.full((400, 6), 0.1, dtype=F64), told.append)
    for shrinkage in prior.SHRINKAGE:
        assert f"fitting the prior: 1 component, shrinkage {shrinkage}" in told
    for components in (2, len(mixture.weights)):
        assert any(f"{components} components" in line for line in told)


# --- principal directions


def test_principal_directions_are_those_of_the_svd() -> None:
    mu = normal(60, 9) @ normal(9, 9, seed=1) + 5
    offset = mu.numpy() - mu.numpy().mean(axis=0)
    _, values, vectors = np.linalg.svd(offset, full_matrices=False)
    directions, scales = principal(mu, 4)
    assert directions.shape == (4, 9)
    assert scales.numpy() == pytest.approx(values[:4] / math.sqrt(60), rel=1e-9)
    assert (scales.diff() < 0).all()
    assert directions.norm(dim=1).numpy() == pytest.approx(np.ones(4), abs=1e-12)
    assert np.abs((directions.numpy() * vectors[:4]).sum(axis=1)) == pytest.approx(np.ones(4), abs=1e-9)
    # Half of any signs would be wrong: the largest component of each is positive.
    for row in directions.numpy():
        assert row[np.abs(row).argmax()] > 0
    assert scales.numpy() == pytest.approx((offset @ directions.numpy().T).std(axis=0), rel=1e-9)


def test_fewer_principal_directions_than_asked_for() -> None:
    directions, scales = principal(normal(3, 5), 32)
    assert directions.shape == (5, 5)
    assert (scales[2:] < 1e-7).all()  # three points lie in a plane
    assert (scales[:2] > 0.1).all()
    for mu in (normal(1, 5), torch.ones(10, 5)):
        directions, scales = principal(mu, 2)
        assert scales.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
        assert directions.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
