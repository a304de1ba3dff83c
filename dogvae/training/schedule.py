"""Learning rate and weight of the KL term over training; pure functions of the epoch, which may be fractional."""

from __future__ import annotations

import math

from dogvae.config import Config


def lr_at(config: Config, epoch: float) -> float:
    """Learning rate after that many epochs: linear warm-up, then constant or half a cosine down to 1% of the peak."""
    if epoch < config.lr_warmup:
        return config.lr * (epoch + 0.01) / (config.lr_warmup + 0.01)
    if config.schedule == "constant":
        return config.lr
    share = (epoch - config.lr_warmup) / max(config.epochs - config.lr_warmup, 1e-9)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def beta_at(config: Config, epoch: float) -> float:
    """Weight of the KL term after that many epochs: it grows linearly from 0 during the warm-up."""
    return config.beta * min(1.0, epoch / config.kl_warmup) if config.kl_warmup else config.beta
