"""The priors that a trained model draws latents from: a flow if the export has one, a Gaussian, and N(0, I)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dogvae import rng
from dogvae.errors import UsageError
from dogvae.network.flow import GUIDANCE, Flow, GaussianField, draw
from dogvae.network.prior import Gaussian
from dogvae.rng import Stream

DENSITIES = ("gaussian", "normal")  # priors that every model has, and that have a density
FLOW = "flow"
BATCH = 256  # latents drawn at a time; another number would change the samples of a seed
# Fixed batch of the flow, by device type. On a CPU, eight latents at a time take 40% of the time of one after another.
FLOW_BATCH = {"cpu": 8, "cuda": 64}


class Priors:
    """Draws flat latents (n, d). `names` are those of the priors; the first is the default."""

    def __init__(self, gaussian: Gaussian, flow: Flow | None, device: torch.device) -> None:
        self.gaussian = gaussian
        self.names: tuple[str, ...] = ((FLOW,) if flow else ()) + DENSITIES
        self._flow = flow and flow.to(device).eval()
        self._device = device

    def latents(
        self, n: int, seed: int, temperature: float, name: str | None, guidance: float | None
    ) -> Iterator[Tensor]:
        """`n` latents in batches (b, d) of at most BATCH, on the CPU. UsageError if an argument is out of range."""
        check_draw(n, seed, temperature)
        name = self.check(name, self.names)
        if guidance is not None and name != FLOW:
            raise UsageError(f"--guidance: only a flow has it, and these samples come from the prior {name!r}")
        if guidance is not None and not math.isfinite(guidance):
            raise UsageError(f"--guidance: {guidance} is not a finite number")
        for batch, start in enumerate(range(0, n, BATCH)):
            # Each batch has its own random stream and is drawn whole, so that a dog does not depend on `n`.
            noise = rng.normal((BATCH, len(self.gaussian.mean)), Stream.SAMPLE, seed, batch)
            if name == FLOW:  # this takes long, so only for those that are needed
                yield self._follow_flow(noise[: n - start], temperature, GUIDANCE if guidance is None else guidance)
            else:
                z = temperature * noise if name == "normal" else self.gaussian.draw(noise, temperature)
                yield z[: n - start]

    def _follow_flow(self, noise_nd: Tensor, temperature: float, guidance: float) -> Tensor:
        assert self._flow
        flow, field = self._flow, self._field
        size = FLOW_BATCH[self._device.type]
        return in_batches(lambda part: draw(flow, field, part.to(self._device), temperature, guidance), noise_nd, size)

    @functools.cached_property
    def _field(self) -> GaussianField:
        """The velocity of the Gaussian, which takes seconds for latents of 2,048 numbers."""
        return GaussianField.of(self.gaussian, self._device)

    def log_prob(self, z_nd: Tensor, name: str) -> Tensor:
        """Log density (n,) in nats, float64, of latents (n, d) under one of `DENSITIES`."""
        self.check(name, DENSITIES)
        z = z_nd.double()
        if name == "normal":
            return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
        return self.gaussian.double().log_prob(z)

    def check(self, name: str | None, names: tuple[str, ...]) -> str:
        """The prior called `name`, by default the first of `names`; UsageError if it is none of them."""
        if name == FLOW and FLOW not in self.names:
            raise UsageError("--prior: this model has no flow; `dogvae fit-prior RUN` trains one")
        if name is not None and name not in names:
            raise UsageError(f"--prior: {name!r} is none of {', '.join(names)}")
        return name or names[0]


def in_batches(network: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """`network` applied to x (n, ...) in batches of `size`, on the CPU.

    Shorter batches are padded, so that what it returns for an image never depends on its batch mates.
    """
    out = []
    for part in x.split(size):
        padded = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
        out.append(network(padded)[: len(part)].cpu())
    return torch.cat(out)


def check_draw(n: int, seed: int, temperature: float) -> None:
    """UsageError if a number is out of range."""
    if n < 1:
        raise UsageError(f"n: {n} is too small, it must be at least 1")
    if seed < 0:
        raise UsageError(f"seed: {seed} is too small, it must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature: {temperature} must be a finite number, at least 0")
