"""Likelihoods, KL and scores against torch.distributions, brute force and hand calculation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dogvae.network import likelihood

F64 = torch.float64
NAMES = ["bernoulli", "gaussian"]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """8-bit pixel values in [0, 1], a tenth of them black and a tenth white."""
    kind = uniform(*shape, seed=seed)
    grey = (255 * uniform(*shape, seed=seed + 1)).round() / 255
    return torch.where(kind < 0.1, 0.0, torch.where(kind > 0.9, 1.0, grey))


def test_kl_equals_that_of_torch() -> None:
    mu, logvar = random(4, 3, 2, 2, scale=2), random(4, 3, 2, 2, seed=1, scale=3)
    mu[0], logvar[0] = 0, 0  # the prior itself
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), prior).sum(dim=(1, 2, 3))
    got = likelihood.kl(mu, logvar)
    assert got.shape == (4,)
    assert got[0] == 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


# --- the likelihoods


def test_bernoulli_sums_cross_entropy_over_pixels_and_averages_samples() -> None:
    logits, x = random(2, 5, 3, 4, 4, scale=3), uniform(5, 3, 4, 4)
    terms = F.binary_cross_entropy(torch.sigmoid(logits), x.expand_as(logits), reduction="none")
    got = likelihood.bernoulli(logits, x)
    assert got.shape == (5,)
    torch.testing.assert_close(got.double(), terms.sum(dim=(2, 3, 4)).mean(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_terms_of_bfloat16_outputs_are_computed_in_float32(name: str) -> None:
    outputs, x = random(1, 1, 3, 64, 64).bfloat16(), uniform(1, 3, 64, 64)
    exact = outputs[0].double()
    if name == "bernoulli":
        got, expected = likelihood.bernoulli(outputs, x), F.binary_cross_entropy_with_logits(exact, x, reduction="sum")
    else:
        got, expected = likelihood.squared_errors(name, outputs, x), (exact + 0.5 - x).square().sum()
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_squared_errors_sum_over_pixels_and_average_samples() -> None:
    outputs, x = random(3, 4, 3, 8, 8), uniform(4, 3, 8, 8)
    for name, means in (("bernoulli", 1 / (1 + torch.exp(-outputs))), ("gaussian", outputs + 0.5)):
        got = likelihood.squared_errors(name, outputs, x)
        assert got.shape == (4,)
        for b in range(4):
            terms = [float((means[s, b] - x[b]).square().sum()) for s in range(3)]
            assert float(got[b]) == pytest.approx(sum(terms) / 3, rel=1e-5)


@pytest.mark.parametrize("sigma", [1 / 255, 0.1, 1.0])
def test_gaussian_is_the_density_per_grey_level(sigma: float) -> None:
    """That of torch's Normal, on pixels scaled to 0..255."""
    outputs, x = random(2, 5, 3, 4, 4, scale=0.2), pixels(5, 3, 4, 4)
    errors = (outputs + 0.5 - x).square().sum(dim=(2, 3, 4)).mean(dim=0)
    expected = -Normal(255 * (outputs + 0.5), 255 * sigma).log_prob(255 * x).sum(dim=(2, 3, 4)).mean(dim=0)
    torch.testing.assert_close(likelihood.gaussian(errors, sigma, 48), expected, rtol=1e-6, atol=1e-4)


def test_best_sigma_minimises_the_gaussian_term() -> None:
    errors = 48 * uniform(5)  # of 5 images with 48 pixels
    best = likelihood.best_sigma(errors.sum(), 5 * 48)
    least = float(likelihood.gaussian(errors, best, 48).sum())
    for factor in (0.1, 0.5, 0.99, 0.999, 1.001, 1.01, 2.0, 10.0):
        assert float(likelihood.gaussian(errors, factor * best, 48).sum()) > least


def test_best_sigma_is_at_least_one_grey_level() -> None:
    for residual, sigma in ((0.0, 1.0), (0.99, 1.0), (1.01, 1.01), (255.0, 255.0)):  # in grey levels
        error = torch.tensor(48 * (residual / 255) ** 2, dtype=F64)
        assert float(likelihood.best_sigma(error, 48)) == pytest.approx(sigma / 255, rel=1e-9)


def test_best_sigma_as_a_constant_gives_the_gradient_of_half_the_log_of_the_squared_error() -> None:
    """Rybkin, Daniilidis & Levine 2021: the term with the best sigma is pixels / 2 * log(MSE) plus a constant."""
    outputs, x = random(2, 5, 3, 4, 4, scale=0.2).requires_grad_(), pixels(5, 3, 4, 4)
    errors = likelihood.squared_errors("gaussian", outputs, x)
    sigma = likelihood.best_sigma(errors.detach().sum(), x.numel())
    (got,) = torch.autograd.grad(likelihood.gaussian(errors, sigma, 48).sum(), outputs)
    (expected,) = torch.autograd.grad(x.numel() / 2 * (outputs + 0.5 - x).square().mean().log(), outputs)
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_decoded_mean_is_monotonic_within_0_and_1(name: str) -> None:
    outputs = torch.cat([torch.tensor([-1e4, -9.0]), torch.linspace(-1, 1, 101), torch.tensor([9.0, 1e4])])
    shown = likelihood.decoded_mean(name, outputs)
    expected = 1 / (1 + torch.exp(-outputs)) if name == "bernoulli" else (outputs + 0.5).clip(0, 1)
    torch.testing.assert_close(shown, expected)
    assert (shown.diff() >= 0).all()
    assert (shown.min(), shown.max()) == (0, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_extreme_outputs_have_finite_terms_and_gradients(name: str, value: float) -> None:
    for pixel in (0.0, 0.5, 1.0):
        outputs, x = torch.full((1, 1, 1, 1, 1), value, requires_grad=True), torch.full((1, 1, 1, 1), pixel)
        if name == "bernoulli":
            total = likelihood.bernoulli(outputs, x).sum()
        else:
            errors = likelihood.squared_errors(name, outputs, x)
            total = likelihood.gaussian(errors, likelihood.best_sigma(errors.detach().sum(), 1), 1).sum()
        total.backward()
        assert torch.isfinite(total)
        assert outputs.grad is not None
        assert torch.isfinite(outputs.grad).all()


# --- bits of 8-bit pixels


def mass(x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """The Gaussian's mass on the grey level of each pixel; black and white take the tails. Differences of cdf."""
    normal = Normal(mean, torch.full_like(mean, sigma))
    above = torch.where(x == 1, 1.0, normal.cdf(x + 0.5 / 255))
    below = torch.where(x == 0, 0.0, normal.cdf(x - 0.5 / 255))
    return above - below


@pytest.mark.parametrize("sigma", [1 / 255, 0.02, 0.2, 1.0])
@pytest.mark.parametrize(("eighths", "tolerance"), [(True, 1e-8), (False, 2e-3)])
def test_bits_equal_a_direct_computation(sigma: float, eighths: bool, tolerance: float) -> None:
    """Exactly if residuals are multiples of an eighth of a grey level, else up to the rounding to it."""
    x = pixels(40, 3, 16, 16)
    furthest = min(4 * sigma, 1)  # residuals beyond 1 count as 1
    means = x + (2 * sigma * random(2, 40, 3, 16, 16, seed=3)).clip(-furthest, furthest)  # also outside of [0, 1]
    if eighths:
        means = (means * 8 * 255).round() / (8 * 255)
    expected = -mass(x.expand_as(means), means, sigma).log2().mean()
    counts = likelihood.residual_counts(means.float(), x.float())
    assert likelihood.bits(counts, sigma) == pytest.approx(float(expected), abs=tolerance)


@pytest.mark.parametrize("mean", [-0.02, 0.0, 0.3, 1.0, 1.03])
@pytest.mark.parametrize("sigma", [1 / 255, 0.1, 0.2])
def test_masses_of_the_256_levels_add_up_to_one(mean: float, sigma: float) -> None:
    mean = round(mean * 8 * 255) / (8 * 255)
    means, total = torch.full((1, 1, 1, 1, 1), mean), 0.0
    for level in range(256):
        x = torch.full((1, 1, 1, 1), level / 255)
        total += 2 ** -likelihood.bits(likelihood.residual_counts(means, x), sigma)
    assert total == pytest.approx(1, abs=1e-6)


def test_residual_counts_of_batches_add_up() -> None:
    x, means = pixels(6, 3, 8, 8).float(), uniform(2, 6, 3, 8, 8, seed=5).float()
    counts = likelihood.residual_counts(means, x)
    parts = [likelihood.residual_counts(means[:, part], x[part]) for part in (slice(0, 2), slice(2, 6))]
    assert torch.equal(counts, parts[0] + parts[1])
    assert counts.dtype == torch.int64
    black, white = int((x == 0).sum()), int((x == 1).sum())
    assert counts.sum(dim=1).tolist() == [2 * black, 2 * (x.numel() - black - white), 2 * white]


def test_residual_counts_and_bits_of_nan_do_not_crash() -> None:
    x = pixels(1, 3, 8, 8).float()
    counts = likelihood.residual_counts(torch.full((1, 1, 3, 8, 8), math.nan), x)
    assert counts.sum() == x.numel()
    assert math.isnan(likelihood.bits(counts, math.nan))


# --- scores


def test_psnr_by_hand() -> None:
    decoded = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
    decoded[1, 0, 0, 0] = 1.0  # one of 48 values is off by the whole range
    got = likelihood.psnr(decoded, torch.zeros(3, 3, 4, 4))
    assert got.tolist() == pytest.approx([20.0, 10 * math.log10(48), 100.0], rel=1e-5)


@pytest.mark.parametrize(
    ("error", "mean_error", "expected"), [(0.0, 0.5, 1), (0.5, 0.5, 0), (0.125, 0.5, 0.75), (1.0, 0.5, -1)]
)
def test_explained_is_1_when_perfect_and_0_for_the_mean_image(error: float, mean_error: float, expected: float) -> None:
    assert likelihood.explained(error, mean_error) == expected


def test_explained_of_images_that_do_not_differ_is_nan() -> None:
    assert math.isnan(likelihood.explained(0.1, 0.0))
