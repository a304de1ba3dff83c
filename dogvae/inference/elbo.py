"""The validation ELBO, computed exactly over all ranks, and the two scores that `explained` is measured between."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from dogvae import rng
from dogvae.data.dataset import Batches, Dataset, Split, grey_levels, moments
from dogvae.network.likelihood import flat_score, floor_table, kl, psnr, reconstruction
from dogvae.network.vae import VAE
from dogvae.rng import Stream

VAL_SAMPLES = 4  # posterior samples in validation, whatever number a run trains with, so that any two runs compare
VAL_CHUNK = 32  # images validated at a time; fixed, so that every world size computes the same numbers
ACTIVE_VARIANCE = 0.01  # Burda, Grosse & Salakhutdinov 2016: the variance of an active latent's mean exceeds this


@torch.inference_mode()
def evaluate(model: VAE, split: Split, device: torch.device, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    """Exact validation: means over all images of the split, the same numbers at every world size.

    Returns `loss`, the negative ELBO in nats per image (beta 1, `VAL_SAMPLES` samples, fixed noise), and its two terms
    `reconstruction` and `kl`. Also returns the `psnr` of the decoded posterior mean in dB and the number of
    `active_latents`. Every rank must call this function, and every rank gets the result.
    """
    model.eval()
    n, latents = len(split), math.prod(model.latent_shape)
    chunks = [np.arange(start, min(start + VAL_CHUNK, n)) for start in range(0, n, VAL_CHUNK)]
    table = torch.zeros(len(chunks), 3 + 2 * latents, dtype=torch.float64, device=device)
    own = range(rank, len(chunks), world_size)  # the chunks of this rank
    for c, images in zip(own, Batches(split, device)([chunks[c] for c in own]), strict=True):
        x = images.float() / 255
        noise = rng.normal((VAL_SAMPLES, len(x), *model.latent_shape), Stream.VALIDATION, c)
        logits, mu, logvar = model(x, noise.to(device))
        table[c, 0] = reconstruction(model.config.likelihood, logits, x, model.log_scale).double().sum()
        table[c, 1] = kl(mu, logvar).double().sum()
        table[c, 2] = psnr(model.decode_mean(mu), x).double().sum()
        means = mu.flatten(1).double()
        table[c, 3:] = torch.cat([means.sum(0), means.square().sum(0)])
    if world_size > 1:
        dist.all_reduce(table)  # exact: one rank adds a row's numbers, all others add zeros
    sums = table.sum(dim=0).cpu() / n
    variance = sums[3 + latents :] - sums[3 : 3 + latents].square()
    model.train()
    return {
        "loss": float(sums[0] + sums[1]),
        "reconstruction": float(sums[0]),
        "kl": float(sums[1]),
        "psnr": float(sums[2]),
        "active_latents": int((variance > ACTIVE_VARIANCE).sum()),
    }


def baselines(likelihood: str, dataset: Dataset) -> tuple[float, float]:
    """(floor, mean): reconstruction terms on the validation images, in nats per image.

    `floor` is the least possible one, `mean` that of the mean training image as the prediction for every image.
    """
    floor = float(grey_levels(dataset.val) @ floor_table(likelihood)) / len(dataset.val)
    return floor, flat_score(likelihood, moments(dataset.train)[0], *moments(dataset.val))
