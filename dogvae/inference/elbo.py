"""Exact validation over all ranks, and the two scores that `explained` lies between."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from dogvae import rng
from dogvae.data.dataset import Batches, Dataset, Split, grey_levels, moments
from dogvae.network import likelihood as loss
from dogvae.network.vae import VAE
from dogvae.rng import Stream

VAL_SAMPLES = 4  # posterior samples in validation, whatever a run trains with: any two runs compare
VAL_CHUNK = 32  # images validated at once; fixed, so that every world size computes the same numbers
ACTIVE_VARIANCE = 0.01  # Burda, Grosse & Salakhutdinov 2016: a latent is active if its mean varies more than this


@torch.inference_mode()
def evaluate(model: VAE, split: Split, device: torch.device, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    """Exact validation: the mean over all images of the split, the same number at every world size.

    The negative ELBO (beta 1, `VAL_SAMPLES` samples, fixed noise), its two terms, PSNR of the posterior mean's decoding
    (dB, mean over images) and the number of active latents. Every rank must call it; all get the result.
    """
    model.eval()
    n, latents = len(split), math.prod(model.latent_shape)
    chunks = [np.arange(start, min(start + VAL_CHUNK, n)) for start in range(0, n, VAL_CHUNK)]
    table = torch.zeros(len(chunks), 3 + 2 * latents, dtype=torch.float64, device=device)
    mine = range(rank, len(chunks), world_size)
    for c, images in zip(mine, Batches(split, device)([chunks[c] for c in mine]), strict=True):
        x = images.float() / 255
        noise = rng.normal((VAL_SAMPLES, len(x), *model.latent_shape), Stream.VALIDATION, c)
        logits, mu, logvar = model(x, noise.to(device))
        table[c, 0] = loss.reconstruction(model.config.likelihood, logits, x, model.log_scale).double().sum()
        table[c, 1] = loss.kl(mu, logvar).double().sum()
        table[c, 2] = loss.psnr(model.decode_mean(mu), x).double().sum()
        means = mu.flatten(1).double()
        table[c, 3:] = torch.cat([means.sum(0), means.square().sum(0)])
    if world_size > 1:
        dist.all_reduce(table)  # each row comes from one rank, the others add zeros: the sum is exact
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
    """(floor, mean): the least possible reconstruction term on validation, and the mean training image's."""
    floor = float(grey_levels(dataset.val) @ loss.floor_table(likelihood)) / len(dataset.val)
    return floor, loss.flat_score(likelihood, moments(dataset.train)[0], *moments(dataset.val))
