"""Likelihoods, KL and ELBO sums, in nats; pure functions.

Shapes: images x_bchw are in [0, 1]; the decoder's outputs have a leading sample axis, sbchw; posterior parameters and
latents are bchw and sbchw. "Reconstruction" is the expected negative log likelihood, summed over pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Below, the densities of the continuous Bernoulli and the Gaussian have no upper limit: an all-black pixel could score
# infinitely well. These bounds make the best possible score, the floor of `explained`, finite.
LOGIT_BOUND = 9.0  # continuous Bernoulli: its parameter stays within [1.2e-4, 1 - 1.2e-4]
LOG_SCALE_BOUNDS = (math.log(1 / 255), 0.0)  # Gaussian: a standard deviation from one grey level to the whole range


def bernoulli(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every pixel, in nats."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")


def continuous_bernoulli(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Negative log density of the continuous Bernoulli (Loaiza-Ganem & Cunningham 2019, eq. 4-7), its logits bounded.

    With the logit l the normalising constant is C = l / tanh(l / 2) (2 at l = 0); log C is even in l.
    """
    l = LOGIT_BOUND * torch.tanh(logits / LOGIT_BOUND)  # noqa: E741
    small = l.abs() < 0.05
    safe = torch.where(small, torch.ones_like(l), l)
    # log(2 atanh(1 - 2p) / (1 - 2p)) with 1 - 2p = -tanh(l / 2); near 0 by its series, where the quotient is 0 / 0
    log_c = torch.where(small, math.log(2) + l.square() / 12, (safe / torch.tanh(safe / 2)).abs().log())
    return bernoulli(l, x) - log_c


def gaussian(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Negative log density of a Gaussian with mean sigmoid(logits) and one learned, shared scale.

    Rybkin, Daniilidis & Levine 2021, "Simple and effective VAE training with calibrated decoders".
    """
    assert log_scale is not None
    low, high = LOG_SCALE_BOUNDS
    s = low + (high - low) * torch.sigmoid(log_scale)
    return 0.5 * ((x - torch.sigmoid(logits)) * torch.exp(-s)).square() + s + 0.5 * math.log(2 * math.pi)


LIKELIHOODS: dict[str, Callable[..., Tensor]] = {
    "bernoulli": bernoulli,
    "continuous-bernoulli": continuous_bernoulli,
    "gaussian": gaussian,
}


def reconstruction(likelihood: str, logits_sbchw: Tensor, x_bchw: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Negative log likelihood of each image (b,): summed over pixels, mean over the posterior samples; in fp32."""
    nll = LIKELIHOODS[likelihood](logits_sbchw.float(), x_bchw.float(), log_scale)
    return nll.sum(dim=(2, 3, 4)).mean(dim=0)


def kl(mu_bchw: Tensor, logvar_bchw: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) of each image (b,), summed over latents (Kingma & Welling 2014, appendix B)."""
    mu, logvar = mu_bchw.float(), logvar_bchw.float()
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def psnr(decoded_bchw: Tensor, x_bchw: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (b,) in dB, both arguments in [0, 1]; at most 100 dB."""
    mse = (decoded_bchw.float() - x_bchw.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-10))


def decoded_mean(likelihood: str, logits: Tensor) -> Tensor:
    """The likelihood's mean, in [0, 1]: the picture that a person is shown."""
    if likelihood != "continuous-bernoulli":
        return torch.sigmoid(logits)
    l = LOGIT_BOUND * torch.tanh(logits / LOGIT_BOUND)  # noqa: E741
    small = l.abs() < 0.05
    safe = torch.where(small, torch.ones_like(l), l)
    return torch.where(small, 0.5 + l / 12, 1 / (1 - torch.exp(-safe)) - 1 / safe)


def floor_table(likelihood: str) -> np.ndarray:
    """The least reconstruction term of a pixel at each of the 256 grey levels, (256,) float64 nats."""
    x = torch.arange(256, dtype=torch.float64) / 255
    if likelihood == "gaussian":
        best = 0.5 * math.log(2 * math.pi) + LOG_SCALE_BOUNDS[0]
        return np.full(256, best)
    if likelihood == "bernoulli":
        return torch.special.entr(torch.stack([x, 1 - x])).sum(dim=0).numpy()
    every = continuous_bernoulli(_logit_grid()[:, None], x[None, :].expand(len(_logit_grid()), -1))
    return every.min(dim=0).values.numpy()


def flat_score(likelihood: str, prediction: Tensor, mean: Tensor, mean_square: Tensor) -> float:
    """The average reconstruction term of images that are all predicted to be the same image, `prediction`.

    The images come as their mean and mean squared image: the terms are linear in those. All arguments are float64
    (3, h, h) in [0, 1]; the Gaussian's scale is the best one for these images.
    """
    if likelihood == "gaussian":
        squares = mean_square - 2 * prediction * mean + prediction.square()
        s = squares.mean().sqrt().log().clamp(*LOG_SCALE_BOUNDS)
        return float((0.5 * squares * torch.exp(-2 * s) + s + 0.5 * math.log(2 * math.pi)).sum())
    if likelihood == "bernoulli":
        return float(bernoulli(torch.logit(prediction, 1e-6), mean).sum())
    grid = _logit_grid()
    means = decoded_mean(likelihood, grid)
    nearest = torch.searchsorted(means, prediction.contiguous()).clamp(max=len(grid) - 1)
    return float(continuous_bernoulli(grid[nearest], mean).sum())


def _logit_grid() -> Tensor:
    """Logits fine and wide enough to invert or minimise the continuous Bernoulli, which has no closed forms for it."""
    return torch.linspace(-40, 40, 80001, dtype=torch.float64)


def explained(loss: float, floor: float, mean: float) -> float:
    """1 - (loss - floor) / (mean - floor): 0 is no better than the mean image, 1 is perfect."""
    return 1 - (loss - floor) / (mean - floor)
