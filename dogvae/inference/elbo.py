"""The validation ELBO, computed exactly over all ranks, and the error that `explained` is measured against."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dogvae import rng
from dogvae.data.dataset import Batches, Dataset, Split, pixel_sums
from dogvae.network import likelihood
from dogvae.network.vae import VAE
from dogvae.rng import Stream

VAL_SAMPLES = 4  # posterior samples in validation, whatever number a run trains with, so that any two runs compare
# Images validated at a time; fixed, so that every world size computes the same numbers. Each chunk has its own noise.
VAL_CHUNK = 32
PIXELS_CUDA = 256 * 64**2  # at a time on a GPU, in whole chunks: few launches
KEPT_NOISE_BYTES = 256 << 20  # most noise that is kept on a GPU from one validation to the next
ACTIVE_VARIANCE = 0.01  # Burda, Grosse & Salakhutdinov 2016: the variance of an active latent's mean exceeds this


class ValidationNoise:
    """The posterior noise of validation: the same on every device, and drawn on the CPU. A GPU keeps it."""

    def __init__(self, latent_shape: tuple[int, ...], device: torch.device) -> None:
        self._latent_shape, self._device = latent_shape, device
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._kept_bytes = 0

    def of(self, images: np.ndarray) -> Tensor:
        """Noise (VAL_SAMPLES, b, *latent_shape) of images (b,) that follow each other, from the start of a chunk on."""
        first, last = int(images[0]), int(images[-1])
        if (kept := self._kept.get((first, last))) is not None:
            return kept
        parts = []
        for start in range(first, last + 1, VAL_CHUNK):
            shape = (VAL_SAMPLES, min(VAL_CHUNK, last + 1 - start), *self._latent_shape)
            parts.append(rng.normal(shape, Stream.VALIDATION, start // VAL_CHUNK))
        noise = torch.cat(parts, dim=1).to(self._device)
        if noise.is_cuda and self._kept_bytes + noise.nbytes <= KEPT_NOISE_BYTES:
            self._kept[first, last] = noise
            self._kept_bytes += noise.nbytes
        return noise


@torch.inference_mode()
def evaluate(
    model: VAE,
    split: Split,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    sigma: float | None = None,
    noise: ValidationNoise | None = None,
) -> dict[str, float]:
    """Exact validation: means over all images of the split, the same numbers at every world size.

    Every rank must call this function, and every rank gets the result:

    - `loss`: the negative ELBO in nats per image (beta 1, `VAL_SAMPLES` samples, fixed noise), the sum of
      `reconstruction` and `kl`. The Gaussian likelihood has the `sigma` that is given, or the one that fits all of
      these images best. So any two runs compare.
    - `bits_per_dim`: the negative ELBO of the 8-bit pixels in bits per pixel value, with the decoded mean and `sigma`
      as a Gaussian, whatever likelihood the model was trained with.
    - `sigma`: in [1/255, 1]. `error`: the mean squared error of the decoded posterior means, and `psnr`: theirs in dB.
    - `active_latents`: how many latents vary between images.

    `noise` is that of earlier validations with the same latent shape and device, which need not be drawn again.
    """
    model.eval()
    noise = noise or ValidationNoise(model.latent_shape, device)
    n, latents, pixels = len(split), math.prod(model.latent_shape), math.prod(split.image_shape)
    kind = model.config.likelihood
    at_once = VAL_CHUNK
    if device.type == "cuda":
        at_once *= max(1, PIXELS_CUDA // (VAL_CHUNK * split.image_shape[1] ** 2))
    chunks = [np.arange(start, min(start + at_once, n)) for start in range(0, n, at_once)]
    table = torch.zeros(len(chunks), 5 + 2 * latents, dtype=torch.float64, device=device)
    counts = torch.zeros(3, likelihood.BINS, dtype=torch.int64, device=device)
    own = range(rank, len(chunks), world_size)  # the chunks of this rank
    for c, images in zip(own, Batches(split, device)([chunks[c] for c in own]), strict=True):
        x = images.float() / 255
        outputs, mu, logvar = model(x, noise.of(chunks[c]))
        decoded = model.decode_mean(mu)
        counts += likelihood.residual_counts(likelihood.mean(kind, outputs), x)
        if kind == "bernoulli":
            table[c, 0] = likelihood.bernoulli(outputs, x).double().sum()
        table[c, 1] = likelihood.squared_errors(kind, outputs, x).double().sum()
        table[c, 2] = likelihood.kl(mu, logvar).double().sum()
        table[c, 3] = likelihood.psnr(decoded, x).double().sum()
        table[c, 4] = (decoded - x).square().double().mean(dim=(1, 2, 3)).sum()
        means = mu.flatten(1).double()
        table[c, 5:] = torch.cat([means.sum(0), means.square().sum(0)])
    if world_size > 1:
        dist.all_reduce(table)  # exact: one rank adds a row's numbers, all others add zeros
        dist.all_reduce(counts)
    sums = table.sum(dim=0).cpu() / n
    reconstruction, error, kl = sums[0], sums[1], sums[2]
    if sigma is None:
        sigma = float(likelihood.best_sigma(error, pixels))
    if kind == "gaussian":
        reconstruction = likelihood.gaussian(error, sigma, pixels)
    variance = sums[5 + latents :] - sums[5 : 5 + latents].square()
    model.train()
    return {
        "loss": float(reconstruction + kl),
        "reconstruction": float(reconstruction),
        "kl": float(kl),
        "bits_per_dim": likelihood.bits(counts, sigma) + float(kl) / (pixels * math.log(2)),
        "sigma": sigma,
        "error": float(sums[4]),
        "psnr": float(sums[3]),
        "active_latents": int((variance > ACTIVE_VARIANCE).sum()),
    }


def mean_error(dataset: Dataset) -> float:
    """The mean squared error of the mean training image as the decoding of every validation image.

    It is the validation images' variance and the squared distance of the two means. Both come from integers, so they
    are exactly 0 for images that do not differ.
    """
    n, m = len(dataset.train), len(dataset.val)
    (train, _), (val, squares) = pixel_sums(dataset.train), pixel_sums(dataset.val)
    variance = (m * squares - val.square()).double() / m**2
    distance = (m * train - n * val).double() / (n * m)
    return float((variance + distance.square()).mean()) / 255**2
