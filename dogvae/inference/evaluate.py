"""What `dogvae evaluate` shows: bounds on the likelihood, quality of reconstructions and of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dogvae import rng
from dogvae.console import explained_text
from dogvae.data.dataset import Dataset, Split
from dogvae.errors import UsageError
from dogvae.inference.elbo import evaluate, mean_error
from dogvae.inference.features import Kinds, Report, collect, distances
from dogvae.inference.inception import load_inception
from dogvae.inference.model import DogVAE
from dogvae.inference.priors import DENSITIES
from dogvae.inference.verdict import judge_rows, rounded, verdict
from dogvae.network.likelihood import bernoulli, explained, gaussian, squared_errors
from dogvae.network.vae import VAE
from dogvae.rng import Stream

SAMPLED = 2048  # pictures of each kind in a Frechet distance, which depends on their number
CHUNK = 32  # images that a network gets at a time


def measure(model: DogVAE, dataset: Dataset, samples: int, inception: bool, report: Report) -> dict[str, Any]:
    """All figures of a model on the validation split; likelihoods are in nats per image.

    `samples` is the number of draws of the importance-weighted bound. The Frechet distances compare the validation
    images with samples from each prior, and with training images: the distance that a perfect model could reach.
    `dogvae.inference.verdict` has the judge's figures.
    Raises UsageError if the dataset's images have another size, or if `samples` is less than 1.
    """
    model.check_size(dataset)
    if samples < 1:
        raise UsageError(f"--samples: {samples} is too small, it must be at least 1")
    net, val = model.model, dataset.val
    report("validation, part", 0, 2)
    figures: dict[str, Any] = {"images": len(val), **evaluate(net, val, model.device, sigma=model.sigma)}
    net.eval()
    share = explained(figures.pop("error"), mean_error(dataset))
    figures["explained"] = share if math.isfinite(share) else None  # JSON has no NaN
    report("validation, part", 1, 2)
    figures["ssim"] = _mean_ssim(net, val, model.device)
    figures |= bounds(model, val, samples, report)
    n = min(SAMPLED, max(len(val), len(dataset.train)))
    kinds: Kinds = {"validation": lambda n: _chunks(val, n), "training": lambda n: _chunks(dataset.train, n)}
    for prior in model.priors:
        kinds[prior] = lambda n, prior=prior: _drawn(model, n, prior)  # type: ignore[misc]
    figures["frechet"] = distances(
        collect(kinds, n, lambda x: net.encoder(x.to(model.device))[0].flatten(1), "Frechet distance", report)
    )
    figures |= verdict(model, dataset, kinds, SAMPLED, report)
    figures["frechet_inception"], figures["without_inception"] = None, None
    if inception:
        try:
            network = load_inception(model.device)
        except UsageError as error:
            figures["without_inception"] = str(error)
        else:
            figures["frechet_inception"] = distances(collect(kinds, n, network, "FID", report))
    return figures


@torch.inference_mode()
def bounds(model: DogVAE, split: Split, samples: int, report: Report) -> dict[str, dict[str, float]]:
    """For each prior the KL and the importance-weighted bound, in nats, each a mean over the images of the split.

    The KL is a mean over the draws. The bound is -log mean_k p(x | z_k) p(z_k) / q(z_k | x) with `samples` draws
    z_k ~ q (Burda, Grosse & Salakhutdinov 2016, eq. 8). With one draw it is the negative ELBO, and more draws bring it
    closer to -log p(x).
    """
    net, device = model.model, model.device

    def reconstruction(outputs: Tensor, x: Tensor) -> Tensor:
        x = x.expand(outputs.shape[1], -1, -1, -1)
        if net.config.likelihood == "bernoulli":
            return bernoulli(outputs, x)
        return gaussian(squared_errors("gaussian", outputs, x), model.sigma, x[0].numel())

    weights: dict[str, list[Tensor]] = {prior: [] for prior in DENSITIES}
    divergence: dict[str, list[Tensor]] = {prior: [] for prior in DENSITIES}
    for i in range(len(split)):
        x = split.gather(np.array([i])).to(device).float() / 255
        mu, logvar = net.encoder(x)
        noise = rng.normal((samples, *net.latent_shape), Stream.IMPORTANCE, i).to(device)
        z = mu + torch.exp(0.5 * logvar) * noise
        nll = torch.cat([reconstruction(net.decoder(part)[None], x) for part in z.split(CHUNK)]).double()
        log_q = torch.distributions.Normal(mu.double(), torch.exp(0.5 * logvar.double())).log_prob(z.double())
        log_q = log_q.sum(dim=(1, 2, 3)).cpu()
        for prior in DENSITIES:
            log_p = torch.from_numpy(model.log_prior(z.cpu().numpy(), prior))
            divergence[prior].append((log_q - log_p).mean())
            weights[prior].append(torch.logsumexp(log_p - log_q - nll.cpu(), dim=0) - math.log(samples))
        report("importance-weighted bound, image", i + 1, len(split))
    return {
        "kl_by_prior": {prior: float(torch.stack(v).mean()) for prior, v in divergence.items()},
        "importance_weighted": {prior: -float(torch.stack(v).mean()) for prior, v in weights.items()},
    }


def ssim(a_bchw: Tensor, b_bchw: Tensor) -> Tensor:
    """Structural similarity (b,) of images in [0, 1]; 1 for equal images (Wang et al. 2004).

    Uses that paper's Gaussian window, 11 pixels wide with standard deviation 1.5, at all places inside the image.
    """
    offset = torch.arange(11, dtype=a_bchw.dtype, device=a_bchw.device) - 5
    window = torch.exp(-offset.square() / (2 * 1.5**2))
    window = window / window.sum()
    channels = a_bchw.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, window[None, None, :, None].expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(x, window[None, None, None, :].expand(channels, 1, 1, -1), groups=channels)

    mean_a, mean_b = blur(a_bchw), blur(b_bchw)
    var_a, var_b = blur(a_bchw.square()) - mean_a.square(), blur(b_bchw.square()) - mean_b.square()
    covariance = blur(a_bchw * b_bchw) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    index = index / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    return index.mean(dim=(1, 2, 3))


@torch.inference_mode()
def _mean_ssim(net: VAE, split: Split, device: torch.device) -> float:
    scores = []
    for x in _chunks(split, len(split)):
        x = x.to(device)
        scores.append(ssim(net.decode_mean(net.encoder(x)[0]), x))
    return float(torch.cat(scores).double().mean())


def _chunks(split: Split, most: int) -> Iterator[Tensor]:
    """The first `most` images of a split, (b, 3, h, h) in [0, 1]."""
    for x in split.chunks(CHUNK, most):
        yield x.float() / 255


def _drawn(model: DogVAE, n: int, prior: str) -> Iterator[Tensor]:
    """`n` samples (b, 3, h, h) in [0, 1], rounded to 8 bits as in a picture file."""
    for latents in model.latent_batches(n, prior=prior):
        for z in torch.from_numpy(latents).split(CHUNK):
            yield rounded(model.model.decode_mean(z.to(model.device)))


def table(figures: dict[str, Any], samples: int) -> str:
    """The figures of `measure` as a table for people."""
    rows = [
        ("negative ELBO, N(0, I)", f"{figures['loss']:,.1f} nats"),
        ("  reconstruction", f"{figures['reconstruction']:,.1f} nats"),
        ("  KL to N(0, I)", f"{figures['kl']:,.1f} nats"),
        ("  KL to the fitted Gaussian", f"{figures['kl_by_prior']['gaussian']:,.1f} nats"),
        *(
            (f"-log p(x) at most, {samples} draws, {name}", f"{figures['importance_weighted'][prior]:,.1f} nats")
            for prior, name in (("normal", "N(0, I)"), ("gaussian", "Gaussian"))
        ),
        ("bits per dimension", f"{figures['bits_per_dim']:.3f}"),
        ("explained (0: the mean image, 1: perfect)", explained_text(figures["explained"])),
        ("PSNR", f"{figures['psnr']:.2f} dB"),
        ("SSIM", f"{figures['ssim']:.3f}"),
        ("active latents", f"{figures['active_latents']}"),
    ]
    for key, name in (("frechet", "Frechet distance, encoder"), ("frechet_inception", "FID")):
        for kind, value in (figures[key] or {}).items():
            rows.append((f"{name}: {kind if kind == 'training' else 'samples, ' + kind}", f"{value:,.1f}"))
    rows += judge_rows(figures)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:>14}" for name, value in rows]
    if figures["without_judge"]:
        lines.append(figures["without_judge"])
    if figures["without_inception"]:
        lines.append(f"{figures['without_inception']}; everything else was computed")
    return "\n".join([f"{figures['images']:,} validation images", *lines])
