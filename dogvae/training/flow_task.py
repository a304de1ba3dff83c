"""Training a flow prior (dogvae/network/flow.py) on the latents of a VAE that is trained already."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dogvae import rng
from dogvae.config import Config
from dogvae.data.dataset import Batches, Dataset, Split
from dogvae.errors import UsageError
from dogvae.inference.elbo import VAL_CHUNK
from dogvae.inference.load import load
from dogvae.network.flow import Flow, GaussianField, draw
from dogvae.pictures import grid, to_uint8
from dogvae.rng import Stream
from dogvae.training.task import memory_format

VAL_DRAWS = 8  # of noise for each validation image; their times are spread evenly over [0, 1]
SHOWN = 32  # samples in TensorBoard


class FlowTask:
    """Training a flow prior by the error of its velocities, on samples of the posteriors of training images.

    The frozen encoder makes the latents anew in each step. So the images are augmented as for the VAE, and no set of
    latents is too large for the memory.
    """

    terms: tuple[str, ...] = ("loss",)

    def __init__(self, config: Config, device: torch.device) -> None:
        assert config.flow
        self.settings = config.flow
        exported = load(config.flow.vae, device)
        if exported.about["files"]["model.safetensors"] != config.flow.weights:
            raise UsageError(f"{config.flow.vae} holds another model than the one that this prior was begun for")
        self.memory_format = memory_format(config, device)
        self.vae = exported.model.requires_grad_(False).to(memory_format=self.memory_format)
        self.field = GaussianField.of(exported.gaussian, device)
        self.dims = math.prod(self.vae.latent_shape)
        # Of the posterior, of the flow's start, and of the time.
        self.noise_shape: tuple[int, ...] = (2 * self.dims + 1,)

    def network(self) -> Flow:
        """See `Task`."""
        return Flow(self.settings, self.vae.latent_shape)

    def losses(self, net: nn.Module, x: Tensor, noise: Tensor, n: int, epoch: float) -> tuple[Tensor, Tensor]:
        """See `Task`: the mean squared error of a velocity's components.

        Times are logistic-normal (Esser et al. 2024).
        """
        posterior, start, time = noise.split([self.dims, self.dims, 1], dim=-1)
        errors = self._errors(net, self._latents(x, posterior), start, torch.sigmoid(time[..., 0]))[0].mean(0)
        total = errors.sum()
        return total / n, total.detach()[None]

    @torch.no_grad()
    def _latents(self, x: Tensor, noise: Tensor) -> Tensor:
        """Standardised samples (k, b, d) of the posteriors of images x (b, 3, h, h), from noise (k, b, d)."""
        mu, logvar = (part.flatten(1) for part in self.vae.encoder(x))
        return self.field.standardised(mu + torch.exp(0.5 * logvar) * noise)

    def _errors(self, net: nn.Module, end: Tensor, start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Errors (k, b) of the flow and of the Gaussian's field alone, from noise to latents (k, b, d) at (k, b)."""
        x = torch.lerp(start, end, t[..., None]).flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            gaussian = self.field.velocity(x, t.flatten())
        residual = (end - start).flatten(0, 1) - gaussian
        flow = (net(x, t.flatten()) - residual).square().mean(-1)
        return flow.view(t.shape), residual.square().mean(-1).view(t.shape)

    def baseline(self, dataset: Dataset) -> float:
        """None is needed."""
        return 0.0

    @torch.inference_mode()
    def validate(
        self, network: nn.Module, split: Split, device: torch.device, rank: int, world_size: int, baseline: float
    ) -> dict[str, float]:
        """See `Task`: `loss` is the mean squared error of a velocity's components, `gaussian_loss` without the flow.

        Times are uniform, and the noise is the same in every validation.
        """
        network.eval()
        n = len(split)
        chunks = [np.arange(start, min(start + VAL_CHUNK, n)) for start in range(0, n, VAL_CHUNK)]
        table = torch.zeros(len(chunks), 2, dtype=torch.float64, device=device)
        own = range(rank, len(chunks), world_size)
        for c, images in zip(own, Batches(split, device)([chunks[c] for c in own]), strict=True):
            noise = rng.normal((VAL_DRAWS, len(images), 2 * self.dims), Stream.FLOW, c).to(device)
            spread = torch.from_numpy(rng.words(len(images), Stream.FLOW, c, 1) / 2**64).float()
            t = (torch.arange(VAL_DRAWS)[:, None] + spread) / VAL_DRAWS
            posterior, start = noise.chunk(2, dim=-1)
            x = (images.float() / 255).contiguous(memory_format=self.memory_format)
            errors = self._errors(network, self._latents(x, posterior), start, t.to(device))
            table[c] = torch.stack([error.double().mean(0).sum() for error in errors])
        if world_size > 1:
            dist.all_reduce(table)  # exact: one rank adds a row's numbers, all others add zeros
        loss, gaussian = (table.sum(0) / n).tolist()
        network.train()
        return {"loss": loss, "gaussian_loss": gaussian}

    def pictures(self, network: nn.Module, dataset: Dataset, device: torch.device) -> dict[str, np.ndarray]:
        """Samples of the flow."""
        noise = rng.normal((SHOWN, self.dims), Stream.PREVIEW).to(device)
        latents = draw(network, self.field, noise).view(SHOWN, *self.vae.latent_shape)
        samples = to_uint8(self.vae.decode_mean(latents)).transpose(0, 2, 3, 1)
        return {"samples": grid(samples, columns=8).transpose(2, 0, 1)}
