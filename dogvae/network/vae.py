"""Encoder, Decoder, VAE: a convolutional variational autoencoder whose latent is a 4x4 map of `latent_dim` channels.

Two architectures: the reference notebook's, and the default, which corrects it: no activation on the posterior's
parameters, a log-variance that cannot overflow, logits instead of probabilities, padding that halves the size exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dogvae.config import ModelConfig
from dogvae.network.likelihood import decoded_mean
from dogvae.network.norm import SyncBatchNorm

LATENT_SIDE = 4  # pixels: the encoder halves the image down to this side
LOGVAR_BOUND = 10.0  # limit of |log variance|, default architecture: its exp() cannot overflow in any precision
GROUP_CHANNELS = 8  # channels in each group of group norm


# Brightness, red against blue, green against magenta: nearly the principal components of colours in photos (Ohta,
# Kanade & Sakai 1980). The rows are orthonormal. In RGB, colour is a small difference of three large numbers. So a
# network with RGB outputs learns brightness first, and for a long time no colour at all (docs/quality.md).
OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
OPPONENT = OPPONENT / OPPONENT.norm(dim=1, keepdim=True)
OPPONENT_SCALE = torch.tensor([1.0, 0.5, 0.5])  # factors of the decoder's outputs: colour varies less than brightness


def _norm(config: ModelConfig, channels: int) -> nn.Module:
    if config.norm == "batch":
        return SyncBatchNorm(channels)
    return nn.GroupNorm(math.gcd(max(1, channels // GROUP_CHANNELS), channels), channels)


def _widths(config: ModelConfig) -> list[int]:
    """Output channels of the encoder's stages; each stage halves the image."""
    stages = (config.image_size // LATENT_SIDE).bit_length() - 1
    return [config.width * min(2**i, 8) for i in range(stages)]


class Encoder(nn.Module):
    """Images (b, 3, h, h) in [0, 1] to posterior mean and log-variance, each (b, latent_dim, 4, 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.notebook = config.architecture == "notebook"
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate(_widths(config)):
            # The notebook normalises from its third stage on, and its padding of 2 makes each map a pixel larger.
            normed = stage >= 2 if self.notebook else stage >= 1
            padding = 2 if self.notebook else 1
            layers.append(
                nn.Conv2d(channels, width, 4, stride=2, padding=padding, bias=not normed and not self.notebook)
            )
            if normed:
                layers.append(_norm(config, width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = width
        if self.notebook:
            layers.append(nn.Conv2d(channels, 2 * config.latent_dim, 4, padding=1, bias=False))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        else:
            layers.append(nn.Conv2d(channels, 2 * config.latent_dim, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (b, latent_dim, 4, 4) float32."""
        mu, logvar = self.layers(x_bchw).float().chunk(2, dim=1)
        if not self.notebook:
            logvar = LOGVAR_BOUND * torch.tanh(logvar / LOGVAR_BOUND)
        return mu, logvar


class Decoder(nn.Module):
    """Latents (b, latent_dim, 4, 4) to logits (b, 3, h, h)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.notebook = config.architecture == "notebook"
        layers: list[nn.Module] = []
        channels = config.latent_dim
        for width in reversed(_widths(config)):
            layers.append(nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=False))
            layers.append(_norm(config, width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        pixels = nn.ConvTranspose2d(channels, 3, 3, padding=1)
        if config.architecture == "default":
            nn.init.zeros_(pixels.weight)  # start from flat grey pictures instead of noise, which has to be unlearnt
        layers.append(pixels)
        self.layers = nn.Sequential(*layers)

    def forward(self, z_bchw: Tensor) -> Tensor:
        """Logits of the pixels, (b, 3, h, h)."""
        if self.notebook:
            return self.layers(z_bchw)
        return _mix(self.layers(z_bchw), OPPONENT.T * OPPONENT_SCALE)


def _mix(x_bchw: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the three channels of each pixel, (b, 3, h, w), by a 3x3 matrix."""
    return F.conv2d(x_bchw, matrix.to(x_bchw)[:, :, None, None])


class VAE(nn.Module):
    """Encoder and decoder. It draws no random numbers: `forward` is given the noise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.log_scale = nn.Parameter(torch.tensor(1.0)) if config.likelihood == "gaussian" else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_dim, 4, 4)."""
        return (self.config.latent_dim, LATENT_SIDE, LATENT_SIDE)

    def forward(self, x_bchw: Tensor, noise_sbchw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (s, b, 3, h, h) for s posterior samples, and the posterior's mean and log-variance.

        x is (b, 3, h, h) in [0, 1]. Samples are z = mu + exp(logvar / 2) * noise, with standard normal noise
        (s, b, latent_dim, 4, 4).
        """
        mu, logvar = self.encoder(x_bchw)
        z = mu + torch.exp(0.5 * logvar) * noise_sbchw
        return self.decode_samples(z), mu, logvar

    def decode_samples(self, z_sbchw: Tensor) -> Tensor:
        """Logits (s, b, 3, h, h) of latents (s, b, latent_dim, 4, 4), decoded in one call as a batch of s * b."""
        norms = [m for m in self.decoder.modules() if isinstance(m, SyncBatchNorm)]
        for norm in norms:
            # The notebook decodes one sample after another, so each sample is normalised by its own statistics.
            norm.groups = len(z_sbchw) if self.config.architecture == "notebook" else 1
        logits = self.decoder(z_sbchw.flatten(0, 1))
        for norm in norms:
            norm.groups = 1
        return logits.unflatten(0, z_sbchw.shape[:2])

    def decode_mean(self, z_bchw: Tensor) -> Tensor:
        """Pictures (b, 3, h, h) in [0, 1]: the mean of the likelihood, given latents (b, latent_dim, 4, 4)."""
        return decoded_mean(self.config.likelihood, self.decoder(z_bchw).float())
