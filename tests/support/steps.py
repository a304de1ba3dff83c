"""A small training step, and the same thing computed plainly by torch's own distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import ContinuousBernoulli, Normal, kl_divergence

from dogvae import rng
from dogvae.config import Config
from dogvae.network.vae import VAE
from dogvae.rng import Stream
from dogvae.training.step import Trainer

CPU = torch.device("cpu")


def config_of(**settings: Any) -> Config:
    """A small network and a plain step. Every setting that matters is given, whatever its default."""
    plain: dict[str, Any] = dict(
        image_size=32, width=4, latent_dim=3, norm="group", likelihood="bernoulli", epochs=10, batch_size=4, lr=1e-2,
        schedule="constant", lr_warmup=0.0, samples=2, beta=1.0, kl_warmup=0.0, grad_clip=0.0, ema=0.0, augment=False,
        precision="fp32", seed=5,
    )  # fmt: skip
    return Config.make(**{**plain, **settings})


def photos(n: int, seed: int = 0) -> Tensor:
    """Noise, uint8 (n, 3, 32, 32)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), np.uint8))


def trainer_of(config: Config) -> Trainer:
    """A trainer without weights of 0, which make the gradients of their neighbours 0."""
    trainer = Trainer(config, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return trainer


def noise_of(config: Config, n: int, epoch: int, step: int) -> Tensor:
    """The documented noise of a step, (samples, n, latent_dim, 4, 4): keyed by (seed, epoch, step)."""
    generator = torch.Generator().manual_seed(rng.seed(Stream.POSTERIOR, config.seed, epoch, step))
    return torch.randn((config.samples, n, config.model.latent_dim, 4, 4), generator=generator)


def plain_terms(model: VAE, x: Tensor, noise: Tensor, likelihood: str) -> tuple[Tensor, Tensor]:
    """(reconstruction, KL) of each image (b,), computed for one image and one sample at a time."""
    reconstructions, kls = [], []
    for b in range(len(x)):
        mu, logvar = model.encoder(x[b : b + 1])
        posterior = Normal(mu, torch.exp(logvar / 2))
        terms = []
        for s in range(len(noise)):
            logits = model.decoder(mu + posterior.scale * noise[s, b : b + 1])
            if likelihood == "bernoulli":
                terms.append(F.binary_cross_entropy(torch.sigmoid(logits), x[b : b + 1], reduction="sum"))
            elif likelihood == "gaussian":
                assert model.log_scale is not None
                scale = torch.exp((1 - torch.sigmoid(model.log_scale)) * math.log(1 / 255))
                terms.append(-Normal(torch.sigmoid(logits), scale).log_prob(x[b : b + 1]).sum())
            else:
                bounded = 1000 * torch.tanh(logits.double() / 1000)  # in float32 the density of torch loses its digits
                terms.append(-ContinuousBernoulli(logits=bounded).log_prob(x[b : b + 1].double()).sum().float())
        reconstructions.append(torch.stack(terms).mean())
        kls.append(kl_divergence(posterior, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum())
    return torch.stack(reconstructions), torch.stack(kls)
