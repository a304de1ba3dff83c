"""Other ways to train the same autoencoder on the same photos, each as its users would write it.

Every loop calls `tick` after each step, and ends when `tick` returns False. `photos` are uint8 (n, 3, 64, 64), in
memory.

- notebook: the cells of the reference notebook: its network, its loss, its transforms on PIL images, one decoding per
  posterior sample, Adam. One thing is changed: the notebook scaled images to [-1, 1], and cross-entropy now refuses
  targets outside [0, 1].
- ddp: a plain script for torchrun: our network, its K samples decoded at once, a DataLoader with torchvision's
  transforms, DistributedDataParallel.
- lightning: the same network, loss and loader under Lightning's Trainer.
- pythae: the same under pythae's BaseTrainer.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms
from torchvision.transforms import v2

from dogvae.config import Config
from dogvae.network.vae import VAE

Tick = Callable[[], bool]


# --- the notebook


class NotebookVAE(nn.Module):
    """The notebook's network and loss; the width of the first layer, 64 there, is a parameter here."""

    def __init__(self, latent_dim: int, no_of_sample: int, batch_size: int, width: int = 64) -> None:
        super().__init__()
        self.no_of_sample, self.batch_size, self.latent_dim = no_of_sample, batch_size, latent_dim

        def enc(n_input: int, n_output: int, bn: bool = False) -> list[nn.Module]:
            norm = [nn.BatchNorm2d(n_output)] if bn else []
            return [nn.Conv2d(n_input, n_output, 4, 2, 2, bias=False), *norm, nn.LeakyReLU(0.2, inplace=True)]

        def dec(n_input: int, n_output: int) -> list[nn.Module]:
            conv = nn.ConvTranspose2d(n_input, n_output, 4, 2, 1, bias=False)
            return [conv, nn.BatchNorm2d(n_output), nn.ReLU(inplace=True)]

        w = width
        self.encoder = nn.Sequential(
            *enc(3, w),
            *enc(w, 2 * w),
            *enc(2 * w, 4 * w, bn=True),
            *enc(4 * w, 8 * w, bn=True),
            nn.Conv2d(8 * w, latent_dim * 2, 4, 1, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.decoder = nn.Sequential(
            *dec(latent_dim, 8 * w),
            *dec(8 * w, 4 * w),
            *dec(4 * w, 2 * w),
            *dec(2 * w, w),
            nn.ConvTranspose2d(w, 3, 3, 1, 1),
            nn.Sigmoid(),
        )

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).view(-1, 3 * 64 * 64)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> list[Tensor]:
        sample_z = []
        for _ in range(self.no_of_sample):
            std = logvar.mul(0.5).exp_()
            eps = std.data.new(std.size()).normal_()
            sample_z.append(eps.mul(std).add_(mu))
        return sample_z

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        x = self.encoder(x)
        mu, logvar = x[:, : self.latent_dim], x[:, self.latent_dim :]
        return [self.decode(z) for z in self.reparameterize(mu, logvar)], mu, logvar

    def loss_function(self, recon_x: list[Tensor], x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        bce = torch.zeros((), device=x.device)
        for recon_x_one in recon_x:
            bce += F.binary_cross_entropy(recon_x_one, x.view(-1, 3 * 64 * 64))
        bce /= len(recon_x)
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        kld /= self.batch_size * 3 * 64 * 64
        return bce + kld


class NotebookDogs(Dataset[Tensor]):
    """PIL images in memory, transformed one by one."""

    def __init__(self, photos: np.ndarray) -> None:
        self.imgs = [Image.fromarray(photo.transpose(1, 2, 0)) for photo in photos]
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.RandomApply([transforms.RandomRotation(degrees=10)], p=0.3),
                transforms.ToTensor(),
            ]
        )

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.imgs[index])

    def __len__(self) -> int:
        return len(self.imgs)


def notebook(photos: np.ndarray, config: Config, workers: int, device: torch.device, tick: Tick) -> None:
    """The notebook's training loop. It divides the KL by a fixed batch of 32; here by `config.batch_size`."""
    loader = DataLoader(NotebookDogs(photos), config.batch_size, shuffle=True, num_workers=workers)
    model = NotebookVAE(config.model.latent_dim, config.samples, config.batch_size, config.model.width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    model.train()
    while True:
        for data in loader:
            data = data.to(device)
            optimizer.zero_grad()
            recon_batch, mu, logvar = model(data)
            loss = model.loss_function(recon_batch, data, mu, logvar)
            loss.backward()
            optimizer.step()
            if not tick():
                return


# --- our network in other hands


class Network(nn.Module):
    """Our default network, which draws its own noise here. Maps images (b, 3, h, h) to their loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.samples, self.vae = config.samples, VAE(config.model)

    def forward(self, x: Tensor) -> Tensor:
        """The negative ELBO of x (b, 3, h, h) in [0, 1]: nats per image, less constants.

        The Gaussian has the sigma that fits the batch best, so its term is pixels / 2 * log(MSE): Rybkin et al. 2021.
        """
        noise = torch.randn(self.samples, len(x), *self.vae.latent_shape, device=x.device)
        outputs, mu, logvar = self.vae(x, noise)
        mse = (outputs.float() + 0.5 - x).square().mean()
        kl = -0.5 * torch.sum(1 + logvar - mu.square() - logvar.exp()) / len(x)
        return x[0].numel() / 2 * mse.log() + kl


class Photos(Dataset[Tensor]):
    """uint8 images in memory, transformed as tensors by torchvision's v2."""

    def __init__(self, photos: np.ndarray) -> None:
        self.photos = torch.from_numpy(photos)
        rotation = v2.RandomRotation(10, interpolation=v2.InterpolationMode.BILINEAR)
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(0.5), v2.RandomApply([rotation], 0.3), v2.ToDtype(torch.float32, scale=True)]
        )

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.photos[index])

    def __len__(self) -> int:
        return len(self.photos)


def loader_of(photos: Dataset[Any], batch_size: int, workers: int, device: torch.device, **how: Any) -> DataLoader[Any]:
    """A DataLoader with the settings of PyTorch's performance guide."""
    return DataLoader(
        photos, batch_size, num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda", **how
    )


def ddp(photos: np.ndarray, config: Config, workers: int, device: torch.device, tick: Tick) -> None:
    """A training script for torchrun; `config.batch_size` is the global batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = Photos(photos)
    sampler: DistributedSampler[Tensor] = DistributedSampler(dataset, world_size, rank)
    loader = loader_of(dataset, config.batch_size // world_size, workers, device, sampler=sampler)
    model = nn.parallel.DistributedDataParallel(Network(config).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    model.train()
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for x in loader:
            x = x.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if not tick():
                return


def lightning(photos: np.ndarray, config: Config, workers: int, device: torch.device, tick: Tick) -> None:
    """Lightning's Trainer, with its loggers, checkpoints and progress bar off."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network(config)

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.network(x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=config.lr)

    class Ticking(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = not tick()

    cuda = device.type == "cuda"
    trainer = L.Trainer(
        accelerator="gpu" if cuda else "cpu", devices=1, max_epochs=-1, precision="bf16-mixed" if cuda else "32-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Ticking()],
    )  # fmt: skip
    trainer.fit(Module(), loader_of(Photos(photos), config.batch_size, workers, device, shuffle=True))


def pythae(photos: np.ndarray, config: Config, workers: int, device: torch.device, tick: Tick) -> None:
    """pythae's trainer: a custom model is a BaseAE whose forward returns the loss."""
    from pythae.data.datasets import DatasetOutput
    from pythae.models.base import BaseAE, BaseAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Model(BaseAE):
        def __init__(self) -> None:
            network = Network(config)
            latents = int(np.prod(network.vae.latent_shape))
            super().__init__(BaseAEConfig(input_dim=photos.shape[1:], latent_dim=latents), decoder=network.vae.decoder)
            self.network = network

        def set_decoder(self, decoder: nn.Module) -> None:
            """pythae accepts only its own decoders; ours is called by the network."""

        def forward(self, inputs: Any, **kwargs: Any) -> Any:
            return ModelOutput(loss=self.network(inputs["data"]))

    class Data(Photos):
        def __getitem__(self, index: int) -> Any:
            return DatasetOutput(data=super().__getitem__(index))

    class Over(Exception):
        pass

    class Ticking(TrainingCallback):
        def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
            if not tick():
                raise Over

    with tempfile.TemporaryDirectory() as folder, suppress(Over):
        settings = BaseTrainerConfig(
            output_dir=folder, num_epochs=1000, learning_rate=config.lr, no_cuda=device.type == "cpu",
            per_device_train_batch_size=config.batch_size, train_dataloader_num_workers=workers,
        )  # fmt: skip
        BaseTrainer(Model(), Data(photos), training_config=settings, callbacks=[Ticking()]).train()
