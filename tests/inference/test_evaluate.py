"""The figures of an exported model: each against a closed form, another library or a slow computation of its own."""

from __future__ import annotations

import email.message
import io
import json
import math
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

import dogvae
from dogvae import rng
from dogvae.commands import cli, flags
from dogvae.config import ModelConfig
from dogvae.data.dataset import Dataset, Split
from dogvae.errors import UsageError
from dogvae.inference import evaluate as quality
from dogvae.inference.elbo import evaluate
from dogvae.inference.model import PRIORS, DogVAE
from dogvae.network import likelihood as loss
from dogvae.network.prior import Mixture
from dogvae.network.vae import VAE
from dogvae.rng import Stream
from dogvae.storage import Storage
from dogvae.training.export import export
from tests.support.command import ROOT
from tests.support.runs import job, make_dataset, train

CPU = torch.device("cpu")
LATENTS = 2 * 4 * 4
SAMPLES = 8
WEIGHTS = "inception_v3_google-0cc3c7bd.pth"  # what torchvision calls them
Writer = Callable[..., Path]


def quiet(text: str, done: int, total: int) -> None:
    """Nobody listens."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(make_dataset(tmp_path_factory.mktemp("quality") / "dataset"))


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a model that was trained for a moment."""
    run = tmp_path_factory.mktemp("quality") / "run"
    config = job(dataset.path, epochs=4, latent_dim=2, lr=1e-2)
    train(config, run)
    return Path(export(Storage(run), config).uri)


@pytest.fixture(scope="module")
def model(folder: Path) -> DogVAE:
    return dogvae.load(folder, "cpu")


@pytest.fixture(scope="module")
def figures(model: DogVAE, dataset: Dataset) -> dict[str, Any]:
    """What most people will see: all but the Inception network's."""
    return quality.measure(model, dataset, SAMPLES, False, quiet)


# --- structural similarity


def pairs(kind: str) -> tuple[Tensor, Tensor]:
    """Four pairs of images that are unrelated, noisy, shifted, or of other contrast."""
    a = F.interpolate(uniform(4, 3, 8, 8), (32, 32), mode="bilinear")
    others = {
        "unrelated": F.interpolate(uniform(4, 3, 8, 8, seed=1), (32, 32), mode="bilinear"),
        "noisy": (a + 0.1 * random(4, 3, 32, 32)).clamp(0, 1),
        "shifted": a.roll(2, dims=3),
        "contrast": 0.3 + 0.4 * a,
        "inverted": 1 - a,
    }
    return a, others[kind]


@pytest.mark.parametrize("kind", ["unrelated", "noisy", "shifted", "contrast", "inverted"])
def test_ssim_is_that_of_scikit_image(kind: str) -> None:
    """Theirs has a value for every pixel; only those whose window of 11 lies inside are of one meaning."""
    a, b = pairs(kind)
    expected = []
    for one, other in zip(a, b, strict=True):
        _, each = structural_similarity(
            one.permute(1, 2, 0).numpy(), other.permute(1, 2, 0).numpy(), gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=1, channel_axis=2, full=True,
        )  # fmt: skip
        expected.append(each[5:-5, 5:-5].mean())
    got = quality.ssim(a, b)
    assert got.shape == (4,)
    assert got.tolist() == pytest.approx(expected, abs=1e-9)
    assert max(expected) < 0.99
    assert quality.ssim(a.float(), b.float()).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_equal_images_is_one() -> None:
    a = uniform(3, 3, 32, 32).float()
    assert quality.ssim(a, a).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    black = torch.zeros(1, 3, 32, 32)
    assert quality.ssim(black, black).tolist() == pytest.approx([1], abs=1e-6)
    # Black and white have neither variance: only the means' term is left, c1 / (1 + c1).
    assert quality.ssim(black, black + 1).tolist() == pytest.approx([1e-4 / 1.0001], rel=1e-3)


# --- Frechet distance


def with_moments(mean: Tensor, deviation: Tensor) -> Tensor:
    """2d points whose mean is `mean` and whose covariance is diagonal, exactly."""
    d = len(mean)
    spread = math.sqrt(d) * torch.diag(deviation)
    return mean + torch.cat([spread, -spread])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The same for any number of features: the trace of (A B)^(1/2) is the nuclear norm of X Y^T, A = X^T X."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = ((each - each.mean(axis=0)) / math.sqrt(len(each)) for each in (a, b))
    both = scipy.linalg.svdvals(x @ y.T).sum()
    return float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * both)


def test_frechet_of_known_gaussians() -> None:
    """Diagonal covariances: the means' distance and the standard deviations' one, squared."""
    mean, other_mean = torch.tensor([1.0, 0.0, -2.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double()
    deviation, other_deviation = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.0]).double()
    got = quality.frechet(with_moments(mean, deviation), with_moments(other_mean, other_deviation))
    assert got == pytest.approx((1 + 9) + (4 + 0.25), rel=1e-9)


def test_frechet_of_turned_gaussians() -> None:
    """Covariances diag(4, 1) and the same turned by 90 degrees commute: (2 - 1)^2 twice."""
    a = with_moments(torch.zeros(2).double(), torch.tensor([2.0, 1.0]).double())
    assert quality.frechet(a, a.flip(1)) == pytest.approx(2, rel=1e-9)


def test_frechet_is_the_formula_with_a_matrix_root() -> None:
    """Covariances that do not commute, by scipy's general root of their product."""
    a, b = random(200, 12), 0.5 + random(150, 12, seed=1) @ random(12, 12, seed=2) / 3
    cov_a, cov_b = (np.cov(each.numpy().T, ddof=0) for each in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert quality.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert quality.frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert distance(a.numpy(), b.numpy()) == pytest.approx(expected, rel=1e-9)
    assert quality.frechet(a.float(), b.float()) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_fewer_samples_than_features() -> None:
    """The covariances are singular, as those of 2,048 features of some validation photos are."""
    a, b = random(5, 40), 1 + random(9, 40, seed=1)
    expected = distance(a.numpy(), b.numpy())
    assert quality.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert quality.frechet(b, a) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [7, 200])
def test_frechet_of_equal_sets_is_zero(n: int) -> None:
    a = random(n, 20)
    assert quality.frechet(a, a) == pytest.approx(0, abs=1e-5)
    assert quality.frechet(a, a[torch.randperm(n)]) == pytest.approx(0, abs=1e-5)


# --- bounds


def priors(seed: int = 0) -> dict[str, Tensor]:
    """One Gaussian and a mixture of two, near the posteriors that `invented` has."""
    tensors = {"directions": torch.eye(LATENTS)[:3], "scales": torch.ones(3)}
    for name, weights in (("gaussian", [1.0]), ("mixture", [0.3, 0.7])):
        k = len(weights)
        factors = torch.eye(LATENTS) + 0.1 * random(k, LATENTS, LATENTS, seed=seed + k).float().tril()
        means = 0.3 * random(k, LATENTS, seed=seed + 10 + k).float()
        tensors |= {f"{name}.weights": torch.tensor(weights), f"{name}.means": means, f"{name}.factors": factors}
    return tensors


def invented(likelihood: str = "bernoulli") -> DogVAE:
    """A model of random weights, none of which is 0, as some are at first; and priors of random moments."""
    config = ModelConfig(image_size=32, width=4, latent_dim=2, norm="group", likelihood=likelihood)
    torch.manual_seed(1)
    vae = VAE(config).eval()
    with torch.no_grad():
        for i, p in enumerate(vae.parameters()):
            p.add_(0.1 * random(*p.shape, seed=i).float())
    return DogVAE(vae, CPU, {}, priors())


def blind(mu: float, logvar: float) -> DogVAE:
    """A model whose decoder ignores the latents, and whose posterior is the same for every image."""
    model = invented()
    with torch.no_grad():
        pixels = model.model.decoder.layers[-1]
        head = model.model.encoder.layers[-1]
        assert isinstance(pixels, nn.ConvTranspose2d)
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        pixels.weight.zero_()
        head.weight.zero_()
        head.bias.copy_(torch.tensor([mu, mu, *2 * [10 * math.atanh(logvar / 10)]]))  # it is bounded by a tanh
    return model


def negative_log_likelihood(vae: VAE, z: Tensor, x: Tensor) -> float:
    """Of one image given one latent, by torch's distributions."""
    logits = vae.decoder(z[None])[0].double()
    pixel: Distribution = Bernoulli(logits=logits, validate_args=False)
    if vae.config.likelihood == "gaussian":
        assert vae.log_scale is not None
        scale = math.exp((1 - 1 / (1 + math.exp(-float(vae.log_scale)))) * math.log(1 / 255))
        pixel = Normal(torch.sigmoid(logits), scale)
    elif vae.config.likelihood == "continuous-bernoulli":
        pixel = ContinuousBernoulli(logits=1000 * torch.tanh(logits / 1000))
    return -float(pixel.log_prob(x.double()).sum())


def density(model: DogVAE, prior: str) -> Distribution:
    """A prior, in float64, by torch's distributions."""
    if prior == "normal":
        return MultivariateNormal(torch.zeros(LATENTS).double(), torch.eye(LATENTS).double())
    fitted: Mixture = model._priors[prior].double()
    parts = MultivariateNormal(fitted.means, scale_tril=fitted.factors)
    return MixtureSameFamily(Categorical(fitted.weights), parts)


def images(split: Split, n: int) -> Tensor:
    return split.gather(np.arange(n)).float() / 255


def validation(dataset: Dataset) -> Tensor:
    return images(dataset.val, len(dataset.val))


class First(Split):
    """The first images of a split."""

    def __init__(self, split: Split, n: int) -> None:
        self.split, self.n = split, n

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> Tensor:
        assert indices.max() < self.n
        return self.split.gather(indices)


@torch.no_grad()
@pytest.mark.parametrize("likelihood", loss.LIKELIHOODS)
def test_bounds_are_those_of_a_slow_computation(likelihood: str, dataset: Dataset) -> None:
    """One image and one draw at a time, with torch's distributions; more draws than the network takes at once."""
    model, n, samples = invented(likelihood), 3, quality.CHUNK + 8
    vae = model.model
    kls: dict[str, list[float]] = {prior: [] for prior in PRIORS}
    bounds: dict[str, list[float]] = {prior: [] for prior in PRIORS}
    for i, x in enumerate(images(dataset.val, n)):
        mu, logvar = (each[0].flatten().double() for each in vae.encoder(x[None]))
        posterior = Normal(mu, torch.exp(logvar / 2))
        generator = torch.Generator().manual_seed(rng.seed(Stream.IMPORTANCE, i))  # the documented draw
        noise = torch.randn((samples, 2, 4, 4), generator=generator).flatten(1)
        z = mu + posterior.scale * noise
        nll = [negative_log_likelihood(vae, each.float().view(2, 4, 4), x) for each in z]
        for prior in PRIORS:
            apart = [
                float(posterior.log_prob(each).sum()) - float(density(model, prior).log_prob(each[None])) for each in z
            ]
            kls[prior].append(float(np.mean(apart)))
            logs = -np.array(nll) - np.array(apart)
            bounds[prior].append(-float(np.log(np.mean(np.exp(logs - logs.max()))) + logs.max()))
    got = quality.bounds(model, First(dataset.val, n), samples, quiet)
    assert got["kl_by_prior"] == pytest.approx({k: np.mean(v) for k, v in kls.items()}, rel=1e-4)
    assert got["importance_weighted"] == pytest.approx({k: np.mean(v) for k, v in bounds.items()}, rel=2e-6)
    assert len({round(value, 3) for value in got["importance_weighted"].values()}) == 3  # the priors differ


@torch.no_grad()
def test_bound_is_exact_where_nothing_is_to_be_integrated(dataset: Dataset) -> None:
    """The posterior is N(0, I) and the decoder ignores it: every draw has the weight p(x)."""
    model = blind(0.0, 0.0)
    x = images(dataset.val, 3)
    exact = float(np.mean([negative_log_likelihood(model.model, torch.zeros(2, 4, 4), each) for each in x]))
    for samples in (1, 5):
        got = quality.bounds(model, First(dataset.val, 3), samples, quiet)
        assert got["importance_weighted"]["normal"] == pytest.approx(exact, rel=1e-6)
        assert got["kl_by_prior"]["normal"] == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_bound_comes_near_the_likelihood(dataset: Dataset) -> None:
    """The decoder ignores the latents, so -log p(x) is known; the posterior is not the prior: many draws tell it, while
    one draw is off by the KL on average.
    """
    model = blind(0.15, -0.1)
    nll = [negative_log_likelihood(model.model, torch.zeros(2, 4, 4), x) for x in validation(dataset)]
    divergence = LATENTS * 0.5 * (0.15**2 + math.exp(-0.1) - 1 + 0.1)
    many = quality.bounds(model, First(dataset.val, 1), 3000, quiet)
    assert many["kl_by_prior"]["normal"] == pytest.approx(divergence, abs=0.08)
    assert many["importance_weighted"]["normal"] == pytest.approx(nll[0], abs=0.08)
    one = quality.bounds(model, dataset.val, 1, quiet)
    assert one["importance_weighted"]["normal"] - np.mean(nll) == pytest.approx(one["kl_by_prior"]["normal"], abs=1e-2)


def test_bound_falls_with_the_draws(model: DogVAE, dataset: Dataset) -> None:
    several = [quality.bounds(model, dataset.val, n, quiet)["importance_weighted"] for n in (1, 8, 64)]
    for prior in PRIORS:
        first, second, third = (bound[prior] for bound in several)
        assert first > second > third


@torch.no_grad()
def test_bound_of_one_draw_is_the_negative_elbo(model: DogVAE, dataset: Dataset) -> None:
    """Within what so few draws may be off: 4 standard errors, which 30 other draws of each image tell."""
    torch.manual_seed(0)
    prior = density(model, "normal")
    means, variances = [], []
    for x in validation(dataset):
        mu, logvar = (each[0] for each in model.model.encoder(x[None]))
        posterior = Normal(mu, torch.exp(logvar / 2))
        terms = []
        for z in posterior.sample((30,)):
            apart = float(posterior.log_prob(z).sum()) - float(prior.log_prob(z.flatten().double()))
            terms.append(negative_log_likelihood(model.model, z, x) + apart)
        means.append(np.mean(terms))
        variances.append(np.var(terms, ddof=1))
    error = math.sqrt(sum(variances)) / len(means)
    got = quality.bounds(model, dataset.val, 1, quiet)["importance_weighted"]["normal"]
    assert got == pytest.approx(np.mean(means), abs=4 * error)
    assert got == pytest.approx(evaluate(model.model, dataset.val, CPU)["loss"], abs=4 * error)
    model.model.eval()
    assert 4 * error < 0.1 * abs(got)


def analytic(model: DogVAE, split: Split, prior: str, samples: int) -> tuple[float, float]:
    """The KL to a prior that is one Gaussian, averaged over images, and the standard error of a mean over draws."""
    target = density(model, "normal")
    if prior == "gaussian":
        fitted = model._priors[prior].double()
        target = MultivariateNormal(fitted.means[0], scale_tril=fitted.factors[0])
    assert isinstance(target, MultivariateNormal)
    precision = target.precision_matrix
    total, variance = 0.0, 0.0
    mus, logvars = (each.flatten(1).double() for each in model.model.encoder(images(split, len(split))))
    for mu, var in zip(mus, logvars.exp(), strict=True):
        total += float(kl_divergence(MultivariateNormal(mu, torch.diag(var)), target))
        # log q - log p is a quadratic form of the noise; its variance is that of one.
        root = var.sqrt()
        form = root[:, None] * precision * root - torch.eye(LATENTS)
        slope = root * (precision @ (mu - target.mean))
        variance += float(0.5 * form.square().sum() + slope.square().sum())
    return total / len(mus), math.sqrt(variance / samples) / len(mus)


@torch.no_grad()
@pytest.mark.parametrize("prior", ["normal", "gaussian"])
def test_divergence_is_the_analytic_one(prior: str, model: DogVAE, dataset: Dataset) -> None:
    """Within 4 standard errors of the mean over draws."""
    samples = 300
    got = quality.bounds(model, dataset.val, samples, quiet)["kl_by_prior"][prior]
    expected, error = analytic(model, dataset.val, prior, samples)
    assert got == pytest.approx(expected, abs=4 * error)
    assert error < 0.02 * expected
    if prior == "normal":
        mu, logvar = model.model.encoder(validation(dataset))
        assert got == pytest.approx(float(loss.kl(mu, logvar).mean()), abs=4 * error)


def test_fitted_priors_are_nearer_than_the_normal_one(model: DogVAE, dataset: Dataset) -> None:
    """To the training images' posteriors, which they are fitted to: no Gaussian can be nearer than the best one."""
    got = quality.bounds(model, dataset.train, 16, quiet)["kl_by_prior"]
    assert got["gaussian"] < 0.95 * got["normal"]
    assert got["mixture"] < 0.95 * got["normal"]


# --- all figures


def test_figures_are_those_of_the_run(figures: dict[str, Any], folder: Path, model: DogVAE, dataset: Dataset) -> None:
    """What was recorded while it was trained, what validation gives, and what the export says."""
    recorded = json.loads((folder / "config.json").read_text())["metrics"]
    afresh = evaluate(model.model, dataset.val, CPU)
    model.model.eval()
    for name in ("loss", "reconstruction", "kl", "psnr", "active_latents"):
        assert figures[name] == pytest.approx(recorded[f"val_{name}"], rel=1e-6)
        assert figures[name] == pytest.approx(afresh[name], rel=1e-6)
    assert figures["explained"] == pytest.approx(recorded["val_explained"], rel=1e-6)
    assert figures["images"] == 20


def test_measuring_leaves_the_model_as_it_was(figures: dict[str, Any], model: DogVAE, folder: Path) -> None:
    """With batch norm, a model that was left in training would draw other dogs."""
    assert not model.model.training
    assert np.array_equal(model.sample(3), dogvae.load(folder, "cpu").sample(3))


def test_ssim_is_that_of_the_reconstructions(figures: dict[str, Any], model: DogVAE, dataset: Dataset) -> None:
    with torch.no_grad():
        x = validation(dataset)
        decoded = model.model.decode_mean(model.model.encoder(x)[0])
    scores = [
        structural_similarity(
            a.permute(1, 2, 0).double().numpy(), b.permute(1, 2, 0).double().numpy(), gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=1, channel_axis=2, full=True,
        )[1][5:-5, 5:-5].mean()
        for a, b in zip(decoded, x, strict=True)
    ]  # fmt: skip
    assert figures["ssim"] == pytest.approx(np.mean(scores), abs=1e-4)


def test_frechet_distances_are_of_what_a_person_would_see(
    figures: dict[str, Any], model: DogVAE, dataset: Dataset
) -> None:
    """Of as many samples as there are training images, rounded to 8 bits, encoded one by one."""

    @torch.no_grad()
    def features(pictures: Tensor) -> np.ndarray:
        return np.stack([model.model.encoder(x[None])[0].flatten().numpy() for x in pictures])

    val = features(validation(dataset))
    expected = {"training": distance(val, features(images(dataset.train, 100)))}
    for prior in PRIORS:
        samples = torch.from_numpy(model.sample(100, prior=prior)).permute(0, 3, 1, 2).float() / 255
        expected[prior] = distance(val, features(samples))
    assert figures["frechet"] == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 3) for value in expected.values()}) >= 3


def test_figures_are_all_there_and_json(figures: dict[str, Any]) -> None:
    one = {"images", "loss", "reconstruction", "kl", "psnr", "active_latents", "explained", "ssim"}
    several = {"kl_by_prior": PRIORS, "importance_weighted": PRIORS, "frechet": ("training", *PRIORS)}
    assert set(figures) == one | set(several) | {"frechet_inception", "without_inception"}
    for name, keys in several.items():
        assert set(figures[name]) == set(keys)
        assert all(isinstance(value, float) and math.isfinite(value) for value in figures[name].values())
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["frechet_inception"] is None
    assert figures["without_inception"] is None


def test_figures_are_the_same_again(figures: dict[str, Any], folder: Path, dataset: Dataset) -> None:
    """Whatever the global generator does."""
    torch.manual_seed(99)
    assert quality.measure(dogvae.load(folder, "cpu"), dataset, SAMPLES, False, quiet) == figures


def test_progress_is_told(model: DogVAE, dataset: Dataset) -> None:
    heard: dict[str, list[tuple[int, int]]] = {}
    quality.measure(
        model, dataset, 2, False, lambda text, done, total: heard.setdefault(text, []).append((done, total))
    )
    assert heard["importance-weighted bound, image"] == [(i, 20) for i in range(1, 21)]
    for kind in ("training", *PRIORS):
        ends = [told[-1] for text, told in heard.items() if text.startswith(f"Frechet distance, {kind}:")]
        assert ends == [(100, 100)]


def test_progress_does_not_go_beyond_its_end(model: DogVAE, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more validation images than are compared."""
    monkeypatch.setattr(quality, "SAMPLED", 4)
    heard: list[tuple[int, int]] = []
    quality.measure(model, dataset, 1, False, lambda text, done, total: heard.append((done, total)))
    assert (4, 4) in heard
    assert all(done <= total for done, total in heard)


def test_table_has_every_figure(figures: dict[str, Any]) -> None:
    """Each in a line of its own, with its unit."""
    inception = {"training": 11.25, "mixture": 22.25, "gaussian": 33.25, "normal": 44.25}
    lines = quality.table({**figures, "frechet_inception": inception}, SAMPLES).splitlines()
    assert lines[0] == "20 validation images"

    def said(*words: str) -> str:
        (line,) = (line for line in lines if all(word in line for word in words))
        return line.split("  ")[-1].strip()

    f = figures
    assert said("negative ELBO") == f"{f['loss']:,.1f} nats"
    assert said("reconstruction") == f"{f['reconstruction']:,.1f} nats"
    assert said("KL to N(0, I)") == f"{f['kl']:,.1f} nats"
    assert said("KL to the fitted Gaussian") == f"{f['kl_by_prior']['gaussian']:,.1f} nats"
    assert said("KL to the fitted mixture") == f"{f['kl_by_prior']['mixture']:,.1f} nats"
    for prior, name in (("normal", "N(0, I)"), ("gaussian", "Gaussian"), ("mixture", "mixture")):
        assert said("log p(x)", name, f"{SAMPLES} draws") == f"{f['importance_weighted'][prior]:,.1f} nats"
    assert said("explained") == f"{f['explained']:.3f}"
    assert said("PSNR") == f"{f['psnr']:.2f} dB"
    assert said("SSIM") == f"{f['ssim']:.3f}"
    assert said("active latents") == str(f["active_latents"])
    for network, values in (("encoder", f["frechet"]), ("Inception", inception)):
        assert said("Frechet", network, "training") == f"{values['training']:,.1f}"
        for prior in PRIORS:
            assert said("Frechet", network, "samples", prior) == f"{values[prior]:,.1f}"
    assert not any("Inception" in line for line in quality.table(figures, SAMPLES).splitlines())


def test_dataset_of_another_size_is_refused(model: DogVAE, write_dataset: Writer) -> None:
    other = write_dataset([np.zeros((4, 3, 64, 64), np.uint8)], [np.zeros((2, 3, 64, 64), np.uint8)])
    with pytest.raises(UsageError, match=r"images of 64 pixels, this model is for 32"):
        quality.measure(model, Dataset(other), 1, False, quiet)


@pytest.mark.parametrize("samples", [0, -1])
def test_without_draws_there_is_no_bound(samples: int, model: DogVAE, dataset: Dataset) -> None:
    with pytest.raises(UsageError, match=f"--samples: {samples} is too small"):
        quality.measure(model, dataset, samples, False, quiet)


def test_few_images(model: DogVAE, write_dataset: Writer) -> None:
    """One for validation and two for training still give numbers."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    figures = quality.measure(model, Dataset(write_dataset([pixels[:2]], [pixels[2:]])), 2, False, quiet)
    assert figures["images"] == 1
    json.dumps(figures, allow_nan=False)


# --- the Inception network


class Answer(io.BytesIO):
    """What a server may send in place of the weights."""

    def info(self) -> email.message.Message:
        return email.message.Message()


def offline(monkeypatch: pytest.MonkeyPatch, where: Path, answer: Exception | bytes) -> None:
    """No weights here, and this in place of the internet."""

    def urlopen(*args: Any, **kwargs: Any) -> Answer:
        if isinstance(answer, Exception):
            raise answer
        return Answer(answer)

    monkeypatch.setenv("TORCH_HOME", str(where))
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (urllib.error.URLError(OSError(101, "Network is unreachable")), "Network is unreachable"),
        (urllib.error.HTTPError("https://x", 403, "Forbidden", email.message.Message(), None), "Forbidden"),
        (TimeoutError("timed out"), "timed out"),
        (b"<html>please log in</html>", "invalid hash value"),
    ],
    ids=["no route", "forbidden", "no answer", "something else"],
)
def test_without_internet_all_else_is_there(
    answer: Exception | bytes,
    reason: str,
    figures: dict[str, Any],
    model: DogVAE,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offline(monkeypatch, tmp_path, answer)
    before = socket.getdefaulttimeout()
    got = quality.measure(model, dataset, SAMPLES, True, quiet)
    assert socket.getdefaulttimeout() == before
    line = got.pop("without_inception")
    assert line.startswith("the Inception network's weights could not be downloaded: ")
    assert reason in line
    assert "\n" not in line
    assert got == {k: v for k, v in figures.items() if k != "without_inception"}
    assert quality.table({**got, "without_inception": line}, SAMPLES).splitlines()[-1].startswith(line)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network of random weights, lying where the real ones would; the same built independently."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, transform_input=True)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.5)  # or little would be left of the differences after so many layers
    path = tmp_path / "hub/checkpoints" / WEIGHTS
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    offline(monkeypatch, tmp_path, AssertionError("the weights are here, nothing is to be downloaded"))
    return network.eval()


@torch.no_grad()
def pooled(network: nn.Module, pictures: Tensor) -> np.ndarray:
    """What the last pooling gives: photos resized and normalised as torchvision says."""
    from torchvision.transforms.functional import InterpolationMode, normalize, resize

    out: list[Tensor] = []
    hook = network.avgpool.register_forward_hook(lambda module, inputs, output: out.append(output.flatten(1)))  # type: ignore[operator,union-attr]
    for x in pictures:
        large = resize(x[None], [299, 299], InterpolationMode.BILINEAR, antialias=True)
        network(normalize(large, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    hook.remove()
    return torch.cat(out).numpy()


def test_inception_features_are_those_before_the_classifier(inception: nn.Module, dataset: Dataset) -> None:
    x = images(dataset.val, 2)
    with torch.no_grad():
        got = quality._inception(CPU)(x)
    expected = pooled(inception, x)
    assert got.shape == (2, 2048)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3 * np.abs(expected).max()
    assert np.abs(got.numpy() - expected).max() < 1e-4 * np.abs(expected[0] - expected[1]).max()


@pytest.mark.slow
def test_inception_distances(
    inception: nn.Module, model: DogVAE, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few pictures: each costs as much as a thousand of ours."""
    monkeypatch.setattr(quality, "SAMPLED", 4)
    got = quality.measure(model, dataset, 1, True, quiet)
    assert got["without_inception"] is None
    val = pooled(inception, images(dataset.val, 4))
    expected = {"training": distance(val, pooled(inception, images(dataset.train, 4)))}
    for prior in PRIORS:
        samples = torch.from_numpy(model.sample(4, prior=prior)).permute(0, 3, 1, 2).float() / 255
        expected[prior] = distance(val, pooled(inception, samples))
    assert got["frechet_inception"] == pytest.approx(expected, rel=0.01)
    assert all(value > 0 for value in expected.values())


# --- the command


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `dogvae ...`."""
    code = flags.run(cli._main, [*map(str, argv), "--device", "cpu"])
    return code, *capsys.readouterr()


def test_command_prints_json(
    folder: Path, dataset: Dataset, figures: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("evaluate", folder, dataset.path, "--json", "--no-inception", "--samples", SAMPLES)
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    assert json.loads(out) == figures


@pytest.mark.slow
def test_command_as_it_is_typed(folder: Path, dataset: Dataset, figures: dict[str, Any]) -> None:
    """JSON on stdout and nothing else, for another program to read."""
    script = Path(sys.executable).with_name("dogvae")
    args = ["evaluate", folder, dataset.path, "--json", "--no-inception", "--samples", str(SAMPLES), "--device", "cpu"]
    done = subprocess.run([script, *args], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    got = json.loads(done.stdout)
    assert set(got) == set(figures)
    for name in ("images", "active_latents", "loss", "ssim", "kl_by_prior", "importance_weighted"):
        assert got[name] == pytest.approx(figures[name], rel=1e-4)


def test_command_prints_the_table(
    folder: Path, dataset: Dataset, figures: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "evaluate", folder, dataset.path, "--no-inception", "--samples", SAMPLES)
    assert (code, err) == (0, "")
    assert out == quality.table(figures, SAMPLES) + "\n"


def test_command_says_what_is_wrong(
    folder: Path, dataset: Dataset, write_dataset: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset([np.zeros((4, 3, 64, 64), np.uint8)], [np.zeros((2, 3, 64, 64), np.uint8)])
    for argv, text in (
        ((tmp_path / "none", dataset.path), "is no exported model"),
        ((folder.parent, dataset.path), "a run keeps its own in RUN/export"),
        ((folder, tmp_path / "none"), "none"),
        ((folder, folder), str(folder)),
        ((folder, other), "images of 64 pixels"),
        ((folder, dataset.path, "--samples", "0"), "--samples: 0 is too small"),
        ((folder, dataset.path, "--samples", "many"), "--samples: invalid int value"),
    ):
        code, out, err = run(capsys, "evaluate", *argv, "--no-inception", "--json")
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert text in err
