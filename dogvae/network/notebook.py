"""The reference notebook's network, exactly: `--preset notebook`. Batch norm, a 4x4 latent map, one logit per channel.

Its encoder ends with an activation on the posterior's parameters, and its log-variance has no bound.
"""

from __future__ import annotations

from torch import Tensor, nn

from dogvae.config import ModelConfig
from dogvae.network.norm import SyncBatchNorm


def _widths(config: ModelConfig) -> list[int]:
    """Output channels of the encoder's stages; each stage halves the image."""
    stages = (config.image_size // config.latent_side).bit_length() - 1
    return [config.width * min(2**i, 8) for i in range(stages)]


class NotebookEncoder(nn.Module):
    """Images (b, 3, h, h) in [0, 1] to posterior mean and log-variance, each (b, latent_dim, s, s)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate(_widths(config)):
            # Padding of 2 makes each map a pixel larger than half; the last convolution takes that pixel off.
            layers.append(nn.Conv2d(channels, width, 4, stride=2, padding=2, bias=False))
            if stage >= 2:
                layers.append(SyncBatchNorm(width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = width
        layers.append(nn.Conv2d(channels, 2 * config.latent_dim, 4, padding=1, bias=False))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, x_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (b, latent_dim, s, s) float32."""
        mu, logvar = self.layers(x_bchw).float().chunk(2, dim=1)
        return mu, logvar


class NotebookDecoder(nn.Module):
    """Latents (b, latent_dim, s, s) to outputs (b, 3, h, h)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.latent_dim
        for width in reversed(_widths(config)):
            layers.append(nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=False))
            layers.append(SyncBatchNorm(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(nn.ConvTranspose2d(channels, 3, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z_bchw: Tensor) -> Tensor:
        """Outputs of the pixels, (b, 3, h, h)."""
        return self.layers(z_bchw)
