"""Likelihoods, KL and the scores of the ELBO; pure functions.

Shapes: images are x_bchw in [0, 1]. Outputs of the decoder have a leading axis for posterior samples: sbchw. Posterior
parameters are bchw. The "reconstruction" term is the expected negative log likelihood in nats, summed over pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255  # steps between black and white of an 8-bit picture
# Least sigma of the Gaussian: one grey level. Its density has no upper limit, but 8 bits hold no finer truth.
LEAST_SIGMA = 1 / LEVELS
FINE = 8  # bins in a grey level, in which residuals are counted
BINS = 2 * FINE * LEVELS + 1  # for residuals from -1 to 1


def bernoulli(logits_sbchw: Tensor, x_bchw: Tensor) -> Tensor:
    """Binary cross-entropy of each image, (b,) nats: the sum over pixels, averaged over posterior samples."""
    logits = logits_sbchw.float()
    nats = F.binary_cross_entropy_with_logits(logits, x_bchw.float().expand_as(logits), reduction="none")
    return _over_samples(nats.sum(dim=(2, 3, 4)))


def gaussian(errors_b: Tensor, sigma: Tensor | float, pixels: int) -> Tensor:
    """Negative log density of each image, (b,) nats, under a Gaussian whose `pixels` values share one `sigma`.

    `errors_b` are the squared errors of the images, summed over pixels. The density is per grey level, not per unit
    of [0, 1]. So it is about the log probability of the 8-bit picture: see `bits`.
    """
    sigma = torch.as_tensor(sigma, device=errors_b.device)
    constant = pixels * (math.log(LEVELS) + 0.5 * math.log(2 * math.pi))
    return errors_b / (2 * sigma.square()) + pixels * sigma.log() + constant


def best_sigma(error: Tensor, values: int) -> Tensor:
    """The sigma under which pixels with the summed squared error `error` are most probable: their root mean square.

    `error` is a sum over `values` pixels. The decoder is trained with the sigma of each batch: Rybkin, Daniilidis &
    Levine 2021, "Simple and effective VAE training with calibrated decoders", eq. 5.
    """
    return (error / values).sqrt().clamp_min(LEAST_SIGMA)


def squared_errors(likelihood: str, outputs_sbchw: Tensor, x_bchw: Tensor) -> Tensor:
    """Squared error of each image, (b,): the sum over pixels, averaged over posterior samples."""
    decoded = mean(likelihood, outputs_sbchw)
    return _over_samples((decoded - x_bchw.float()).square().sum(dim=(2, 3, 4)))


def _over_samples(values_sb: Tensor) -> Tensor:
    """The mean (b,) over posterior samples; that of one sample costs a GPU nothing."""
    return values_sb.squeeze(0) if len(values_sb) == 1 else values_sb.mean(dim=0)


def mean(likelihood: str, outputs: Tensor) -> Tensor:
    """The mean of the likelihood, float32 in the shape of `outputs`; the Gaussian's may leave [0, 1] a little."""
    return torch.sigmoid(outputs.float()) if likelihood == "bernoulli" else outputs.float() + 0.5


def decoded_mean(likelihood: str, outputs: Tensor) -> Tensor:
    """The mean of the likelihood within [0, 1], in the shape of `outputs`: the picture to show."""
    return mean(likelihood, outputs).clamp(0, 1)


def kl(mu_bchw: Tensor, logvar_bchw: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) of each image, (b,) float32: Kingma & Welling 2014, appendix B."""
    mu, logvar = mu_bchw.float(), logvar_bchw.float()
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def psnr(decoded_bchw: Tensor, x_bchw: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (b,) in dB, at most 100. Both arguments are in [0, 1]."""
    mse = (decoded_bchw.float() - x_bchw.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-10))


def residual_counts(means_sbchw: Tensor, x_bchw: Tensor) -> Tensor:
    """How many pixels have which residual x - mean, (3, BINS) int64; the rows are black, other and white pixels.

    Residuals are rounded to an eighth of a grey level. Counts add up over batches and ranks without rounding.
    """
    x = x_bchw.expand_as(means_sbchw)
    residual = torch.nan_to_num(x - means_sbchw).clamp(-1, 1)
    column = (residual * (FINE * LEVELS)).round().long() + BINS // 2
    row = (x > 0).long() + (x >= 1).long()
    bins = (row * BINS + column).flatten()
    if x.device.type == "cpu":
        return torch.bincount(bins, minlength=3 * BINS).view(3, BINS)
    # Without bincount, which waits for the device to read the largest bin.
    counts = torch.zeros(3 * BINS, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins)).view(3, BINS)


def bits(counts: Tensor, sigma: float) -> float:
    """Mean of -log2 P over 8-bit pixel values, given `residual_counts`: P is the Gaussian's mass on the grey level.

    Black takes all the mass below it too, and white all above it, so that the masses of the 256 levels add up to 1.
    """
    counts = counts.double().cpu()
    residual = torch.arange(BINS, dtype=torch.float64).sub(BINS // 2) / (FINE * LEVELS)
    half = 0.5 / LEVELS
    black = torch.special.log_ndtr((residual + half) / sigma)
    white = torch.special.log_ndtr((half - residual) / sigma)
    near = torch.special.log_ndtr((half - residual.abs()) / sigma)
    far = torch.special.log_ndtr((-half - residual.abs()) / sigma)
    inside = near + torch.log1p(-torch.exp(far - near))
    nats = -(counts * torch.stack([black, inside, white])).sum() / counts.sum().clamp_min(1)
    return float(nats) / math.log(2)


def explained(error: float, mean_error: float) -> float:
    """The share of the images' variance that decodings explain: 0 is as good as the mean image, 1 is perfect.

    Both are mean squared errors over the same images: of the decodings, and of the mean training image. The result is
    NaN if the images do not differ.
    """
    return 1 - error / mean_error if mean_error > 0 else math.nan
