"""Playing with an exported model: sampling, reconstructing, walking from one dog to another. Imports no Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from dogvae.config import ModelConfig
from dogvae.console import UsageError
from dogvae.decode import _crop, crops, to_rgb
from dogvae.model import VAE
from dogvae.photos import Photo
from dogvae.pictures import normal, to_uint8

EXPORT_FORMAT, EXPORT_VERSION = "dogvae-export", 1
BATCH = 256  # images in the network at once

Picture = str | Path | Image.Image | np.ndarray


def load(path: str | Path, device: str | torch.device | None = None) -> DogVAE:
    """The model of an export folder, on `device` (default: the GPU if there is one); UsageError if it is none."""
    folder = Path(path)
    try:
        about = json.loads((folder / "config.json").read_text())
        if not isinstance(about, dict) or about.get("format") != EXPORT_FORMAT:
            raise UsageError(f"{folder} is no exported model; a run keeps its own in RUN/export")
        if about.get("version") != EXPORT_VERSION:
            raise UsageError(f"{folder} has format version {about.get('version')}, this dogvae reads {EXPORT_VERSION}")
        model = VAE(ModelConfig(**about["model"]))
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder} is no exported model: {error}") from error
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder} is damaged: {str(error).splitlines()[0]}; export the run again") from error
    return DogVAE(model, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), about)


class DogVAE:
    """A trained model. Pictures come out as uint8 (n, h, w, 3) arrays, latents as float32 (n, d, 4, 4) arrays.

    Pictures go in as paths, PIL images, or uint8 arrays (h, w, 3) of any size: cropped and resized as for training.
    """

    def __init__(self, model: VAE, device: torch.device, about: dict[str, Any]) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.about = about
        self.size: int = model.config.image_size
        self.latent_shape = model.latent_shape

    def sample(self, n: int, seed: int = 0, temperature: float = 1.0) -> np.ndarray:
        """`n` new dogs (n, h, w, 3) uint8 from latents ~ N(0, temperature^2 I); the same seed gives the same dogs."""
        if n < 1:
            raise UsageError(f"-n: {n} is too small, it must be at least 1")
        if not 0 <= temperature < float("inf"):
            raise UsageError(f"--temperature: {temperature} must be a number from 0 up")
        return self.decode(temperature * normal((n, *self.latent_shape), seed).numpy())

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture] | np.ndarray) -> np.ndarray:
        """Posterior means (n, d, 4, 4) float32 of pictures."""
        x = torch.from_numpy(np.stack([self._pixels(p) for p in pictures]))
        return np.concatenate(
            [self.model.encoder(part.to(self.device).float() / 255)[0].cpu().numpy() for part in x.split(BATCH)]
        )

    @torch.inference_mode()
    def decode(self, latents: np.ndarray | Tensor) -> np.ndarray:
        """Pictures (n, h, w, 3) uint8 of latents (n, d, 4, 4)."""
        z = torch.as_tensor(latents, dtype=torch.float32)
        if z.shape[1:] != self.latent_shape:
            raise UsageError(
                f"latents have shape {tuple(z.shape)}, this model's are (n, {', '.join(map(str, self.latent_shape))})"
            )
        decoded = [to_uint8(self.model.decode_mean(part.to(self.device))) for part in z.split(BATCH)]
        return np.ascontiguousarray(np.concatenate(decoded).transpose(0, 2, 3, 1))

    def reconstruct(self, pictures: Sequence[Picture] | np.ndarray) -> np.ndarray:
        """Pictures (n, h, w, 3) uint8 through the latent and back."""
        return self.decode(self.encode(pictures))

    def interpolate(self, a: Picture, b: Picture, steps: int = 32) -> np.ndarray:
        """A walk (steps, h, w, 3) uint8 on the straight line between the posterior means of two pictures."""
        if steps < 2:
            raise UsageError(f"--steps: {steps} is too small, it must be at least 2")
        start, end = torch.from_numpy(self.encode([a, b]))
        t = torch.linspace(0, 1, steps)[:, None, None, None]
        return self.decode(torch.lerp(start, end, t))

    def prepared(self, pictures: Sequence[Picture] | np.ndarray) -> np.ndarray:
        """Pictures as the model sees them, (n, h, w, 3) uint8."""
        return np.stack([self._pixels(p) for p in pictures]).transpose(0, 2, 3, 1)

    def _pixels(self, picture: Picture) -> np.ndarray:
        """(3, h, w) uint8."""
        if isinstance(picture, str | Path):
            try:
                ((_, pixels),) = crops(Photo(str(picture), Path(picture).read_bytes()), self.size)
            except OSError as error:
                raise UsageError(f"{picture} cannot be read: {error.strerror}") from error
            if isinstance(pixels, str):
                raise UsageError(f"{picture} cannot be used: {pixels}")
            return pixels
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        _, pixels = _crop(to_rgb(image), self.size, None)
        assert isinstance(pixels, np.ndarray)
        return pixels
