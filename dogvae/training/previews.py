"""The pictures that TensorBoard and results.png show of a run."""

from __future__ import annotations

import numpy as np
import torch

from dogvae import rng
from dogvae.data.dataset import Dataset
from dogvae.network import prior
from dogvae.network.vae import VAE
from dogvae.pictures import grid, to_uint8
from dogvae.rng import Stream

COLUMNS = 8
PHOTOS, SAMPLES = 16, 32
FITTED_TO = 128  # training images, spread evenly; the export's prior is fitted to all of them
MOST_LATENTS = 4096  # more have a covariance of over 128 MB: then there are no samples from the fitted prior
SHOWN_SIDE = 128  # pixels of a picture, to which smaller ones are enlarged

FITTED, NORMAL, WALK = "samples, fitted prior", "samples, N(0, I)", "walk"


def preview_sheets(model: VAE, data: Dataset, device: torch.device) -> dict[str, np.ndarray]:
    """Pictures (3, H, W) uint8 by name: reconstructions, samples from the fitted prior and from N(0, I), and a walk.

    A row of validation photos stands above the row of its reconstructions. Both kinds of samples come from the same
    noise. The walk goes from the first photo to the eighth.
    """
    n = min(PHOTOS, len(data.val))
    photos_u8 = data.val.gather(np.arange(n if n < COLUMNS else n // COLUMNS * COLUMNS))  # full rows
    mu = model.encoder(photos_u8.to(device).float() / 255)[0]
    latents = {"reconstructions": mu}
    noise = rng.normal((SAMPLES, mu[0].numel()), Stream.PREVIEW)
    if noise.shape[1] <= MOST_LATENTS:
        step = max(1, len(data.train) // FITTED_TO)
        few = data.train.gather(np.arange(0, len(data.train), step)[:FITTED_TO])
        means, logvars = (part.flatten(1).cpu() for part in model.encoder(few.to(device).float() / 255))
        latents[FITTED] = prior.quick_fit(means, logvars.exp()).draw(noise.double()).to(mu)
    latents[NORMAL] = noise.to(mu)
    t = torch.linspace(0, 1, COLUMNS, device=device)[:, None, None, None]
    latents[WALK] = torch.lerp(mu[:1], mu[:COLUMNS][-1:], t)
    parts = [part.view(-1, *model.latent_shape) for part in latents.values()]
    decoded = to_uint8(model.decode_mean(torch.cat(parts))).transpose(0, 2, 3, 1)
    sheets = dict(zip(latents, np.split(decoded, np.cumsum([len(part) for part in parts])[:-1]), strict=True))
    photos = photos_u8.numpy().transpose(0, 2, 3, 1)
    rows = [
        part[start : start + COLUMNS]
        for start in range(0, len(photos), COLUMNS)
        for part in (photos, sheets["reconstructions"])
    ]
    sheets["reconstructions"] = np.concatenate(rows)
    return {name: _sheet(pictures) for name, pictures in sheets.items()}


def _sheet(pictures_nhw3: np.ndarray) -> np.ndarray:
    factor = max(1, SHOWN_SIDE // pictures_nhw3.shape[1])
    return grid(pictures_nhw3.repeat(factor, 1).repeat(factor, 2), COLUMNS).transpose(2, 0, 1)
