"""What a run trains, as the loop and the step see it: a network, the loss of a step, and the validation.

`VAETask` is here; dogvae/training/flow_task.py has the other one, a flow prior. Everything else is the same for both.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dogvae.config import Config
from dogvae.data.dataset import Dataset, Split
from dogvae.inference.elbo import ValidationNoise, evaluate, mean_error
from dogvae.network import likelihood
from dogvae.network.vae import VAE
from dogvae.training.previews import preview_sheets
from dogvae.training.schedule import beta_at


class Task(Protocol):
    """What a run trains. Every method is called on all ranks."""

    terms: tuple[str, ...]
    """Names of the losses that `losses` returns. The first is the one that training lowers."""
    memory_format: torch.memory_format
    """Memory format of the weights and of the images."""
    noise_shape: tuple[int, ...]
    """Shape of the standard normal noise of one sample of one image."""

    def network(self) -> nn.Module:
        """The network with its first weights, on the CPU. Its randomness comes from torch's default generator."""

    def losses(self, net: nn.Module, x: Tensor, noise: Tensor, n: int, epoch: float) -> tuple[Tensor, Tensor]:
        """The objective of this rank, (), and each of `terms` summed over its images, without gradients.

        `x` (b, 3, h, h) in [0, 1] is this rank's slice of a global batch of `n` images, `noise` is (samples, b,
        *noise_shape), and `epoch` is the number of epochs so far, with its fraction. The objectives of all ranks add up
        to the mean over the global batch.
        """

    def baseline(self, dataset: Dataset) -> float:
        """A number about the dataset that `validate` needs. Only rank 0 computes it."""

    def validate(
        self, network: nn.Module, split: Split, device: torch.device, rank: int, world_size: int, baseline: float
    ) -> dict[str, float]:
        """Exact means over the images of the split. The best checkpoint is the one with the least `loss`."""

    def pictures(self, network: nn.Module, dataset: Dataset, device: torch.device) -> dict[str, np.ndarray]:
        """Pictures (3, H, W) uint8 for TensorBoard, by name."""


def memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """The default network is a fifth faster with colours innermost, also on CPUs; the notebook's there is not."""
    innermost = device.type == "cuda" or config.model.architecture == "default"
    return torch.channels_last if innermost else torch.contiguous_format


class VAETask:
    """Training a VAE by its ELBO."""

    terms: tuple[str, ...] = ("loss", "reconstruction", "kl")

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.world_size = config, dist.get_world_size() if dist.is_initialized() else 1
        self.memory_format = memory_format(config, device)
        side = config.model.latent_side
        self.noise_shape: tuple[int, ...] = (config.model.latent_dim, side, side)
        self.validation_noise = ValidationNoise(self.noise_shape, device)

    def network(self) -> VAE:
        """See `Task`."""
        return VAE(self.config.model)

    def losses(self, net: nn.Module, x: Tensor, noise: Tensor, n: int, epoch: float) -> tuple[Tensor, Tensor]:
        """See `Task`: the terms are in nats, the objective is that of `loss_scale`."""
        outputs, mu, logvar = net(x, noise)
        # In float32, as outside of autocast.
        with torch.autocast(x.device.type, enabled=False):
            reconstruction = self._reconstruction(outputs, x, n).sum()
            kl = likelihood.kl(mu, logvar).sum()
        beta = beta_at(self.config, epoch)
        loss = reconstruction + beta * kl
        objective = loss / n if self.config.loss_scale == "image" else self._objective(reconstruction, kl, beta, n)
        return objective, torch.stack([loss, reconstruction, kl]).detach()

    def _reconstruction(self, outputs: Tensor, x: Tensor, n: int) -> Tensor:
        """Negative log likelihood of this rank's images, (b,), with the best sigma for the global batch of `n`."""
        if self.config.model.likelihood == "bernoulli":
            return likelihood.bernoulli(outputs, x)
        errors = likelihood.squared_errors("gaussian", outputs, x)
        # As a constant, the best sigma gives the same gradients: the loss is flat there.
        error = errors.detach().double().sum()
        if self.world_size > 1:
            dist.all_reduce(error)
        pixels = x.shape[1:].numel()  # a rank may have no image
        return likelihood.gaussian(errors, likelihood.best_sigma(error, n * pixels).float(), pixels)

    def _objective(self, reconstruction: Tensor, kl: Tensor, beta: float, n: int) -> Tensor:
        """The notebook's loss: this rank's part for a global batch of `n` images, from sums over its own images.

        Cross-entropy is averaged over the pixels there are, KL over those of a full batch.
        """
        pixels = 3 * self.config.model.image_size**2
        return reconstruction / (n * pixels) + beta * kl / (self.config.batch_size * pixels)

    def baseline(self, dataset: Dataset) -> float:
        """The mean squared error of the mean training image, which `explained` is measured against."""
        return mean_error(dataset)

    def validate(
        self, network: nn.Module, split: Split, device: torch.device, rank: int, world_size: int, baseline: float
    ) -> dict[str, float]:
        """See `Task` and `evaluate`."""
        assert isinstance(network, VAE)
        figures = evaluate(network, split, device, rank, world_size, noise=self.validation_noise)
        explained = likelihood.explained(figures.pop("error"), baseline)
        return {"explained": explained, **figures, "loss_per_pixel": figures["loss"] / np.prod(split.image_shape)}

    def pictures(self, network: nn.Module, dataset: Dataset, device: torch.device) -> dict[str, np.ndarray]:
        """Those of `preview_sheets`."""
        assert isinstance(network, VAE)
        return preview_sheets(network, dataset, device)
