"""Likelihoods, KL and scores against torch.distributions, numerical integration, brute force and hand calculation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import ContinuousBernoulli, Normal, kl_divergence

from dogvae.network import likelihood

NAMES = ["bernoulli", "continuous-bernoulli", "gaussian"]
NEAR_ZERO = [0.0, 1e-6, 1e-3, 0.02, 0.049, 0.0499999, 0.0500001, 0.051, 0.09, 0.5]  # a series takes over below 0.05


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bounded(logits: Tensor) -> Tensor:
    """The documented bound on logits of the continuous Bernoulli."""
    return 1000 * torch.tanh(logits / 1000)


def test_kl_equals_that_of_torch() -> None:
    mu, logvar = random(4, 3, 2, 2, scale=2), random(4, 3, 2, 2, seed=1, scale=3)
    mu[0], logvar[0] = 0, 0  # the prior itself
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), prior).sum(dim=(1, 2, 3))
    got = likelihood.kl(mu, logvar)
    assert got.shape == (4,)
    assert got[0] == 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_bernoulli_is_cross_entropy_of_probabilities() -> None:
    logits, x = random(2, 5, 3, 4, 4, scale=3), uniform(5, 3, 4, 4)
    expected = F.binary_cross_entropy(torch.sigmoid(logits), x.expand_as(logits), reduction="none")
    torch.testing.assert_close(likelihood.bernoulli(logits, x), expected, rtol=1e-10, atol=1e-12)


def test_continuous_bernoulli_equals_that_of_torch() -> None:
    logits = random(1000, scale=4)
    logits = torch.cat([logits[logits.abs() > 0.1], torch.tensor([s * v for v in NEAR_ZERO for s in (1, -1)]).double()])
    for x in (uniform(len(logits)), torch.zeros(len(logits)).double(), torch.ones(len(logits)).double()):
        expected = -ContinuousBernoulli(logits=bounded(logits)).log_prob(x)
        torch.testing.assert_close(likelihood.continuous_bernoulli(logits, x), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("logit", [-50.0, -5.0, -0.051, -0.049, 0.0, 0.01, 0.0499999, 0.0500001, 1.0, 30.0])
def test_continuous_bernoulli_is_a_density_with_the_decoded_mean(logit: float) -> None:
    """By integration over [0, 1]."""
    x = torch.linspace(0, 1, 20001, dtype=torch.float64)
    logits = torch.full_like(x, logit)
    density = torch.exp(-likelihood.continuous_bernoulli(logits, x))
    assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-6)
    mean = float(likelihood.decoded_mean("continuous-bernoulli", logits)[0])
    assert mean == pytest.approx(float(torch.trapezoid(density * x, x)), abs=1e-6)


@pytest.mark.parametrize(
    ("raw", "scale"), [(raw, (1 / 255) ** (1 / (1 + math.exp(raw)))) for raw in (-3.0, 0.0, 4.0)] + [(1e4, 1.0)]
)
def test_gaussian_equals_that_of_torch(raw: float, scale: float) -> None:
    """The sigmoid of the raw parameter interpolates log(scale) between one grey level and the whole range."""
    logits, x = random(2, 5, 3, 4, 4, scale=2), uniform(5, 3, 4, 4)
    expected = -Normal(torch.sigmoid(logits), scale).log_prob(x)
    got = likelihood.gaussian(logits, x, torch.tensor(raw, dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    smallest = likelihood.gaussian(logits, x, torch.tensor(-1e4, dtype=torch.float64))
    torch.testing.assert_close(smallest, -Normal(torch.sigmoid(logits), 1 / 255).log_prob(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_decoded_mean_is_monotonic_within_0_and_1(name: str) -> None:
    for logits in (torch.tensor([-1e4, -9.0, 0.0, 0.05, 9.0, 1e4]), torch.linspace(-1, 1, 101)):
        mean = likelihood.decoded_mean(name, logits)
        assert mean.min() >= 0
        assert mean.max() <= 1
        assert (mean.diff() >= -1e-6).all()
        if name != "continuous-bernoulli":
            torch.testing.assert_close(mean, 1 / (1 + torch.exp(-logits)))


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_sums_pixels_and_averages_samples(name: str) -> None:
    logits, x, scale = random(3, 4, 3, 8, 8), uniform(4, 3, 8, 8), torch.tensor(0.3)
    got = likelihood.reconstruction(name, logits, x, scale)
    assert got.shape == (4,)
    for b in range(4):
        terms = [likelihood.LIKELIHOODS[name](logits[s, b], x[b], scale).sum() for s in range(3)]
        assert float(got[b]) == pytest.approx(float(sum(terms)) / 3, rel=1e-5)


def test_reconstruction_of_bfloat16_is_computed_in_float32() -> None:
    logits, x = random(1, 1, 3, 64, 64).bfloat16(), uniform(1, 3, 64, 64)
    got = likelihood.reconstruction("bernoulli", logits, x)
    assert got.dtype == torch.float32
    exact = F.binary_cross_entropy_with_logits(logits[0].double(), x, reduction="sum")
    assert float(got) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_extreme_logits_have_finite_losses_and_gradients(name: str, value: float) -> None:
    for pixel in (0.0, 0.5, 1.0):
        logits = torch.full((1, 1, 1, 1, 1), value, requires_grad=True)
        scale = torch.tensor(value, requires_grad=True)
        total = likelihood.reconstruction(name, logits, torch.full((1, 1, 1, 1), pixel), scale).sum()
        total.backward()
        assert torch.isfinite(total)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        assert scale.grad is None or torch.isfinite(scale.grad)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name: str) -> None:
    logits = torch.tensor([-12.0, -3.0, -0.06, -0.03, 0.0, 0.02, 0.07, 5.0], dtype=torch.float64, requires_grad=True)
    scale, x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), uniform(8)
    assert torch.autograd.gradcheck(
        lambda *inputs: likelihood.LIKELIHOODS[name](inputs[0], x, inputs[1]), (logits, scale)
    )


@pytest.mark.parametrize("name", NAMES)
def test_floor_table_is_the_minimum_over_a_grid(name: str) -> None:
    x = torch.arange(256, dtype=torch.float64) / 255
    if name == "gaussian":
        means, scales = torch.linspace(0, 1, 256).double(), torch.logspace(math.log10(1 / 255), 0, 50).double()
        scores = -Normal(means[:, None, None], scales[None, :, None]).log_prob(x).flatten(0, 1)
    elif name == "bernoulli":
        p = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None].clamp(1e-12, 1 - 1e-12)
        scores = -(x * p.log() + (1 - x) * (1 - p).log())
    else:
        logits = 1000 * torch.linspace(-1, 1, 18002, dtype=torch.float64)[:, None] ** 5  # dense near 0
        # The density is |l| exp(-|l| d) / (1 - exp(-|l|)), d from the nearer end. torch's own ends at logits of 36.
        size, distance = logits.abs(), torch.where(logits > 0, 1 - x, x)
        scores = -(size.log() - size * distance - (-torch.expm1(-size)).log())
    table = likelihood.floor_table(name)
    assert table.shape == (256,)
    assert table.dtype == np.float64
    assert np.abs(table - scores.min(dim=0).values.numpy()).max() < 5e-4  # nats per pixel, from the width of the grid


@pytest.mark.parametrize("name", NAMES)
def test_flat_score_is_the_average_over_images(name: str) -> None:
    x = uniform(7, 3, 4, 4)
    prediction = 0.15 + 0.7 * uniform(3, 4, 4, seed=1)  # means that the bounded continuous Bernoulli can have
    got = likelihood.flat_score(name, prediction, x.mean(dim=0), x.square().mean(dim=0))
    if name == "bernoulli":
        terms, tolerance = F.binary_cross_entropy(prediction.expand_as(x), x, reduction="none"), 1e-8
    elif name == "gaussian":  # with the best of many scales
        scales = torch.logspace(math.log10(1 / 255), 0, 4001, dtype=torch.float64)
        averages = torch.stack([-Normal(prediction, s).log_prob(x).sum(dim=(1, 2, 3)).mean() for s in scales])
        terms, tolerance = -Normal(prediction, scales[averages.argmin()]).log_prob(x), 1e-4
    else:  # with the logit that has this mean, by bisection
        low, high = torch.full_like(prediction, -1000.0), torch.full_like(prediction, 1000.1)  # the middle is never 0
        for _ in range(60):
            middle = (low + high) / 2
            below = middle.expm1().reciprocal().add(1) - middle.reciprocal() < prediction  # the density is ~ exp(l x)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        terms, tolerance = -ContinuousBernoulli(logits=low).log_prob(x), 2e-3
    assert got == pytest.approx(float(terms.sum(dim=(1, 2, 3)).mean()), abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_flat_score_of_black_and_white_images_is_the_finite_floor(name: str) -> None:
    x = torch.zeros(3, 2, 2, dtype=torch.float64)
    x[:, 1] = 1
    floor = float(likelihood.floor_table(name)[(x * 255).int().numpy()].sum())
    assert likelihood.flat_score(name, x, x, x) == pytest.approx(floor, abs=2e-3)


def test_psnr_by_hand() -> None:
    decoded = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
    decoded[1, 0, 0, 0] = 1.0  # one of 48 values is off by the whole range
    got = likelihood.psnr(decoded, torch.zeros(3, 3, 4, 4))
    assert got.tolist() == pytest.approx([20.0, 10 * math.log10(48), 100.0], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "floor", "mean", "expected"),
    [(100, 100, 300, 1), (300, 100, 300, 0), (150, 100, 300, 0.75), (400, 100, 300, -0.5), (-150, -200, 0, 0.75)],
)
def test_explained_by_hand(loss: float, floor: float, mean: float, expected: float) -> None:
    assert likelihood.explained(loss, floor, mean) == expected
