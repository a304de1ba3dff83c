"""A trained export that tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.network.vae import VAE
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.export import export
from tests.support.runs import SIZE, make_dataset

D = 32  # dimensions of a latent: 2 channels of 4 x 4


def export_of_drawn_dogs(folder: Path) -> tuple[Path, Path]:
    """A dataset of 100 drawn dogs, and the export of a run whose only checkpoint is of a model that never trained.

    Its weights are drawn so that latents vary by about 1, and pictures with the latents.
    """
    dataset = make_dataset(folder / "dataset")
    data = Dataset(dataset)
    config = Config.make(width=4, latent_dim=2, epochs=1).for_data(
        str(dataset), data.fingerprint, SIZE, len(data.train)
    )
    torch.manual_seed(0)
    model = VAE(config.model)
    nn.init.normal_(model.decoder.layers[-1].weight, std=0.5)  # type: ignore[arg-type]
    x = data.train.gather(np.arange(len(data.train))).float() / 255
    with torch.no_grad():
        for _ in range(40):  # the running statistics of batch norm
            mu, _ = model.encoder(x)
            model.decoder(torch.randn(100, *model.latent_shape))
        last = model.encoder.layers[-1]
        spread = mu.std(dim=(0, 2, 3))
        last.weight[:2] /= spread[:, None, None, None]  # type: ignore[index,operator]
        last.bias[:2] /= spread  # type: ignore[index,operator]
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    names = ("val_loss", "val_reconstruction", "val_kl", "val_explained", "val_psnr", "val_active_latents")
    record = {"epoch": 0, **dict.fromkeys(names, 1.0)}
    run = Storage(folder / "run")
    checkpoints = Checkpoints(run)
    checkpoints.save(tensors, {"epoch": 1, "step": 1, "val_loss": 1.0, "records": [record]})
    checkpoints.wait()
    return dataset, Path(export(run, config).uri)
