"""Latents of a litter: children between two parents, by random masks that are smooth over the places of the latent."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dogvae import rng
from dogvae.rng import Stream

KNOTS = 3  # random numbers along each side of a mask: the middle of a picture, where the dog is, and its edges
CONTRAST = 3.0  # of a mask: half of the random numbers give one of the parents a share of 88% or more


def children(means: np.ndarray, deviations: np.ndarray, n: int, seed: int, temperature: float) -> np.ndarray:
    """Latents (n, c, s, s) float32 of `n` children of two parents.

    `means` and `deviations` are (2, c, s, s): the mean and the standard deviation of each parent's posterior.
    A child is m * z_a + (1 - m) * z_b, where z = mean + temperature * deviation * noise, and m is its `mask`.
    A child depends on the seed and on its number only, not on `n`.
    """
    mu, sigma = torch.from_numpy(means), torch.from_numpy(deviations)
    side, litter = mu.shape[-1], []
    for child in range(n):
        numbers = rng.normal((KNOTS**2 + mu.numel(),), Stream.LITTER, seed, child)
        a, b = mu + temperature * sigma * numbers[KNOTS**2 :].view_as(mu)
        litter.append(torch.lerp(b, a, mask(numbers[: KNOTS**2].view(KNOTS, KNOTS), side)))
    return torch.stack(litter).numpy()


def mask(knots: Tensor, side: int) -> Tensor:
    """Shares (side, side) of the first parent, in [0, 1]: standard normal numbers (k, k), enlarged smoothly."""
    smooth = F.interpolate(knots[None, None], size=(side, side), mode="bilinear", align_corners=True)[0, 0]
    return torch.sigmoid(CONTRAST * smooth)
