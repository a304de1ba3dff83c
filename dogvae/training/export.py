"""The export of a run: its best model in a small folder that can be loaded without Ray and the training code."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from dogvae import __version__
from dogvae.config import Config
from dogvae.console import Progress, explained_text
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.inference.load import EXPORT as FOLDER
from dogvae.inference.load import EXPORT_FORMAT, EXPORT_VERSION, FLOW_FILE
from dogvae.inference.model import DogVAE, posteriors
from dogvae.json_text import parse
from dogvae.network import prior
from dogvae.network.flow import Flow
from dogvae.network.vae import VAE
from dogvae.pictures import grid, png, to_uint8
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints, part
from dogvae.training.run_folder import CONFIG, open_run
from dogvae.training.task import memory_format

ONNX = ("encoder.onnx", "decoder.onnx")
DIRECTIONS = 32  # principal directions that are kept
PARENTS = 64  # validation photos among which the playground's first parents are chosen
# In the time left, fitting the prior and drawing the preview count as so many encoded images.
FIT_AS_IMAGES, PREVIEW_AS_IMAGES = 200, 200


def export(run: Storage, config: Config, folder: Storage | None = None, with_flow: bool = True) -> Storage:
    """Export the best checkpoint, and a prior fitted to it, to `folder`: by default `export/` of the run.

    Writes model.safetensors, prior.safetensors, flow.safetensors if a flow was trained for this model (and
    `with_flow`), README.md, preview.png, and config.json last. Returns the folder.
    Raises UsageError if the run has no finished epoch.
    """
    best = Checkpoints(run).best()
    if best is None or best.meta.get("val_loss") is None:
        raise UsageError(f"{run.uri} has no finished epoch to export: train it first")
    metrics = best.meta["records"][-1]
    if "val_sigma" not in metrics:
        raise UsageError(f"{run.uri} was trained by dogvae 0.1: export it with that version")
    weights = part(best.tensors, "ema") or part(best.tensors, "model")
    model = VAE(config.model).eval()
    model.load_state_dict(weights)
    model.to(memory_format=memory_format(config, torch.device("cpu")))
    with Progress("exporting") as line:
        files = _contents(run, config, model, weights, metrics, with_flow, line)
    folder = folder or run / FOLDER
    for name in (*ONNX, FLOW_FILE):  # these files of an earlier export belong to other weights
        if name not in files:
            folder.delete(name)
    for name, content in files.items():
        folder.write(name, content)
    return folder


def _contents(
    run: Storage,
    config: Config,
    model: VAE,
    weights: dict[str, Tensor],
    metrics: dict[str, Any],
    with_flow: bool,
    line: Progress,
) -> dict[str, bytes]:
    """The files of the export by name, config.json last."""
    data = Dataset(config.data, config.fingerprint)
    fitted = _prior(model, data, line)
    files = {
        "model.safetensors": safetensors.torch.save({k: v.contiguous() for k, v in weights.items()}),
        "prior.safetensors": safetensors.torch.save(fitted),
    }
    about: dict[str, Any] = {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "model": config.to_dict()["model"],
        "training": {k: v for k, v in config.to_dict().items() if k not in ("model", "data", "flow")},
        "dataset_fingerprint": config.fingerprint,
        "metrics": metrics,
        "sigma": metrics["val_sigma"],
        "files": {name: _sha256(content) for name, content in files.items()},
        "dogvae": __version__,
    }
    flow = None
    if with_flow and (found := _flow(run, model, about["files"]["model.safetensors"])) is not None:
        flow, about["flow"] = found
        files[FLOW_FILE] = safetensors.torch.save({k: v.contiguous() for k, v in flow.state_dict().items()})
        about["files"][FLOW_FILE] = _sha256(files[FLOW_FILE])
    done = min(len(data.train), prior.MOST_IMAGES) + FIT_AS_IMAGES
    line.update(done, done + PREVIEW_AS_IMAGES, "drawing a preview")
    files["preview.png"] = _preview(DogVAE(model, torch.device("cpu"), about, fitted, flow))
    files["README.md"] = _card(about, model.latent_shape).encode()
    files[CONFIG] = (json.dumps(about, indent=2) + "\n").encode()
    line.update(done + PREVIEW_AS_IMAGES, done + PREVIEW_AS_IMAGES, "writing")
    return files


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def prior_run(run: Storage, weights: str) -> Storage:
    """The run in which a flow prior is trained for a VAE whose exported weights have the SHA-256 `weights`."""
    return run / f"prior-{weights[:8]}"


def _flow(run: Storage, model: VAE, weights: str) -> tuple[Flow, dict[str, Any]] | None:
    """The flow that was trained for this VAE, and what config.json says of it. None if there is none that helps."""
    storage = prior_run(run, weights)
    best = Checkpoints(storage).best() if storage.exists(CONFIG) else None
    if best is None or best.meta.get("val_loss") is None:
        return None
    record = best.meta["records"][-1]
    if record["val_loss"] >= record["val_gaussian_loss"]:
        return None
    config = Config.make_nested(best.meta["config"])
    assert config.flow
    flow = Flow(config.flow, model.latent_shape)
    flow.load_state_dict(part(best.tensors, "ema") or part(best.tensors, "model"))
    settings = {"width": config.flow.width, "depth": config.flow.depth}
    return flow, {"settings": settings, "metrics": record}


def export_again(run: str) -> str:
    """Export a run anew, over what was exported before. Returns where; UsageError if `run` is not a run."""
    return export(*open_run(run)).uri


def is_export(path: str) -> bool:
    """Whether `path` is the folder of an exported model, not of a run."""
    try:
        about = parse(Storage(path).read(CONFIG))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("format") == EXPORT_FORMAT


def _prior(model: VAE, data: Dataset, line: Progress) -> dict[str, Tensor]:
    """The prior and the principal directions of the latents, as float32 tensors by name, on the CPU."""
    mu, gaussian = None, None
    if torch.cuda.is_available():
        with suppress(torch.OutOfMemoryError):  # others may use the GPU: then the CPU does
            mu, gaussian = _gaussian(model.to("cuda"), data, torch.device("cuda"), line)
        model.cpu()
    if mu is None or gaussian is None:
        mu, gaussian = _gaussian(model, data, torch.device("cpu"), line)
    directions, scales = prior.principal(mu, DIRECTIONS)
    parents = _parents(model, data, gaussian.mean.float())
    tensors = {"directions": directions, "scales": scales, "parents": parents}
    tensors |= {f"gaussian.{part}": tensor for part, tensor in vars(gaussian).items()}
    return {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}


def _gaussian(model: VAE, data: Dataset, device: torch.device, line: Progress) -> tuple[Tensor, prior.Gaussian]:
    """The posterior means (n, d) of training images, and the Gaussian fitted to them, on the CPU."""
    n = min(len(data.train), prior.MOST_IMAGES)
    all_work = n + FIT_AS_IMAGES + PREVIEW_AS_IMAGES
    line.update(0, all_work, "encoding the photos")
    mu, var = posteriors(
        model,
        data.train,
        device,
        prior.MOST_IMAGES,
        lambda done, total: line.update(done, all_work, f"encoding image {done:,} of {total:,}"),
    )
    fitted = prior.fit(
        mu.to(device),
        var.to(device),
        lambda done, total: line.update(n + FIT_AS_IMAGES * done / total, all_work, "fitting the prior"),
    )
    return mu, prior.Gaussian(fitted.mean.cpu(), fitted.factor.cpu())


@torch.inference_mode()
def _parents(model: VAE, data: Dataset, mean: Tensor) -> Tensor:
    """The latents (2, d) of two validation photos that are alike: the playground's first parents.

    Dogs in a like pose have the best litters. Chosen are the two whose posterior means, less the `mean` (d,) of all
    photos, have the greatest inner product: they are alike, and far from the mean, which is no dog. Photos within 55
    degrees may be twins, and are not taken.
    """
    photos = data.val.gather(np.arange(min(PARENTS, len(data.val))))
    mu = model.encoder(photos.float() / 255)[0].flatten(1)
    centred = mu - mean
    directions = F.normalize(centred)
    cosine = directions @ directions.T
    best = int((centred @ centred.T).where(cosine < math.cos(math.radians(55)), -math.inf).argmax())
    return mu[[best // len(mu), best % len(mu)]]


def _preview(model: DogVAE) -> bytes:
    """Samples above a walk between two validation photos. The photos, which may be private, are not shown."""
    latents = np.concatenate([model.sample_latents(32), model.path(model.parents, steps=8)])
    with torch.inference_mode():  # all at once: one by one, as `decode` does, takes ten times as long
        pictures = to_uint8(model.model.decode_mean(torch.from_numpy(latents)))
    return png(grid(pictures.transpose(0, 2, 3, 1), columns=8))


def _prior_text(about: dict[str, Any]) -> str:
    if "flow" not in about:
        return "Samples come from a Gaussian, fitted to the latents of the training photos."
    record = about["flow"]["metrics"]
    errors = f"{record['val_loss']:.4f}, that of a fitted Gaussian {record['val_gaussian_loss']:.4f}"
    return f"""Samples come from a flow prior, trained on the latents of the training photos. The error of its
velocities on validation images is {errors}."""


def _card(about: dict[str, Any], latent_shape: tuple[int, int, int]) -> str:
    model, training, metrics = about["model"], about["training"], about["metrics"]
    size = model["image_size"]
    channels, side, _ = latent_shape
    dims = channels * side * side
    return f"""# A DogVAE

A variational autoencoder of dog photos: {size}x{size} RGB images to a {dims}-dimensional latent
({channels} channels of {side}x{side}) and back. Likelihood: {model["likelihood"]}. Width: {model["width"]}.

![samples, and a walk between two dogs](preview.png)

| on the validation images | |
| --- | --- |
| negative ELBO | {metrics["val_loss"]:.1f} nats per image |
| reconstruction | {metrics["val_reconstruction"]:.1f} nats |
| KL | {metrics["val_kl"]:.1f} nats |
| bits per dimension | {metrics["val_bits_per_dim"]:.3f} |
| explained (0: the mean image, 1: perfect) | {explained_text(metrics["val_explained"])} |
| PSNR | {metrics["val_psnr"]:.2f} dB |
| active latents of {dims} | {metrics["val_active_latents"]} |

Best of {training["epochs"]} epochs: epoch {metrics["epoch"] + 1}.
Dataset fingerprint: `{about["dataset_fingerprint"]}`.

{_prior_text(about)}

    dogvae playground .
    dogvae sample . -n 64 -o samples.png
    dogvae reconstruct . photo.jpg -o reconstruction.png
    dogvae interpolate . one.jpg another.jpg -o walk.gif

In Python:

    import dogvae
    model = dogvae.load(".")
    pictures = model.sample(64, seed=0)  # uint8 (64, {size}, {size}, 3)
"""
