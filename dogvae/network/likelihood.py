"""Likelihoods, KL and the scores of the ELBO, in nats; pure functions.

Shapes: images are x_bchw in [0, 1]. Logits of the decoder have a leading axis for posterior samples: sbchw. Posterior
parameters are bchw. The "reconstruction" term is the expected negative log likelihood, summed over pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The densities of the continuous Bernoulli and the Gaussian have no upper limit: a black pixel could score infinitely
# well. These bounds keep the best possible score finite, which `explained` needs as its floor.
LOGIT_BOUND = 1000.0  # continuous Bernoulli: bounds its mean to [0.001, 0.999]
LOG_SCALE_BOUNDS = (math.log(1 / 255), 0.0)  # Gaussian: a standard deviation between one grey level and the whole range


def bernoulli(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each pixel in nats, in the shape of `logits`; x broadcasts to it."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")


def continuous_bernoulli(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Negative log density of the continuous Bernoulli for each pixel, in the shape of `logits`.

    Loaiza-Ganem & Cunningham 2019. The logits are bounded smoothly to +-LOGIT_BOUND.
    """
    logits = _bounded(logits)
    return bernoulli(logits, x) - _log_c(logits)


def _bounded(logits: Tensor) -> Tensor:
    return LOGIT_BOUND * torch.tanh(logits / LOGIT_BOUND)


def _log_c(logits: Tensor) -> Tensor:
    """Log of the normalising constant (ibid., eq. 7), l / tanh(l / 2) for the logit l.

    Near l = 0, where that is 0 / 0, its series is used.
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
    """The logit within the bounds whose mean is nearest to `mean`, float64. By bisection: there is no closed form."""
    low, high = torch.full_like(mean, -LOGIT_BOUND), torch.full_like(mean, LOGIT_BOUND)
    for _ in range(60):
        middle = (low + high) / 2
        less = _continuous_mean(middle) < mean
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return (low + high) / 2


def gaussian(logits: Tensor, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Negative log density of a Gaussian for each pixel, in the shape of `logits`.

    The mean is sigmoid(logits). All pixels share one learned standard deviation exp(s), where s is `log_scale`
    squashed into LOG_SCALE_BOUNDS.
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
    """Negative log likelihood of each image, (b,) float32: the sum over pixels, averaged over posterior samples."""
    nll = LIKELIHOODS[likelihood](logits_sbchw.float(), x_bchw.float(), log_scale)
    return nll.sum(dim=(2, 3, 4)).mean(dim=0)


def kl(mu_bchw: Tensor, logvar_bchw: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) of each image, (b,) float32: Kingma & Welling 2014, appendix B."""
    mu, logvar = mu_bchw.float(), logvar_bchw.float()
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def psnr(decoded_bchw: Tensor, x_bchw: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (b,) in dB, at most 100. Both arguments are in [0, 1]."""
    mse = (decoded_bchw.float() - x_bchw.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-10))


def decoded_mean(likelihood: str, logits: Tensor) -> Tensor:
    """The mean of the likelihood in [0, 1], in the shape of `logits`: the picture to show."""
    if likelihood == "continuous-bernoulli":
        return _continuous_mean(_bounded(logits))
    return torch.sigmoid(logits)


def floor_table(likelihood: str) -> np.ndarray:
    """The least possible reconstruction term of a pixel at each of the 256 grey levels, (256,) float64 nats."""
    x = torch.arange(256, dtype=torch.float64) / 255
    if likelihood == "gaussian":
        best = 0.5 * math.log(2 * math.pi) + LOG_SCALE_BOUNDS[0]
        return np.full(256, best)
    if likelihood == "bernoulli":
        return torch.special.entr(torch.stack([x, 1 - x])).sum(dim=0).numpy()
    best_logits = _continuous_logit(x)  # an exponential family fits best where its mean equals the data
    return (bernoulli(best_logits, x) - _log_c(best_logits)).numpy()


def flat_score(likelihood: str, prediction: Tensor, mean: Tensor, mean_square: Tensor) -> float:
    """The average reconstruction term, in nats per image, if every image is predicted to be `prediction`.

    `mean` and `mean_square` are the averages of the images and of their squares; no more is needed. All tensors are
    (3, h, h) float64 in [0, 1]. The Gaussian takes the scale that is best for these images.
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
    """1 - (loss - floor) / (mean - floor): 0 is as good as predicting the mean image, 1 is perfect."""
    return 1 - (loss - floor) / (mean - floor)
