"""The best checkpoint as a small folder that needs neither Ray nor the training code: the thing that people keep."""

from __future__ import annotations

import io
import json
from typing import Any

import safetensors.torch
import torch
from PIL import Image

from dogvae import __version__
from dogvae.checkpoint import Checkpoints
from dogvae.config import Config
from dogvae.console import UsageError
from dogvae.dataset import Dataset
from dogvae.generate import EXPORT_FORMAT, EXPORT_VERSION
from dogvae.model import VAE
from dogvae.pictures import standard
from dogvae.step import part
from dogvae.storage import Storage

FOLDER = "export"


def export(run: Storage, config: Config, folder: Storage | None = None) -> Storage:
    """Write `folder`, by default `export/` of the run: model.safetensors, README.md, preview.png, config.json last."""
    best = Checkpoints(run).best()
    if best is None or best.meta["val_loss"] is None:
        raise UsageError(f"{run.uri} has no finished epoch to export: train it first")
    weights = part(best.tensors, "ema") or part(best.tensors, "model")
    model = VAE(config.model).eval()
    model.load_state_dict(weights)
    about = {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "model": config.to_dict()["model"],
        "training": {k: v for k, v in config.to_dict().items() if k not in ("model", "data")},
        "dataset_fingerprint": config.fingerprint,
        "metrics": best.meta["records"][-1],
        "dogvae": __version__,
    }
    folder = folder or run / FOLDER
    folder.write("model.safetensors", safetensors.torch.save({k: v.contiguous() for k, v in weights.items()}))
    folder.write("preview.png", _preview(model, config))
    folder.write("README.md", _card(about).encode())
    folder.write("config.json", (json.dumps(about, indent=2) + "\n").encode())
    return folder


@torch.inference_mode()
def _preview(model: VAE, config: Config) -> bytes:
    """Samples above a walk between two validation photos; the photos themselves stay where they are."""
    val = Dataset(config.data).val
    photos = val.gather(torch.arange(min(8, len(val))).numpy())
    drawn = standard(model, photos, torch.device("cpu"))
    sheet = torch.cat([torch.from_numpy(drawn["samples"]), torch.from_numpy(drawn["walk"])], dim=1)
    buffer = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _card(about: dict[str, Any]) -> str:
    model, training, metrics = about["model"], about["training"], about["metrics"]
    size, dims = model["image_size"], model["latent_dim"] * 16
    return f"""# A DogVAE

A variational autoencoder of dog photos: {size}x{size} RGB images to a {dims}-dimensional latent
({model["latent_dim"]} channels of 4x4) and back. Likelihood: {model["likelihood"]}. Width: {model["width"]}.

![samples, and a walk between two dogs](preview.png)

| on the validation images | |
| --- | --- |
| negative ELBO | {metrics["val_loss"]:.1f} nats per image |
| reconstruction | {metrics["val_reconstruction"]:.1f} nats |
| KL | {metrics["val_kl"]:.1f} nats |
| explained (0: the mean image, 1: perfect) | {metrics["val_explained"]:.3f} |
| PSNR | {metrics["val_psnr"]:.2f} dB |
| active latents of {dims} | {metrics["val_active_latents"]} |

Best of {training["epochs"]} epochs: epoch {metrics["epoch"] + 1}.
Dataset fingerprint: `{about["dataset_fingerprint"]}`.

    dogvae sample . -n 64 -o samples.png
    dogvae reconstruct . photo.jpg -o reconstruction.png
    dogvae interpolate . one.jpg another.jpg -o walk.gif

In Python:

    import dogvae
    model = dogvae.load(".")
    pictures = model.sample(64, seed=0)  # uint8 (64, {size}, {size}, 3)
"""
