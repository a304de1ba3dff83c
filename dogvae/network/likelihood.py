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
LOGIT_BOUND = 1000.0  # continuous Bernoulli: its mean stays within [0.001, 0.999]
LOG_SCALE_BOUNDS = (math.log(1 / 255), 0.0)  # Gaussian: a standard deviation from one grey level to the whole range


def bernoulli(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every pixel, in nats."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")


def continuous_bernoulli(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Negative log density of the continuous Bernoulli (Loaiza-Ganem & Cunningham 2019), logits bounded smoothly."""
    logits = _bounded(logits)
    return bernoulli(logits, x) - _log_c(logits)


def _bounded(logits: Tensor) -> Tensor:
    return LOGIT_BOUND * torch.tanh(logits / LOGIT_BOUND)


def _log_c(logits: Tensor) -> Tensor:
    """Log of the normalising constant (ibid., eq. 7): l / tanh(l / 2) with the logit l; by its series near 0, where
    that is 0 / 0.
    """
    small = logits.abs() < 0.05
    safe = torch.where(small, torch.ones_like(logits), logits)
    return torch.where(small, math.log(2) + logits.square() / 12, (safe / torch.tanh(safe / 2)).log())


def _continuous_mean(logits: Tensor) -> Tensor:
    """Mean of the continuous Bernoulli (ibid., eq. 8)."""
    small = logits.abs() < 0.05
    safe = torch.where(small, torch.ones_like(logits), logits)
    return torch.where(small, 0.5 + logits / 12, 1 / -torch.expm1(-safe) - 1 / safe)


def _continuous_logit(mean: Tensor) -> Tensor:
    """The logit within the bounds whose mean is nearest; by bisection, there is no closed form. float64."""
    low, high = torch.full_like(mean, -LOGIT_BOUND), torch.full_like(mean, LOGIT_BOUND)
    for _ in range(60):
        middle = (low + high) / 2
        less = _continuous_mean(middle) < mean
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return (low + high) / 2


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
    if likelihood == "continuous-bernoulli":
        return _continuous_mean(_bounded(logits))
    return torch.sigmoid(logits)


def floor_table(likelihood: str) -> np.ndarray:
    """The least reconstruction term of a pixel at each of the 256 grey levels, (256,) float64 nats."""
    x = torch.arange(256, dtype=torch.float64) / 255
    if likelihood == "gaussian":
        best = 0.5 * math.log(2 * math.pi) + LOG_SCALE_BOUNDS[0]
        return np.full(256, best)
    if likelihood == "bernoulli":
        return torch.special.entr(torch.stack([x, 1 - x])).sum(dim=0).numpy()
    best_logits = _continuous_logit(x)  # a member of an exponential family fits best where its mean is the data's
    return (bernoulli(best_logits, x) - _log_c(best_logits)).numpy()


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
    logits = _continuous_logit(prediction)
    return float((bernoulli(logits, mean) - _log_c(logits)).sum())


def explained(loss: float, floor: float, mean: float) -> float:
    """1 - (loss - floor) / (mean - floor): 0 is no better than the mean image, 1 is perfect."""
    return 1 - (loss - floor) / (mean - floor)
