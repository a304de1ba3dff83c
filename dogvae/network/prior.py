"""The prior p(z) that new dogs are sampled from, fitted to the latents after training. Pure torch, float64.

The decoder was trained on samples of the aggregated posterior q(z): the average of N(mu, var) over training images.
With few or similar images q(z) is far from N(0, I), whose samples then decode to noise. So a Gaussian with a full
covariance is fitted to q(z). It maximises E_q(z)[log p(z)], which is what a learned prior adds to the ELBO (Tomczak &
Welling 2018, eq. 3). A mixture of several is no better for 512-dimensional latents (docs/quality.md).

Latents are flat here: (n, d), where d is the number of channels times the pixels of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dogvae import rng
from dogvae.rng import Stream

MOST_IMAGES = 20_000  # training images that the prior is fitted to
LEAST_IMAGES = 80  # with fewer, none can be held out
LEAST_VARIANCE = 1e-6  # lower bound of posterior variances: a latent without any variance has no density
HELD_OUT = 5  # every fifth image is held out, to choose the shrinkage
QUICK_SHRINKAGE = 0.5
SHRINKAGE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # shares by which correlations, which may be chance, are lowered


@dataclass(frozen=True)
class Gaussian:
    """A normal density: mean (d,) and the lower Cholesky factor (d, d) of its covariance."""

    mean: Tensor
    factor: Tensor

    def double(self) -> Gaussian:
        """A copy in float64, which sums over hundreds of dimensions need."""
        return Gaussian(self.mean.double(), self.factor.double())

    def log_prob(self, z_nd: Tensor) -> Tensor:
        """Log density of latents (n, d), (n,) in nats."""
        whitened = torch.linalg.solve_triangular(self.factor, (z_nd - self.mean).T, upper=False)
        logs = -0.5 * whitened.square().sum(dim=0) - self.factor.diagonal().log().sum()
        return logs - 0.5 * z_nd.shape[1] * math.log(2 * math.pi)

    def draw(self, noise_nd: Tensor, temperature: float = 1.0) -> Tensor:
        """Samples (n, d) from standard normal noise (n, d). Temperature 0 gives the mean."""
        return self.mean + temperature * noise_nd @ self.factor.T


def fit(
    mu_nd: Tensor,
    var_nd: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Gaussian:
    """Fit a Gaussian to posteriors N(mu, var). Held-out images choose by how much correlations are lowered.

    `progress(done, total)` counts the fits.
    """
    mu, var = mu_nd.double(), var_nd.double().clamp_min(LEAST_VARIANCE)
    if len(mu) < LEAST_IMAGES:
        return _fit(mu, var, SHRINKAGE[-1])
    held = torch.arange(len(mu)) % HELD_OUT == 0
    noise = torch.randn(
        mu[held].shape, generator=torch.Generator().manual_seed(rng.seed(Stream.PRIOR)), dtype=torch.float64
    )
    z = mu[held] + var[held].sqrt() * noise.to(mu.device)

    scores = []
    for done, shrinkage in enumerate(SHRINKAGE):
        progress(done, len(SHRINKAGE) + 1)
        scores.append(float(_fit(mu[~held], var[~held], shrinkage).log_prob(z).mean()))
    progress(len(SHRINKAGE), len(SHRINKAGE) + 1)
    return _fit(mu, var, SHRINKAGE[scores.index(max(scores))])


def quick_fit(mu_nd: Tensor, var_nd: Tensor) -> Gaussian:
    """`fit` for a preview, from about a hundred images: half of the correlations, which few images show badly."""
    return _fit(mu_nd.double(), var_nd.double().clamp_min(LEAST_VARIANCE), QUICK_SHRINKAGE)


def _fit(mu: Tensor, var: Tensor, shrinkage: float) -> Gaussian:
    """The Gaussian with the moments of the aggregated posterior, its correlations lowered by the share `shrinkage`."""
    mean = mu.mean(dim=0)
    covariance = torch.cov(mu.T, correction=0) + torch.diag(var.mean(dim=0))
    covariance = torch.lerp(covariance, torch.diag(covariance.diagonal()), shrinkage)
    return Gaussian(mean, torch.linalg.cholesky(covariance))


def principal(mu_nd: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first r <= `most` principal directions of means (n, d): unit vectors (r, d), and standard deviations (r,).

    The largest deviation comes first. The sign makes the largest component of each direction positive.
    """
    values, vectors = torch.linalg.eigh(torch.cov(mu_nd.double().T, correction=0))
    scales, directions = values.flip(0)[:most].clamp_min(0).sqrt(), vectors.T.flip(0)[:most]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * largest.sign(), scales
