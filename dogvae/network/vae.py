"""The VAE and its default network: residual convolutions between images and a square map of latents.

Nothing in it depends on the other images of a batch, so the number of workers and the batch of an image change nothing.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dogvae.config import ModelConfig
from dogvae.network.likelihood import decoded_mean
from dogvae.network.norm import SyncBatchNorm
from dogvae.network.notebook import NotebookDecoder, NotebookEncoder

LOGVAR_BOUND = 10.0  # limit of |log variance|: its exp() cannot overflow in any precision
FIRST_OUTPUT = 1e-3  # standard deviation of the last convolution's weights at the start: pictures begin as flat grey

# Brightness, red against blue, green against magenta: nearly the principal components of colours in photos (Ohta,
# Kanade & Sakai 1980). The rows are orthonormal. In RGB, colour is a small difference of three large numbers. So a
# network with RGB outputs learns brightness first, and for a long time no colour at all (docs/quality.md).
OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
OPPONENT = OPPONENT / OPPONENT.norm(dim=1, keepdim=True)
OPPONENT_SCALE = torch.tensor([1.0, 0.5, 0.5])  # factors of the decoder's outputs: colour varies less than brightness


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))) with 3x3 convolutions. The second one begins at zero, the block at the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        for zero in (self.first.bias, self.second.weight, self.second.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """The same shape as `x_bchw`."""
        return x_bchw + self.second(F.silu(self.first(F.silu(x_bchw))))


class PixelUnshuffle(nn.PixelUnshuffle):
    """(b, c, h, w) to (b, 4 c, h / 2, w / 2), as torch's, which leaves the shape of a batch without images as it is.

    A rank has no image of a last batch that is smaller than the number of ranks. On a GPU, torch's would also lay the
    channels outermost, and the next convolution would copy them back.
    """

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(b, 4 c, h / 2, w / 2)."""
        b, c, h, w = x_bchw.shape
        if b and not x_bchw.is_cuda:
            return super().forward(x_bchw)
        x = x_bchw.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4)
        return x.reshape(b, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)


class PixelShuffle(nn.PixelShuffle):
    """(b, 4 c, h, w) to (b, c, 2 h, 2 w): the inverse of `PixelUnshuffle`."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(b, c, 2 h, 2 w)."""
        b, c, h, w = x_bchw.shape
        if b and not x_bchw.is_cuda:
            return super().forward(x_bchw)
        x = x_bchw.permute(0, 2, 3, 1).reshape(b, h, w, c // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(b, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)


def _widths(config: ModelConfig) -> list[int]:
    """Channels at half the image's side, a quarter, and so on to the side of the latent map."""
    stages = (config.image_size // config.latent_side).bit_length() - 1
    return [config.width * min(2**i, 4) for i in range(stages)]


class Encoder(nn.Module):
    """Images (b, 3, h, h) in [0, 1] to posterior mean and log-variance, each (b, latent_dim, s, s)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = _widths(config)
        layers: list[nn.Module] = [PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1), Residual(widths[0])]
        for above, width in itertools.pairwise(widths):
            layers += [nn.Conv2d(above, width, 4, stride=2, padding=1), Residual(width)]
        layers += [nn.SiLU(), nn.Conv2d(widths[-1], 2 * config.latent_dim, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (b, latent_dim, s, s) float32."""
        # Photos vary by about 0.25 around mid grey: times 4 is about unit variance.
        mu, logvar = self.layers(4 * (x_bchw - 0.5)).float().chunk(2, dim=1)
        return mu, LOGVAR_BOUND * torch.tanh(logvar / LOGVAR_BOUND)


class Decoder(nn.Module):
    """Latents (b, latent_dim, s, s) to outputs (b, 3, h, h)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = _widths(config)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_dim, widths[0], 3, padding=1)]
        layers += [Residual(widths[0]), Residual(widths[0])]
        for below, width in itertools.pairwise(widths):
            layers += [nn.Conv2d(below, 4 * width, 1), PixelShuffle(2), Residual(width), Residual(width)]
        pixels = nn.Conv2d(widths[-1], 12, 3, padding=1)
        nn.init.normal_(pixels.weight, std=FIRST_OUTPUT)
        assert pixels.bias is not None
        nn.init.zeros_(pixels.bias)
        self.layers = nn.Sequential(*layers, nn.SiLU(), pixels, PixelShuffle(2))
        self.to_rgb: Tensor
        self.register_buffer("to_rgb", (OPPONENT.T * OPPONENT_SCALE)[:, :, None, None], persistent=False)

    def forward(self, z_bchw: Tensor) -> Tensor:
        """Outputs of the pixels, (b, 3, h, h)."""
        opponent = self.layers(z_bchw)
        return F.conv2d(opponent, self.to_rgb.to(opponent))


class VAE(nn.Module):
    """Encoder and decoder. It draws no random numbers: `forward` is given the noise.

    The decoder's outputs are the pixels' logits for the Bernoulli likelihood, and their means less 0.5 for the
    Gaussian: `dogvae.network.likelihood` reads them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        notebook = config.architecture == "notebook"
        self.encoder = NotebookEncoder(config) if notebook else Encoder(config)
        self.decoder = NotebookDecoder(config) if notebook else Decoder(config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_dim, s, s)."""
        return (self.config.latent_dim, self.config.latent_side, self.config.latent_side)

    def forward(self, x_bchw: Tensor, noise_sbchw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (k, b, 3, h, h) for k posterior samples, and the posterior's mean and log-variance.

        x is (b, 3, h, h) in [0, 1]. Samples are z = mu + exp(logvar / 2) * noise, with standard normal noise
        (k, b, latent_dim, s, s).
        """
        mu, logvar = self.encoder(x_bchw)
        z = mu + torch.exp(0.5 * logvar) * noise_sbchw
        return self.decode_samples(z), mu, logvar

    def decode_samples(self, z_sbchw: Tensor) -> Tensor:
        """Outputs (k, b, 3, h, h) of latents (k, b, latent_dim, s, s), decoded in one call as a batch of k * b."""
        norms = [m for m in self.decoder.modules() if isinstance(m, SyncBatchNorm)]
        for norm in norms:
            # The notebook decodes one sample after another, so each sample is normalised by its own statistics.
            norm.groups = len(z_sbchw)
        outputs = self.decoder(z_sbchw.flatten(0, 1))
        for norm in norms:
            norm.groups = 1
        return outputs.unflatten(0, z_sbchw.shape[:2])

    def decode_mean(self, z_bchw: Tensor) -> Tensor:
        """Pictures (b, 3, h, h) in [0, 1]: the mean of the likelihood, given latents (b, latent_dim, s, s)."""
        return decoded_mean(self.config.likelihood, self.decoder(z_bchw))
