"""`DogVAE`, a trained model: it samples, reconstructs, interpolates, crosses and finds neighbours. Without Ray."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from dogvae.data.dataset import Dataset, Split
from dogvae.errors import UsageError
from dogvae.inference.litter import children
from dogvae.inference.priors import DENSITIES, Priors, check_draw, in_batches
from dogvae.inference.user_images import Picture, Pictures, pixels
from dogvae.network.flow import Flow
from dogvae.network.prior import Gaussian
from dogvae.network.vae import VAE
from dogvae.pictures import to_uint8

SPAN = 3.0  # standard deviations that pictures of a principal direction extend to each side
METHODS = ("linear", "spherical")
BATCH = 256  # training images encoded at a time
INFERENCE_BATCH = {"cpu": 1, "cuda": 64}  # of the network, by device type. On a CPU one image is as fast as many.


class DogVAE:
    """A trained model.

    Returned pictures are uint8 arrays (n, h, h, 3), or lists of PIL images with `pil=True`. Latents are float32 arrays
    (n, d, s, s). `dogvae.inference.user_images` says which kinds of pictures the methods take.
    `latent_shape` is (d, s, s), `size` is h in pixels, and `about` is the export's config.json.
    """

    def __init__(
        self,
        model: VAE,
        device: torch.device,
        about: dict[str, Any],
        prior: dict[str, Tensor],
        flow: Flow | None = None,
    ) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.about = about
        self.size: int = model.config.image_size
        if type(about["sigma"]) not in (int, float) or not 0 < about["sigma"] < 1e9:
            raise ValueError(f"config.json: sigma is {about['sigma']!r:.40}")
        self.sigma = float(about["sigma"])
        """Standard deviation of a pixel around its decoded value, found in validation."""
        self.latent_shape = model.latent_shape
        gaussian = Gaussian(prior["gaussian.mean"], prior["gaussian.factor"])
        self._priors = Priors(gaussian, flow, device)
        self.gaussian = gaussian
        self.priors = self._priors.names
        """Names of the priors that samples can come from. The first is the default."""
        directions, scales = prior["directions"], prior["scales"]
        self.parents: np.ndarray = prior["parents"].reshape(2, *self.latent_shape).numpy()
        """Latents (2, d, s, s) of two validation photos: the first parents in the playground."""
        self.directions: np.ndarray = directions.reshape(-1, *self.latent_shape).numpy()
        """Principal directions (r, d, s, s) of the training images' posterior means: unit length, widest first."""
        self.scales: np.ndarray = scales.numpy()
        """Standard deviations (r,) of the training images' posterior means along each direction."""
        self.moves: np.ndarray = self.directions * self.scales[:, None, None, None]
        """The directions (r, d, s, s) scaled to a length of one standard deviation."""
        self.mean: np.ndarray = gaussian.mean.reshape(self.latent_shape).numpy()
        """Mean latent (d, s, s) of the training images."""

    def sample(
        self,
        n: int,
        seed: int = 0,
        temperature: float = 1.0,
        prior: str | None = None,
        pil: bool = False,
        guidance: float | None = None,
    ) -> Any:
        """`n` new dogs (n, h, h, 3) uint8. A seed always gives the same dogs; a smaller `n` gives the first of them.

        `prior` is one of `priors`: "flow", which the export may have; "gaussian", fitted to the training images'
        latents; or "normal", N(0, I) as in the notebook. `temperature` scales the distance from the prior's mean, or
        the noise that a flow starts from: below 1, more ordinary dogs. `guidance` is the flow's, see
        `dogvae.network.flow.draw`. Raises UsageError if an argument is out of range, or if the pictures would not fit
        into memory.
        """
        _check_memory(n, 3 * self.size**2)
        return self._out(np.concatenate(list(self.samples(n, seed, temperature, prior, guidance))), pil)

    def samples(
        self, n: int, seed: int = 0, temperature: float = 1.0, prior: str | None = None, guidance: float | None = None
    ) -> Iterator[np.ndarray]:
        """The pictures of `sample` in batches (b, h, h, 3) of at most 256, for numbers that do not fit into memory."""
        for latents in self.latent_batches(n, seed, temperature, prior, guidance):
            yield self.decode(latents)

    def sample_latents(
        self, n: int, seed: int = 0, temperature: float = 1.0, prior: str | None = None, guidance: float | None = None
    ) -> np.ndarray:
        """The latents (n, d, s, s) of the pictures of `sample`."""
        _check_memory(n, 4 * self.mean.size)
        return np.concatenate(list(self.latent_batches(n, seed, temperature, prior, guidance)))

    def latent_batches(
        self, n: int, seed: int = 0, temperature: float = 1.0, prior: str | None = None, guidance: float | None = None
    ) -> Iterator[np.ndarray]:
        """The latents of `sample` in batches (b, d, s, s) of at most 256."""
        for z in self._priors.latents(n, seed, temperature, prior, guidance):
            yield z.reshape(-1, *self.latent_shape).numpy()

    def log_prior(self, latents: np.ndarray, prior: str = DENSITIES[0]) -> np.ndarray:
        """Log density (n,) in nats, float64, of latents (n, d, s, s) under "gaussian" or "normal"."""
        return self._priors.log_prob(self._latent_tensor(latents).flatten(1), prior).numpy()

    def encode(self, pictures: Pictures) -> np.ndarray:
        """Posterior means (n, d, s, s) float32 of n pictures. Raises UsageError if a picture cannot be used."""
        return self.posterior(pictures)[0]

    @torch.inference_mode()
    def posterior(self, pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
        """Posterior means and standard deviations, each (n, d, s, s) float32, of n pictures. Raises as `encode`."""
        x = torch.from_numpy(pixels(pictures, self.size))
        both = self._in_batches(lambda part: torch.stack(self.model.encoder(part.float() / 255), 1), x).numpy()
        return both[:, 0].copy(), np.exp(both[:, 1] / 2)

    @torch.inference_mode()
    def decode(self, latents: np.ndarray | Tensor, pil: bool = False) -> Any:
        """Pictures (n, h, h, 3) uint8 of latents (n, d, s, s)."""
        out = to_uint8(self._in_batches(self.model.decode_mean, self._latent_tensor(latents)))
        return self._out(np.ascontiguousarray(out.transpose(0, 2, 3, 1)), pil)

    def _latent_tensor(self, latents: np.ndarray | Tensor) -> Tensor:
        """Latents (n, d, s, s) of any dtype and memory layout as float32 on the CPU, checked."""
        array = latents.detach().cpu().numpy() if isinstance(latents, Tensor) else latents
        z = torch.from_numpy(np.array(array, np.float32, order="C"))
        if z.shape[1:] != self.latent_shape:
            shape = ", ".join(map(str, self.latent_shape))
            raise UsageError(f"latents have shape {tuple(z.shape)}, this model's are (n, {shape})")
        if not z.isfinite().all():
            raise UsageError("latents hold numbers that are not finite")
        return z

    def _in_batches(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`network` applied to x in batches of INFERENCE_BATCH."""
        if not len(x):
            raise UsageError("there are no pictures")
        return in_batches(lambda part: network(part.to(self.device)), x, INFERENCE_BATCH[self.device.type])

    def _out(self, pictures_nhwc: np.ndarray, pil: bool) -> Any:
        return [Image.fromarray(p) for p in pictures_nhwc] if pil else pictures_nhwc

    def reconstruct(self, pictures: Pictures, pil: bool = False) -> Any:
        """Pictures (n, h, h, 3) uint8, encoded and decoded again."""
        return self.decode(self.encode(pictures), pil)

    def prepared(self, pictures: Pictures) -> np.ndarray:
        """Pictures as the encoder gets them: cropped and resized to (n, h, h, 3) uint8."""
        return np.ascontiguousarray(pixels(pictures, self.size).transpose(0, 2, 3, 1))

    def interpolate(self, a: Picture, b: Picture, steps: int = 32, method: str = METHODS[0], pil: bool = False) -> Any:
        """Pictures (steps, h, h, 3) uint8 on the way from the reconstruction of `a` to that of `b`: see `path`."""
        return self.walk([a, b], steps, method, pil)

    def walk(self, pictures: Sequence[Picture], steps: int = 32, method: str = METHODS[0], pil: bool = False) -> Any:
        """Pictures on the way through m pictures, `steps` from each to the next: see `path`.

        Returns ((m - 1) * (steps - 1) + 1, h, h, 3) uint8.
        """
        return self.decode(self.path(self.encode(pictures), steps, method), pil)

    def path(self, latents: np.ndarray, steps: int = 32, method: str = METHODS[0]) -> np.ndarray:
        """Latents ((m - 1) * (steps - 1) + 1, d, s, s) on the way through m latents, which are themselves among them.

        `method`: "linear", or "spherical" interpolation (Shoemake 1985). A straight line passes closer to the origin
        than latents usually lie; the spherical path keeps their distance from it (White 2016).
        """
        if steps < 2:
            raise UsageError(f"steps: {steps} is too small, it must be at least 2")
        if method not in METHODS:
            raise UsageError(f"method: {method!r} is none of {', '.join(METHODS)}")
        z = self._latent_tensor(latents)
        if len(z) < 2:
            raise UsageError("a walk needs at least two pictures")
        _check_memory((len(z) - 1) * steps, 3 * self.size**2)
        t = torch.linspace(0, 1, steps)[:, None, None, None]
        between = torch.lerp if method == "linear" else _slerp
        legs = [between(start, end, t) for start, end in itertools.pairwise(z)]
        return torch.cat([*(leg[:-1] for leg in legs[:-1]), legs[-1]]).numpy()

    def litter(
        self, a: Picture, b: Picture, n: int = 12, seed: int = 0, temperature: float = 0.7, pil: bool = False
    ) -> Any:
        """`n` children (n, h, h, 3) uint8 of two pictures: random mixtures of their latents, see `children`.

        A seed always gives the same children; a smaller `n` gives the first of them. Raises UsageError as `sample`.
        """
        return self.decode(self.litter_latents(a, b, n, seed, temperature), pil)

    def litter_latents(self, a: Picture, b: Picture, n: int, seed: int = 0, temperature: float = 0.7) -> np.ndarray:
        """The latents (n, d, s, s) of the pictures of `litter`."""
        check_draw(n, seed, temperature)
        _check_memory(n, 3 * self.size**2)
        return children(*self.posterior([a, b]), n, seed, temperature)

    def check_size(self, dataset: Dataset) -> None:
        """Raise UsageError unless the dataset's images have this model's size."""
        if dataset.size != self.size:
            raise UsageError(f"{dataset.path} has images of {dataset.size} pixels, this model needs {self.size}")

    def direction(self, photos_with: Pictures, photos_without: Pictures) -> np.ndarray:
        """mean(with) - mean(without), (d, s, s): adding it to a latent moves towards `photos_with`.

        The means are over the photos' posterior means. Larsen et al. 2016 call the difference an attribute vector.
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

        Returns their indices (n, k) in the training split, distances (n, k), and images (n, k, h, h, 3) uint8; fewer
        than `k` if there are fewer training images. `progress(done, total)` counts encoded training images.
        Raises UsageError if the dataset's images have another size.
        """
        if k < 1:
            raise UsageError(f"k: {k} is too small, it must be at least 1")
        data = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
        self.check_size(data)
        queries = torch.from_numpy(self.encode(pictures)).flatten(1)
        means = posteriors(self.model, data.train, self.device, progress=progress)[0]
        distances, indices = torch.cdist(queries, means, compute_mode="donot_use_mm_for_euclid_dist").topk(
            min(k, len(means)), largest=False
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
    """Posterior means and variances of the first `most` images (default: all): (n, d * s * s) float32 on the CPU."""
    n = min(len(split), most or len(split))
    mu, var = [], []
    for x in split.chunks(BATCH, most):
        m, logvar = model.encoder(x.to(device).float() / 255)
        mu.append(m.flatten(1).cpu())
        var.append(logvar.exp().flatten(1).cpu())
        progress(sum(map(len, mu)), n)
    return torch.cat(mu), torch.cat(var)


def _check_memory(n: int, nbytes: int) -> None:
    """Raise UsageError if `n` pictures of `nbytes` each would fill more than half of the free memory."""
    free = psutil.virtual_memory().available
    if n * nbytes > free / 2:
        raise UsageError(
            f"n: {n:,} pictures take {n * nbytes / 1e9:,.0f} GB, and only {free / 1e9:.0f} GB are free; "
            "`samples` yields them in batches, and `dogvae sample -o FILE.npy` writes them in batches"
        )


def _slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation between two latents at t (steps, 1, 1, 1) in [0, 1].

    Linear where the angle between the latents is 0 or pi, or undefined because one of them is 0.
    """
    a, b = start.double(), end.double()
    norms = a.norm() * b.norm()
    angle = torch.acos(((a * b).sum() / norms).clamp(-1, 1)) if norms > 0 else torch.zeros(())
    if not 1e-4 < angle < torch.pi - 1e-4:
        return torch.lerp(start, end, t)
    t = t.double()
    return ((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)).float()
