"""The prior p(z) that new dogs are sampled from, fitted to the latents after training. Pure torch, float64.

The decoder was trained on samples of the aggregated posterior q(z): the average of N(mu, var) over training images.
With few or similar images q(z) is far from N(0, I), whose samples then decode to noise. So a mixture of Gaussians with
full covariances is fitted to q(z). It maximises E_q(z)[log p(z)], which is what a learned prior adds to the ELBO
(Tomczak & Welling 2018, eq. 3).

Latents are flat here: (n, d) with d = latent_dim * 16.
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
MOST_COMPONENTS = 32
LEAST_IMAGES = 40  # images per component, on average
LEAST_VARIANCE = 1e-6  # lower bound of posterior variances: a latent without any variance has no density
HELD_OUT = 5  # every fifth image is held out, to choose the shrinkage and the number of components
SHRINKAGE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # shares by which correlations, which may be chance, are lowered
MOST_STEPS, TOLERANCE = 50, 1e-4  # of expectation maximisation, which stops when a step gains fewer nats per latent


@dataclass(frozen=True)
class Mixture:
    """k Gaussians: weights (k,), means (k, d) and the lower Cholesky factors of the covariances, (k, d, d)."""

    weights: Tensor
    means: Tensor
    factors: Tensor

    def double(self) -> Mixture:
        """A copy in float64, which sums over hundreds of dimensions need."""
        return Mixture(self.weights.double(), self.means.double(), self.factors.double())

    def log_prob(self, z_nd: Tensor) -> Tensor:
        """Log density of latents (n, d), (n,) in nats."""
        return torch.logsumexp(self._joint(z_nd), dim=1)

    def expected(self, mu_nd: Tensor, var_nd: Tensor) -> Tensor:
        """log weight + E[log N(z)] over z ~ N(mu, var) for each image and component, (n, k) nats."""
        precisions = torch.cholesky_inverse(self.factors).diagonal(dim1=1, dim2=2)
        return self._joint(mu_nd) - 0.5 * var_nd @ precisions.T

    def _joint(self, z_nd: Tensor) -> Tensor:
        logs = []
        for mean, factor in zip(self.means, self.factors, strict=True):
            whitened = torch.linalg.solve_triangular(factor, (z_nd - mean).T, upper=False)
            logs.append(-0.5 * whitened.square().sum(dim=0) - factor.diagonal().log().sum())
        return torch.stack(logs, dim=1) + self.weights.log() - 0.5 * z_nd.shape[1] * math.log(2 * math.pi)

    def draw(self, uniform_n: Tensor, noise_nd: Tensor, temperature: float = 1.0) -> Tensor:
        """Samples (n, d) from uniform numbers in [0, 1) and standard normal noise. Temperature 0 gives the means."""
        chosen = torch.searchsorted(self.weights.cumsum(0), uniform_n).clamp_max(len(self.weights) - 1)
        z = self.means[chosen]
        for k in chosen.unique():
            z[chosen == k] += temperature * noise_nd[chosen == k] @ self.factors[k].T
        return z


def fit(mu_nd: Tensor, var_nd: Tensor, progress: Callable[[str], None] = lambda text: None) -> tuple[Mixture, Mixture]:
    """Fit one Gaussian, and a mixture, to posteriors N(mu, var). Held-out images choose the number of components.

    `progress` is called with a line of text before each fit.
    """
    mu, var = mu_nd.double(), var_nd.double().clamp_min(LEAST_VARIANCE)
    held = torch.arange(len(mu)) % HELD_OUT == 0
    noise = torch.randn(mu[held].shape, generator=_generator(Stream.PRIOR), dtype=torch.float64)
    z = mu[held] + var[held].sqrt() * noise.to(mu.device)

    def score(components: int, shrinkage: float) -> float:
        progress(f"fitting the prior: {components} component{'s' * (components > 1)}, shrinkage {shrinkage}")
        return float(_fit(mu[~held], var[~held], components, shrinkage).log_prob(z).mean())

    if len(mu) < 2 * LEAST_IMAGES:
        single = _fit(mu, var, 1, SHRINKAGE[-1])
        return single, single
    best, shrinkage = max((score(1, s), s) for s in SHRINKAGE)
    components = 1
    while 2 * components <= min(MOST_COMPONENTS, len(mu) // LEAST_IMAGES):
        new = score(2 * components, shrinkage)
        if new <= best:
            break
        best, components = new, 2 * components
    single = _fit(mu, var, 1, shrinkage)
    return single, single if components == 1 else _fit(mu, var, components, shrinkage)


def principal(mu_nd: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first r <= `most` principal directions of means (n, d): unit vectors (r, d), and standard deviations (r,).

    The largest deviation comes first. The sign makes the largest component of each direction positive.
    """
    values, vectors = torch.linalg.eigh(torch.cov(mu_nd.double().T, correction=0))
    scales, directions = values.flip(0)[:most].clamp_min(0).sqrt(), vectors.T.flip(0)[:most]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * largest.sign(), scales


def _fit(mu: Tensor, var: Tensor, components: int, shrinkage: float) -> Mixture:
    """Fit a mixture by expectation maximisation on a lower bound of E_q[log p(z)].

    Responsibilities belong to images, not to samples of their posteriors. A component has too few images for its own
    covariance in hundreds of dimensions, so the average covariance is mixed in, with the weight of `d` images. The
    correlations of that average are lowered by the share `shrinkage`.
    """
    n, d = mu.shape
    share = _clusters(mu, components)
    before = -math.inf
    for _ in range(MOST_STEPS):
        count = share.sum(dim=0).clamp_min(1e-8)
        means = (share.T @ mu) / count[:, None]
        scatter = torch.stack([_scatter(mu - m, var, s) for m, s in zip(means, share.T, strict=True)])
        pooled = scatter.sum(dim=0) / n
        pooled = torch.lerp(pooled, torch.diag(pooled.diagonal()), shrinkage)
        covariances = (scatter + d * pooled) / (count + d)[:, None, None] if components > 1 else pooled[None]
        new = Mixture(count / n, means, torch.linalg.cholesky(covariances))
        joint = new.expected(mu, var)
        bound = float(torch.logsumexp(joint, dim=1).mean()) / d
        if bound > before:  # a step can also lower the bound, as the average covariance is mixed in
            mixture = new
        if components == 1 or bound - before < TOLERANCE:
            break
        share, before = joint.softmax(dim=1), bound
    return mixture


def _scatter(offset_nd: Tensor, var_nd: Tensor, share_n: Tensor) -> Tensor:
    """E[(z - mean)(z - mean)^T], summed over images with weights `share_n`: (d, d)."""
    return (offset_nd * share_n[:, None]).T @ offset_nd + torch.diag(share_n @ var_nd)


def _clusters(mu: Tensor, components: int) -> Tensor:
    """One-hot clusters of the images, (n, k), by k-means from k-means++ seeds."""
    generator = _generator(Stream.CLUSTERS)
    centres = mu[:1]
    for _ in range(components - 1):
        distance = torch.cdist(mu, centres).amin(dim=1).square().cpu()
        chosen = torch.multinomial(distance / distance.sum(), 1, generator=generator) if distance.sum() > 0 else [0]
        centres = torch.cat([centres, mu[chosen]])
    for _ in range(10):
        share = torch.nn.functional.one_hot(torch.cdist(mu, centres).argmin(dim=1), components).to(mu)
        count = share.sum(dim=0)[:, None]
        centres = torch.where(count > 0, (share.T @ mu) / count.clamp_min(1), centres)
    return share


def _generator(stream: Stream) -> torch.Generator:
    return torch.Generator().manual_seed(rng.seed(stream))
