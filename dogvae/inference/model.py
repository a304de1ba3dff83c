"""Playing with an exported model: sampling, reconstructing, walking from one dog to another. Imports no Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from dogvae import rng
from dogvae.config import ModelConfig
from dogvae.data.dataset import Dataset, Split
from dogvae.errors import UsageError
from dogvae.inference.user_images import Picture, Pictures, pixels
from dogvae.network.prior import Mixture
from dogvae.network.vae import VAE
from dogvae.pictures import to_uint8
from dogvae.rng import Stream
from dogvae.storage import Storage

EXPORT_FORMAT, EXPORT_VERSION = "dogvae-export", 2
SPAN = 3.0  # how far pictures of a principal direction go, in standard deviations
PRIORS = ("mixture", "gaussian", "normal")  # the first is the default
METHODS = ("linear", "spherical")
BATCH = 256  # latents drawn, and training images encoded, at once
# How many pictures the network takes at once where a person looks at each: always as many, if need be padded, so that a
# picture does not depend on those beside it. One is as fast as many on a CPU.
CHUNK = {"cpu": 1, "cuda": 64}


def load(path: str | Path, device: str | torch.device | None = None) -> DogVAE:
    """The model of an export folder, also `s3://...`, on `device` (default: the GPU if there is one).

    Nothing in the folder is executed. Raises UsageError if it is no export, of another version, or damaged.
    """
    folder, place = Storage(path), _device(device)
    try:
        about = json.loads(folder.read("config.json"))
    except (OSError, ValueError) as error:
        why = "it has no config.json" if isinstance(error, FileNotFoundError) else str(error)
        if not folder.exists(""):
            why = "there is no such folder"
        elif isinstance(error, NotADirectoryError):
            why = "it is no folder"
        raise UsageError(f"{path} is no exported model: {why}; a run keeps its own in RUN/export") from error
    if not isinstance(about, dict) or about.get("format") != EXPORT_FORMAT:
        raise UsageError(f"{path} is no exported model; a run keeps its own in RUN/export")
    if (version := about.get("version")) != EXPORT_VERSION:
        older = isinstance(version, int) and version < EXPORT_VERSION
        remedy = "export it again: dogvae export RUN" if older else "it needs a newer dogvae"
        raise UsageError(f"{path} has format version {version}, this dogvae reads {EXPORT_VERSION}: {remedy}")
    try:
        tensors = {}
        for name in ("model.safetensors", "prior.safetensors"):
            content = folder.read(name)
            if hashlib.sha256(content).hexdigest() != about["files"][name]:
                raise UsageError(f"{path}/{name} is damaged: it is not what was exported; export the run again")
            tensors[name] = safetensors.torch.load(content)
        model = VAE(_config(about["model"]))
        model.load_state_dict(tensors["model.safetensors"])
        return DogVAE(model, place, about, tensors["prior.safetensors"])
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} is damaged: {error}; export the run again") from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}; export the run again") from error


def _config(settings: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**settings)
    except UsageError as error:
        raise ValueError(f"config.json: {error}") from error


def _device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device: {device} is no device; cpu or cuda") from error
    if place.type not in CHUNK or (place.type == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"--device: {device} is not to be had here; leave it out, or say cpu")
    return place


class DogVAE:
    """A trained model. Pictures come out as uint8 arrays (n, h, w, 3), or as PIL images with `pil=True`.

    What pictures may go in as: see `dogvae.inference.user_images`. Latents are float32 arrays (n, d, 4, 4).
    `latent_shape` is (d, 4, 4), `size` is h, and `about` is the export's config.json.
    """

    def __init__(self, model: VAE, device: torch.device, about: dict[str, Any], prior: dict[str, Tensor]) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.about = about
        self.size: int = model.config.image_size
        self.latent_shape = model.latent_shape
        d = math.prod(model.latent_shape)
        self._priors = {
            name: Mixture(*(prior[f"{name}.{part}"] for part in ("weights", "means", "factors")))
            for name in ("mixture", "gaussian")
        }
        directions, scales = prior["directions"], prior["scales"]
        for mixture in self._priors.values():
            k = len(mixture.weights)
            if not k or (mixture.means.shape, mixture.factors.shape) != ((k, d), (k, d, d)):
                raise ValueError("its prior is another model's")
        if directions.shape != (len(scales), d):
            raise ValueError("its directions are another model's")
        self.directions: np.ndarray = directions.reshape(-1, *self.latent_shape).numpy()
        """Principal directions (r, d, 4, 4) of the training images' posterior means, unit length, widest first."""
        self.scales: np.ndarray = scales.numpy()
        """Standard deviation (r,) of the training images along each direction."""
        self.moves: np.ndarray = self.directions * self.scales[:, None, None, None]
        """One standard deviation (r, d, 4, 4) along each direction."""
        self.mean: np.ndarray = self._priors["gaussian"].means[0].reshape(self.latent_shape).numpy()
        """Mean latent (d, 4, 4) of the training images."""

    def sample(self, n: int, seed: int = 0, temperature: float = 1.0, prior: str = PRIORS[0], pil: bool = False) -> Any:
        """`n` new dogs (n, h, w, 3) uint8. The same seed gives the same dogs, and more of them begins with fewer.

        `prior`: "mixture" or "gaussian", fitted to the training images' latents, or "normal", N(0, I) as in the
        notebook. `temperature` scales what is drawn around the prior's means: below 1, more ordinary dogs.
        """
        _fits(n, 3 * self.size**2)
        return self._out(np.concatenate(list(self.samples(n, seed, temperature, prior))), pil)

    def samples(self, n: int, seed: int = 0, temperature: float = 1.0, prior: str = PRIORS[0]) -> Iterator[np.ndarray]:
        """What `sample` gives, in batches of at most 256: any number of pictures in little memory."""
        for latents in self._latents(n, seed, temperature, prior):
            yield self.decode(latents)

    def sample_latents(self, n: int, seed: int = 0, temperature: float = 1.0, prior: str = PRIORS[0]) -> np.ndarray:
        """The latents (n, d, 4, 4) of what `sample` gives."""
        _fits(n, 4 * self.mean.size)
        return np.concatenate(list(self._latents(n, seed, temperature, prior)))

    def _latents(self, n: int, seed: int, temperature: float, prior: str) -> Iterator[np.ndarray]:
        if n < 1:
            raise UsageError(f"-n: {n} is too small, it must be at least 1")
        if seed < 0:
            raise UsageError(f"--seed: {seed} is too small, it must be at least 0")
        if not 0 <= temperature < float("inf"):
            raise UsageError(f"--temperature: {temperature} must be a number from 0 up")
        _check_prior(prior)
        for batch, start in enumerate(range(0, n, BATCH)):
            # Always whole batches, each from numbers of its own: a dog does not depend on how many are asked for.
            noise = rng.normal((BATCH, self.mean.size), Stream.SAMPLE, seed, batch)
            if prior == "normal":
                z = temperature * noise
            else:
                chance = torch.Generator().manual_seed(rng.seed(Stream.COMPONENT, seed, batch))
                uniform = torch.rand(BATCH, generator=chance)
                z = self._priors[prior].draw(uniform, noise, temperature)
            yield z[: n - start].reshape(-1, *self.latent_shape).numpy()

    def log_prior(self, latents: np.ndarray, prior: str = PRIORS[0]) -> np.ndarray:
        """Log density (n,) in nats, float64, of latents (n, d, 4, 4) under a prior."""
        z = self._z(latents).flatten(1).double()
        _check_prior(prior)
        if prior == "normal":
            return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1).numpy()
        return self._priors[prior].double().log_prob(z).numpy()

    @torch.inference_mode()
    def encode(self, pictures: Pictures) -> np.ndarray:
        """Posterior means (n, d, 4, 4) float32 of pictures."""
        x = torch.from_numpy(pixels(pictures, self.size))
        return self._chunked(lambda part: self.model.encoder(part.float() / 255)[0].cpu().numpy(), x)

    @torch.inference_mode()
    def decode(self, latents: np.ndarray | Tensor, pil: bool = False) -> Any:
        """Pictures (n, h, w, 3) uint8 of latents (n, d, 4, 4)."""
        out = self._chunked(lambda part: to_uint8(self.model.decode_mean(part)), self._z(latents))
        return self._out(np.ascontiguousarray(out.transpose(0, 2, 3, 1)), pil)

    def _z(self, latents: np.ndarray | Tensor) -> Tensor:
        """Latents (n, d, 4, 4) of any number type and memory layout, as float32 on the CPU."""
        array = latents.detach().cpu().numpy() if isinstance(latents, Tensor) else latents
        z = torch.from_numpy(np.array(array, np.float32, order="C"))
        if z.shape[1:] != self.latent_shape:
            shape = ", ".join(map(str, self.latent_shape))
            raise UsageError(f"latents have shape {tuple(z.shape)}, this model's are (n, {shape})")
        if not z.isfinite().all():
            raise UsageError("latents hold numbers that are not finite")
        return z

    def _chunked(self, network: Callable[[Tensor], np.ndarray], x: Tensor) -> np.ndarray:
        if not len(x):
            raise UsageError("there are no pictures")
        size, out = CHUNK[self.device.type], []
        for part in x.split(size):
            padded = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
            out.append(network(padded.to(self.device))[: len(part)])
        return np.concatenate(out)

    def _out(self, pictures_nhwc: np.ndarray, pil: bool) -> Any:
        return [Image.fromarray(p) for p in pictures_nhwc] if pil else pictures_nhwc

    def reconstruct(self, pictures: Pictures, pil: bool = False) -> Any:
        """Pictures (n, h, w, 3) uint8 through the latent and back."""
        return self.decode(self.encode(pictures), pil)

    def prepared(self, pictures: Pictures) -> np.ndarray:
        """Pictures as the model sees them, (n, h, w, 3) uint8."""
        return np.ascontiguousarray(pixels(pictures, self.size).transpose(0, 2, 3, 1))

    def interpolate(self, a: Picture, b: Picture, steps: int = 32, method: str = METHODS[0], pil: bool = False) -> Any:
        """A walk (steps, h, w, 3) uint8 from the reconstruction of one picture to that of the other: see `path`."""
        return self.walk([a, b], steps, method, pil)

    def walk(self, pictures: Sequence[Picture], steps: int = 32, method: str = METHODS[0], pil: bool = False) -> Any:
        """A walk from each picture to the next, `steps` from one to the other: see `path`."""
        return self.decode(self.path(self.encode(pictures), steps, method), pil)

    def path(self, latents: np.ndarray, steps: int = 32, method: str = METHODS[0]) -> np.ndarray:
        """The latents ((m - 1) * (steps - 1) + 1, d, 4, 4) of a walk through m latents, each of which is met exactly.

        `method`: "linear", or "spherical" (Shoemake 1985), which turns from one to the other and keeps the distance
        from the origin that latents have, where a straight line would cut the corner (White 2016).
        """
        if steps < 2:
            raise UsageError(f"--steps: {steps} is too small, it must be at least 2")
        if method not in METHODS:
            raise UsageError(f"--method: {method!r} is none of {', '.join(METHODS)}")
        z = self._z(latents)
        if len(z) < 2:
            raise UsageError("a walk needs at least two pictures")
        _fits((len(z) - 1) * steps, 3 * self.size**2)
        t = torch.linspace(0, 1, steps)[:, None, None, None]
        between = torch.lerp if method == "linear" else _slerp
        legs = [between(start, end, t) for start, end in itertools.pairwise(z)]
        return torch.cat([*(leg[:-1] for leg in legs[:-1]), legs[-1]]).numpy()

    def check_size(self, dataset: Dataset) -> None:
        """UsageError unless the dataset's images are of this model's size."""
        if dataset.size != self.size:
            raise UsageError(f"{dataset.path} has images of {dataset.size} pixels, this model is for {self.size}")

    def direction(self, photos_with: Pictures, photos_without: Pictures) -> np.ndarray:
        """The direction (d, 4, 4) from the mean latent of the one pictures to that of the others: add it to a latent.

        Larsen et al. 2016 call it an attribute vector.
        """
        return self.encode(photos_with).mean(axis=0) - self.encode(photos_without).mean(axis=0)

    def neighbours(
        self,
        pictures: Pictures,
        dataset: str | Path | Dataset,
        k: int = 8,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The `k` nearest training images of each of n pictures, by Euclidean distance of their posterior means.

        Returns their indices (n, k) in the training split, distances (n, k), and the images (n, k, h, w, 3) uint8.
        Raises UsageError if the dataset's images are of another size.
        """
        if k < 1:
            raise UsageError(f"-k: {k} is too small, it must be at least 1")
        data = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
        self.check_size(data)
        mine = torch.from_numpy(self.encode(pictures)).flatten(1)
        theirs = posteriors(self.model, data.train, self.device, progress=progress)[0]
        distances, indices = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist").topk(
            min(k, len(theirs)), largest=False
        )
        images = data.train.gather(indices.flatten().numpy()).numpy().transpose(0, 2, 3, 1)
        return indices.numpy(), distances.numpy(), images.reshape(*indices.shape, *images.shape[1:])


@torch.inference_mode()
def posteriors(
    model: VAE,
    split: Split,
    device: torch.device,
    most: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Posterior means and variances, each (n, d) float32 on the CPU, of a split's first `most` images."""
    n = min(len(split), most or len(split))
    mu, var = [], []
    for x in split.chunks(BATCH, most):
        m, logvar = model.encoder(x.to(device).float() / 255)
        mu.append(m.flatten(1).cpu())
        var.append(logvar.exp().flatten(1).cpu())
        progress(sum(map(len, mu)), n)
    return torch.cat(mu), torch.cat(var)


def _check_prior(prior: str) -> None:
    if prior not in PRIORS:
        raise UsageError(f"--prior: {prior!r} is none of {', '.join(PRIORS)}")


def _fits(n: int, nbytes: int) -> None:
    """UsageError if `n` pictures of so many bytes each would fill more than half of the memory that is free."""
    free = psutil.virtual_memory().available
    if n * nbytes > free / 2:
        raise UsageError(
            f"-n: {n:,} pictures take {n * nbytes / 1e9:,.0f} GB, here are {free / 1e9:.0f} GB free; "
            "`samples` gives them one batch after another, and `dogvae sample -o FILE.npy` writes them so"
        )


def _slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation between two latents, t (steps, 1, 1, 1) in [0, 1]; straight where there is no angle."""
    a, b = start.double(), end.double()
    norms = a.norm() * b.norm()
    angle = torch.acos(((a * b).sum() / norms).clamp(-1, 1)) if norms > 0 else torch.zeros(())
    if not 1e-4 < angle < torch.pi - 1e-4:
        return torch.lerp(start, end, t)
    t = t.double()
    return ((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)).float()
