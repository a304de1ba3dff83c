"""The pictures that TensorBoard shows of a run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dogvae import rng
from dogvae.network.vae import VAE
from dogvae.pictures import grid, to_uint8
from dogvae.rng import Stream


def preview_sheets(model: VAE, photos_u8: Tensor, device: torch.device) -> dict[str, np.ndarray]:
    """Three pictures, each (3, H, W) uint8: photos above their reconstructions, samples from N(0, I), and a walk.

    `photos_u8` is (n, 3, h, h) with n >= 1. The walk goes from the first photo to the last one.
    """
    x = photos_u8.to(device).float() / 255
    mu, _ = model.encoder(x)
    decoded = to_uint8(model.decode_mean(mu))
    samples = to_uint8(model.decode_mean(rng.normal((32, *model.latent_shape), Stream.PREVIEW).to(device)))
    t = torch.linspace(0, 1, 8, device=device)[:, None, None, None]
    walk = to_uint8(model.decode_mean(torch.lerp(mu[:1], mu[-1:], t)))
    sheets = {
        "reconstructions": (np.concatenate([photos_u8.numpy(), decoded]), len(photos_u8)),
        "samples": (samples, 8),
        "walk": (walk, 8),
    }
    return {
        name: grid(images.transpose(0, 2, 3, 1), columns).transpose(2, 0, 1)
        for name, (images, columns) in sheets.items()
    }
