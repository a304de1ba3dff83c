"""Pictures for people: uint8 grids, and what the decoder makes of latents. Knows neither training nor files."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dogvae.model import VAE


def to_uint8(x: Tensor) -> np.ndarray:
    """Images of values in [0, 1], any shape, as uint8 on the CPU."""
    return (x.float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def grid(images_n3hw: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 images (n, 3, h, w) as one (3, H, W), row by row, on white."""
    n, channels, h, w = images_n3hw.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    sheet = np.full((channels, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, np.uint8)
    for i, image in enumerate(images_n3hw):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[:, y : y + h, x : x + w] = image
    return sheet


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers from a seed, drawn on the CPU so that they are the same for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def standard(model: VAE, photos_u8: Tensor, device: torch.device) -> dict[str, np.ndarray]:
    """The three pictures of a run: photos over their reconstructions, samples from N(0, I), a walk between two dogs.

    `photos_u8` is (n, 3, h, h) with n >= 1; each picture is (3, H, W) uint8.
    """
    x = photos_u8.to(device).float() / 255
    mu, _ = model.encoder(x)
    decoded = to_uint8(model.decode_mean(mu))
    samples = to_uint8(model.decode_mean(normal((32, *model.latent_shape), seed=0).to(device)))
    t = torch.linspace(0, 1, 8, device=device)[:, None, None, None]
    walk = to_uint8(model.decode_mean(torch.lerp(mu[:1], mu[-1:], t)))
    return {
        "reconstructions": grid(np.concatenate([photos_u8.numpy(), decoded]), columns=len(photos_u8)),
        "samples": grid(samples, columns=8),
        "walk": grid(walk, columns=8),
    }
