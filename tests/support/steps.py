"""A small training step, and the same thing computed plainly by torch's own distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dogvae import rng
from dogvae.config import Config
from dogvae.network.vae import VAE
from dogvae.rng import Stream
from dogvae.training.step import Trainer

CPU = torch.device("cpu")


def config_of(**settings: Any) -> Config:
    """A small network and a plain step. Every setting that matters is given, whatever its default."""
    plain: dict[str, Any] = dict(
        image_size=32, width=4, latent_dim=3, latent_size=4, likelihood="bernoulli", epochs=10, batch_size=4,
        lr=1e-2, schedule="constant", lr_warmup=0.0, samples=2, beta=1.0, kl_warmup=0.0, grad_clip=0.0, ema=0.0,
        augment=False, precision="fp32", seed=5,
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


def plain_outputs(model: VAE, x: Tensor, noise: Tensor) -> tuple[Tensor, Normal]:
    """Outputs (k, b, 3, h, h) and the posterior of images (b, 3, h, h), one image and one sample at a time."""
    outputs, mus, scales = [], [], []
    for b in range(len(x)):
        mu, logvar = model.encoder(x[b : b + 1])
        mus.append(mu)
        scales.append(torch.exp(logvar / 2))
        outputs.append(torch.stack([model.decoder(mu + scales[-1] * each) for each in noise[:, b : b + 1]]))
    return torch.cat(outputs, dim=1), Normal(torch.cat(mus), torch.cat(scales))


def plain_means(model: VAE, x: Tensor, noise: Tensor) -> Tensor:
    """The likelihood's means of all posterior samples, (k, b, 3, h, h)."""
    outputs = plain_outputs(model, x, noise)[0]
    return torch.sigmoid(outputs) if model.config.likelihood == "bernoulli" else outputs + 0.5


def plain_sigma(means: Tensor, x: Tensor) -> float:
    """The root mean square of all residuals: the standard deviation under which a Gaussian fits best."""
    return max(1 / 255, float((means.detach() - x).double().square().mean().sqrt()))


def plain_terms(model: VAE, x: Tensor, noise: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """(reconstruction, KL) of each image, (b,). Only the Gaussian uses `sigma`; its density is per grey level."""
    outputs, posterior = plain_outputs(model, x, noise)
    x = x.expand_as(outputs)
    if model.config.likelihood == "bernoulli":
        nats = F.binary_cross_entropy(torch.sigmoid(outputs), x, reduction="none")
    else:
        nats = -Normal(255 * (outputs + 0.5), 255 * sigma).log_prob(255 * x)
    kl = kl_divergence(posterior, Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean)))
    return nats.sum(dim=(2, 3, 4)).mean(dim=0), kl.sum(dim=(1, 2, 3))
