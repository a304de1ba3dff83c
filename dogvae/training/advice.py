"""What to do next, in one line, when the records or the pictures of a finished run say that something is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.inference.load import load
from dogvae.pictures import to_uint8
from dogvae.storage import Storage
from dogvae.training.export import FOLDER
from dogvae.training.metrics import LEAST_GAIN, best, read, still_improving

LOOKED_AT = 32  # validation photos whose reconstructions are examined
FEW_PHOTOS = 200
ACTIVE = 0.02  # share of the latents that must vary between photos
LEAST_COLOUR = 0.5  # saturation of reconstructions over that of the photos
MOST_CLIPPED = 0.1  # share of values that are 0 or 255, beyond that of the photos


def advice_of(run: Storage, config: Config) -> str | None:
    """The advice for a run that has been exported."""
    data = Dataset(config.data, config.fingerprint)
    model = load((run / FOLDER).uri, "cpu").model
    photos = data.val.gather(np.arange(min(LOOKED_AT, len(data.val))))
    with torch.inference_mode():
        decoded = to_uint8(model.decode_mean(model.encoder(photos.float() / 255)[0]))
    pictures = (x.transpose(0, 2, 3, 1) for x in (photos.numpy(), decoded))
    return advice(config, read(run), len(data.train), *pictures)


def advice(
    config: Config,
    records: Sequence[dict[str, Any]],
    n_photos: int,
    photos_nhw3: np.ndarray,
    reconstructions_nhw3: np.ndarray,
) -> str | None:
    """The advice that matters most, or None if there is none.

    `n_photos` is the number of training photos. `photos_nhw3` are some validation photos, uint8, and
    `reconstructions_nhw3` is what the exported model makes of them.
    """
    top = best(records)
    if top is None:
        return "no epoch has a finite loss: lower --lr"
    latents = config.model.latent_dim * config.model.latent_side**2
    active = top.get("val_active_latents")
    if active is not None and active < max(1, ACTIVE * latents):
        return (
            f"the latents say almost nothing about a photo ({active:,} of {latents:,} vary): lower --beta, "
            "add --kl-warmup 5, or show more photos"
        )
    clipped = _clipped(reconstructions_nhw3) - _clipped(photos_nhw3)
    if clipped > MOST_CLIPPED:
        return f"{clipped:.0%} more pixel values than in the photos are fully black or white: lower --lr"
    if _colour(reconstructions_nhw3) < LEAST_COLOUR * _colour(photos_nhw3):
        return f"the pictures have lost their colours: train longer, such as --epochs {2 * config.epochs}"
    if n_photos < FEW_PHOTOS:
        return f"{n_photos} training photos are few for new dogs: show it {FEW_PHOTOS} at least, better thousands"
    if since := overfits_since(records):
        return f"it has overfitted since epoch {since}, which is exported: more photos help, or a smaller --width"
    if still_improving(records):
        return f"it was still improving: more epochs help, such as --epochs {2 * config.epochs}"
    return None


def overfits_since(records: Sequence[dict[str, Any]]) -> int | None:
    """The epoch from which on validation got worse while training got better, by over 3% of what is unexplained.

    Epochs count from 1. None if the best epoch is among the last quarter, or if the loss of training did not fall.
    """
    top = best(records)
    if top is None or len(records) < 4 or top["epoch"] >= records[-1]["epoch"] - len(records) // 4:
        return None
    # None, which JSON has for NaN, means that it is not defined.
    before, after = (1 - (record.get("val_explained") or math.nan) for record in (top, records[-1]))
    is_worse = after > (1 + LEAST_GAIN) * before
    return top["epoch"] + 1 if is_worse and records[-1]["train_loss"] < top["train_loss"] else None


def _clipped(pictures: np.ndarray) -> float:
    """The share of values that are 0 or 255."""
    return float(((pictures == 0) | (pictures == 255)).mean())


def _colour(pictures: np.ndarray) -> float:
    """The mean distance between the largest and the smallest of a pixel's three values: 0 for grey pictures."""
    return float(np.ptp(pictures.astype(np.int16), axis=-1).mean())
