"""A flow prior: a transformer that learns how noise moves to the latents of photos (flow matching).

At time t in [0, 1], x_t = (1 - t) x_0 + t x_1 lies between noise x_0 from N(0, I) and a latent x_1. The flow learns the
velocity E[x_1 - x_0 | x_t], and following it from noise gives latents (Lipman et al. 2023; Liu, Gong & Liu 2023).

If the latents had a normal density, the velocity would be known: `GaussianField`. The transformer only adds a
correction to it, which begins at zero. So a flow starts as good as the fitted Gaussian.

Latents are flat here, (n, d), and standardised: less the Gaussian's mean, and divided by one scale for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dogvae.config import FlowConfig
from dogvae.network.prior import Gaussian

HEAD = 32  # numbers of each attention head
PATCHES = 4  # patches along a side of the latent map, if its side is a multiple of that: each is a token
FREQUENCIES = 32  # of time
FASTEST = 200.0  # the highest one, in radians per unit of time
LEAST_VALUE = 1e-6  # lower bound of the eigenvalues: below it, float32 has none
STEPS = 20  # from noise to latent
GUIDANCE = 0.5  # of 0, 0.5, 1, 1.5 and 2 the best by Frechet distance and share of dogs (docs/quality.md)


@dataclass(frozen=True)
class GaussianField:
    """The velocity field of a Gaussian: mean (d,), scale (), eigenvalues (d,) and eigenvectors (d, d), float32.

    The eigenvectors are the columns. The eigenvalues are those of the covariance divided by scale^2.
    """

    mean: Tensor
    scale: Tensor
    values: Tensor
    vectors: Tensor

    @staticmethod
    def of(gaussian: Gaussian, device: torch.device) -> GaussianField:
        """The field of a Gaussian; the mean variance of the standardised latents is 1."""
        factor = gaussian.factor.double()
        covariance = factor @ factor.T
        scale = covariance.diagonal().mean().sqrt()
        values, vectors = torch.linalg.eigh(covariance / scale.square())
        parts = (gaussian.mean, scale, values.clamp_min(LEAST_VALUE), vectors)
        return GaussianField(*(part.float().to(device) for part in parts))

    def standardised(self, z_nd: Tensor) -> Tensor:
        """Latents (n, d) less the mean, divided by the scale."""
        return (z_nd - self.mean) / self.scale

    def latents(self, x_nd: Tensor) -> Tensor:
        """The inverse of `standardised`."""
        return self.mean + self.scale * x_nd

    def velocity(self, x_nd: Tensor, t_n: Tensor) -> Tensor:
        """E[x_1 - x_0 | x_t] (n, d) for x_0 from N(0, I) and x_1 from this Gaussian, which are jointly normal.

        Along an eigenvector with the value v it is x_t times (t v - (1 - t)) / (t^2 v + (1 - t)^2): the covariance of
        x_1 - x_0 and x_t, divided by the variance of x_t.
        """
        t = t_n[:, None]
        gain = (t * self.values - (1 - t)) / (t.square() * self.values + (1 - t).square())
        return (x_nd @ self.vectors * gain) @ self.vectors.T


class Block(nn.Module):
    """Attention and a feed-forward network, both shifted, scaled and gated by time (adaLN, Peebles & Xie 2023).

    The six vectors of time are the same for all blocks but for an offset of each block's own (Chen et al. 2024).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.offset = nn.Parameter(torch.zeros(6, width))

    def forward(self, h_ntw: Tensor, time_n6w: Tensor) -> Tensor:
        """The same shape as `h_ntw`: n times tokens times width."""
        shift, scale, gate, shift_2, scale_2, gate_2 = (time_n6w + self.offset)[:, :, None].unbind(1)
        normed = _normalised(h_ntw) * (1 + scale) + shift
        n, tokens, width = h_ntw.shape
        q, k, v = self.qkv(normed).view(n, tokens, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        h = h_ntw + gate * self.out(attended)
        normed = _normalised(h) * (1 + scale_2) + shift_2
        return h + gate_2 * self.down(F.gelu(self.up(normed), approximate="tanh"))


def _normalised(h_ntw: Tensor) -> Tensor:
    return F.layer_norm(h_ntw, h_ntw.shape[-1:])


class Flow(nn.Module):
    """The correction of the Gaussian's velocity: a transformer over the patches of a latent map, zero at first."""

    def __init__(self, config: FlowConfig, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, side, _ = self.latent_shape = latent_shape
        self.patch = side // PATCHES if side % PATCHES == 0 else 1
        tokens, size, width = (side // self.patch) ** 2, channels * self.patch**2, config.width
        self.into, self.position = nn.Linear(size, width), nn.Parameter(0.02 * torch.randn(tokens, width))
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.depth))
        self.out = nn.Linear(width, size)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_nd: Tensor, t_n: Tensor) -> Tensor:
        """The correction (n, d), float32, at standardised latents (n, d) and times (n,)."""
        channels, side, _ = self.latent_shape
        n, p, grid = len(x_nd), self.patch, side // self.patch  # n may be 0
        patches = x_nd.view(n, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        angles = t_n[:, None] * FASTEST ** torch.linspace(0, 1, FREQUENCIES, device=t_n.device)
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        h = self.into(patches) + self.position
        modulation = self.modulation(time).unflatten(1, (6, h.shape[-1]))
        for block in self.blocks:
            h = block(h, modulation)
        out = self.out(_normalised(h)).float().view(n, grid, grid, channels, p, p)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x_nd.shape)


@torch.inference_mode()
def draw(
    flow: nn.Module,
    field: GaussianField,
    noise_nd: Tensor,
    temperature: float = 1.0,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
) -> Tensor:
    """Latents (n, d) from standard normal noise (n, d), by Euler's method in steps of equal time.

    `temperature` scales the noise. `guidance` w moves away from the Gaussian: the correction counts 1 + w times, as a
    model that guides a better one away from itself (Karras et al. 2024). 0 follows the learned flow.
    """
    x = temperature * noise_nd
    for step in range(steps):
        t = torch.full((len(x),), step / steps, device=x.device)
        x = x + (field.velocity(x, t) + (1 + guidance) * flow(x, t)) / steps
    return field.latents(x)
