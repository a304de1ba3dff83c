"""Likelihoods, KL and scores, against torch.distributions, brute force and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, ContinuousBernoulli, Normal, kl_divergence

from dogvae.config import ModelConfig
from dogvae.network import likelihood as loss
from dogvae.network.vae import LOGVAR_BOUND, Encoder

NAMES = ["bernoulli", "continuous-bernoulli", "gaussian"]
GREY = np.arange(256) / 255


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bounded(logits: Tensor) -> Tensor:
    """What the continuous Bernoulli makes of its logits, so that an all-black pixel cannot score infinitely well."""
    return 1000 * torch.tanh(logits / 1000)


# --- KL


def test_kl_is_torchs() -> None:
    mu, logvar = random(4, 3, 2, 2, scale=2), random(4, 3, 2, 2, seed=1, scale=2)
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), prior).sum(dim=(1, 2, 3))
    got = loss.kl(mu, logvar)
    assert got.shape == (4,)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_kl_by_hand() -> None:
    """Two latents, N(1, 1) and N(0, e): 1/2 + (e - 1 - 1)/2. And a posterior that is the prior costs nothing."""
    mu, logvar = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert float(loss.kl(mu, logvar)) == pytest.approx(0.5 + (math.e - 2) / 2, rel=1e-6)
    assert float(loss.kl(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1))) == 0


@settings(max_examples=50, deadline=None)
@given(st.floats(-5, 5), st.floats(-10, 10))
def test_kl_is_never_negative(mu: float, logvar: float) -> None:
    assert float(loss.kl(torch.full((1, 1, 1, 1), mu), torch.full((1, 1, 1, 1), logvar))) >= -1e-6


# --- likelihoods


def test_bernoulli_is_the_cross_entropy_of_probabilities() -> None:
    logits, x = random(2, 5, 3, 4, 4, scale=3), uniform(5, 3, 4, 4)
    got = loss.bernoulli(logits, x)
    assert got.shape == logits.shape
    probabilities = torch.sigmoid(logits)
    torch.testing.assert_close(
        got, F.binary_cross_entropy(probabilities, x.expand_as(logits), reduction="none"), rtol=1e-10, atol=1e-12
    )
    by_hand = -(x * probabilities.log() + (1 - x) * (1 - probabilities).log())
    torch.testing.assert_close(got, by_hand, rtol=1e-10, atol=1e-12)
    black_or_white = (x > 0.5).double().expand_as(logits)
    torch.testing.assert_close(
        loss.bernoulli(logits, black_or_white), -Bernoulli(logits=logits).log_prob(black_or_white), rtol=1e-10, atol=0
    )


def test_continuous_bernoulli_is_torchs() -> None:
    logits, x = random(1000, scale=4), uniform(1000)
    got = loss.continuous_bernoulli(logits, x)
    expected = -ContinuousBernoulli(logits=bounded(logits)).log_prob(x)
    away = bounded(logits).abs() > 0.1  # near 0 torch itself resorts to a series
    torch.testing.assert_close(got[away], expected[away], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("at", [0.0, 1e-6, 1e-3, 0.02, 0.049, 0.0499999, 0.0500001, 0.051, 0.09, 0.5])
def test_continuous_bernoulli_near_zero(at: float) -> None:
    """Where our series takes over, the density must neither jump nor lose digits; torch takes over elsewhere."""
    for sign in (1.0, -1.0):
        logits = torch.tensor([sign * at], dtype=torch.float64)
        for x in (0.0, 0.3, 1.0):
            got = float(loss.continuous_bernoulli(logits, torch.tensor([x], dtype=torch.float64)))
            expected = -float(ContinuousBernoulli(logits=bounded(logits)).log_prob(torch.tensor(x).double()))
            assert got == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("logit", [-50.0, -5.0, -0.04, 0.0, 0.03, 1.0, 30.0])
def test_continuous_bernoulli_is_a_density(logit: float) -> None:
    """Integrated over [0, 1] it is 1, however large the logit (which is bounded)."""
    x = torch.linspace(0, 1, 20001, dtype=torch.float64)
    density = torch.exp(-loss.continuous_bernoulli(torch.full_like(x, logit), x))
    assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-6)


def test_gaussian_is_torchs() -> None:
    logits, x = random(2, 5, 3, 4, 4, scale=2), uniform(5, 3, 4, 4)
    for raw in (-3.0, 0.0, 1.0, 4.0):
        share = 1 / (1 + math.exp(-raw))
        scale = math.exp((1 - share) * math.log(1 / 255))  # between one grey level and the whole range
        expected = -Normal(torch.sigmoid(logits), scale).log_prob(x)
        got = loss.gaussian(logits, x, torch.tensor(raw, dtype=torch.float64))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("raw", "scale"), [(-1e4, 1 / 255), (1e4, 1.0)])
def test_gaussian_scale_is_bounded(raw: float, scale: float) -> None:
    got = loss.gaussian(torch.zeros(1), torch.full((1,), 0.75), torch.tensor(raw))
    assert float(got) == pytest.approx(-float(Normal(0.5, scale).log_prob(torch.tensor(0.75))), rel=1e-5)


def test_decoded_mean() -> None:
    logits = random(1000, scale=4)
    for name in ("bernoulli", "gaussian"):
        torch.testing.assert_close(loss.decoded_mean(name, logits), 1 / (1 + torch.exp(-logits)), rtol=1e-12, atol=0)
    got = loss.decoded_mean("continuous-bernoulli", logits)
    torch.testing.assert_close(got, ContinuousBernoulli(logits=bounded(logits)).mean, rtol=0, atol=1e-6)
    assert (got - torch.sigmoid(logits)).abs().max() > 0.05  # the two means are not to be taken for each other


def test_decoded_mean_near_zero() -> None:
    """The mean as an integral over the density, where our series takes over."""
    x = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for logit in (-0.051, -0.049, 0.0, 0.01, 0.0499999, 0.0500001):
        density = torch.exp(logit * x)
        expected = float(torch.trapezoid(density * x, x) / torch.trapezoid(density, x))
        got = loss.decoded_mean("continuous-bernoulli", torch.tensor([logit], dtype=torch.float64))
        assert float(got) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_decoded_mean_is_a_picture(name: str) -> None:
    for logits in (torch.tensor([-1e4, -9.0, 0.0, 0.05, 9.0, 1e4]), torch.linspace(-1, 1, 101)):
        mean = loss.decoded_mean(name, logits)
        assert mean.min() >= 0
        assert mean.max() <= 1
        assert (mean.diff() >= -1e-6).all()


def test_reconstruction_sums_pixels_and_averages_samples() -> None:
    """2 samples, 1 image of 2 pixels in one channel. -log p of a white pixel at logit l is log(1 + exp(-l))."""
    probabilities = torch.tensor([[0.5, 0.25], [0.8, 0.1]])
    logits = torch.logit(probabilities).view(2, 1, 1, 1, 2)
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    first = -math.log(0.5) - math.log(0.75)
    second = -math.log(0.8) - math.log(0.9)
    got = loss.reconstruction("bernoulli", logits, x)
    assert got.shape == (1,)
    assert float(got) == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_keeps_images_apart(name: str) -> None:
    likelihoods: dict[str, Callable[..., Tensor]] = {
        "bernoulli": loss.bernoulli,
        "continuous-bernoulli": loss.continuous_bernoulli,
        "gaussian": loss.gaussian,
    }
    logits, x, scale = random(3, 4, 3, 8, 8), uniform(4, 3, 8, 8), torch.tensor(0.3)
    got = loss.reconstruction(name, logits, x, scale)
    for b in range(4):
        terms = [likelihoods[name](logits[s, b], x[b], scale).sum() for s in range(3)]
        assert float(got[b]) == pytest.approx(float(sum(terms)) / 3, rel=1e-5)


def test_reconstruction_is_in_fp32() -> None:
    logits, x = random(1, 1, 3, 64, 64).bfloat16(), uniform(1, 3, 64, 64)
    got = loss.reconstruction("bernoulli", logits, x)
    assert got.dtype == torch.float32
    exact = F.binary_cross_entropy_with_logits(logits[0].double(), x, reduction="sum")
    assert float(got) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_extreme_logits_have_finite_losses_and_gradients(name: str, value: float) -> None:
    for pixel in (0.0, 0.5, 1.0):
        logits = torch.full((1, 1, 1, 1, 1), value, requires_grad=True)
        scale = torch.tensor(value, requires_grad=True)
        total = loss.reconstruction(name, logits, torch.full((1, 1, 1, 1), pixel), scale).sum()
        total.backward()
        assert torch.isfinite(total)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        assert scale.grad is None or torch.isfinite(scale.grad)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right(name: str) -> None:
    logits = torch.tensor([-12.0, -3.0, -0.06, -0.03, 0.0, 0.02, 0.07, 5.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = uniform(8)
    assert torch.autograd.gradcheck(lambda l, s: loss.LIKELIHOODS[name](l, x, s), (logits, scale))  # noqa: E741


def test_log_variance_is_bounded() -> None:
    """However far the last layer goes, exp() of the default log-variance stays finite, and so do gradients."""
    encoder = Encoder(ModelConfig(image_size=32, width=8, latent_dim=4))
    with torch.no_grad():
        encoder.layers[-1].weight.mul_(1e6)  # type: ignore[union-attr,operator]
    mu, logvar = encoder(torch.rand(4, 3, 32, 32))
    assert logvar.abs().max() <= LOGVAR_BOUND == 10
    assert logvar.abs().max() > 9.9
    assert mu.abs().max() > 1e3  # only the log-variance is bounded
    loss.kl(mu * 0, logvar).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in encoder.parameters())


# --- scores


FLOORS = [
    "bernoulli",
    "continuous-bernoulli",
    "gaussian",
]


@pytest.mark.parametrize("name", FLOORS)
def test_floor_table_by_brute_force(name: str) -> None:
    x = torch.from_numpy(GREY)
    if name == "gaussian":
        means, scales = torch.linspace(0, 1, 256).double(), torch.logspace(math.log10(1 / 255), 0, 50).double()
        every = -Normal(means[:, None, None], scales[None, :, None]).log_prob(x).flatten(0, 1)
    elif name == "bernoulli":
        p = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None].clamp(1e-12, 1 - 1e-12)
        every = -(x * p.log() + (1 - x) * (1 - p).log())
    else:
        # Dense near 0 and up to the bound.
        logits = 1000 * torch.linspace(-1, 1, 18002, dtype=torch.float64)[:, None] ** 5
        # The density is |l| exp(-|l| d) / (1 - exp(-|l|)), d from the nearer end; torch's own stops at logits of 36.
        size, distance = logits.abs(), torch.where(logits > 0, 1 - x, x)
        every = -(size.log() - size * distance - (-torch.expm1(-size)).log())
    table = loss.floor_table(name)
    assert table.shape == (256,)
    assert table.dtype == np.float64
    assert np.abs(table - every.min(dim=0).values.numpy()).max() < 5e-4  # nats of a pixel, for the grid's width


@pytest.mark.parametrize("name", FLOORS)
def test_floor_is_below_any_score(name: str) -> None:
    levels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    floor = loss.floor_table(name)[levels.numpy()].sum(axis=(1, 2, 3))
    for scale in (0.1, 3.0, 30.0):
        logits = random(1, 2, 3, 8, 8, scale=scale)
        assert (loss.reconstruction(name, logits, levels / 255, torch.tensor(-5.0)).numpy() >= floor - 1e-2).all()


@pytest.mark.parametrize("name", NAMES)
def test_flat_score_is_the_average_over_images(name: str) -> None:
    x = uniform(7, 3, 4, 4)
    prediction = 0.15 + 0.7 * uniform(3, 4, 4, seed=1)  # all means that the bounded continuous Bernoulli can have
    got = loss.flat_score(name, prediction, x.mean(dim=0), x.square().mean(dim=0))
    if name == "bernoulli":
        terms = F.binary_cross_entropy(prediction.expand_as(x), x, reduction="none")
        tolerance = 1e-8
    elif name == "gaussian":
        # The best of all scales, found by trying them.
        scales = torch.logspace(math.log10(1 / 255), 0, 4001, dtype=torch.float64)
        averages = torch.stack([-Normal(prediction, s).log_prob(x).sum(dim=(1, 2, 3)).mean() for s in scales])
        terms = -Normal(prediction, scales[averages.argmin()]).log_prob(x)
        tolerance = 1e-4
    else:
        # The logit that has this mean, by bisection.
        low, high = torch.full_like(prediction, -1000.0), torch.full_like(prediction, 1000.1)  # never 0 in the middle
        for _ in range(60):
            middle = (low + high) / 2
            below = middle.expm1().reciprocal().add(1) - middle.reciprocal() < prediction  # the density is ~ exp(l x)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        terms = -ContinuousBernoulli(logits=low).log_prob(x)
        tolerance = 2e-3
    assert got == pytest.approx(float(terms.sum(dim=(1, 2, 3)).mean()), abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_flat_score_of_the_mean_is_the_best(name: str) -> None:
    """No other flat prediction scores better than the images' own mean: it is what a model must beat."""
    x = uniform(7, 3, 4, 4)
    moments = x.mean(dim=0), x.square().mean(dim=0)
    best = loss.flat_score(name, moments[0], *moments)
    for seed in range(5):
        other = (moments[0] + random(3, 4, 4, seed=seed, scale=0.05)).clamp(0, 1)
        assert loss.flat_score(name, other, *moments) > best


@pytest.mark.parametrize("name", FLOORS)
def test_flat_score_of_black_and_white_is_finite(name: str) -> None:
    x = torch.zeros(3, 2, 2, dtype=torch.float64)
    x[:, 1] = 1
    got = loss.flat_score(name, x, x, x)
    floor = float(loss.floor_table(name)[(x * 255).int().numpy()].sum())
    assert got == pytest.approx(floor, abs=2e-3)


def test_psnr_by_hand() -> None:
    x = torch.zeros(3, 3, 4, 4)
    decoded = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
    decoded[1, 0, 0, 0] = 1.0  # one of 48 values is off by the whole range
    got = loss.psnr(decoded, x)
    assert got.tolist() == pytest.approx([20.0, 10 * math.log10(48), 100.0], rel=1e-5)


def test_explained_by_hand() -> None:
    assert loss.explained(100.0, 100.0, 300.0) == 1
    assert loss.explained(300.0, 100.0, 300.0) == 0
    assert loss.explained(150.0, 100.0, 300.0) == 0.75
    assert loss.explained(400.0, 100.0, 300.0) == -0.5
    assert loss.explained(-150.0, -200.0, 0.0) == 0.75  # densities can have negative floors
